"""Images from a registry by the OCI distribution API (distribution-spec 1.1), over urllib3.

Login as docker does it (`login.py`). Credentials go to the registry and to its realm only: a redirected blob is
fetched without them, and never from https to http. Each document is checked against its digest; layers are
checked by who reads them.
"""

import hashlib
import json
from urllib.parse import urljoin, urlsplit

import urllib3

from cos_console.model.image import (
    Digest,
    ImageReference,
    LayerStream,
    Platform,
    ResolvedImage,
    Transport,
    parse_digest,
)
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import manifest
from cos_console.sources.blob import BlobStream
from cos_console.sources.connection import Connections, discard, may_be_plain, problem_of
from cos_console.sources.login import Login
from cos_console.sources.reference import split_name
from cos_console.sources.settings import SourceSettings

_REDIRECTS = {301, 302, 303, 307, 308}
_TAGS_LIMIT = 20_000
_AGAIN = frozenset({"COS-NET-RESET", "COS-NET-BUSY", "COS-NET-ERROR"})


class Registry:
    """One repository of one registry. Safe to use after a fork."""

    def __init__(self, host: str, repository: str, settings: SourceSettings) -> None:
        self.host = host
        self.repository = repository
        self.settings = settings
        self._scope = f"repository:{repository}:pull"
        self._connections = Connections(settings)
        real = "registry-1.docker.io" if host == "docker.io" else host
        plain = may_be_plain(host, settings) and not self._connections.speaks_tls(real)
        self.base = f"{'http' if plain else 'https'}://{real}"
        self._login = Login(host, self.base, settings, self._connections)

    def get(self, path: str, *, accept: str, limit: int) -> tuple[bytes, urllib3.HTTPHeaderDict]:
        """A small document below the repository. Asked for once more after a passing fault. Raises Problem."""
        try:
            return self._get(path, accept, limit)
        except Problem as e:
            if e.report.code not in _AGAIN:
                raise
        return self._get(path, accept, limit)

    def open(self, path: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """GET below the repository, logged in, redirects followed; answers 200 or 206. Raises Problem."""
        url = origin = urljoin(
            self.base, path if path.startswith("/v2/") else f"/v2/{self.repository}/{path}"
        )
        logins = 0
        for _ in range(8):
            ours = urlsplit(url)[:2] == urlsplit(origin)[:2]
            sent = dict(headers)
            known = self._login.header(self._scope) if ours else None
            if known:
                sent["Authorization"] = known
            response = self._connections.request(url, sent)
            if response.status in {200, 206}:
                return response
            if response.status == 401 and ours and logins < 2:
                logins += 1
                challenges = response.headers.getlist("WWW-Authenticate")
                discard(response)
                self._login.answer(challenges, self._scope)
                continue
            place = response.headers.get("Location", "")
            if response.status in _REDIRECTS and place:
                discard(response)
                url = self._allowed(url, urljoin(url, place))
                continue
            raise self._refused(response, path)
        raise Problem(
            "COS-REGISTRY-ANSWER",
            f"{self.host} leads from one address to the next without end.",
            now="Ask who runs the registry.",
            exit_code=ExitCode.SOURCE,
        )

    def tags(self) -> tuple[str, ...]:
        """All tags of the repository, in the registry's order (distribution-spec, listing tags)."""
        found: list[str] = []
        path = "tags/list?n=1000"
        while path and len(found) < _TAGS_LIMIT:
            data, headers = self.get(path, accept="application/json", limit=manifest.MANIFEST_LIMIT)
            tags = manifest.load_json(data, f"the list of tags at {self.host}").get("tags")
            page = (
                [manifest.readable(t) for t in tags if isinstance(t, str)] if isinstance(tags, list) else []
            )
            found += page
            link = headers.get("Link", "").partition(">")
            target = urljoin(f"/v2/{self.repository}/tags/list", link[0].removeprefix("<"))
            path = target if page and 'rel="next"' in link[2] and target.startswith("/v2/") else ""
        return tuple(found)

    def _get(self, path: str, accept: str, limit: int) -> tuple[bytes, urllib3.HTTPHeaderDict]:
        response = self.open(path, {"Accept": accept})
        try:
            data = response.read(limit + 1, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as e:
            response.close()
            raise problem_of(e, self.base, self.settings) from None
        if len(data) > limit:
            response.close()
            raise Problem(
                "COS-MANIFEST",
                f"{self.host} sent a description of more than {limit >> 20} MiB.",
                now="Choose another image, or tell its maker.",
                exit_code=ExitCode.SOURCE,
            )
        response.release_conn()
        return data, response.headers

    def _allowed(self, old: str, new: str) -> str:
        was, is_now = urlsplit(old), urlsplit(new)
        downgraded = was.scheme == "https" and is_now.scheme != "https"
        if is_now.scheme not in {"http", "https"} or not is_now.netloc or "@" in is_now.netloc or downgraded:
            raise Problem(
                "COS-REGISTRY-ANSWER",
                f"{self.host} leads to an address without encryption, or to none.",
                now="Ask who runs the registry.",
                exit_code=ExitCode.SOURCE,
            )
        return new

    def _refused(self, response: urllib3.BaseHTTPResponse, path: str) -> Problem:
        """Words for a status that is not an answer."""
        status, wait = response.status, response.headers.get("Retry-After", "")
        words = _error_codes(response)
        response.close()
        if status in {401, 403}:
            return self._login.denied(f"the answer was {status}")
        if status == 404:
            kind, _, name = path.partition("?")[0].rpartition("/")
            if kind == "manifests" and "NAME_UNKNOWN" not in words:
                what = f"{self.host}/{self.repository} has no image {name}"
            elif kind == "blobs":
                what = f"{self.host}/{self.repository} has lost a part of the image ({name[:19]}…)"
            else:
                what = f"{self.host} has no {self.repository}"
            return Problem(
                "COS-IMAGE-UNKNOWN",
                f"{what}.",
                now="Check the name and the tag.",
                exit_code=ExitCode.NOT_FOUND,
                detail=words,
            )
        if status == 429:
            soon = f"Wait {wait} s" if wait.isdigit() else "Wait some minutes"
            return Problem(
                "COS-NET-LIMIT",
                f"{self.host} lets us fetch no more for now (429).",
                now=f"{soon}, or log in with: docker login {self.host}",
                exit_code=ExitCode.SOURCE,
                detail=words,
            )
        return Problem(
            "COS-NET-BUSY" if status in {408, 500, 502, 503, 504} else "COS-REGISTRY-ANSWER",
            f"{self.host} answered {status}.",
            now="Try again later; look at the registry's own logs.",
            exit_code=ExitCode.SOURCE,
            detail=words,
        )


class RegistryContent:
    """Layers are fetched in any process, several at a time."""

    parallel = True

    def __init__(self, registry: Registry, image: ResolvedImage) -> None:
        self.image = image
        self._registry = registry

    def open_layer(self, index: int) -> LayerStream:
        layer = self.image.layers[index]

        def open_blob(headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
            return self._registry.open(f"blobs/{layer.digest}", headers)

        limit = self._registry.settings.wait_limit_s
        return BlobStream(self._registry.host, layer.size_bytes, open_blob, wait_limit_s=limit)

    def next_layer(self) -> LayerStream | None:
        return None

    def close(self) -> None:
        pass


def open_registry(reference: ImageReference, settings: SourceSettings, platform: Platform) -> RegistryContent:
    """Resolve a tag or digest to a manifest for `platform`. Raises Problem."""
    host, repository, tag, digest = split_name(reference.location)
    registry = Registry(host, repository, settings)
    wanted = settings.pin or digest or tag
    data, headers = registry.get(f"manifests/{wanted}", accept=manifest.ACCEPT, limit=manifest.MANIFEST_LIMIT)
    if ":" in wanted:
        pinned = parse_digest(wanted)
    else:
        # The header is the registry's word; what counts is that the bytes match it, which `load` checks.
        pinned = Digest("sha256:" + hashlib.sha256(data).hexdigest())
        stated = headers.get("Docker-Content-Digest", pinned)
        if stated.startswith("sha256:") and stated != pinned:
            manifest.load(data, Digest(stated), str(reference))

    def fetch(blob: Digest, what: str, limit: int) -> bytes:
        if what == "manifest":
            return registry.get(f"manifests/{blob}", accept=manifest.ACCEPT, limit=limit)[0]
        return registry.get(f"blobs/{blob}", accept="*/*", limit=limit)[0]

    image = manifest.resolve_manifest(reference, data, pinned, fetch, platform, tag)
    return RegistryContent(registry, image)


def list_tags(reference: ImageReference, settings: SourceSettings) -> tuple[str, ...]:
    """The tags beside the one that `reference` names, in the registry's order. Raises Problem."""
    if reference.transport is not Transport.DOCKER:
        raise ValueError("only a registry has tags")
    host, repository, _, _ = split_name(reference.location)
    return Registry(host, repository, settings).tags()


def _error_codes(response: urllib3.BaseHTTPResponse) -> str:
    """The codes of an error answer (distribution-spec, error codes); its free text is left out."""
    try:
        errors = json.loads(response.read(16 << 10))["errors"]
        return manifest.readable(" ".join(str(e["code"]) for e in errors))
    except (ValueError, KeyError, TypeError, RecursionError, OSError, urllib3.exceptions.HTTPError):
        return ""

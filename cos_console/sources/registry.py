"""Images from a registry by the OCI distribution API (distribution-spec 1.1), over urllib3.

Login as docker does it: credentials and helpers from docker's own configuration, Basic, or a Bearer token from
the realm that the registry names (distribution's token authentication). Credentials go to the registry and to
its realm only: a redirected blob is fetched without them. Proxies come from the usual variables.
A lost connection in mid-layer is waited for and goes on with an HTTP range request at the exact byte.
"""

import base64
import hashlib
import json
import os
import re
import ssl
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlencode, urljoin, urlsplit

import urllib3

from cos_console.model.image import (
    Digest,
    ImageReference,
    Layer,
    LayerStream,
    Platform,
    ResolvedImage,
    parse_digest,
)
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import manifest
from cos_console.sources.reference import split_name
from cos_console.sources.settings import SourceSettings

_LOOPBACK = re.compile(r"^(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?$")
_REDIRECTS = {301, 302, 303, 307, 308}
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')


class Registry:
    """One registry host. Safe to use after a fork: connections are made anew where they were not made here."""

    def __init__(self, host: str, settings: SourceSettings) -> None:
        self.host = host
        self._settings = settings
        self._pid = 0
        self._pools: dict[str, urllib3.PoolManager] = {}
        self._authorization: dict[str, str] = {}
        self._credentials: tuple[str, str] | bool | None = False
        real = "registry-1.docker.io" if host == "docker.io" else host
        plain = host in settings.insecure_hosts or bool(_LOOPBACK.match(host))
        self.base = f"{'http' if plain and not self._tls_there(real) else 'https'}://{real}"

    def _tls_there(self, host: str) -> bool:
        """A loopback or insecure host may speak TLS all the same: ask once."""
        try:
            self._pool("https://").request(
                "GET", f"https://{host}/v2/", retries=False, timeout=5.0, redirect=False
            )
        except urllib3.exceptions.SSLError as e:
            return "WRONG_VERSION_NUMBER" not in str(e) and "record layer" not in str(e).lower()
        except urllib3.exceptions.HTTPError:
            return False
        return True

    # --- requests --------------------------------------------------------------------------------------------

    def get(self, path: str, *, accept: str, scope: str, limit: int) -> tuple[bytes, dict[str, str]]:
        """A small document. Raises Problem."""
        response = self.open(path, headers={"Accept": accept}, scope=scope)
        try:
            data = response.read(limit + 1, decode_content=False)
        except urllib3.exceptions.HTTPError as e:
            raise self._network(e) from None
        finally:
            response.release_conn()
        if len(data) > limit:
            raise Problem(
                "COS-MANIFEST",
                f"{self.host} sent a description of more than {limit >> 20} MiB.",
                now="Choose another image, or tell its maker.",
                exit_code=ExitCode.SOURCE,
            )
        return data, {k.lower(): v for k, v in response.headers.items()}

    def open(self, path: str, *, headers: dict[str, str], scope: str) -> urllib3.BaseHTTPResponse:
        """GET with login and redirects followed. Raises Problem, also for every status but 200 and 206."""
        url = urljoin(self.base, path)
        asked = refreshed = False
        for _ in range(8):
            own = urlsplit(url).netloc == urlsplit(self.base).netloc
            sent = dict(headers)
            if own and scope in self._authorization:
                sent["Authorization"] = self._authorization[scope]
            response = self._request(url, sent)
            if response.status in {200, 206}:
                return response
            response.drain_conn()
            response.release_conn()
            if response.status in _REDIRECTS and response.headers.get("Location"):
                url = urljoin(url, response.headers["Location"])
                continue
            if response.status == 401 and own and not (asked and refreshed):
                refreshed = asked
                asked = True
                self._authorization[scope] = self._login(response.headers.get("WWW-Authenticate", ""), scope)
                continue
            raise self._status(response.status, path)
        raise self._status(310, path)

    def _request(self, url: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        try:
            return self._pool(url).request(
                "GET", url, headers=headers, redirect=False, retries=False, preload_content=False
            )
        except urllib3.exceptions.HTTPError as e:
            raise self._network(e) from None

    def _pool(self, url: str) -> urllib3.PoolManager:
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._pools = {}
        split = urlsplit(url)
        key = f"{split.scheme}"
        if key not in self._pools:
            s = self._settings
            timeout = urllib3.Timeout(connect=s.connect_timeout_s, read=s.stall_timeout_s)
            context = ssl.create_default_context()
            for ca in self._authorities():
                context.load_verify_locations(cafile=ca)
            proxy = urllib.request.getproxies().get(split.scheme)
            if proxy and not urllib.request.proxy_bypass(split.hostname or ""):
                self._pools[key] = urllib3.ProxyManager(
                    proxy, ssl_context=context, timeout=timeout, maxsize=4
                )
            else:
                self._pools[key] = urllib3.PoolManager(ssl_context=context, timeout=timeout, maxsize=4)
        return self._pools[key]

    def _authorities(self) -> list[str]:
        """Extra certificate authorities: the one that was named, then docker's and podman's own places."""
        found = []
        if self._settings.ca_file:
            if not Path(self._settings.ca_file).is_file():
                raise Problem(
                    "COS-CA-FILE",
                    f"The certificate file {self._settings.ca_file} can't be read.",
                    now="Check the path given with --ca.",
                    exit_code=ExitCode.USAGE,
                )
            found.append(self._settings.ca_file)
        for base in ("/etc/docker/certs.d", "/etc/containers/certs.d"):
            found += [str(p) for p in sorted(Path(base, self.host).glob("*.crt"))]
        return found

    # --- login -----------------------------------------------------------------------------------------------

    def _login(self, challenge: str, scope: str) -> str:
        """The Authorization header for `scope`. Raises Problem COS-AUTH."""
        kind, _, rest = challenge.partition(" ")
        fields = {k.lower(): v for k, v in _CHALLENGE.findall(rest)}
        user = self._stored()
        if kind.lower() == "basic":
            if user is None:
                raise self._denied("it wants a login, and docker's configuration has none for it")
            return "Basic " + base64.b64encode(f"{user[0]}:{user[1]}".encode()).decode()
        realm = fields.get("realm", "")
        if kind.lower() != "bearer" or urlsplit(realm).scheme not in {"http", "https"}:
            raise self._denied("it asks for a login of a kind that is not known")
        if urlsplit(self.base).scheme == "https" and urlsplit(realm).scheme != "https":
            raise self._denied("it wants the login sent without encryption")
        headers = {}
        if user is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(f"{user[0]}:{user[1]}".encode()).decode()
        query = urlencode({"service": fields.get("service", ""), "scope": fields.get("scope", scope)})
        response = self._request(f"{realm}?{query}", headers)
        data = response.read(1 << 20)
        response.release_conn()
        if response.status != 200:
            raise self._denied(f"the login was refused ({response.status})")
        try:
            document = json.loads(data)
            token = document.get("token") or document.get("access_token")
        except (ValueError, AttributeError):
            token = None
        if not isinstance(token, str) or not token.isprintable():
            raise self._denied("its login service gave no token")
        return f"Bearer {token}"

    def _stored(self) -> tuple[str, str] | None:
        """(user, password) from docker's own configuration and helpers."""
        if self._credentials is False:
            from docker import auth

            name = "https://index.docker.io/v1/" if self.host == "docker.io" else self.host
            try:
                entry = auth.load_config().resolve_authconfig(name)
            except Exception:  # noqa: BLE001 - helpers fail in many ways; their words may hold secrets
                entry = None
            found = None
            if entry and (entry.get("Username") or entry.get("username")):
                user = str(entry.get("Username") or entry.get("username"))
                found = (user, str(entry.get("Password") or entry.get("password") or ""))
            self._credentials = found
        return self._credentials if isinstance(self._credentials, tuple) else None

    # --- problems --------------------------------------------------------------------------------------------

    def _denied(self, why: str) -> Problem:
        return Problem(
            "COS-AUTH",
            f"{self.host} did not let us in: {why}.",
            now=f"Log in with: docker login {self.host}",
            exit_code=ExitCode.SOURCE,
        )

    def _status(self, status: int, path: str) -> Problem:
        if status in {401, 403}:
            return self._denied(f"the answer was {status}")
        if status == 404:
            return Problem(
                "COS-IMAGE-UNKNOWN",
                f"{self.host} has no {path.removeprefix('/v2/')}.",
                now="Check the name and the tag.",
                exit_code=ExitCode.NOT_FOUND,
            )
        if status == 429:
            return Problem(
                "COS-NET-LIMIT",
                f"{self.host} lets nobody fetch more for now (429).",
                now="Wait some minutes, or log in.",
                exit_code=ExitCode.SOURCE,
            )
        return Problem(
            "COS-NET-STATUS",
            f"{self.host} answered {status}.",
            now="Try again later; look at the registry's own logs.",
            exit_code=ExitCode.SOURCE,
        )

    def _network(self, e: Exception) -> Problem:
        text = str(e)
        code, why, now = "COS-NET", "can't be reached", "Check the network: link, address, DNS, proxy."
        if isinstance(e, urllib3.exceptions.NameResolutionError) or "resolve" in text:
            code, why, now = "COS-NET-NAME", "has no known address", "Check the name and the DNS server."
        elif "CERTIFICATE_VERIFY_FAILED" in text:
            code = "COS-NET-TLS"
            if "expired" in text or "not yet valid" in text:
                why, now = "shows a certificate that is not valid today", "Check this machine's clock first."
            else:
                why = "shows a certificate that nobody known here has signed"
                now = "Give its authority's certificate with --ca FILE."
        elif "refused" in text:
            code, why, now = (
                "COS-NET-REFUSED",
                "refused the connection",
                "Check host and port; is the registry up?",
            )
        elif isinstance(e, urllib3.exceptions.TimeoutError):
            code, why = "COS-NET-TIMEOUT", "did not answer in time"
        elif isinstance(e, urllib3.exceptions.SSLError):
            code, why, now = (
                "COS-NET-TLS",
                "does not speak TLS",
                "Name it with --insecure-registry if that is meant.",
            )
        return Problem(code, f"{self.host} {why}.", now=now, exit_code=ExitCode.SOURCE)


class BlobStream:
    """A blob's bytes. `refetched_bytes` counts what had to be moved twice (a server without ranges)."""

    def __init__(self, registry: Registry, repository: str, layer: Layer, settings: SourceSettings) -> None:
        self._registry = registry
        self._path = f"/v2/{repository}/blobs/{layer.digest}"
        self._scope = f"repository:{repository}:pull"
        self._size = layer.size_bytes
        self._settings = settings
        self._at = 0
        self._response: urllib3.BaseHTTPResponse | None = None
        self.refetched_bytes = 0

    def readinto(self, buffer: memoryview) -> int:
        lost_at = 0.0
        pause = 0.2
        while True:
            if self._at >= self._size:
                return 0
            try:
                if self._response is None:
                    self._connect()
                assert self._response is not None  # noqa: S101 - for the type checker
                data = self._response.read(min(len(buffer), self._size - self._at), decode_content=False)
                if data:
                    buffer[: len(data)] = data
                    self._at += len(data)
                    return len(data)
                reason = "ended the connection early"
            except (urllib3.exceptions.HTTPError, OSError):
                reason = "broke the connection"
            except Problem as e:
                if not e.report.code.startswith("COS-NET"):
                    raise
                reason = e.report.what
            self.close()
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > self._settings.wait_limit_s:
                raise Problem(
                    "COS-NET-RESET",
                    f"{self._registry.host} {reason} at {self._at} of {self._size} bytes of a layer"
                    f" and did not come back within {self._settings.wait_limit_s:.0f} s.",
                    unchanged="active and passive are exactly as before.",
                    now="Check the network and start again.",
                    exit_code=ExitCode.SOURCE,
                )
            time.sleep(pause)
            pause = min(pause * 2, 10.0)

    def _connect(self) -> None:
        headers = {"Accept": "*/*"}
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
        response = self._registry.open(self._path, headers=headers, scope=self._scope)
        self._response = response
        if self._at and response.status == 206:
            found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if not found or int(found[1]) != self._at:
                raise urllib3.exceptions.HTTPError("another range than was asked for")
        elif self._at:
            left = self._at
            while left:
                data = response.read(min(left, 1 << 18), decode_content=False)
                if not data:
                    raise urllib3.exceptions.HTTPError("it ended before the old place")
                left -= len(data)
                self.refetched_bytes += len(data)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


class RegistryContent:
    """Layers are fetched in any process, several at a time."""

    parallel = True

    def __init__(
        self, registry: Registry, repository: str, image: ResolvedImage, settings: SourceSettings
    ) -> None:
        self.image = image
        self._registry = registry
        self._repository = repository
        self._settings = settings

    def open_layer(self, index: int) -> LayerStream:
        return BlobStream(self._registry, self._repository, self.image.layers[index], self._settings)

    def next_layer(self) -> LayerStream | None:
        return None

    def close(self) -> None:
        pass


def open_registry(reference: ImageReference, settings: SourceSettings, platform: Platform) -> RegistryContent:
    """Resolve a tag or digest to a manifest for `platform`. Raises Problem."""
    host, repository, tag, digest = split_name(reference.location)
    registry = Registry(host, settings)
    scope = f"repository:{repository}:pull"
    wanted = settings.pin or digest or tag
    data, headers = registry.get(
        f"/v2/{repository}/manifests/{wanted}",
        accept=manifest.ACCEPT,
        scope=scope,
        limit=manifest.MANIFEST_LIMIT,
    )
    if ":" in wanted:
        pinned = parse_digest(wanted)
    else:
        # The header is the registry's word; what counts is that the bytes match it, which `load` checks.
        pinned = Digest("sha256:" + hashlib.sha256(data).hexdigest())
        stated = headers.get("docker-content-digest", pinned)
        if stated.startswith("sha256:") and stated != pinned:
            manifest.load(data, Digest(stated), str(reference))

    def fetch(blob: Digest, what: str, limit: int) -> bytes:
        kind = "manifests" if what == "manifest" else "blobs"
        accept = manifest.ACCEPT if what == "manifest" else "*/*"
        return registry.get(f"/v2/{repository}/{kind}/{blob}", accept=accept, scope=scope, limit=limit)[0]

    image = manifest.resolve_manifest(reference, data, pinned, fetch, platform, tag)
    return RegistryContent(registry, repository, image, settings)

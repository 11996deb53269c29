"""Images of a running Docker Engine, through the `docker` package: local ones, else pulled by the engine.

The engine exports an image as one tar stream (`GET /images/ID/get`), whose layers come in its own order. They
are read as they stream, without a copy on disk or in memory, and known by their diff_id; the image is known by
its id, which its description in the same stream must have as its digest.
DOCKER_HOST, DOCKER_TLS_VERIFY and DOCKER_CERT_PATH say where the engine is.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, cast

from cos_console.model.image import (
    Compression,
    ImageReference,
    Layer,
    LayerStream,
    Platform,
    ResolvedImage,
    parse_digest,
)
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import manifest
from cos_console.sources.saved import SavedError, SavedImage, SavedLayer
from cos_console.sources.settings import SourceSettings

PullReport = Callable[[int, int, str], None]
"""Told while the engine pulls: bytes had, bytes in all as far as known, words."""

_T = TypeVar("_T")
_ANSWER_S = 60
_SILENCE_S = 1800
"""An engine gathers a whole image on its own disk before the first byte of an export comes."""


class _Api(Protocol):
    """What is used of docker.APIClient."""

    def inspect_image(self, image: str) -> dict[str, object]: ...

    def get_image(self, image: str, chunk_size: int) -> Iterator[bytes]: ...

    def pull(
        self, repository: str, tag: str, *, stream: bool, decode: bool, platform: str
    ) -> Iterator[dict[str, Any]]: ...

    def close(self) -> None: ...


class EngineContent:
    """Sequential: `next_layer` walks the export stream."""

    parallel = False

    def __init__(self, image: ResolvedImage) -> None:
        self.image = image
        self._api: _Api | None = None
        self._saved: SavedImage | None = None

    def open_layer(self, index: int) -> LayerStream:
        raise NotImplementedError("an engine gives its layers in its own order")

    def next_layer(self) -> LayerStream | None:
        """Raises Problem COS-ENGINE, COS-ENGINE-DOWN, and COS-DIGEST when another image was exported."""
        if self._saved is None:
            self._api = _connect(_SILENCE_S)
            identity = str(self.image.digest)
            diff_ids = frozenset(str(layer.diff_id) for layer in self.image.layers)
            api = self._api
            self._saved = _told(lambda: SavedImage(api.get_image(identity, chunk_size=1 << 20), diff_ids))
        saved = self._saved
        layer = _told(saved.next_layer)
        if layer is not None:
            return _EngineLayer(layer)
        assert self.image.digest is not None  # noqa: S101 - an engine's image has an id
        found = saved.described_by(self.image.digest)
        if found != [layer.diff_id for layer in self.image.layers]:
            raise Problem(
                "COS-DIGEST",
                "The Docker Engine exported another image than the one that was asked for.",
                unchanged="active and passive are exactly as before.",
                now="Pull the image again and start again.",
                exit_code=ExitCode.VERIFICATION,
            )
        return None

    def close(self) -> None:
        if self._api is not None:
            self._api.close()
            self._api = self._saved = None


class _EngineLayer:
    def __init__(self, layer: SavedLayer) -> None:
        self._layer = layer

    def readinto(self, buffer: memoryview) -> int:
        return _told(lambda: self._layer.readinto(buffer))

    def close(self) -> None:
        pass


def open_engine(
    reference: ImageReference,
    settings: SourceSettings,
    platform: Platform,
    report: PullReport | None = None,
) -> EngineContent:
    """Find the image in the engine, else let it pull. Raises Problem COS-ENGINE*, COS-IMAGE-UNKNOWN, COS-PLATFORM."""
    name = reference.location
    api = _connect(_ANSWER_S)
    try:
        attrs = _inspect(api, settings.pin) if settings.pin else None
        attrs = attrs or _inspect(api, name)
        if attrs is None and not name.startswith("sha256:"):
            _pull(api, name, platform, report)
            attrs = _inspect(api, name)
    finally:
        api.close()
    if attrs is None:
        raise Problem(
            "COS-IMAGE-UNKNOWN",
            f"The Docker Engine has no image {name} and can't pull it.",
            now="Check the name; `docker images` lists what it has.",
            exit_code=ExitCode.NOT_FOUND,
        )
    image = _image(attrs, reference)
    manifest.require_platform(image.platform, platform, reference)
    return EngineContent(image)


def _image(attrs: dict[str, object], reference: ImageReference) -> ResolvedImage:
    root, config = attrs.get("RootFS"), attrs.get("Config")
    found = root.get("Layers") if isinstance(root, dict) else None
    raw = config.get("Labels") if isinstance(config, dict) else None
    labels = {str(k): str(v) for k, v in raw.items()} if isinstance(raw, dict) else {}
    try:
        identity = parse_digest(str(attrs.get("Id")))
        diff_ids = [parse_digest(str(d)) for d in found] if isinstance(found, list) else []
    except ValueError:
        diff_ids = []
    if not diff_ids:
        raise manifest.bad_image(reference, "the engine names no layers")
    size = attrs.get("Size")
    # Only the classic stores count unpacked bytes; containerd's counts what it holds, packed and unpacked.
    unpacked = size if isinstance(size, int) and size > 0 and attrs.get("GraphDriver") else None
    tag = re.search(r":([\w.-]+)(?:@|$)", reference.location.rpartition("/")[2])
    lower = {key.lower(): value for key, value in attrs.items()}
    return ResolvedImage(
        reference=reference,
        digest=identity,
        config_digest=identity,
        platform=manifest.platform_of(lower),
        layers=tuple(
            Layer(digest=None, diff_id=d, size_bytes=0, compression=Compression.NONE) for d in diff_ids
        ),
        version=manifest.version_of(
            labels, tag[1] if tag and not reference.location.startswith("sha256:") else ""
        ),
        created=manifest.readable(str(attrs.get("Created") or "")),
        transfer_bytes=unpacked or 0,
        unpacked_bytes=unpacked,
        labels=labels,
    )


def _connect(timeout_s: int) -> _Api:
    """Raises Problem COS-ENGINE-DOWN, COS-ENGINE-DENIED."""
    import docker
    from docker import errors

    where = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    shown = manifest.readable(re.sub(r"//[^/@]*@", "//", where))
    try:
        return cast("_Api", docker.from_env(timeout=timeout_s).api)
    except (errors.DockerException, OSError, ValueError, ImportError) as e:
        if "Permission denied" in str(e):
            raise Problem(
                "COS-ENGINE-DENIED",
                f"The Docker Engine at {shown} may not be used by this user.",
                now="Run this as root.",
                exit_code=ExitCode.SOURCE,
            ) from None
        raise Problem(
            "COS-ENGINE-DOWN",
            f"No Docker Engine answers at {shown}.",
            now="Start it, or set DOCKER_HOST to where it listens (unix://, tcp://).",
            exit_code=ExitCode.SOURCE,
            detail=manifest.readable(str(e), 500),
        ) from None


def _inspect(api: _Api, name: str) -> dict[str, object] | None:
    """None when the engine does not have it."""
    from docker import errors

    try:
        return _told(lambda: api.inspect_image(name))
    except errors.NotFound:
        return None


def _pull(api: _Api, name: str, platform: Platform, report: PullReport | None) -> None:
    """Let the engine pull; raises Problem with its words when it can't."""
    from docker import errors

    whole, _, digest = name.partition("@")
    repository, _, tag = whole.rpartition(":") if ":" in whole.rpartition("/")[2] else (whole, "", "")
    sizes: dict[str, tuple[int, int]] = {}
    try:
        events = api.pull(repository, digest or tag, stream=True, decode=True, platform=str(platform))
        for event in _each(events):
            if "error" in event:
                raise _pull_failed(name, str(event["error"]))
            detail = event.get("progressDetail") or {}
            total = detail.get("total")
            if isinstance(total, int) and event.get("status") == "Downloading":
                sizes[str(event.get("id"))] = (int(detail.get("current") or 0), total)
            elif event.get("status") == "Download complete" and str(event.get("id")) in sizes:
                whole_size = sizes[str(event["id"])][1]
                sizes[str(event["id"])] = (whole_size, whole_size)
            if report is not None:
                words = manifest.readable(f"{event.get('id') or ''} {event.get('status') or ''}".strip())
                report(sum(s[0] for s in sizes.values()), sum(s[1] for s in sizes.values()), words)
    except errors.APIError as e:
        raise _pull_failed(name, str(e.explanation or e)) from None


def _pull_failed(name: str, words: str) -> Problem:
    """The engine's words, sorted. Most of them come from the registry."""
    said = manifest.readable(words, 300)
    low = said.lower()
    code, exit_code, now = (
        "COS-ENGINE",
        ExitCode.SOURCE,
        "Look at the engine's log; check its network and proxy.",
    )
    if "no matching manifest" in low or "does not match the specified platform" in low:
        code, now = "COS-PLATFORM", "Choose an image for this machine's architecture."
    elif any(w in low for w in ("manifest unknown", "not found", "does not exist")):
        code, exit_code, now = "COS-IMAGE-UNKNOWN", ExitCode.NOT_FOUND, "Check the name and the tag."
    elif any(w in low for w in ("unauthorized", "denied", "authentication")):
        code, now = "COS-AUTH", f"Log in with: docker login {name.partition('/')[0]}"
    elif "toomanyrequests" in low:
        code, now = "COS-NET-LIMIT", "Wait some minutes, or log in."
    return Problem(
        code,
        f"The Docker Engine could not pull {name}: {said.rstrip('.')}.",
        now=now,
        exit_code=exit_code,
    )


def _each(events: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while (event := _told(lambda: next(events, None))) is not None:
        yield event


def _told(act: Callable[[], _T]) -> _T:
    """`act`, with what the engine and the line to it can do wrong as a Problem. NotFound passes."""
    import requests
    import urllib3
    from docker import errors

    try:
        return act()
    except errors.NotFound:
        raise
    except errors.APIError as e:
        why = f"refused: {manifest.readable(str(e.explanation or e), 300).rstrip('.')}"
    except SavedError as e:
        why = f"sent an export that can't be read: {e}"
    except (requests.RequestException, urllib3.exceptions.HTTPError, errors.DockerException, OSError):
        why = "broke the connection"
    raise Problem(
        "COS-ENGINE",
        f"The Docker Engine {why}.",
        unchanged="active and passive are exactly as before.",
        now="Look at the engine's log, then start again.",
        exit_code=ExitCode.SOURCE,
    )

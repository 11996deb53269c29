"""Images of a running Docker Engine, through the `docker` package: local ones, else pulled by the engine.

The engine exports an image as one tar stream (`docker save`), whose layers come in its own order. They are
read as they stream, without a copy, and known by their diff_id; the image by its configuration's digest.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, Protocol, cast

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
from cos_console.sources.manifest import bad_image


class _Image(Protocol):
    id: str
    attrs: dict[str, object]
    labels: dict[str, str]
    tags: list[str]

    def save(self, chunk_size: int) -> Iterator[bytes]: ...


class _Saved:
    """Chunks of `docker save` as a file that can only be read forwards."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts = [self._rest]
        have = len(self._rest)
        while have < size:
            chunk = next(self._chunks, b"")
            if not chunk:
                break
            parts.append(chunk)
            have += len(chunk)
        data = b"".join(parts)
        self._rest = data[size:]
        return data[:size]


class _MemberStream:
    def __init__(self, file: IO[bytes], first: bytes) -> None:
        self._file = file
        self._first = first

    def readinto(self, buffer: memoryview) -> int:
        if self._first:
            count = min(len(buffer), len(self._first))
            buffer[:count] = self._first[:count]
            self._first = self._first[count:]
            return count
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        pass


class EngineContent:
    """Sequential: `next_layer` walks the export stream."""

    parallel = False

    def __init__(self, image: ResolvedImage, exported: _Image) -> None:
        self.image = image
        self._exported = exported
        self._members: Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]] | None = None

    def open_layer(self, index: int) -> LayerStream:
        raise NotImplementedError("an engine gives its layers in its own order")

    def next_layer(self) -> LayerStream | None:
        if self._members is None:
            self._members = self._open()
        for tar, info in self._members:
            if not info.isfile() or info.size < 1024:
                continue
            file = tar.extractfile(info)
            if file is None:
                continue
            head = file.read(512)
            if len(head) == 512 and head[257:262] == b"ustar":
                return _MemberStream(file, head)
        return None

    def _open(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        stream = cast("IO[bytes]", _Saved(self._exported.save(chunk_size=1 << 20)))
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for info in tar:
                    yield tar, info
        except tarfile.TarError:
            raise Problem(
                "COS-ENGINE",
                "The Docker Engine ended the export of the image too early.",
                now="Look at the engine's log and try again.",
                exit_code=ExitCode.SOURCE,
            ) from None

    def close(self) -> None:
        pass


def open_engine(reference: ImageReference) -> EngineContent:
    """Raises Problem COS-ENGINE-DOWN, COS-IMAGE-UNKNOWN, COS-ENGINE."""
    import docker
    from docker import errors

    name = reference.location
    short = name.removeprefix("docker.io/").removeprefix("library/")
    try:
        client = docker.from_env()
        try:
            found = cast("_Image", client.images.get(short if not name.startswith("sha256:") else name))
        except errors.ImageNotFound:
            if name.startswith("sha256:"):
                raise
            client.images.pull(short)
            found = cast("_Image", client.images.get(short))
    except errors.NotFound:
        raise Problem(
            "COS-IMAGE-UNKNOWN",
            f"The Docker Engine has no image {short} and can't pull it.",
            now="Check the name; `docker images` lists what it has.",
            exit_code=ExitCode.NOT_FOUND,
        ) from None
    except errors.APIError as e:
        raise Problem(
            "COS-ENGINE",
            f"The Docker Engine refused: {e.explanation or e}.",
            now="Look at the engine's log.",
            exit_code=ExitCode.SOURCE,
        ) from None
    except (errors.DockerException, OSError):
        raise Problem(
            "COS-ENGINE-DOWN",
            "No Docker Engine answers here.",
            now="Start it, or set DOCKER_HOST to where it listens.",
            exit_code=ExitCode.SOURCE,
        ) from None
    attrs = found.attrs
    root = attrs.get("RootFS")
    diff_ids = root.get("Layers") if isinstance(root, dict) else None
    if not isinstance(diff_ids, list) or not diff_ids:
        raise bad_image(reference, "the engine names no layers")
    layers = tuple(
        Layer(digest=None, diff_id=parse_digest(str(d)), size_bytes=0, compression=Compression.NONE)
        for d in diff_ids
    )
    identity = parse_digest(found.id)
    labels = dict(found.labels or {})
    tag = name.rpartition(":")[2] if not name.startswith("sha256:") else ""
    image = ResolvedImage(
        reference=reference,
        digest=identity,
        config_digest=identity,
        platform=Platform(str(attrs.get("Os") or ""), str(attrs.get("Architecture") or "")),
        layers=layers,
        version=labels.get("org.opencontainers.image.version", "") or (tag if tag != "latest" else ""),
        created=str(attrs.get("Created") or ""),
        transfer_bytes=0,
        unpacked_bytes=None,
        labels=labels,
    )
    return EngineContent(image, found)

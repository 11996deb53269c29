"""Images and where they come from, in the terms of the OCI image and distribution specifications.

References are written as in containers-transports(5).
"""

import re
from enum import StrEnum
from typing import NewType, Protocol

import msgspec

Digest = NewType("Digest", str)
"""`sha256:` and 64 hex digits (OCI image spec, descriptor.md); made only by `parse_digest`."""

_HEX_LENGTH = {"sha256": 64, "sha512": 128}


def parse_digest(text: str) -> Digest:
    """`text` as a digest. Raises ValueError unless sha256 or sha512 in full lower-case hex."""
    algorithm, _, value = text.partition(":")
    length = _HEX_LENGTH.get(algorithm)
    if length is None or not re.fullmatch(rf"[0-9a-f]{{{length}}}", value):
        raise ValueError(f"not a digest: {text[:100]!r}")
    return Digest(text)


def short_digest(digest: str) -> str:
    """As shown on a narrow screen: `sha256:7e1c…9a04`."""
    algorithm, _, value = digest.partition(":")
    return f"{algorithm}:{value[:4]}…{value[-4:]}" if value else digest


class Transport(StrEnum):
    DOCKER = "docker"
    DOCKER_DAEMON = "docker-daemon"
    OCI = "oci"
    OCI_ARCHIVE = "oci-archive"
    DOCKER_ARCHIVE = "docker-archive"
    DIRECTORY = "directory"
    SLOT = "slot"
    """Another slot of the same installation (restore, restore from recovery)."""


class ImageReference(msgspec.Struct, frozen=True):
    """What the operator named. `location` is everything after the transport's prefix, normalised."""

    transport: Transport
    location: str
    """docker: `host[:port]/path[:tag][@digest]`; oci: `DIR[:REF]`; archives: FILE; directory: PATH."""

    def __str__(self) -> str:
        prefix = {Transport.DOCKER: "docker://", Transport.DIRECTORY: "dir:"}.get(
            self.transport, f"{self.transport.value}:"
        )
        return prefix + self.location


class Platform(msgspec.Struct, frozen=True):
    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(p for p in (self.os, self.architecture, self.variant) if p)


class Compression(StrEnum):
    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One layer of a resolved image, lowest first in `ResolvedImage.layers`."""

    digest: Digest | None
    """Of the bytes as transferred; None where the source has none (docker engine, directory)."""
    diff_id: Digest | None
    """Of the uncompressed tar; None for a directory."""
    size_bytes: int
    """As transferred; 0 where not known."""
    compression: Compression


class ResolvedImage(msgspec.Struct, frozen=True, kw_only=True):
    """An image pinned: every byte that will be read is fixed by what stands here (except a directory)."""

    reference: ImageReference
    digest: Digest | None
    """Of the manifest; of the config for a docker engine or docker archive; None for a directory."""
    config_digest: Digest | None
    platform: Platform | None
    layers: tuple[Layer, ...]
    version: str
    """From org.opencontainers.image.version or the tag; empty when nothing tells."""
    created: str
    """RFC 3339, or empty."""
    transfer_bytes: int
    """Compressed bytes to fetch, 0 where not known."""
    unpacked_bytes: int | None
    """Where the source tells (directory, sizes in annotations); None otherwise."""
    labels: dict[str, str] = {}


class LayerStream(Protocol):
    """Compressed bytes of one layer in order. A lost connection is resumed inside `readinto`."""

    def readinto(self, buffer: memoryview) -> int:
        """Fill up to len(buffer) bytes; 0 at the end. Raises Problem when it can't go on."""
        ...

    def close(self) -> None: ...


class Content(Protocol):
    """The bytes of a resolved image. Picklable or fork-safe: `open_layer` is called in worker processes.

    Where `parallel` is False the layers come only as `next_layer` gives them (docker save streams them in its
    own order); where True, `open_layer` may be called for any index, in any process, several at a time.
    """

    image: ResolvedImage
    parallel: bool

    def open_layer(self, index: int) -> LayerStream: ...

    def next_layer(self) -> LayerStream | None:
        """The next layer of a sequential source, None after the last. Its place is told by its diff_id."""
        ...

    def close(self) -> None: ...

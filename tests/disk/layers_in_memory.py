"""Layers in memory as a source of images, and quick tar layers to put into it."""

import gzip
import hashlib
import io
import tarfile

import zstandard

from cos_console.model.image import (
    Compression,
    ImageReference,
    Layer,
    LayerStream,
    ResolvedImage,
    Transport,
    parse_digest,
)


class Stream:
    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer)

    def close(self) -> None:
        pass


class Blobs:
    """Layers in memory as a source; `sequential` gives each once, in reverse, known by diff_id only.

    `blobs` are the bytes as transferred, where they are not to be made from `tars`.
    """

    def __init__(
        self,
        tars: list[bytes],
        *,
        compression: Compression = Compression.GZIP,
        sequential: bool = False,
        blobs: list[bytes] | None = None,
    ) -> None:
        pack = {
            Compression.GZIP: lambda d: gzip.compress(d, 1),
            Compression.ZSTD: zstandard.ZstdCompressor().compress,
            Compression.NONE: lambda d: d,
        }[compression]
        self.blobs = blobs or [pack(t) for t in tars]
        self.parallel = not sequential
        self._left = list(dict.fromkeys(reversed(tars))) if sequential else []
        digest = lambda d: parse_digest("sha256:" + hashlib.sha256(d).hexdigest())  # noqa: E731
        self.image = ResolvedImage(
            reference=ImageReference(Transport.OCI, "test"),
            digest=None,
            config_digest=None,
            platform=None,
            layers=tuple(
                Layer(
                    digest=None if sequential else digest(b),
                    diff_id=digest(t),
                    size_bytes=len(b),
                    compression=Compression.NONE if sequential else compression,
                )
                for b, t in zip(self.blobs, tars, strict=True)
            ),
            version="1",
            created="",
            transfer_bytes=sum(map(len, self.blobs)),
            unpacked_bytes=None,
        )

    def open_layer(self, index: int) -> LayerStream:
        return Stream(self.blobs[index])

    def next_layer(self) -> LayerStream | None:
        return Stream(self._left.pop(0)) if self._left else None

    def close(self) -> None:
        pass


def layer(*members: tuple[str, dict[str, object]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, facts in members:
            info = tarfile.TarInfo(name)
            data = facts.get("data")
            info.type = facts.get("type", tarfile.REGTYPE)  # type: ignore[assignment]
            info.mode = facts.get("mode", 0o755 if info.type == tarfile.DIRTYPE else 0o644)  # type: ignore[assignment]
            info.uid, info.gid = facts.get("owner", (0, 0))  # type: ignore[misc]
            info.mtime = facts.get("mtime", 1_700_000_000)  # type: ignore[assignment]
            info.linkname = facts.get("link", "")  # type: ignore[assignment]
            info.devmajor, info.devminor = facts.get("device", (0, 0))  # type: ignore[misc]
            info.pax_headers = {
                f"SCHILY.xattr.{k}": v.decode("utf-8", "surrogateescape")
                for k, v in facts.get("xattrs", {}).items()  # type: ignore[attr-defined]
            }
            info.size = len(data) if isinstance(data, bytes) else 0
            tar.addfile(info, io.BytesIO(data) if isinstance(data, bytes) else None)
    return out.getvalue()


D = {"type": tarfile.DIRTYPE}

"""Read an image whole, as an upgrade would, and check it by other means than the project's own."""

import gzip
import hashlib

import zstandard

from cos_console.model.image import Content, LayerStream


def drain(stream: LayerStream, size: int = 256 << 10) -> bytes:
    """Every byte of a layer as transferred."""
    buffer = memoryview(bytearray(size))
    parts = []
    while count := stream.readinto(buffer):
        parts.append(bytes(buffer[:count]))
    stream.close()
    return b"".join(parts)


def plain(data: bytes) -> bytes:
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return data


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def read_whole(content: Content) -> list[str]:
    """The diff_ids of all layers, each computed from what came, lowest first for a parallel source."""
    found = []
    if not content.parallel:
        while (stream := content.next_layer()) is not None:
            found.append(sha256(plain(drain(stream))))
        return found
    for index, layer in enumerate(content.image.layers):
        data = drain(content.open_layer(index))
        if layer.digest is not None:
            assert sha256(data) == layer.digest
        if layer.size_bytes:
            assert len(data) == layer.size_bytes
        found.append(sha256(plain(data)))
    return found

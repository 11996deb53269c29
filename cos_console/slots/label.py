"""The label of an ext2/3/4 image: 16 bytes at offset 120 of its superblock.

With metadata_csum the superblock's checksum (crc32c of its first 1020 bytes, seed ~0, not inverted) changes
too (Linux, Documentation/filesystems/ext4/super.rst), so the whole superblock is written then.
"""

import struct

from cos_console.formats.readat import FormatError
from cos_console.slots.port import Place, Port

SUPERBLOCK_OFFSET = 1024
_LABEL_AT, _LABEL_BYTES = 120, 16
_METADATA_CSUM = 0x400


def read_label(port: Port, place: Place) -> str:
    """Raises FormatError when the file is no ext2/3/4 image."""
    return label_of(port.read(place, SUPERBLOCK_OFFSET, 1024))


def label_of(superblock: bytes) -> str:
    _check(superblock)
    return superblock[_LABEL_AT : _LABEL_AT + _LABEL_BYTES].split(b"\0")[0].decode(errors="replace")


def write_for(superblock: bytes, label: str) -> tuple[int, bytes]:
    """(offset in the image, bytes) of the one write that gives it this label. Raises FormatError."""
    _check(superblock)
    raw = label.encode()
    if len(raw) > _LABEL_BYTES:
        raise FormatError(f"a label has at most 16 bytes: {label!r}")
    new = bytearray(superblock)
    new[_LABEL_AT : _LABEL_AT + _LABEL_BYTES] = raw.ljust(_LABEL_BYTES, b"\0")
    (ro_compat,) = struct.unpack_from("<I", superblock, 0x64)
    if ro_compat & _METADATA_CSUM:
        struct.pack_into("<I", new, 0x3FC, _crc32c(bytes(new[:0x3FC])))
        return SUPERBLOCK_OFFSET, bytes(new)
    return SUPERBLOCK_OFFSET + _LABEL_AT, bytes(new[_LABEL_AT : _LABEL_AT + _LABEL_BYTES])


def set_label(port: Port, place: Place, label: str) -> None:
    """Write the label, make it durable and read it back from the medium. Raises OSError, FormatError."""
    superblock = port.read(place, SUPERBLOCK_OFFSET, 1024)
    offset, data = write_for(superblock, label)
    # Always written, even when it looks right: a read before a crash may have come from memory only.
    port.write_at(place, offset, data)
    port.fsync_file(place)
    if port.read_back(place, offset, len(data)) != data:
        raise OSError(5, "the label does not read back as written", str(place))


def _check(superblock: bytes) -> None:
    if len(superblock) < 1024 or superblock[56:58] != b"\x53\xef":
        raise FormatError("no ext2/3/4 superblock")


def _table() -> tuple[int, ...]:
    rows = []
    for n in range(256):
        for _ in range(8):
            n = (n >> 1) ^ (0x82F63B78 if n & 1 else 0)  # noqa: PLW2901
        rows.append(n)
    return tuple(rows)


_CRC = _table()


def _crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value

"""Which file system is this, by its own superblock: type, label, UUID.

Offsets: util-linux libblkid's superblock probes and each file system's on-disk documentation. udev's view is a
hint; this is what is on the disk. Reads at most the first 68 KiB.
"""

import uuid
from dataclasses import dataclass

from cos_console.formats.readat import ReadAt

_SWAP_PAGE_SIZES = (4096, 8192, 16384, 65536)


@dataclass(frozen=True)
class Probe:
    """`fs_type` is empty where nothing was recognised."""

    fs_type: str
    label: str = ""
    uuid: str = ""


def probe(source: ReadAt) -> Probe:
    """Recognise what `source` starts with. Raises OSError when it can't be read."""
    head = source.read_at(0, 69632)
    for look in (_luks, _lvm, _ext, _squashfs, _xfs, _btrfs, _iso, _swap, _vfat):
        found = look(head)
        if found is not None:
            return found
    return Probe("")


def _ext(head: bytes) -> Probe | None:
    sb = head[1024:2048]
    if sb[56:58] != b"\x53\xef":
        return None
    compat, incompat = int.from_bytes(sb[92:96], "little"), int.from_bytes(sb[96:100], "little")
    ro_compat = int.from_bytes(sb[100:104], "little")
    if incompat & ~0x0012 or ro_compat & ~0x0007:
        kind = "ext4"
    else:
        kind = "ext3" if compat & 0x0004 else "ext2"
    return Probe(kind, _text(sb[120:136]), _uuid(sb[104:120]))


def _squashfs(head: bytes) -> Probe | None:
    return Probe("squashfs") if head[:4] == b"hsqs" else None


def _xfs(head: bytes) -> Probe | None:
    return Probe("xfs", _text(head[108:120]), _uuid(head[32:48])) if head[:4] == b"XFSB" else None


def _btrfs(head: bytes) -> Probe | None:
    sb = head[65536:]
    if sb[64:72] != b"_BHRfS_M":
        return None
    return Probe("btrfs", _text(sb[299:555]), _uuid(sb[32:48]))


def _iso(head: bytes) -> Probe | None:
    return Probe("iso9660", _text(head[32808:32840]).rstrip()) if head[32769:32774] == b"CD001" else None


def _swap(head: bytes) -> Probe | None:
    for page in _SWAP_PAGE_SIZES:
        if head[page - 10 : page] in {b"SWAPSPACE2", b"SWAP-SPACE"}:
            return Probe("swap", _text(head[1052:1068]), _uuid(head[1036:1052]))
    return None


def _luks(head: bytes) -> Probe | None:
    if head[:6] != b"LUKS\xba\xbe":
        return None
    label = _text(head[24:72]) if head[6:8] == b"\x00\x02" else ""
    return Probe("luks", label, _text(head[168:208]))


def _lvm(head: bytes) -> Probe | None:
    return Probe("lvm2", "", "") if head[512:520] == b"LABELONE" else None


def _vfat(head: bytes) -> Probe | None:
    if head[510:512] != b"\x55\xaa":
        return None
    if head[82:87] == b"FAT32":
        return Probe("vfat", _text(head[71:82]).strip(), _serial(head[67:71]))
    if head[54:59] in {b"FAT16", b"FAT12"}:
        return Probe("vfat", _text(head[43:54]).strip(), _serial(head[39:43]))
    return None


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _uuid(raw: bytes) -> str:
    return str(uuid.UUID(bytes=raw)) if len(raw) == 16 else ""


def _serial(raw: bytes) -> str:
    return f"{raw[3]:02X}{raw[2]:02X}-{raw[1]:02X}{raw[0]:02X}"

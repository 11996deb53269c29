"""Which file system is this, by its own superblock: type, label, UUID.

Offsets: util-linux libblkid's superblock probes and each file system's on-disk documentation. udev's view is a
hint; this is what is on the disk. Reads at most the first 68 KiB and, for RAID members, 8 KiB near the end. A RAID
member or a LUKS or LVM container is told before the file system that may shine through it.
"""

import uuid
from dataclasses import dataclass
from itertools import pairwise

from cos_console.formats.readat import ReadAt

_MD_MAGIC = b"\xfc\x4e\x2b\xa9"
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
    member = _md(source, head)
    if member is not None:
        return member
    for look in (_luks, _lvm, _ext, _squashfs, _xfs, _btrfs, _iso, _swap, _vfat):
        found = look(head)
        if found is not None:
            return found
    return Probe("")


def _ext(head: bytes) -> Probe | None:
    sb = head[1024:2048]
    if sb[56:58] != b"\x53\xef":
        return None
    if sb[96:100] == b"\x08\0\0\0":
        return Probe("jbd", _text(sb[120:136]), _uuid(sb[104:120]))
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
    for at in range(0, 2048, 512):
        label = head[at : at + 512]
        if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001":
            place = int.from_bytes(label[20:24], "little")
            raw = label[place : place + 32].decode("ascii", "replace")
            cuts = (0, 6, 10, 14, 18, 22, 26, 32)
            return Probe("lvm2", "", "-".join(raw[a:b] for a, b in pairwise(cuts)))
    return None


def _md(source: ReadAt, head: bytes) -> Probe | None:
    """Linux software RAID: version 1.1 at the start, 1.2 at 4 KiB, 1.0 and 0.90 near the end."""
    size = source.size_bytes
    places = [head[:72], head[4096:4168]]
    if size >= 131072:
        late = (size // 512 - 16 & ~7) * 512
        places.append(source.read_at(late, 72))
        old = source.read_at((size & ~65535) - 65536, 72)
        if old[:8] == _MD_MAGIC + bytes(4):
            return Probe("md", "", _uuid(old[20:24] + old[52:64]))
    for raw in places:
        if raw[:8] == _MD_MAGIC + b"\1\0\0\0" and len(raw) == 72:
            return Probe("md", _text(raw[32:64]), _uuid(raw[16:32]))
    return None


def _vfat(head: bytes) -> Probe | None:
    if head[510:512] != b"\x55\xaa":
        return None
    if head[3:11] in {b"NTFS    ", b"EXFAT   "}:
        return Probe(head[3:11].decode().strip().lower())
    sector, cluster = int.from_bytes(head[11:13], "little"), head[13]
    plausible = sector in {512, 1024, 2048, 4096} and cluster and not cluster & cluster - 1
    if not plausible or head[16] not in {1, 2} or head[21] < 0xF0:
        return None  # a partition table, or a boot sector of something else
    if head[82:87] == b"FAT32":
        return Probe("vfat", _fat_label(head[71:82]), _serial(head[67:71]))
    if head[54:57] == b"FAT":
        return Probe("vfat", _fat_label(head[43:54]), _serial(head[39:43]))
    return None


def _fat_label(raw: bytes) -> str:
    label = _text(raw).strip()
    return "" if label == "NO NAME" else label


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _uuid(raw: bytes) -> str:
    return str(uuid.UUID(bytes=raw)) if len(raw) == 16 else ""


def _serial(raw: bytes) -> str:
    return f"{raw[3]:02X}{raw[2]:02X}-{raw[1]:02X}{raw[0]:02X}"

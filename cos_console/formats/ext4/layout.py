"""Where things lie on an ext4 file system that we write: geometry, superblock, group descriptors.

Source: Linux Documentation/filesystems/ext4. Features are those that GRUB 2.02 and every kernel of cOS read:
extents, filetype, flex_bg, sparse_super, large_file, huge_file, dir_nlink, extra_isize, ext_attr. Left out on
purpose: metadata_csum (a label is then one sector and can't tear), 64bit (32-bit block numbers reach 16 TiB),
a journal (the image is mounted read-only), dir_index (a linear directory needs no hash seed to be right).
Bitmaps and inode tables are packed at the front (flex_bg), so that file data gets one long run.
"""

import math
import struct
from dataclasses import dataclass

BLOCK = 4096
INODE = 256
GROUP_BLOCKS = 8 * BLOCK
FIRST_INODE = 11
LOST_FOUND = 11
ROOT = 2
_COMPAT = 0x0008  # ext_attr
_INCOMPAT = 0x0002 | 0x0040 | 0x0200  # filetype, extents, flex_bg
_RO_COMPAT = 0x0001 | 0x0002 | 0x0008 | 0x0020 | 0x0040  # sparse_super, large, huge, dir_nlink, extra_isize


@dataclass(frozen=True)
class Geometry:
    """Sizes of a file system of `blocks` blocks of 4096 bytes."""

    blocks: int
    groups: int
    inodes_per_group: int
    descriptor_blocks: int

    @property
    def inodes(self) -> int:
        return self.groups * self.inodes_per_group

    @property
    def table_blocks(self) -> int:
        """Blocks of one group's inode table."""
        return self.inodes_per_group * INODE // BLOCK

    def group_blocks(self, group: int) -> int:
        return min(GROUP_BLOCKS, self.blocks - group * GROUP_BLOCKS)

    def has_superblock(self, group: int) -> bool:
        return group <= 1 or any(_power(group, base) for base in (3, 5, 7))


@dataclass(frozen=True)
class Group:
    """Where one group's bitmaps and inode table lie (block numbers)."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int


def geometry(size_bytes: int) -> Geometry:
    """Raises ValueError under 1 MiB or over 16 TiB."""
    blocks = size_bytes // BLOCK
    if blocks < 256 or blocks >= 1 << 32:
        raise ValueError("an image is between 1 MiB and 16 TiB")
    groups = math.ceil(blocks / GROUP_BLOCKS)
    if groups > 1 and blocks % GROUP_BLOCKS and blocks % GROUP_BLOCKS < 64:
        blocks -= blocks % GROUP_BLOCKS  # a last group too small for anything is left out
        groups -= 1
    ratio = 4096 if size_bytes < 512 << 20 else 16384
    wanted = blocks * BLOCK // ratio
    per_group = max(64, math.ceil(wanted / groups / 64) * 64)
    return Geometry(blocks, groups, min(per_group, GROUP_BLOCKS), math.ceil(groups * 32 / BLOCK))


def place(geo: Geometry) -> tuple[tuple[Group, ...], tuple[tuple[int, int], ...]]:
    """Groups' metadata and the free runs (first, end) that are left, in order. Raises ValueError if too small."""
    reserved = [
        (g * GROUP_BLOCKS, g * GROUP_BLOCKS + 1 + geo.descriptor_blocks)
        for g in range(geo.groups)
        if geo.has_superblock(g)
    ]
    free: list[tuple[int, int]] = []
    at = 0
    for first, end in [*reserved, (geo.blocks, geo.blocks)]:
        if first > at:
            free.append((at, first))
        at = end

    def take(count: int) -> int:
        for n, (first, end) in enumerate(free):
            if end - first >= count:
                free[n] = (first + count, end)
                return first
        raise ValueError("the image is too small for its own tables")

    bitmaps = [(take(1), take(1)) for _ in range(geo.groups)]
    groups = tuple(Group(b, i, take(geo.table_blocks)) for b, i in bitmaps)
    return groups, tuple((a, b) for a, b in free if b > a)


@dataclass(frozen=True)
class Counts:
    """What the descriptors and the superblock state, per group."""

    free_blocks: tuple[int, ...]
    free_inodes: tuple[int, ...]
    directories: tuple[int, ...]


def descriptors(groups: tuple[Group, ...], counts: Counts) -> bytes:
    return b"".join(
        struct.pack(
            "<IIIHHHHIHHHH",
            g.block_bitmap,
            g.inode_bitmap,
            g.inode_table,
            counts.free_blocks[n],
            counts.free_inodes[n],
            counts.directories[n],
            0x4,  # the inode table is zeroed
            0,
            0,
            0,
            0,
            0,
        )
        for n, g in enumerate(groups)
    )


def superblock(
    geo: Geometry, counts: Counts, *, label: str, uuid: bytes, created_s: int, group: int = 0
) -> bytes:
    """1024 bytes. `group` is the one this copy stands in. Raises ValueError for a label over 16 bytes."""
    name = label.encode()
    if len(name) > 16:
        raise ValueError(f"a label has at most 16 bytes: {label}")
    sb = bytearray(1024)
    struct.pack_into(
        "<6I", sb, 0, geo.inodes, geo.blocks, 0, sum(counts.free_blocks), sum(counts.free_inodes), 0
    )
    struct.pack_into("<6I", sb, 24, 2, 2, GROUP_BLOCKS, GROUP_BLOCKS, geo.inodes_per_group, 0)
    # wtime, mount count, max mounts, magic, state clean, errors continue, minor, lastcheck, interval, OS, revision
    struct.pack_into("<IHhHHHHIIII", sb, 48, created_s, 0, -1, 0xEF53, 1, 1, 0, created_s, 0, 0, 1)
    struct.pack_into("<IHH3I", sb, 84, FIRST_INODE, INODE, group, _COMPAT, _INCOMPAT, _RO_COMPAT)
    sb[104:120] = uuid
    sb[120 : 120 + len(name)] = name
    struct.pack_into("<4I", sb, 236, *struct.unpack("<4I", uuid))  # hash seed, unused without dir_index
    struct.pack_into("<H", sb, 254, 32)
    struct.pack_into("<I", sb, 264, created_s)
    struct.pack_into("<HHI", sb, 348, 32, 32, 1)  # extra inode size wanted, at least; signed directory hash
    sb[372] = 4  # log2 of groups per flex group
    return bytes(sb)


def _power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1

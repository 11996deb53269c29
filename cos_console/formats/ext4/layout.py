"""Where things lie on an ext4 file system that we write: geometry, superblock, group descriptors.

Source: Linux Documentation/filesystems/ext4. Features are those that GRUB 2.02 and every kernel of cOS read:
extents, filetype, flex_bg, sparse_super, large_file, dir_nlink, extra_isize, ext_attr, dir_index. Left out on
purpose: metadata_csum (a label is then one sector and can't tear), 64bit (32-bit block numbers reach 16 TiB),
huge_file (no file has 2 TiB of blocks), a journal (the image is mounted read-only, and GRUB would not replay
it), resize_inode (nobody grows a slot).

flex_bg lets bitmaps and inode tables lie anywhere, so their place and the number of inodes are chosen last,
when the tree is known; only the superblock, its copies and the descriptors have places of their own.
"""

import math
import struct
from dataclasses import dataclass

BLOCK = 4096
INODE = 256
EXTRA_INODE = 32
"""Bytes of the inode's fields behind the first 128."""
GROUP_BLOCKS = 8 * BLOCK
FIRST_INODE = 11
LOST_FOUND = 11
ROOT = 2
MAX_LABEL = 16
_INODES_PER_BLOCK = BLOCK // INODE
_COMPAT = 0x0008 | 0x0020  # ext_attr, dir_index
_INCOMPAT = 0x0002 | 0x0040 | 0x0200  # filetype, extents, flex_bg
_RO_COMPAT = 0x0001 | 0x0002 | 0x0020 | 0x0040  # sparse_super, large_file, dir_nlink, extra_isize
_UNSIGNED_HASH = 0x0002
_HALF_MD4 = 1
_USER_XATTR_ACL = 0x0004 | 0x0008


@dataclass(frozen=True)
class Geometry:
    """Sizes of a file system of `blocks` blocks of 4096 bytes."""

    blocks: int
    groups: int
    descriptor_blocks: int

    def group_blocks(self, group: int) -> int:
        return min(GROUP_BLOCKS, self.blocks - group * GROUP_BLOCKS)

    def has_superblock(self, group: int) -> bool:
        return group <= 1 or any(_power(group, base) for base in (3, 5, 7))

    @property
    def fixed(self) -> list[tuple[int, int]]:
        """(first block, blocks) of the superblocks with the descriptors behind them."""
        return [
            (g * GROUP_BLOCKS, 1 + self.descriptor_blocks)
            for g in range(self.groups)
            if self.has_superblock(g)
        ]

    @property
    def free(self) -> list[tuple[int, int]]:
        """(first block, blocks) of all the rest."""
        return gaps(self.fixed, self.blocks)


@dataclass(frozen=True)
class Group:
    """Where one group's bitmaps and inode table lie (block numbers)."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int


@dataclass(frozen=True)
class Counts:
    """What the descriptors and the superblock state, per group."""

    inodes_per_group: int
    free_blocks: tuple[int, ...]
    free_inodes: tuple[int, ...]
    directories: tuple[int, ...]


def geometry(size_bytes: int) -> Geometry:
    """Raises ValueError under 1 MiB or over 16 TiB."""
    blocks = size_bytes // BLOCK
    if blocks < 256 or blocks >= 1 << 32:
        raise ValueError("an image is between 1 MiB and 16 TiB")
    groups = math.ceil(blocks / GROUP_BLOCKS)
    descriptor_blocks = math.ceil(groups * 32 / BLOCK)
    last = blocks % GROUP_BLOCKS
    if groups > 1 and 0 < last < 64 + descriptor_blocks:
        blocks -= last  # a last group too small for anything is left out
        groups -= 1
    return Geometry(blocks, groups, descriptor_blocks)


def inodes_per_group(geo: Geometry, used: int, spare_blocks: int) -> int:
    """Enough for `used` inodes and, where `spare_blocks` allow, a good deal more for who mounts it to repair.

    Raises ValueError when ext4 can't number so many in so few groups.
    """
    most = GROUP_BLOCKS  # bits of one bitmap block
    least = _whole(math.ceil(used / geo.groups))
    if least > most:
        raise ValueError(f"{used} files; an image of this size numbers {geo.groups * most}")
    wanted = max(used + used // 4 + 512, geo.blocks // 8)
    per_group = min(most, _whole(math.ceil(wanted / geo.groups)))
    affordable = spare_blocks // 4 // geo.groups * _INODES_PER_BLOCK
    return max(least, min(per_group, affordable))


def gaps(runs: list[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """(first, count) of what `runs` (sorted, not overlapping) leave free below `end`."""
    found = []
    at = 0
    for first, count in runs:
        if first > at:
            found.append((at, first - at))
        at = first + count
    if at < end:
        found.append((at, end - at))
    return found


def descriptors(groups: tuple[Group, ...], counts: Counts) -> bytes:
    """Whole blocks of descriptors of 32 bytes. No flags: those go with checksums, which we don't have."""
    table = b"".join(
        struct.pack(
            "<IIIHHHH",
            g.block_bitmap,
            g.inode_bitmap,
            g.inode_table,
            counts.free_blocks[n],
            counts.free_inodes[n],
            counts.directories[n],
            0,
        ).ljust(32, b"\0")
        for n, g in enumerate(groups)
    )
    return table + bytes(-len(table) % BLOCK)


def superblock(
    geo: Geometry, counts: Counts, *, label: str, uuid: bytes, created_s: int, group: int = 0
) -> bytes:
    """1024 bytes. `group` is the one this copy stands in. Raises ValueError for a label over 16 bytes."""
    name = label.encode()
    if len(name) > MAX_LABEL:
        raise ValueError(f"a label has at most {MAX_LABEL} bytes: {label}")
    created_s &= 0xFFFFFFFF
    inodes = geo.groups * counts.inodes_per_group
    sb = bytearray(1024)
    struct.pack_into("<6I", sb, 0, inodes, geo.blocks, 0, sum(counts.free_blocks), sum(counts.free_inodes), 0)
    struct.pack_into("<6I", sb, 24, 2, 2, GROUP_BLOCKS, GROUP_BLOCKS, counts.inodes_per_group, 0)
    # written, mounts, checked after -1 mounts, magic, clean, go on after errors, minor, checked, never again,
    # Linux, revision 1
    struct.pack_into("<IHhHHHHIIII", sb, 48, created_s, 0, -1, 0xEF53, 1, 1, 0, created_s, 0, 0, 1)
    struct.pack_into("<IHH3I", sb, 84, FIRST_INODE, INODE, group, _COMPAT, _INCOMPAT, _RO_COMPAT)
    sb[104:120] = uuid
    sb[120 : 120 + len(name)] = name
    sb[236:252] = uuid  # hash seed
    sb[252] = _HALF_MD4
    struct.pack_into("<II", sb, 256, _USER_XATTR_ACL, 0)
    struct.pack_into("<I", sb, 264, created_s)
    struct.pack_into("<HHI", sb, 348, EXTRA_INODE, EXTRA_INODE, _UNSIGNED_HASH)
    sb[372] = 4  # log2 of groups per flex group
    return bytes(sb)


def _whole(inodes: int) -> int:
    """Rounded up to whole blocks of the table, and not fewer than two (the kernel wants more than one)."""
    return max(2 * _INODES_PER_BLOCK, -(-inodes // _INODES_PER_BLOCK) * _INODES_PER_BLOCK)


def _power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, neighbours made one. Raises ValueError when two overlap."""
    found: list[tuple[int, int]] = []
    at = size = 0
    for first, count in sorted(runs):
        if first == at + size:
            size += count
            continue
        if first < at + size:
            raise ValueError(f"block {first} is used twice")
        if size:
            found.append((at, size))
        at, size = first, count
    if size:
        found.append((at, size))
    return found


def common(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What two sorted lists of runs share."""
    found = []
    n = 0
    for first, count in one:
        end = first + count
        while n < len(other) and other[n][0] + other[n][1] <= first:
            n += 1
        m = n
        while m < len(other) and other[m][0] < end:
            a, b = max(first, other[m][0]), min(end, other[m][0] + other[m][1])
            if a < b:
                found.append((a, b - a))
            m += 1
    return found

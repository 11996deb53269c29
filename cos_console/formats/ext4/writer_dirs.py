"""Directories as ext4 stores them: linear blocks, and a hash tree over them where there are many names.

Source: Linux Documentation/filesystems/ext4/directory.rst, fs/ext4/namei.c and hash.c. A directory of up to 16
blocks (some 2,500 names) stays linear: any reader takes it, and a look-up reads 64 KiB at worst. A larger one
gets an index, because a look-up in a linear directory of 100,000 names reads megabytes. GRUB steps over the
index's nodes, which look like empty entries. The legacy hash is used: each directory names its own, and this
one costs a few operations a byte.
"""

import struct
from collections.abc import Sequence

from cos_console.formats.ext4.layout import BLOCK
from cos_console.formats.readat import FormatError

LINEAR_BLOCKS = 16
_LEGACY = 0
_ROOT_LIMIT = (BLOCK - 32) // 8
_NODE_LIMIT = (BLOCK - 8) // 8
_DIRECTORY = 2
_ENTRY = struct.Struct("<IHBB")

Name = tuple[int, bytes, int]
"""(inode, name, file type)."""


def directory(inode: int, parent: int, names: Sequence[Name], *, least_blocks: int = 1) -> tuple[bytes, bool]:
    """Whole blocks, and whether they have an index (the inode's INDEX flag). Raises FormatError."""
    blocks = _pack([(inode, b".", _DIRECTORY), (parent, b"..", _DIRECTORY), *names])
    if len(blocks) > LINEAR_BLOCKS:
        return b"".join(_indexed(inode, parent, names)), True
    while len(blocks) < least_blocks:
        blocks.append(_ENTRY.pack(0, BLOCK, 0, 0).ljust(BLOCK, b"\0"))
    return b"".join(blocks), False


def name_hash(name: bytes) -> int:
    """dx_hack_hash_unsigned; the lowest bit is left to mark a hash that goes on in the next leaf."""
    before, last = 0x37ABE8F9, 0x12A3FE2D
    for byte in name:
        now = (before + (last ^ (byte * 7152373))) & 0xFFFFFFFF
        if now & 0x80000000:
            now -= 0x7FFFFFFF
        before, last = last, now
    return min((last << 1) & 0xFFFFFFFE, 0xFFFFFFFC)  # the highest value means the end


def _pack(names: Sequence[Name]) -> list[bytes]:
    pack = _ENTRY.pack
    blocks: list[bytes] = []
    parts: list[bytes] = []
    used = last = 0
    for inode, name, kind in names:
        length = (len(name) + 11) & ~3
        if used + length > BLOCK:
            blocks.append(_closed(parts, used, last))
            parts, used = [], 0
        parts.append(pack(inode, length, len(name), kind) + name + bytes(length - 8 - len(name)))
        used += length
        last = length
    blocks.append(_closed(parts, used, last))
    return blocks


def _closed(parts: list[bytes], used: int, last: int) -> bytes:
    """The last entry of a block reaches to its end."""
    tail = parts[-1]
    parts[-1] = tail[:4] + struct.pack("<H", BLOCK - used + last) + tail[6:]
    return b"".join(parts).ljust(BLOCK, b"\0")


def _indexed(inode: int, parent: int, names: Sequence[Name]) -> list[bytes]:
    """Root node, leaves in the order of their hashes, then inner nodes if the root can't name all leaves."""
    ordered = sorted((name_hash(n[1]), n) for n in names)
    leaves: list[bytes] = []
    index: list[tuple[int, int]] = []
    group: list[Name] = []
    used = 0
    first = 0
    previous = -1
    for number, name in ordered:
        length = (len(name[1]) + 11) & ~3
        if used + length > BLOCK:
            leaves += _pack(group)
            index.append((first, len(leaves)))
            group, used = [], 0
            first = number | (number == previous)
        group.append(name)
        used += length
        previous = number
    leaves += _pack(group)
    index.append((first, len(leaves)))
    levels = 0
    nodes: list[bytes] = []
    if len(index) > _ROOT_LIMIT:
        levels = 1
        upper = []
        for n in range(0, len(index), _NODE_LIMIT):
            part = index[n : n + _NODE_LIMIT]
            nodes.append(_ENTRY.pack(0, BLOCK, 0, 0) + _node(part, _NODE_LIMIT))
            upper.append((part[0][0], len(leaves) + len(nodes)))
        index = upper
        if len(index) > _ROOT_LIMIT:
            raise FormatError(f"{len(names)} names in one directory")
    root = _ENTRY.pack(inode, 12, 1, _DIRECTORY) + b".\0\0\0"
    root += _ENTRY.pack(parent, BLOCK - 12, 2, _DIRECTORY) + b"..\0\0"
    root += struct.pack("<IBBBB", 0, _LEGACY, 8, levels, 0)
    return [root + _node(index, _ROOT_LIMIT), *leaves, *nodes]


def _node(index: Sequence[tuple[int, int]], limit: int) -> bytes:
    """The first hash is not stored: limit and count stand in its place."""
    head = struct.pack("<HHI", limit, len(index), index[0][1])
    body = head + b"".join(struct.pack("<II", number, block) for number, block in index[1:])
    return body.ljust(limit * 8, b"\0")

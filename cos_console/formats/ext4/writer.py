"""A merged tree written as an ext4 file system: inodes, directories, attributes, bitmaps.

Source: Linux Documentation/filesystems/ext4. File content is on the disk already when this runs (its runs are
in the nodes); all the rest is written here, through `write(block, data)`. The same tree gives the same bytes.
"""

import stat as stat_module
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cos_console.formats.ext4 import layout, writer_dirs, writer_xattr
from cos_console.formats.ext4.layout import BLOCK, INODE, Counts, Geometry, Group
from cos_console.formats.layers import Node, Tree
from cos_console.formats.readat import FormatError

_TYPE = {
    stat_module.S_IFREG: 1,
    stat_module.S_IFDIR: 2,
    stat_module.S_IFCHR: 3,
    stat_module.S_IFBLK: 4,
    stat_module.S_IFIFO: 5,
    stat_module.S_IFLNK: 7,
}
# mode uid size atime ctime mtime dtime gid links sectors flags - i_block generation acl size_high -
# sectors_high acl_high uid_high gid_high - - extra_size - ctime+ mtime+ atime+ crtime crtime+ version_high project
_INODE = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHHHHIIIIIII")
_EXTENT_HEAD = struct.Struct("<HHHHI")
_EXTENT = struct.Struct("<IHHI")
_ONE_EXTENT = struct.Struct("<HHHHIIHHI")
_EXTENT_MAGIC = 0xF30A
_EXTENT_MOST = 32768
_EXTENTS_IN_BLOCK = (BLOCK - 12) // 12
_INDEX_FL, _EXTENTS_FL = 0x1000, 0x80000
_LINK_MAX = 65000
_MAX_FILE = BLOCK << 32
_LOST_FOUND_BLOCKS = 4
_TABLE_PIECE = 4096
"""Inodes packed at a time (1 MiB)."""

Runs = Sequence[tuple[int, int, int]]


class NoRoom(Exception):  # noqa: N818 - what the caller makes of it is a sentence
    """The file system is too small for its own tables and directories."""


@dataclass(frozen=True)
class Written:
    inodes: int
    directories: int
    files: int
    """Regular files, hard links counted once."""
    blocks: int
    """Blocks in use, metadata included."""
    dropped: tuple[str, ...]
    """Extended attributes that ext4 can't have, as `path: name`; the first 20."""


def claimed(geo: Geometry, tree: Tree) -> list[tuple[int, int]]:
    """(first block, blocks) in use by file content and superblocks; sorted. Raises ValueError on overlap."""
    runs = geo.fixed
    seen: set[int] = set()
    stack = [tree.root]
    while stack:
        for node in (stack.pop().children or {}).values():
            if node.children is not None:
                stack.append(node)
            elif node.runs and id(node) not in seen:
                seen.add(id(node))
                runs += [(first, count) for _, first, count in node.runs]
    return layout.joined(runs)


class Ext4Writer:
    """Writes one tree. `free` are runs (first block, blocks) that read as zeros, the best ones first."""

    def __init__(
        self,
        geo: Geometry,
        tree: Tree,
        used: Sequence[tuple[int, int]],
        free: Sequence[tuple[int, int]],
        write: Callable[[int, bytes], None],
    ) -> None:
        self._geo = geo
        self._tree = tree
        self._used = list(used)
        self._free = list(free)
        self._write = write
        self._order: list[Node] = []
        self._bodies: dict[int, tuple[bytes, int, int, int]] = {}
        """Inode to (i_block, size, blocks, flags) where it takes more than the node to know."""
        self._attributes: dict[int, tuple[bytes, int]] = {}
        """Inode to (bytes behind its fields, attribute block)."""
        self._parents: dict[int, int] = {}
        """Of directories, by inode."""
        self._dropped: list[str] = []
        self._directories: list[int] = []

    def write_tree(self, *, label: str, uuid: bytes, created_s: int) -> Written:
        """Everything but file content. Raises FormatError (too many inodes, a value that can't be), NoRoom."""
        self._number(created_s)
        self._store_attributes()
        for node in self._order:
            try:
                self._store_body(node)
            except FormatError as e:
                raise FormatError(f"{self._tree.path_of(node)}: {e}") from None
        groups, per_group = self._place_tables()
        self._write_inodes(groups, per_group, created_s)
        counts = self._write_bitmaps(groups, per_group)
        self._write_superblocks(groups, counts, label, uuid, created_s)
        return Written(
            inodes=len(self._order),
            directories=len(self._directories),
            files=sum(n.mode & 0o170000 == stat_module.S_IFREG for n in self._order),
            blocks=self._geo.blocks - sum(counts.free_blocks),
            dropped=tuple(self._dropped),
        )

    # --- numbering -------------------------------------------------------------------------------------------

    def _number(self, created_s: int) -> None:
        """Give every node its inode number and count its names."""
        root = self._tree.root
        assert root.children is not None  # noqa: S101 - the root is a directory
        lost = root.children.get(b"lost+found")
        if lost is None:
            lost = Node(stat_module.S_IFDIR | 0o700, created_s * 10**9, {})
            root.children[b"lost+found"] = lost
        elif not lost.is_dir:
            raise FormatError("lost+found: it must be a directory on ext4")
        for _, node in self._tree.walk():
            node.inode = node.names = 0
        root.inode, lost.inode = layout.ROOT, layout.LOST_FOUND
        number = layout.FIRST_INODE
        directories = [root]
        others: list[Node] = []
        for directory in directories:
            subdirectories = 0
            for child in (directory.children or {}).values():
                child.names += 1
                if child.children is not None:
                    subdirectories += 1
                if child.names > 1:
                    continue
                if child.inode == 0:
                    number += 1
                    child.inode = number
                (others if child.children is None else directories).append(child)
            names = 2 + subdirectories
            directory.names = names if names <= _LINK_MAX else 1
        self._order = sorted(directories + others, key=lambda node: node.inode)
        self._directories = sorted(d.inode for d in directories)

    # --- what the inodes point to ----------------------------------------------------------------------------

    def _store_body(self, node: Node) -> None:
        kind = node.mode & 0o170000
        if kind == stat_module.S_IFREG:
            if node.names > _LINK_MAX:
                raise FormatError(f"{node.names} names; ext4 allows {_LINK_MAX}")
            if node.size > _MAX_FILE - BLOCK:
                raise FormatError(f"{node.size} bytes; ext4 allows 16 TiB")
            if len(node.runs) > 1 or (node.runs and (node.runs[0][0] or node.runs[0][2] > _EXTENT_MOST)):
                self._place(node, node.runs, node.size)
        elif kind == stat_module.S_IFDIR:
            names = [
                (child.inode, name, _TYPE[child.mode & 0o170000])
                for name, child in (node.children or {}).items()
            ]
            parent = self._parents.get(node.inode, layout.ROOT)
            for child in (node.children or {}).values():
                if child.children is not None:
                    self._parents[child.inode] = node.inode
            least = _LOST_FOUND_BLOCKS if node.inode == layout.LOST_FOUND else 1
            data, indexed = writer_dirs.directory(node.inode, parent, names, least_blocks=least)
            self._place(node, self._store(data), len(data), _INDEX_FL if indexed else 0)
        elif kind == stat_module.S_IFLNK:
            size = len(node.link)
            if size >= BLOCK:
                raise FormatError(f"a symbolic link of {size} bytes; {BLOCK - 1} are allowed")
            if size < 60:
                self._bodies[node.inode] = (node.link, size, 0, 0)
            else:
                self._place(node, self._store(node.link), size)
        elif kind in {stat_module.S_IFCHR, stat_module.S_IFBLK}:
            self._bodies[node.inode] = (_device(node.major, node.minor), 0, 0, 0)
        else:
            self._bodies[node.inode] = (b"", 0, 0, 0)

    def _place(self, node: Node, runs: Runs, size: int, flags: int = 0) -> None:
        body, tree_blocks = self._extents(runs)
        blocks = sum(run[2] for run in runs) + tree_blocks
        self._bodies[node.inode] = (body, size, blocks, _EXTENTS_FL | flags)

    def _extents(self, runs: Runs) -> tuple[bytes, int]:
        """The tree's root for i_block, and how many blocks its other nodes took."""
        entries: list[bytes] = []
        starts: list[int] = []
        for logical, first, count in runs:
            for done in range(0, count, _EXTENT_MOST):
                part = min(count - done, _EXTENT_MOST)
                entries.append(_EXTENT.pack(logical + done, part, 0, first + done))
                starts.append(logical + done)
        depth = taken = 0
        while len(entries) > 4:
            upper, upper_starts = [], []
            for n in range(0, len(entries), _EXTENTS_IN_BLOCK):
                part_entries = entries[n : n + _EXTENTS_IN_BLOCK]
                head = _EXTENT_HEAD.pack(_EXTENT_MAGIC, len(part_entries), _EXTENTS_IN_BLOCK, depth, 0)
                block = self._store(head + b"".join(part_entries))[0][1]
                upper.append(struct.pack("<IIHH", starts[n], block, 0, 0))
                upper_starts.append(starts[n])
                taken += 1
            entries, starts, depth = upper, upper_starts, depth + 1
        return _EXTENT_HEAD.pack(_EXTENT_MAGIC, len(entries), 4, depth, 0) + b"".join(entries), taken

    def _store_attributes(self) -> None:
        """Equal attribute blocks are written once and shared, as the kernel does."""
        known: dict[tuple[tuple[tuple[bytes, bytes], ...], int], writer_xattr.Packed] = {}
        users: dict[bytes, list[int]] = {}
        for node in self._order:
            if not node.xattrs:
                continue
            key = (tuple(node.xattrs.items()), node.mode)
            packed = known.get(key)
            if packed is None:
                try:
                    packed = known[key] = writer_xattr.pack(node.xattrs, node.mode)
                except FormatError as e:
                    raise FormatError(f"{self._tree.path_of(node)}: {e}") from None
            node.mode = packed.mode
            for name in packed.dropped:
                if len(self._dropped) < 20:
                    self._dropped.append(f"{self._tree.path_of(node)}: {name.decode(errors='replace')}")
            if packed.inline:
                self._attributes[node.inode] = (packed.inline, 0)
            if packed.block:
                users.setdefault(packed.block, []).append(node.inode)
        for block, inodes in users.items():
            for n in range(0, len(inodes), writer_xattr.MAX_SHARED):
                part = inodes[n : n + writer_xattr.MAX_SHARED]
                place = self._store(writer_xattr.shared(block, len(part)))[0][1]
                for inode in part:
                    self._attributes[inode] = (self._attributes.get(inode, (b"", 0))[0], place)

    # --- room ------------------------------------------------------------------------------------------------

    def _store(self, data: bytes) -> list[tuple[int, int, int]]:
        """Put `data` into fresh blocks; its runs, counted from block 0 of the file. Raises NoRoom."""
        runs = []
        at = 0
        left = -(-len(data) // BLOCK)
        while left:
            if not self._free:
                raise NoRoom
            first, room = self._free[0]
            count = min(left, room)
            self._claim(0, count)
            piece = data[at * BLOCK : (at + count) * BLOCK]
            self._write(first, piece + bytes(-len(piece) % BLOCK))
            runs.append((at, first, count))
            at += count
            left -= count
        return runs

    def _claim(self, n: int, count: int) -> int:
        first, room = self._free[n]
        self._used.append((first, count))
        if count == room:
            del self._free[n]
        else:
            self._free[n] = (first + count, room - count)
        return first

    def _whole(self, count: int) -> int:
        for n, (_, room) in enumerate(self._free):
            if room >= count:
                return self._claim(n, count)
        raise NoRoom

    # --- tables ----------------------------------------------------------------------------------------------

    def _place_tables(self) -> tuple[tuple[Group, ...], int]:
        used = self._order[-1].inode
        spare = sum(count for _, count in self._free)
        try:
            per_group = layout.inodes_per_group(self._geo, used, spare)
        except ValueError as e:
            raise FormatError(str(e)) from None
        table_blocks = per_group * INODE // BLOCK
        bitmaps = [(self._whole(1), self._whole(1)) for _ in range(self._geo.groups)]
        return tuple(Group(b, i, self._whole(table_blocks)) for b, i in bitmaps), per_group

    def _write_inodes(self, groups: tuple[Group, ...], per_group: int, created_s: int) -> None:
        created, created_extra = _time(created_s * 10**9)
        table = bytearray()
        at = 1
        """Number of the inode that comes next in the table."""
        start = 1
        for node in [*self._order, None]:
            number = node.inode if node is not None else at
            while at <= number:
                # Tables are written a group at a time, and in pieces within it.
                index = (at - 1) % per_group
                end = node is None
                if table and (end or index == 0 or len(table) >= _TABLE_PIECE * INODE):
                    begun, offset = divmod(start - 1, per_group)
                    table += bytes(-len(table) % BLOCK)
                    self._write(groups[begun].inode_table + offset * INODE // BLOCK, bytes(table))
                    table.clear()
                    start = at
                if node is None:
                    break
                table += self._inode(node, created, created_extra) if at == number else bytes(INODE)
                at += 1

    def _inode(self, node: Node, created: int, created_extra: int) -> bytes:
        inode = node.inode
        body = self._bodies.get(inode)
        if body is not None:
            block, size, blocks, flags = body
        else:  # a file in one run, or an empty one
            size, flags = node.size, _EXTENTS_FL
            if node.runs:
                _, first, blocks = node.runs[0]
                block = _ONE_EXTENT.pack(_EXTENT_MAGIC, 1, 4, 0, 0, 0, blocks, 0, first)
            else:
                block = _EXTENT_HEAD.pack(_EXTENT_MAGIC, 0, 4, 0, 0)
                blocks = 0
        inline, attributes = self._attributes.get(inode, (b"", 0))
        sectors = (blocks + (1 if attributes else 0)) * (BLOCK // 512)
        if sectors >> 32:
            raise FormatError(f"{self._tree.path_of(node)}: more than 2 TiB of data in one file")
        seconds, extra = _time(node.mtime_ns)
        raw = _INODE.pack(
            node.mode,
            node.uid & 0xFFFF,
            size & 0xFFFFFFFF,
            seconds,
            created,
            seconds,
            0,
            node.gid & 0xFFFF,
            node.names,
            sectors,
            flags,
            0,
            block,
            0,
            attributes,
            size >> 32,
            0,
            0,
            0,
            node.uid >> 16,
            node.gid >> 16,
            0,
            0,
            layout.EXTRA_INODE,
            0,
            created_extra,
            extra,
            extra,
            created,
            created_extra,
            0,
            0,
        )
        return raw + (inline or _NO_ATTRIBUTES)

    def _write_bitmaps(self, groups: tuple[Group, ...], per_group: int) -> Counts:
        geo = self._geo
        bitmap = bytearray(geo.groups * BLOCK)
        for first, count in layout.joined(self._used):
            _set_bits(bitmap, first, count)
        used_inodes = self._order[-1].inode
        free_blocks, free_inodes = [], []
        directories = [0] * geo.groups
        for inode in self._directories:
            directories[(inode - 1) // per_group] += 1
        for n, group in enumerate(groups):
            blocks = geo.group_blocks(n)
            part = bytearray(bitmap[n * BLOCK : (n + 1) * BLOCK])
            free_blocks.append(blocks - int.from_bytes(part, "little").bit_count())
            _set_bits(part, blocks, layout.GROUP_BLOCKS - blocks)
            self._write(group.block_bitmap, bytes(part))
            inodes = max(0, min(per_group, used_inodes - n * per_group))
            free_inodes.append(per_group - inodes)
            inode_bits = bytearray(BLOCK)
            _set_bits(inode_bits, 0, inodes)
            _set_bits(inode_bits, per_group, layout.GROUP_BLOCKS - per_group)
            self._write(group.inode_bitmap, bytes(inode_bits))
        return Counts(per_group, tuple(free_blocks), tuple(free_inodes), tuple(directories))

    def _write_superblocks(
        self, groups: tuple[Group, ...], counts: Counts, label: str, uuid: bytes, created_s: int
    ) -> None:
        table = layout.descriptors(groups, counts)
        for n in range(self._geo.groups):
            if self._geo.has_superblock(n):
                sb = layout.superblock(
                    self._geo, counts, label=label, uuid=uuid, created_s=created_s, group=n
                )
                head = bytes(1024) + sb if n == 0 else sb
                self._write(n * layout.GROUP_BLOCKS, head.ljust(BLOCK, b"\0") + table)


_NO_ATTRIBUTES = bytes(INODE - 128 - layout.EXTRA_INODE)


def _device(major: int, minor: int) -> bytes:
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise FormatError(f"device {major}:{minor}; Linux numbers them up to 4095:1048575")
    if major < 256 and minor < 256:
        return struct.pack("<II", major << 8 | minor, 0)
    return struct.pack("<II", 0, (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12)


def _time(ns: int) -> tuple[int, int]:
    """(low 32 bits of the seconds, nanoseconds and two more bits of seconds); years 1901 to 2446."""
    seconds, nanoseconds = divmod(ns, 10**9)
    if not -(1 << 31) <= seconds < 1 << 31:
        seconds = max(-(1 << 31), min(seconds, (1 << 34) - (1 << 31) - 1))
    epoch = (seconds + (1 << 31)) >> 32
    return seconds & 0xFFFFFFFF, nanoseconds << 2 | epoch


def _set_bits(bits: bytearray, first: int, count: int) -> None:
    end = first + count
    while first < end and first & 7:
        bits[first >> 3] |= 1 << (first & 7)
        first += 1
    whole = (end - first) >> 3
    if whole > 0:
        bits[first >> 3 : (first >> 3) + whole] = b"\xff" * whole
        first += whole << 3
    while first < end:
        bits[first >> 3] |= 1 << (first & 7)
        first += 1

"""A merged tree written as an ext4 file system: inodes, directories, attributes, bitmaps.

Source: Linux Documentation/filesystems/ext4. File content is already on the disk when this runs (its runs are
in the nodes); what is written here is all the rest, through `write(block, data)`. Blocks for it come from
`allocate(count)`. POSIX ACLs have another form on disk than in the attribute (fs/ext4/acl.h).
"""

import stat as stat_module
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cos_console.formats.ext4 import layout
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
_PREFIXES = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
    (b"system.", 7),
)
_XATTR_MAGIC = struct.pack("<I", 0xEA020000)
_INODE_XATTR_ROOM = INODE - 128 - 32
_EXTENTS_FL = 0x80000
_LINK_MAX = 65000
_ACL_NAMED = (2, 8)  # ACL_USER, ACL_GROUP carry an id


@dataclass(frozen=True)
class Written:
    inodes: int
    directories: int
    blocks: int
    """Blocks in use, metadata included."""


class Ext4Writer:
    """Writes one tree. Blocks are numbers; `write` takes whole blocks at a block number."""

    def __init__(
        self,
        geo: Geometry,
        groups: tuple[Group, ...],
        allocate: Callable[[int], list[tuple[int, int]]],
        write: Callable[[int, bytes], None],
    ) -> None:
        self._geo = geo
        self._groups = groups
        self._allocate = allocate
        self._write = write
        self._inodes: list[bytes] = [b""] * (layout.FIRST_INODE + 1)
        self._directories: list[int] = []
        self._used: list[tuple[int, int]] = []
        self._attribute_blocks: dict[bytes, int] = {}

    def write_tree(self, tree: Tree, *, label: str, uuid: bytes, created_s: int) -> Written:
        """Everything but file content. Raises FormatError when the inodes don't suffice or a value can't be."""
        nodes = self._number(tree, created_s)
        for node, parent in nodes:
            self._inode(node, self._directory(node, parent) if node.is_dir else None)
        self._tables()
        return self._finish(label, uuid, created_s)

    # --- numbering -------------------------------------------------------------------------------------------

    def _number(self, tree: Tree, created_s: int) -> list[tuple[Node, int]]:
        """Give every node its inode number and count its names; (node, parent's number), root first."""
        root = tree.root
        assert root.children is not None  # noqa: S101 - the root is a directory
        lost = root.children.get(b"lost+found")
        if lost is None or not lost.is_dir:
            lost = Node(mode=stat_module.S_IFDIR | 0o700, mtime_ns=created_s * 10**9, children={})
            root.children[b"lost+found"] = lost
        for _, node in tree.walk():
            node.inode = node.names = 0
        root.inode, lost.inode = layout.ROOT, layout.LOST_FOUND
        number = layout.FIRST_INODE + 1
        found = [(root, layout.ROOT)]
        for node, _ in found:
            if node.children is None:
                continue
            for child in node.children.values():
                child.names += 1
                if child.names > 1:
                    continue
                if child is not lost:
                    child.inode = number
                    number += 1
                found.append((child, node.inode))
        if number - 1 > self._geo.inodes:
            raise FormatError(
                f"the image has {number - 1} entries; a file system of this size holds {self._geo.inodes}"
            )
        self._inodes = [b""] * number
        return found

    # --- one inode -------------------------------------------------------------------------------------------

    def _inode(self, node: Node, directory: Sequence[tuple[int, int, int]] | None) -> None:
        kind = stat_module.S_IFMT(node.mode)
        size, flags, extra_blocks = node.size, 0, 0
        runs: Sequence[tuple[int, int, int]] = node.runs
        body = b""
        if kind == stat_module.S_IFDIR:
            runs = directory or ()
            size = sum(r[2] for r in runs) * BLOCK
        elif kind == stat_module.S_IFLNK:
            size = len(node.link)
            if size < 60:
                body = node.link
            elif size >= BLOCK:
                raise FormatError(f"a symbolic link of {size} bytes; {BLOCK - 1} are allowed")
            else:
                runs = self._store(node.link)
        elif kind in {stat_module.S_IFCHR, stat_module.S_IFBLK}:
            size, runs = 0, ()
            body = _device(node.major, node.minor)
        elif kind == stat_module.S_IFIFO:
            size, runs = 0, ()
        if not body and kind in {stat_module.S_IFREG, stat_module.S_IFDIR, stat_module.S_IFLNK}:
            flags = _EXTENTS_FL
            body, extra_blocks = self._extents(runs)
        inline, block = self._attributes(node.xattrs)
        names = node.names
        if node.children is not None:
            subdirectories = sum(c.is_dir for c in node.children.values())
            names = 2 + subdirectories
            self._directories.append(node.inode)
            if names > _LINK_MAX:
                names = 1
        elif names > _LINK_MAX:
            raise FormatError(f"an inode with {names} names; ext4 allows {_LINK_MAX}")
        sectors = (sum(r[2] for r in runs) + extra_blocks + (1 if block else 0)) * (BLOCK // 512)
        self._used += [(first, count) for _, first, count in runs]
        seconds, extra = _time(node.mtime_ns)
        self._inodes[node.inode] = (
            struct.pack(
                "<HHIIIIIHHIII",
                node.mode,
                node.uid & 0xFFFF,
                size & 0xFFFFFFFF,
                seconds,
                seconds,
                seconds,
                0,
                node.gid & 0xFFFF,
                names,
                sectors & 0xFFFFFFFF,
                flags,
                0,
            )
            + body.ljust(60, b"\0")
            + struct.pack("<IIII", 0, block, size >> 32, 0)
            + struct.pack("<HHHHHH", sectors >> 32, 0, node.uid >> 16, node.gid >> 16, 0, 0)
            + struct.pack("<HHIIIIIII", 32, 0, extra, extra, extra, seconds, extra, 0, 0)
            + inline
        ).ljust(INODE, b"\0")

    def _extents(self, runs: Sequence[tuple[int, int, int]]) -> tuple[bytes, int]:
        """The tree's root for i_block, and how many blocks its other nodes took."""
        pieces: list[tuple[int, int, int]] = []
        for logical, first, count in runs:
            done = 0
            while done < count:
                part = min(count - done, 32768)
                pieces.append((logical + done, first + done, part))
                done += part
        entries = [
            struct.pack("<IHHI", at, count, first >> 32, first & 0xFFFFFFFF) for at, first, count in pieces
        ]
        starts = [at for at, _, _ in pieces]
        depth = taken = 0
        room = (BLOCK - 12) // 12
        while len(entries) > 4:
            next_entries, next_starts = [], []
            for n in range(0, len(entries), room):
                part_entries = entries[n : n + room]
                head = struct.pack("<HHHHI", 0xF30A, len(part_entries), room, depth, 0)
                block = self._store(head + b"".join(part_entries))[0][1]
                self._used.append((block, 1))
                next_entries.append(struct.pack("<IIHH", starts[n], block & 0xFFFFFFFF, block >> 32, 0))
                next_starts.append(starts[n])
                taken += 1
            entries, starts, depth = next_entries, next_starts, depth + 1
        return struct.pack("<HHHHI", 0xF30A, len(entries), 4, depth, 0) + b"".join(entries), taken

    def _store(self, data: bytes) -> list[tuple[int, int, int]]:
        """Put `data` into fresh blocks; its runs, counted from block 0 of the file."""
        runs = []
        at = 0
        for first, count in self._allocate(-(-len(data) // BLOCK)):
            piece = data[at * BLOCK : (at + count) * BLOCK]
            self._write(first, piece.ljust(count * BLOCK, b"\0"))
            runs.append((at, first, count))
            at += count
        return runs

    # --- attributes ------------------------------------------------------------------------------------------

    def _attributes(self, xattrs: dict[bytes, bytes] | None) -> tuple[bytes, int]:
        """Bytes behind the inode's extra fields, and the block for what has no room there (0: none)."""
        if not xattrs:
            return b"", 0
        entries = sorted(
            (
                (index, name, value)
                for key, raw in xattrs.items()
                for index, name, value in [_attribute(key, raw)]
            ),
            key=lambda e: (e[0], len(e[1]), e[1]),
        )
        inside: list[tuple[int, bytes, bytes]] = []
        outside: list[tuple[int, bytes, bytes]] = []
        room = _INODE_XATTR_ROOM - 4 - 4
        for entry in entries:
            need = 16 + _round(len(entry[1])) + _round(len(entry[2]))
            if need <= room:
                room -= need
                inside.append(entry)
            else:
                outside.append(entry)
        inline = _XATTR_MAGIC + _packed(inside, _INODE_XATTR_ROOM - 4, 0) if inside else b""
        if not outside:
            return inline, 0
        need = 32 + 4 + sum(16 + _round(len(n)) + _round(len(v)) for _, n, v in outside)
        if need > BLOCK:
            raise FormatError(f"extended attributes of {need} bytes on one file; {BLOCK} are allowed")
        body = _packed(outside, BLOCK - 32, 32, hashed=True)
        digest = 0
        for index, name, value in outside:
            digest = ((digest << 16) ^ (digest >> 16) ^ _entry_hash(index, name, value)) & 0xFFFFFFFF
        header = struct.pack("<IIIII", 0xEA020000, 1, 1, digest, 0).ljust(32, b"\0")
        block = self._store(header + body)[0][1]
        self._used.append((block, 1))
        return inline, block

    # --- directories -----------------------------------------------------------------------------------------

    def _directory(self, node: Node, parent: int) -> list[tuple[int, int, int]]:
        assert node.children is not None  # noqa: S101 - called for directories
        blocks: list[bytes] = []
        entries: list[tuple[int, bytes, int]] = []
        used = 0
        listed = [(node.inode, b".", 2), (parent, b"..", 2)]
        listed += [(c.inode, name, _TYPE[stat_module.S_IFMT(c.mode)]) for name, c in node.children.items()]
        for number, name, kind in listed:
            need = 8 + _round(len(name))
            if used + need > BLOCK:
                blocks.append(_directory_block(entries))
                entries, used = [], 0
            entries.append((number, name, kind))
            used += need
        blocks.append(_directory_block(entries))
        if node.inode == layout.LOST_FOUND:
            blocks += [struct.pack("<IHBB", 0, BLOCK, 0, 0).ljust(BLOCK, b"\0")] * 3
        return self._store(b"".join(blocks))

    # --- tables ----------------------------------------------------------------------------------------------

    def _tables(self) -> None:
        per_group = self._geo.inodes_per_group
        blank = bytes(INODE)
        for n, group in enumerate(self._groups):
            part = self._inodes[n * per_group + 1 : (n + 1) * per_group + 1]
            if part:
                data = b"".join(raw or blank for raw in part)
                self._write(group.inode_table, data + bytes(-len(data) % BLOCK))

    def _finish(self, label: str, uuid: bytes, created_s: int) -> Written:
        geo = self._geo
        bitmap = bytearray(geo.groups * BLOCK)
        for first, count in self._all_used():
            _set_bits(bitmap, first, count)
        total_inodes = len(self._inodes) - 1
        free_blocks, free_inodes, directories = [], [], []
        for n, group in enumerate(self._groups):
            blocks = geo.group_blocks(n)
            part = bytearray(bitmap[n * BLOCK : (n + 1) * BLOCK])
            in_use = int.from_bytes(part, "little").bit_count()
            free_blocks.append(blocks - in_use)
            _set_bits(part, blocks, GROUP_BITS - blocks)
            self._write(group.block_bitmap, bytes(part))
            inodes = max(0, min(geo.inodes_per_group, total_inodes - n * geo.inodes_per_group))
            free_inodes.append(geo.inodes_per_group - inodes)
            inode_bits = bytearray(BLOCK)
            _set_bits(inode_bits, 0, inodes)
            _set_bits(inode_bits, geo.inodes_per_group, GROUP_BITS - geo.inodes_per_group)
            self._write(group.inode_bitmap, bytes(inode_bits))
            low, high = n * geo.inodes_per_group, (n + 1) * geo.inodes_per_group
            directories.append(sum(low < d <= high for d in self._directories))
        counts = Counts(tuple(free_blocks), tuple(free_inodes), tuple(directories))
        table = layout.descriptors(self._groups, counts)
        table += bytes(-len(table) % BLOCK)
        for n in range(geo.groups):
            if geo.has_superblock(n):
                sb = layout.superblock(geo, counts, label=label, uuid=uuid, created_s=created_s, group=n)
                head = bytes(1024) + sb if n == 0 else sb
                self._write(n * GROUP_BITS, head.ljust(BLOCK, b"\0") + table)
        return Written(total_inodes, len(self._directories), geo.blocks - sum(free_blocks))

    def _all_used(self) -> Iterator[tuple[int, int]]:
        geo = self._geo
        for n, group in enumerate(self._groups):
            if geo.has_superblock(n):
                yield n * GROUP_BITS, 1 + geo.descriptor_blocks
            yield group.block_bitmap, 1
            yield group.inode_bitmap, 1
            yield group.inode_table, geo.table_blocks
        yield from self._used


GROUP_BITS = layout.GROUP_BLOCKS


def _directory_block(entries: list[tuple[int, bytes, int]]) -> bytes:
    parts = []
    at = 0
    for n, (number, name, kind) in enumerate(entries):
        length = 8 + _round(len(name)) if n + 1 < len(entries) else BLOCK - at
        parts.append((struct.pack("<IHBB", number, length, len(name), kind) + name).ljust(length, b"\0"))
        at += length
    return b"".join(parts)


def _attribute(key: bytes, raw: bytes) -> tuple[int, bytes, bytes]:
    for prefix, index in _PREFIXES:
        if index in {2, 3} and key == prefix:
            return index, b"", _acl(raw)
        if index not in {2, 3} and key.startswith(prefix) and len(key) > len(prefix):
            name = key[len(prefix) :]
            if len(name) > 255:
                break
            return index, name, raw
    raise FormatError(
        f"an extended attribute that ext4 can't hold: {key[:60].decode(errors='backslashreplace')}"
    )


def _acl(raw: bytes) -> bytes:
    """From the attribute's form (version 2, 8 bytes an entry) to the disk's (version 1, 4 or 8 bytes)."""
    if len(raw) < 4 or raw[:4] != b"\x02\0\0\0" or (len(raw) - 4) % 8:
        raise FormatError("a POSIX ACL that is none")
    out = struct.pack("<I", 1)
    for at in range(4, len(raw), 8):
        tag, permissions, owner = struct.unpack_from("<HHI", raw, at)
        out += struct.pack("<HH", tag, permissions)
        if tag in _ACL_NAMED:
            out += struct.pack("<I", owner)
    return out


def _packed(entries: list[tuple[int, bytes, bytes]], size: int, base: int, *, hashed: bool = False) -> bytes:
    """Entries from the front, values from the back; offsets count from `base` before the first entry."""
    head = b""
    values = b""
    for index, name, value in entries:
        padded = value + bytes(-len(value) % 4)
        values = padded + values
        offset = base + size - len(values) if value else 0
        mark = _entry_hash(index, name, value) if hashed else 0
        head += struct.pack("<BBHIII", len(name), index, offset, 0, len(value), mark)
        head += name + bytes(-len(name) % 4)
    return head + bytes(size - len(head) - len(values)) + values


def _entry_hash(_index: int, name: bytes, value: bytes) -> int:
    """fs/ext4/xattr.c ext4_xattr_hash_entry."""
    digest = 0
    for byte in name:
        digest = ((digest << 5) ^ (digest >> 27) ^ byte) & 0xFFFFFFFF
    padded = value + bytes(-len(value) % 4)
    for (word,) in struct.iter_unpack("<I", padded):
        digest = ((digest << 16) ^ (digest >> 16) ^ word) & 0xFFFFFFFF
    return digest


def _device(major: int, minor: int) -> bytes:
    if major < 256 and minor < 256:
        return struct.pack("<II", major << 8 | minor, 0)
    return struct.pack("<II", 0, (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12)


def _time(ns: int) -> tuple[int, int]:
    """(low 32 bits of the seconds, nanoseconds and two more bits of seconds); years 1901 to 2446."""
    seconds, nanoseconds = divmod(ns, 10**9)
    seconds = max(-(1 << 31), min(seconds, (1 << 34) - (1 << 31) - 1))
    epoch = (seconds - ((seconds + (1 << 31)) % (1 << 32) - (1 << 31))) >> 32
    return seconds & 0xFFFFFFFF, nanoseconds << 2 | epoch & 3


def _round(length: int) -> int:
    return (length + 3) & ~3


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

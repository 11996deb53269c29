"""ext2/3/4 read in user space: no mount, no write, no journal replay unless asked for.

Source: Linux Documentation/filesystems/ext4 (on-disk layout). Two looks at one disk: GRUB does not replay the
journal and reads unwritten extents as what was on the disk before (`journal="ignore"`, `unwritten="stale"`);
Linux replays and reads zeros (`journal="replay"`, `unwritten="zeros"`). The replay is in memory only.
Damage is a FormatError; every loop is bounded. Refused by name: bigalloc, encrypt, compression, casefold.
"""

import stat as stat_module
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cos_console.formats.ext4.blockmap import BlockMap, MappedFile, Run
from cos_console.formats.ext4.journal import Overlay, replay
from cos_console.formats.ext4.superblock import INCOMPAT_NAMES, Superblock, parse_superblock
from cos_console.formats.ext4.xattr import block_attributes, inode_attributes
from cos_console.formats.readat import BytesReadAt, FormatError, ReadAt

__all__ = ["Ext4", "Run", "Stat", "Superblock", "parse_superblock"]

_READABLE = 0x0002 | 0x0004 | 0x0010 | 0x0040 | 0x0080 | 0x0100 | 0x0200 | 0x0400 | 0x2000 | 0x4000 | 0x8000
_BIGALLOC = 0x0200
_EXTENTS_FL = 0x80000
_INLINE_FL = 0x10000000
_ROOT_INODE = 2
_SYMLINKS = 40
_MAX_DIRECTORY = 256 << 20
_MAX_DEPTH = 64


@dataclass(frozen=True)
class Stat:
    inode: int
    mode: int
    uid: int
    gid: int
    size_bytes: int
    allocated_bytes: int
    links: int
    mtime: int
    mtime_ns: int = 0
    """Whole seconds in ext2/3 with small inodes and in squashfs."""

    @property
    def is_dir(self) -> bool:
        return stat_module.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat_module.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat_module.S_ISLNK(self.mode)


@dataclass(frozen=True)
class _Inode:
    number: int
    raw: bytes
    mode: int
    size: int
    flags: int

    @property
    def i_block(self) -> bytes:
        return self.raw[40:100]


class Ext4:
    """An opened file system. Paths are relative to its root, with or without a leading slash."""

    def __init__(self, source: ReadAt, superblock: Superblock, *, stale: bool = False) -> None:
        self._source = source
        self._stale = stale
        self.superblock = superblock
        self._tables: dict[int, int] = {}

    @classmethod
    def open(
        cls,
        source: ReadAt,
        *,
        journal: Literal["ignore", "replay"] = "ignore",
        unwritten: Literal["zeros", "stale"] = "zeros",
    ) -> "Ext4":
        """Raises FormatError when this is no ext file system, one with features that are not read here, or one
        whose journal Linux would refuse to replay."""
        superblock = parse_superblock(source.read_at(1024, 1024))
        unknown = superblock.incompat & ~_READABLE
        if unknown:
            names = [INCOMPAT_NAMES.get(1 << b, hex(1 << b)) for b in range(32) if unknown >> b & 1]
            raise FormatError(f"ext4 feature not read here: {', '.join(names)}")
        if superblock.ro_compat & _BIGALLOC:
            raise FormatError("ext4 feature not read here: bigalloc")
        stale = unwritten == "stale"
        fs = cls(source, superblock, stale=stale)
        if journal == "replay" and superblock.needs_recovery and superblock.journal_inode:
            log = fs._open_inode(fs._inode(superblock.journal_inode))
            found = replay(log)
            if found.places:
                if found.block_bytes != superblock.block_bytes:
                    raise FormatError("the journal's blocks are of another size than the file system's")
                overlay = Overlay(source, log, found)
                fs = cls(overlay, parse_superblock(overlay.read_at(1024, 1024)), stale=stale)
        return fs

    # --- looking up ------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Whether `path` leads to something, symlinks followed inside this root."""
        try:
            self._resolve(path)
        except FileNotFoundError:
            return False
        return True

    def stat(self, path: str) -> Stat:
        """Symlinks followed. Raises FileNotFoundError, FormatError."""
        return self._stat(self._resolve(path))

    def lstat(self, path: str) -> Stat:
        return self._stat(self._resolve(path, follow_last=False))

    def readlink(self, path: str) -> str:
        return self._link_target(self._resolve(path, follow_last=False)).decode("utf-8", "surrogateescape")

    def listdir(self, path: str = "/") -> tuple[str, ...]:
        """Names without . and .., sorted. Raises FileNotFoundError, NotADirectoryError, FormatError."""
        inode = self._resolve(path)
        if not stat_module.S_ISDIR(inode.mode):
            raise NotADirectoryError(path)
        names = (n.decode("utf-8", "surrogateescape") for n, _ in self._entries(inode))
        return tuple(sorted(n for n in names if n not in {".", ".."}))

    def read_file(self, path: str, limit: int = 1 << 20) -> bytes:
        """At most `limit` bytes of a regular file. Raises FileNotFoundError, FormatError."""
        file = self.open_file(path)
        return file.read_at(0, min(limit, file.size_bytes))

    def open_file(self, path: str) -> ReadAt:
        """A regular file as a source, so that an image in it can be opened in turn."""
        inode = self._resolve(path)
        if not stat_module.S_ISREG(inode.mode):
            raise FormatError(f"{path} is not a regular file")
        return self._open_inode(inode)

    def runs(self, path: str) -> tuple[Run, ...]:
        """Where the file's blocks lie, in order; holes are left out, unwritten extents are marked."""
        return tuple(self._runs(self._resolve(path)))

    def xattrs(self, path: str) -> dict[bytes, bytes]:
        """Name to value as getxattr gives them; of a symlink at the end of `path`, its own. FormatError."""
        found = self._attributes(self._resolve(path, follow_last=False))
        return {name: value for name, value in found.items() if name != b"system.data"}

    def walk(self, path: str = "/") -> Iterator[tuple[str, Stat]]:
        """Every path below `path` with its lstat, directories before what is in them, symlinks not followed."""
        top = path.strip("/")
        yield from self._walk(self._resolve(path), f"/{top}" if top else "", 0)

    def _walk(self, directory: _Inode, prefix: str, depth: int) -> Iterator[tuple[str, Stat]]:
        if depth > _MAX_DEPTH:
            raise FormatError(f"directories nested more than {_MAX_DEPTH} deep")
        entries = sorted((n, i) for n, i in self._entries(directory) if n not in {b".", b".."})
        for name, number in entries:
            inode = self._inode(number)
            path = f"{prefix}/{name.decode('utf-8', 'surrogateescape')}"
            yield path, self._stat(inode)
            if stat_module.S_ISDIR(inode.mode):
                yield from self._walk(inode, path, depth + 1)

    def _stat(self, inode: _Inode) -> Stat:
        raw = inode.raw
        uid = struct.unpack_from("<H", raw, 2)[0] | struct.unpack_from("<H", raw, 120)[0] << 16
        gid = struct.unpack_from("<H", raw, 24)[0] | struct.unpack_from("<H", raw, 122)[0] << 16
        blocks = struct.unpack_from("<I", raw, 28)[0] | struct.unpack_from("<H", raw, 116)[0] << 32
        mtime_ns = int(struct.unpack_from("<i", raw, 16)[0]) * 1_000_000_000
        if len(raw) >= 140 and struct.unpack_from("<H", raw, 128)[0] >= 12:
            extra = int(struct.unpack_from("<I", raw, 136)[0])  # two bits of epoch, thirty of nanoseconds
            mtime_ns += ((extra & 3) << 32) * 1_000_000_000 + (extra >> 2)
        return Stat(
            inode=inode.number,
            mode=inode.mode,
            uid=uid,
            gid=gid,
            size_bytes=inode.size,
            allocated_bytes=blocks * (self.superblock.block_bytes if inode.flags & 0x40000 else 512),
            links=struct.unpack_from("<H", raw, 26)[0],
            mtime=mtime_ns // 1_000_000_000,
            mtime_ns=mtime_ns,
        )

    def _resolve(self, path: str, *, follow_last: bool = True) -> _Inode:
        todo = [p for p in path.encode("utf-8", "surrogateescape").split(b"/") if p and p != b"."]
        trail = [self._inode(_ROOT_INODE)]
        links = 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            if not stat_module.S_ISDIR(trail[-1].mode):
                raise FileNotFoundError(path)
            number = next((n for entry, n in self._entries(trail[-1]) if entry == name), None)
            if number is None:
                raise FileNotFoundError(path)
            inode = self._inode(number)
            if stat_module.S_ISLNK(inode.mode) and (todo or follow_last):
                links += 1
                if links > _SYMLINKS:
                    raise FormatError(f"{path}: more than {_SYMLINKS} symbolic links")
                target = self._link_target(inode)
                if target.startswith(b"/"):
                    trail = trail[:1]
                todo = [p for p in target.split(b"/") if p and p != b"."] + todo
                continue
            trail.append(inode)
        return trail[-1]

    def _link_target(self, inode: _Inode) -> bytes:
        if not stat_module.S_ISLNK(inode.mode):
            raise FormatError("not a symbolic link")
        if inode.size > 4096:
            raise FormatError("a symbolic link longer than 4096 bytes")
        if inode.size < 60 and not inode.flags & _EXTENTS_FL:
            return inode.i_block[: inode.size]
        return self._open_inode(inode).read_at(0, inode.size)

    # --- inodes ----------------------------------------------------------------------------------------------

    def _inode(self, number: int) -> _Inode:
        sb = self.superblock
        if not 1 <= number <= sb.inodes:
            raise FormatError(f"inode {number} is out of range")
        group, index = divmod(number - 1, sb.inodes_per_group)
        at = self._inode_table(group) * sb.block_bytes + index * sb.inode_bytes
        raw = self._source.read_at(at, sb.inode_bytes)
        if len(raw) < 128:
            raise FormatError(f"inode {number} lies outside the file system")
        mode, _, size_low = struct.unpack_from("<HHI", raw, 0)
        (flags,) = struct.unpack_from("<I", raw, 32)
        (size_high,) = struct.unpack_from("<I", raw, 108)
        return _Inode(number, raw, mode, size_low | size_high << 32, flags)

    def _inode_table(self, group: int) -> int:
        if group in self._tables:
            return self._tables[group]
        sb = self.superblock
        per_block = sb.block_bytes // sb.descriptor_bytes
        block, index = divmod(group, per_block)
        if sb.incompat & 0x10 and block >= sb.first_meta_bg:
            first = block * per_block
            place = sb.first_data_block + first * sb.blocks_per_group + (1 if self._has_super(first) else 0)
        else:
            place = sb.first_data_block + 1 + block
        at = place * sb.block_bytes + index * sb.descriptor_bytes
        raw = self._source.read_at(at, sb.descriptor_bytes)
        if len(raw) < 32:
            raise FormatError(f"the descriptor of group {group} lies outside the file system")
        (table,) = struct.unpack_from("<I", raw, 8)
        if sb.descriptor_bytes >= 64:
            table |= int(struct.unpack_from("<I", raw, 40)[0]) << 32
        if not 0 < table < sb.blocks:
            raise FormatError(f"the inode table of group {group} lies outside the file system")
        self._tables[group] = table
        return int(table)

    def _has_super(self, group: int) -> bool:
        if not self.superblock.ro_compat & 1 or group <= 1:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def _entries(self, inode: _Inode) -> Iterator[tuple[bytes, int]]:
        """(name, inode number) of a directory; index blocks of a hashed one look like empty entries."""
        if not stat_module.S_ISDIR(inode.mode):
            raise FormatError(f"inode {inode.number} is not a directory")
        if inode.size > _MAX_DIRECTORY:
            raise FormatError("a directory larger than 256 MiB")
        if inode.flags & _INLINE_FL:
            yield from self._block_entries(inode.i_block[4:], len(inode.i_block) - 4)
            more = self._attributes(inode).get(b"system.data", b"")
            yield from self._block_entries(more, len(more))
            return
        file = self._open_inode(inode)
        size = self.superblock.block_bytes
        for at in range(0, inode.size, size):
            yield from self._block_entries(file.read_at(at, size), size)

    @staticmethod
    def _block_entries(block: bytes, size: int) -> Iterator[tuple[bytes, int]]:
        at = 0
        while at + 8 <= min(size, len(block)):
            number, length, name_length = struct.unpack_from("<IHB", block, at)
            if size == 65536 and length in {0, 65535}:
                length = 65536
            if length < 8 or length & 3 or at + length > size or name_length + 8 > length:
                raise FormatError("a directory entry of impossible length")
            if number and name_length:
                yield block[at + 8 : at + 8 + name_length], number
            at += length

    # --- data ------------------------------------------------------------------------------------------------

    def _open_inode(self, inode: _Inode) -> ReadAt:
        if inode.flags & _INLINE_FL:
            data = inode.i_block + self._attributes(inode).get(b"system.data", b"")
            if inode.size > len(data):
                raise FormatError("inline data shorter than its file")
            return BytesReadAt(data[: inode.size])
        runs = tuple(self._runs(inode))
        return MappedFile(self._source, inode.size, self.superblock.block_bytes, runs, stale=self._stale)

    def _runs(self, inode: _Inode) -> tuple[Run, ...]:
        if inode.flags & _INLINE_FL:
            return ()
        if not (
            stat_module.S_ISREG(inode.mode)
            or stat_module.S_ISDIR(inode.mode)
            or stat_module.S_ISLNK(inode.mode)
        ):
            return ()
        blocks = BlockMap(self._block, self.superblock.block_bytes, self.superblock.blocks)
        return (
            blocks.extents(inode.i_block)
            if inode.flags & _EXTENTS_FL
            else blocks.mapped(inode.i_block, inode.size)
        )

    def _attributes(self, inode: _Inode) -> dict[bytes, bytes]:
        found = inode_attributes(inode.raw, self._attribute_value)
        low, high = struct.unpack_from("<I", inode.raw, 104)[0], struct.unpack_from("<H", inode.raw, 118)[0]
        if low | high:
            found |= block_attributes(self._block(high << 32 | low), self._attribute_value)
        return found

    def _attribute_value(self, number: int) -> bytes:
        inode = self._inode(number)
        if inode.size > 65536 or inode.flags & _INLINE_FL:
            raise FormatError("an extended attribute larger than 64 KiB")
        return self._open_inode(inode).read_at(0, inode.size)

    def _block(self, number: int) -> bytes:
        size = self.superblock.block_bytes
        if not 0 < number < self.superblock.blocks:
            raise FormatError("a block outside the file system")
        block = self._source.read_at(number * size, size)
        if len(block) != size:
            raise FormatError("a block outside the file system")
        return block


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1

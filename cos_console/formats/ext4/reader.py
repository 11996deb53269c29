"""ext2/3/4 read in user space: no mount, no write, no journal replay unless asked for.

Source: Linux Documentation/filesystems/ext4 (on-disk layout). `journal="ignore"` is what GRUB sees, which does
not replay; `journal="replay"` is what Linux sees after a mount (the journal is applied in memory only).
Damage is a FormatError; every loop is bounded by the size of the source.
"""

import stat as stat_module
import struct
import uuid
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cos_console.formats.ext4.journal import Overlay, replayed_blocks
from cos_console.formats.readat import FormatError, ReadAt

_INCOMPAT_KNOWN = {
    0x0001: "compression",
    0x0002: "filetype",
    0x0004: "needs_recovery",
    0x0008: "journal_dev",
    0x0010: "meta_bg",
    0x0040: "extents",
    0x0080: "64bit",
    0x0100: "mmp",
    0x0200: "flex_bg",
    0x0400: "ea_inode",
    0x1000: "dirdata",
    0x2000: "csum_seed",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}
_READABLE = 0x0002 | 0x0004 | 0x0010 | 0x0040 | 0x0080 | 0x0100 | 0x0200 | 0x0400 | 0x2000 | 0x4000 | 0x8000
_BIGALLOC = 0x0200
_EXTENTS_FL = 0x80000
_INLINE_FL = 0x10000000
_ROOT_INODE = 2
_SYMLINKS = 40
_MAX_DIRECTORY = 256 << 20


@dataclass(frozen=True)
class Superblock:
    """The fields of the primary superblock that we use. Times are seconds since 1970, sizes in bytes."""

    label: str
    uuid: str
    block_bytes: int
    blocks: int
    free_blocks: int
    reserved_blocks: int
    inodes: int
    blocks_per_group: int
    inodes_per_group: int
    inode_bytes: int
    first_data_block: int
    descriptor_bytes: int
    clean: bool
    errors: bool
    needs_recovery: bool
    mkfs_time: int
    write_time: int
    compat: int
    incompat: int
    ro_compat: int
    first_meta_bg: int
    journal_inode: int

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.block_bytes


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
class Run:
    """`length` blocks of a file from its block `logical`, lying at `physical`."""

    logical: int
    length: int
    physical: int
    written: bool = True


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


def parse_superblock(raw: bytes) -> Superblock:
    """From the 1024 bytes at offset 1024. Raises FormatError."""
    if len(raw) < 1024 or raw[56:58] != b"\x53\xef":
        raise FormatError("no ext2/3/4 superblock")
    (inodes, blocks, reserved, free) = struct.unpack_from("<4I", raw, 0)
    first_data, log_block = struct.unpack_from("<II", raw, 20)
    (bpg,) = struct.unpack_from("<I", raw, 32)
    (ipg,) = struct.unpack_from("<I", raw, 40)
    (wtime,) = struct.unpack_from("<I", raw, 48)
    state, _ = struct.unpack_from("<HH", raw, 58)
    (revision,) = struct.unpack_from("<I", raw, 76)
    inode_bytes = struct.unpack_from("<H", raw, 88)[0] if revision else 128
    compat, incompat, ro_compat = struct.unpack_from("<3I", raw, 92)
    (journal_inode,) = struct.unpack_from("<I", raw, 224)
    descriptor = struct.unpack_from("<H", raw, 254)[0] if incompat & 0x80 else 32
    (first_meta,) = struct.unpack_from("<I", raw, 260)
    (mkfs_time,) = struct.unpack_from("<I", raw, 264)
    if incompat & 0x80:
        high = struct.unpack_from("<3I", raw, 336)
        blocks |= high[0] << 32
        reserved |= high[1] << 32
        free |= high[2] << 32
    if log_block > 6:
        raise FormatError(f"impossible block size 2^{10 + log_block}")
    block_bytes = 1024 << log_block
    if not (bpg and ipg) or inode_bytes < 128 or inode_bytes > block_bytes or inode_bytes & (inode_bytes - 1):
        raise FormatError("the superblock's geometry is impossible")
    if descriptor < 32 or descriptor > block_bytes or blocks <= first_data:
        raise FormatError("the superblock's geometry is impossible")
    return Superblock(
        label=raw[120:136].split(b"\0", 1)[0].decode("utf-8", "replace"),
        uuid=str(uuid.UUID(bytes=raw[104:120])),
        block_bytes=block_bytes,
        blocks=blocks,
        free_blocks=free,
        reserved_blocks=reserved,
        inodes=inodes,
        blocks_per_group=bpg,
        inodes_per_group=ipg,
        inode_bytes=inode_bytes,
        first_data_block=first_data,
        descriptor_bytes=descriptor,
        clean=bool(state & 1),
        errors=bool(state & 2),
        needs_recovery=bool(incompat & 4),
        mkfs_time=mkfs_time,
        write_time=wtime,
        compat=compat,
        incompat=incompat,
        ro_compat=ro_compat,
        first_meta_bg=first_meta,
        journal_inode=journal_inode,
    )


class Ext4:
    """An opened file system. Paths are relative to its root, with or without a leading slash."""

    def __init__(self, source: ReadAt, superblock: Superblock) -> None:
        self._source = source
        self.superblock = superblock
        self._tables: dict[int, int] = {}

    @classmethod
    def open(cls, source: ReadAt, *, journal: Literal["ignore", "replay"] = "ignore") -> "Ext4":
        """Raises FormatError when this is no ext file system or one with features that are not read here."""
        superblock = parse_superblock(source.read_at(1024, 1024))
        unknown = superblock.incompat & ~_READABLE
        if unknown:
            names = [_INCOMPAT_KNOWN.get(1 << b, hex(1 << b)) for b in range(32) if unknown >> b & 1]
            raise FormatError(f"ext4 feature not read here: {', '.join(names)}")
        if superblock.ro_compat & _BIGALLOC:
            raise FormatError("ext4 feature not read here: bigalloc")
        fs = cls(source, superblock)
        if journal == "replay" and superblock.needs_recovery and superblock.journal_inode:
            log = fs._open_inode(fs._inode(superblock.journal_inode))
            overlay = Overlay(source, superblock.block_bytes, replayed_blocks(log))
            fs = cls(overlay, parse_superblock(overlay.read_at(1024, 1024)))
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

    def _stat(self, inode: _Inode) -> Stat:
        raw = inode.raw
        uid = struct.unpack_from("<H", raw, 2)[0] | struct.unpack_from("<H", raw, 120)[0] << 16
        gid = struct.unpack_from("<H", raw, 24)[0] | struct.unpack_from("<H", raw, 122)[0] << 16
        blocks = struct.unpack_from("<I", raw, 28)[0] | struct.unpack_from("<H", raw, 116)[0] << 32
        return Stat(
            inode=inode.number,
            mode=inode.mode,
            uid=uid,
            gid=gid,
            size_bytes=inode.size,
            allocated_bytes=blocks * (self.superblock.block_bytes if inode.flags & 0x40000 else 512),
            links=struct.unpack_from("<H", raw, 26)[0],
            mtime=struct.unpack_from("<i", raw, 16)[0],
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
        if inode.size > _MAX_DIRECTORY:
            raise FormatError("a directory larger than 256 MiB")
        if inode.flags & _INLINE_FL:
            yield from self._block_entries(inode.i_block[4:], len(inode.i_block) - 4)
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
            if length < 8 or at + length > size:
                raise FormatError("a directory entry of impossible length")
            if number and name_length:
                yield block[at + 8 : at + 8 + name_length], number
            at += length

    # --- data ------------------------------------------------------------------------------------------------

    def _open_inode(self, inode: _Inode) -> ReadAt:
        if inode.flags & _INLINE_FL:
            return _Inline(inode.i_block[: min(inode.size, 60)], inode.size)
        return _File(self._source, inode.size, self.superblock.block_bytes, tuple(self._runs(inode)))

    def _runs(self, inode: _Inode) -> Iterator[Run]:
        if inode.flags & _INLINE_FL:
            return
        if inode.flags & _EXTENTS_FL:
            runs = list(self._extent_node(inode.i_block, 5))
        else:
            runs = list(self._mapped(inode))
        end = -1
        for run in runs:
            if run.logical < end or run.physical + run.length > self.superblock.blocks or run.physical == 0:
                raise FormatError(f"inode {inode.number} has an impossible block map")
            end = run.logical + run.length
            yield run

    def _extent_node(self, node: bytes, depth_left: int) -> Iterator[Run]:
        magic, entries, _, depth = struct.unpack_from("<4H", node, 0)
        if magic != 0xF30A or depth > depth_left or 12 + entries * 12 > len(node):
            raise FormatError("invalid extent tree")
        for n in range(entries):
            if depth == 0:
                logical, length, high, low = struct.unpack_from("<IHHI", node, 12 + n * 12)
                written = length <= 32768
                yield Run(logical, length if written else length - 32768, high << 32 | low, written)
            else:
                _, low, high = struct.unpack_from("<IIH", node, 12 + n * 12)
                yield from self._extent_node(self._block(high << 32 | low), depth - 1)

    def _mapped(self, inode: _Inode) -> Iterator[Run]:
        """ext2/3 block map: 12 direct, then single, double and triple indirect."""
        count = -(-inode.size // self.superblock.block_bytes)
        current: Run | None = None
        for logical, physical in self._map_numbers(inode.i_block, count):
            if physical == 0:
                continue
            if (
                current
                and current.logical + current.length == logical
                and current.physical + current.length == physical
            ):
                current = Run(current.logical, current.length + 1, current.physical)
            else:
                if current:
                    yield current
                current = Run(logical, 1, physical)
        if current:
            yield current

    def _map_numbers(self, i_block: bytes, count: int) -> Iterator[tuple[int, int]]:
        numbers = struct.unpack("<15I", i_block)
        per_block = self.superblock.block_bytes // 4
        yield from ((n, numbers[n]) for n in range(min(12, count)))
        at = 12
        for level in (1, 2, 3):
            if at >= count:
                return
            yield from self._indirect(numbers[11 + level], level, at, count)
            at += per_block**level

    def _indirect(self, block: int, level: int, at: int, count: int) -> Iterator[tuple[int, int]]:
        if block == 0:
            return
        per_block = self.superblock.block_bytes // 4
        for n, number in enumerate(struct.unpack(f"<{per_block}I", self._block(block))):
            logical = at + n * per_block ** (level - 1)
            if logical >= count:
                return
            if level == 1:
                yield logical, number
            else:
                yield from self._indirect(number, level - 1, logical, count)

    def _block(self, number: int) -> bytes:
        size = self.superblock.block_bytes
        if not 0 < number < self.superblock.blocks:
            raise FormatError("a block outside the file system")
        block = self._source.read_at(number * size, size)
        if len(block) != size:
            raise FormatError("a block outside the file system")
        return block


class _Inline:
    def __init__(self, data: bytes, size: int) -> None:
        if size > len(data):
            raise FormatError("inline data that goes on in an attribute is not read here")
        self._data = data

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class _File:
    """A file's bytes through its runs; holes and unwritten extents read as zeros, as Linux reads them."""

    def __init__(self, source: ReadAt, size: int, block_bytes: int, runs: tuple[Run, ...]) -> None:
        self._source = source
        self._size = size
        self._block = block_bytes
        self._runs = runs
        self._starts = [r.logical * block_bytes for r in runs]

    @property
    def size_bytes(self) -> int:
        return self._size

    def _end(self, index: int) -> int:
        return self._starts[index] + self._runs[index].length * self._block

    def read_at(self, offset: int, length: int) -> bytes:
        if offset >= self._size or length <= 0:
            return b""
        length = min(length, self._size - offset)
        end = offset + length
        parts: list[bytes] = []
        index = max(0, bisect_right(self._starts, offset) - 1)
        while offset < end:
            while (
                index < len(self._runs)
                and self._starts[index] + self._runs[index].length * self._block <= offset
            ):
                index += 1
            if index >= len(self._runs):
                parts.append(bytes(end - offset))
                break
            run, start = self._runs[index], self._starts[index]
            if start > offset:
                hole = min(start, end) - offset
                parts.append(bytes(hole))
                offset += hole
                continue
            take = min(end, start + run.length * self._block) - offset
            if run.written:
                data = self._source.read_at(run.physical * self._block + offset - start, take)
                parts.append(data + bytes(take - len(data)))
            else:
                parts.append(bytes(take))
            offset += take
        return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1

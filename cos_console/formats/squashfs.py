"""squashfs 4.0 read in user space: no mount, no unsquashfs.

Source: Linux Documentation/filesystems/squashfs.rst and fs/squashfs/squashfs_fs.h (all fields little endian).
gzip, xz and zstd are read; lzma, lzo and lz4 are refused by name. Damage is a FormatError: every unpacked
block is bounded by the format's own limit, every list by the bytes that could hold it.
"""

import lzma
import stat as stat_module
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import zstandard

from cos_console.formats.ext4.reader import Stat
from cos_console.formats.readat import FormatError, ReadAt

_MAGIC = b"hsqs"
_METADATA = 8192
_NO_XATTRS = 0xFFFFFFFF
_XATTR_PREFIX = {0: "user.", 1: "trusted.", 2: "security."}
_XATTR_ELSEWHERE = 0x100
_MAX_XATTRS, _MAX_XATTR = 1024, 64 << 10
_NO_FRAGMENT, _NO_TABLE = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_COMPRESSORS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
_DIR, _REG, _SYMLINK, _LDIR, _LREG, _LSYMLINK = 1, 2, 3, 8, 9, 10
_KINDS = {
    1: stat_module.S_IFDIR,
    2: stat_module.S_IFREG,
    3: stat_module.S_IFLNK,
    4: stat_module.S_IFBLK,
    5: stat_module.S_IFCHR,
    6: stat_module.S_IFIFO,
    7: stat_module.S_IFSOCK,
}
_SYMLINKS = 40
_MAX_LISTING = 64 << 20
_MAX_BLOCKS = 4 << 20
_LZMA_MEMORY = 64 << 20
_CACHED_METADATA, _CACHED_DATA = 64, 4


@dataclass(frozen=True)
class Superblock:
    """`mkfs_time` in seconds since 1970; `used_bytes` is the length of the file system without padding."""

    inodes: int
    mkfs_time: int
    block_bytes: int
    fragments: int
    compressor: str
    ids: int
    root: int
    used_bytes: int
    id_table: int
    inode_table: int
    directory_table: int
    fragment_table: int
    xattr_table: int


@dataclass(frozen=True)
class _Inode:
    number: int
    kind: int
    """1 to 7: the extended kinds are folded into the basic ones."""
    mode: int
    uid_index: int
    gid_index: int
    mtime: int
    links: int = 1
    size: int = 0
    start: int = 0
    """Directory: metadata block of its listing. File: byte offset of its first block."""
    offset: int = 0
    """Directory: place in that block. File: place in its fragment."""
    fragment: int = _NO_FRAGMENT
    target: bytes = b""
    block_sizes_at: tuple[int, int] = (0, 0)
    device: int = 0
    xattrs: int = _NO_XATTRS
    """Index in the attribute table."""


@dataclass(frozen=True)
class Entry:
    """One name of the tree, with all that an archive of it needs."""

    path: str
    """Relative, without a leading slash; empty for the root. Bytes that are no UTF-8 as surrogates."""
    stat: Stat
    target: str
    """Of a symbolic link."""
    device: tuple[int, int]
    """(major, minor)"""
    xattrs: dict[str, bytes]
    content: ReadAt | None
    """Of a regular file."""


def parse_superblock(raw: bytes) -> Superblock:
    """From the first 96 bytes. Raises FormatError."""
    if len(raw) < 96 or raw[:4] != _MAGIC:
        raise FormatError("no squashfs superblock")
    inodes, made, block, fragments = struct.unpack_from("<4I", raw, 4)
    compressor, log, _, ids, major, minor = struct.unpack_from("<6H", raw, 20)
    root, used, id_table, xattr_table, inode_table, directory_table, fragment_table, _ = struct.unpack_from(
        "<8Q", raw, 32
    )
    if (major, minor) != (4, 0):
        raise FormatError(f"squashfs {major}.{minor} is not read here, only 4.0")
    if not 12 <= log <= 20 or block != 1 << log:
        raise FormatError(f"squashfs with an impossible block size {block}")
    if not 96 <= inode_table < directory_table <= used:
        raise FormatError("squashfs with impossible table places")
    name = _COMPRESSORS.get(compressor, str(compressor))
    return Superblock(
        inodes, made, block, fragments, name, ids, root, used, id_table, inode_table, directory_table,
        fragment_table, xattr_table,
    )  # fmt: skip


class Squashfs:
    """An opened file system. Paths are relative to its root, with or without a leading slash."""

    def __init__(self, source: ReadAt, superblock: Superblock) -> None:
        self.superblock = superblock
        self._source = source
        self._unpack = _unpacker(superblock.compressor)
        self._metadata: OrderedDict[int, tuple[bytes, int]] = OrderedDict()
        self._data: OrderedDict[int, bytes] = OrderedDict()

    @classmethod
    def open(cls, source: ReadAt) -> "Squashfs":
        """Raises FormatError when this is no squashfs 4.0, is cut short, or its compressor is not read here."""
        superblock = parse_superblock(source.read_at(0, 96))
        if superblock.used_bytes > source.size_bytes:
            raise FormatError(
                f"squashfs of {superblock.used_bytes} bytes is cut short at {source.size_bytes} bytes"
            )
        return cls(source, superblock)

    # --- looking up ------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        """Whether `path` leads to something, symlinks followed inside this root."""
        try:
            self._resolve(path)
        except FileNotFoundError:
            return False
        return True

    def stat(self, path: str) -> Stat:
        """Symlinks followed. `allocated_bytes` is what the bytes take unpacked. FileNotFoundError, FormatError."""
        return self._stat(self._resolve(path))

    def lstat(self, path: str) -> Stat:
        return self._stat(self._resolve(path, follow_last=False))

    def readlink(self, path: str) -> str:
        inode = self._resolve(path, follow_last=False)
        if inode.kind != _SYMLINK:
            raise FormatError("not a symbolic link")
        return inode.target.decode("utf-8", "surrogateescape")

    def listdir(self, path: str = "/") -> tuple[str, ...]:
        """Names, sorted. Raises FileNotFoundError, NotADirectoryError, FormatError."""
        inode = self._resolve(path)
        if inode.kind != _DIR:
            raise NotADirectoryError(path)
        return tuple(sorted(n.decode("utf-8", "surrogateescape") for n, _ in self._entries(inode)))

    def read_file(self, path: str, limit: int = 1 << 20) -> bytes:
        """At most `limit` bytes of a regular file. Raises FileNotFoundError, FormatError."""
        file = self.open_file(path)
        return file.read_at(0, min(limit, file.size_bytes))

    def open_file(self, path: str) -> ReadAt:
        """A regular file as a source, so that an image in it can be opened in turn."""
        inode = self._resolve(path)
        if inode.kind != _REG:
            raise FormatError(f"{path} is not a regular file")
        return self._open(inode)

    def _stat(self, inode: _Inode) -> Stat:
        return Stat(
            inode=inode.number,
            mode=inode.mode,
            uid=self._id(inode.uid_index),
            gid=self._id(inode.gid_index),
            size_bytes=len(inode.target) if inode.kind == _SYMLINK else inode.size,
            allocated_bytes=inode.size,
            links=inode.links,
            mtime=inode.mtime,
            mtime_ns=inode.mtime * 1_000_000_000,
        )

    def _resolve(self, path: str, *, follow_last: bool = True) -> _Inode:
        todo = [p for p in path.encode("utf-8", "surrogateescape").split(b"/") if p and p != b"."]
        trail = [self._inode(self.superblock.root)]
        links = 0
        while todo:
            name = todo.pop(0)
            if name == b"..":
                trail = trail[: max(1, len(trail) - 1)]
                continue
            if trail[-1].kind != _DIR:
                raise FileNotFoundError(path)
            reference = next((r for entry, r in self._entries(trail[-1]) if entry == name), None)
            if reference is None:
                raise FileNotFoundError(path)
            inode = self._inode(reference)
            if inode.kind == _SYMLINK and (todo or follow_last):
                links += 1
                if links > _SYMLINKS:
                    raise FormatError(f"{path}: more than {_SYMLINKS} symbolic links")
                if inode.target.startswith(b"/"):
                    trail = trail[:1]
                todo = [p for p in inode.target.split(b"/") if p and p != b"."] + todo
                continue
            trail.append(inode)
        return trail[-1]

    def walk(self) -> Iterator[Entry]:
        """Everything, parents first, names in the directory's order. Raises FormatError."""
        root = self._inode(self.superblock.root)
        yield self._entry("", root)
        stack, directories = [("", root)], 0
        while stack:
            base, directory = stack.pop()
            directories += 1
            if directories > self.superblock.inodes:
                raise FormatError("squashfs directories that contain each other")
            for raw, reference in self._entries(directory):
                name = raw.decode("utf-8", "surrogateescape")
                if name in {".", ".."} or "/" in name:
                    raise FormatError("a squashfs name that is no name")
                inode = self._inode(reference)
                path = f"{base}/{name}" if base else name
                yield self._entry(path, inode)
                if inode.kind == _DIR:
                    stack.append((path, inode))

    def _entry(self, path: str, inode: _Inode) -> Entry:
        minor = inode.device & 0xFF | inode.device >> 12 & 0xFFF00  # linux/kdev_t.h, new_decode_dev
        return Entry(
            path,
            self._stat(inode),
            inode.target.decode("utf-8", "surrogateescape"),
            (inode.device >> 8 & 0xFFF, minor),
            self._attributes(inode.xattrs),
            self._open(inode) if inode.kind == _REG else None,
        )

    # --- metadata --------------------------------------------------------------------------------------------

    def _block(self, at: int) -> tuple[bytes, int]:
        """The metadata block at byte `at` and where the next one begins."""
        if at in self._metadata:
            self._metadata.move_to_end(at)
            return self._metadata[at]
        head = self._source.read_at(at, 2) if 0 < at < self.superblock.used_bytes else b""
        if len(head) < 2:
            raise FormatError("a squashfs metadata block lies outside the file system")
        (word,) = struct.unpack("<H", head)
        length = word & 0x7FFF
        raw = self._source.read_at(at + 2, length)
        if not 0 < length <= _METADATA or len(raw) < length:
            raise FormatError("a squashfs metadata block of impossible length")
        data = raw if word & 0x8000 else self._unpack(raw, _METADATA)
        if not data:
            raise FormatError("an empty squashfs metadata block")
        self._metadata[at] = data, at + 2 + length
        if len(self._metadata) > _CACHED_METADATA:
            self._metadata.popitem(last=False)
        return data, at + 2 + length

    def _read(self, at: int, offset: int, length: int) -> tuple[bytes, tuple[int, int]]:
        """`length` unpacked bytes from `offset` in the metadata block `at`, and the place behind them."""
        parts: list[bytes] = []
        while True:
            block, following = self._block(at)
            if offset > len(block):
                raise FormatError("a squashfs reference points behind its block")
            piece = block[offset : offset + length]
            parts.append(piece)
            length -= len(piece)
            offset += len(piece)
            if not length:
                return b"".join(parts), (at, offset)
            at, offset = following, 0

    def _inode(self, reference: int) -> _Inode:
        at, offset = self.superblock.inode_table + (reference >> 16), reference & 0xFFFF
        if at >= self.superblock.directory_table:
            raise FormatError("a squashfs inode outside the inode table")
        raw, place = self._read(at, offset, 16)
        kind, mode, uid, gid, mtime, number = struct.unpack("<4HII", raw)
        if not 1 <= kind <= 14:
            raise FormatError(f"a squashfs inode of unknown kind {kind}")
        basic = kind if kind < 8 else kind - 7
        make = partial(_Inode, number, basic, _KINDS[basic] | mode & 0o7777, uid, gid, mtime)

        def more(fmt: str) -> tuple[int, ...]:
            nonlocal place
            fields, place = self._read(*place, struct.calcsize(fmt))
            return struct.unpack(fmt, fields)

        if kind == _DIR:
            start, links, size, offset, _ = more("<IIHHI")
            return make(links, size, start, offset)
        if kind == _LDIR:
            links, size, start, _, _, offset, xattrs = more("<4IHHI")
            return make(links, size, start, offset, xattrs=xattrs)
        if kind == _REG:
            start, fragment, offset, size = more("<4I")
            return make(1, size, start, offset, fragment, block_sizes_at=place)
        if kind == _LREG:
            start, size, _, links, fragment, offset, xattrs = more("<3Q4I")
            return make(links, size, start, offset, fragment, block_sizes_at=place, xattrs=xattrs)
        if basic == _SYMLINK:
            links, size = more("<II")
            if size > 4096:
                raise FormatError("a symbolic link longer than 4096 bytes")
            target, place = self._read(*place, size)
            xattrs = more("<I")[0] if kind == _LSYMLINK else _NO_XATTRS
            return make(links, size, target=target, xattrs=xattrs)
        (links,) = more("<I")
        device = more("<I")[0] if basic in (4, 5) else 0
        return make(links, device=device, xattrs=more("<I")[0] if kind > 7 else _NO_XATTRS)

    def _entries(self, inode: _Inode) -> Iterator[tuple[bytes, int]]:
        """(name, inode reference) of a directory, whose size counts 3 bytes that are not there."""
        left = inode.size - 3
        if left <= 0:
            return
        if left > _MAX_LISTING:
            raise FormatError("a squashfs directory larger than 64 MiB")
        place = self.superblock.directory_table + inode.start, inode.offset
        while left > 0:
            head, place = self._read(*place, 12)
            left -= 12
            count, start, _ = struct.unpack("<3I", head)
            if count > 255:
                raise FormatError("a squashfs directory header counts more than 256 entries")
            for _ in range(count + 1):
                raw, place = self._read(*place, 8)
                offset, _, _, length = struct.unpack("<HhHH", raw)
                if length > 255:
                    raise FormatError("a squashfs name longer than 256 bytes")
                name, place = self._read(*place, length + 1)
                left -= 8 + length + 1
                if left < 0:
                    raise FormatError("a squashfs directory longer than its size")
                yield name, start << 16 | offset

    def _table_entry(self, table: int, index: int, width: int) -> bytes:
        """Entry `index` of a table that lies in metadata blocks, found through a list of their places."""
        if table in {0, _NO_TABLE}:
            raise FormatError("squashfs has no such table")
        block, within = divmod(index * width, _METADATA)
        raw = self._source.read_at(table + block * 8, 8)
        if table >= self.superblock.used_bytes or len(raw) < 8:
            raise FormatError("a squashfs table lies outside the file system")
        return self._read(struct.unpack("<Q", raw)[0], within, width)[0]

    def _id(self, index: int) -> int:
        if index >= self.superblock.ids:
            raise FormatError("a squashfs owner is not in the table")
        return int.from_bytes(self._table_entry(self.superblock.id_table, index, 4), "little")

    def _attributes(self, index: int) -> dict[str, bytes]:
        """Extended attributes: a table of (reference, count, bytes), found through a list of its blocks."""
        table = self.superblock.xattr_table
        if index == _NO_XATTRS or table == _NO_TABLE:
            return {}
        head = self._source.read_at(table, 16)
        if table >= self.superblock.used_bytes or len(head) < 16:
            raise FormatError("the squashfs attribute table lies outside the file system")
        start, count = struct.unpack_from("<QI", head)
        if index >= count:
            raise FormatError("squashfs attributes are not in the table")
        reference, entries, _ = struct.unpack("<QII", self._table_entry(table + 16, index, 16))
        if entries > _MAX_XATTRS:
            raise FormatError(f"more than {_MAX_XATTRS} attributes of one squashfs file")
        place = start + (reference >> 16), reference & 0xFFFF
        found: dict[str, bytes] = {}
        for _ in range(entries):
            raw, place = self._read(*place, 4)
            kind, length = struct.unpack("<HH", raw)
            name, place = self._read(*place, length)
            raw, place = self._read(*place, 4)
            (size,) = struct.unpack("<I", raw)
            prefix = _XATTR_PREFIX.get(kind & 0xFF)
            if prefix is None or size > _MAX_XATTR:
                raise FormatError("a squashfs attribute of unknown kind or impossible size")
            value, place = self._read(*place, size)
            if kind & _XATTR_ELSEWHERE:
                if size != 8:
                    raise FormatError("a squashfs attribute points nowhere")
                (other,) = struct.unpack("<Q", value)
                raw, there = self._read(start + (other >> 16), other & 0xFFFF, 4)
                (size,) = struct.unpack("<I", raw)
                if size > _MAX_XATTR:
                    raise FormatError("a squashfs attribute of impossible size")
                value, _ = self._read(*there, size)
            found[prefix + name.decode("utf-8", "surrogateescape")] = value
        return found

    # --- data ------------------------------------------------------------------------------------------------

    def _open(self, inode: _Inode) -> ReadAt:
        size, block = inode.size, self.superblock.block_bytes
        tail = inode.fragment != _NO_FRAGMENT
        count = size // block if tail else -(-size // block)
        if count > _MAX_BLOCKS:
            raise FormatError("a squashfs file of more than 4 million blocks")
        raw, _ = self._read(*inode.block_sizes_at, count * 4) if count else (b"", (0, 0))
        sizes = struct.unpack(f"<{count}I", raw)
        places = list(accumulate((s & 0xFFFFFF for s in sizes), initial=inode.start))
        fragment: tuple[int, int, int] | None = None
        if tail and size % block:
            if inode.fragment >= self.superblock.fragments:
                raise FormatError("a squashfs fragment is not in the table")
            entry = self._table_entry(self.superblock.fragment_table, inode.fragment, 16)
            at, word, _ = struct.unpack("<QII", entry)
            fragment = at, word, inode.offset
        return _File(self._unpacked, size, block, sizes=sizes, places=places, fragment=fragment)

    def _unpacked(self, at: int, word: int) -> bytes:
        """The data block at byte `at`; `word` is its size on disk, bit 24 set when it is not compressed."""
        if at in self._data:
            self._data.move_to_end(at)
            return self._data[at]
        length, limit = word & 0xFFFFFF, self.superblock.block_bytes
        if length > limit or at + length > self.superblock.used_bytes:
            raise FormatError("a squashfs data block lies outside the file system")
        raw = self._source.read_at(at, length)
        if len(raw) < length:
            raise FormatError("a squashfs data block lies outside the file system")
        data = raw if word & 0x1000000 else self._unpack(raw, limit)
        self._data[at] = data
        if len(self._data) > _CACHED_DATA:
            self._data.popitem(last=False)
        return data


class _File:
    def __init__(
        self,
        unpacked: Callable[[int, int], bytes],
        size: int,
        block: int,
        *,
        sizes: tuple[int, ...],
        places: list[int],
        fragment: tuple[int, int, int] | None,
    ) -> None:
        self._unpacked = unpacked
        self._size = size
        self._block = block
        self._sizes = sizes
        self._places = places
        self._fragment = fragment

    @property
    def size_bytes(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        if offset >= self._size or length <= 0:
            return b""
        end = min(self._size, offset + length)
        parts: list[bytes] = []
        while offset < end:
            index, within = divmod(offset, self._block)
            take = min(end - offset, self._block - within)
            parts.append(self._piece(index, within, take))
            offset += take
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _piece(self, index: int, within: int, take: int) -> bytes:
        if index < len(self._sizes):
            if self._sizes[index] == 0:
                return bytes(take)
            data = self._unpacked(self._places[index], self._sizes[index])
        elif self._fragment is not None:
            at, word, start = self._fragment
            data, within = self._unpacked(at, word), within + start
        else:
            raise FormatError("a squashfs file without its last block")
        piece = data[within : within + take]
        if len(piece) < take:
            raise FormatError("a squashfs block unpacks to less than its file needs")
        return piece


def _unpacker(name: str) -> Callable[[bytes, int], bytes]:
    """A function from packed bytes and the most they may unpack to, which refuses more."""
    unpack = {"gzip": _unpack_gzip, "xz": _unpack_xz, "zstd": _unpack_zstd}.get(name)
    if unpack is None:
        raise FormatError(f"squashfs compressed with {name} is not read here, only gzip, xz and zstd")
    chosen = unpack

    def bounded(raw: bytes, limit: int) -> bytes:
        try:
            data = chosen(raw, limit + 1)
        except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
            raise FormatError(f"a squashfs block does not unpack: {error}") from error
        if len(data) > limit:
            raise FormatError("a squashfs block unpacks to more than the format allows")
        return data

    return bounded


def _unpack_gzip(raw: bytes, most: int) -> bytes:
    stream = zlib.decompressobj()
    data = stream.decompress(raw, most)
    if not stream.eof and len(data) < most:
        raise EOFError("cut short")
    return data


def _unpack_xz(raw: bytes, most: int) -> bytes:
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY)
    data = stream.decompress(raw, most)
    if not stream.eof and len(data) < most:
        raise EOFError("cut short")
    return data


def _unpack_zstd(raw: bytes, most: int) -> bytes:
    stream = zstandard.ZstdDecompressor(max_window_size=8 << 20)
    with stream.stream_reader(raw) as reader:
        data = bytearray()
        while len(data) < most and (piece := reader.read(most - len(data))):
            data += piece
        return bytes(data)

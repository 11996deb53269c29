"""Tar streams as container layers have them, read once, forwards, strictly.

Sources: POSIX.1-2001 pax (records of `x` and `g` headers), the GNU tar manual ("Basic Tar Format", "Storing
Sparse Files": old GNU, 0.0, 0.1 and 1.0), star's SCHILY.xattr.* and libarchive's LIBARCHIVE.xattr.* records,
OCI image spec layer.md. A wrong checksum, a stream that ends early, a number or a name that can't be:
FormatError with the entry named. File content is not touched here: `store` takes it out of the stream.
"""

import base64
import binascii
import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from isal import isal_zlib

from cos_console.formats.readat import FormatError

BLOCK = 512
MAX_NAME = 4095
MAX_PAX = 1 << 20
"""Bytes of one extension header, as Go's archive/tar has it."""
MAX_ENTRIES = 1_000_000
MAX_SPARSE_PARTS = 100_000

REGULAR, HARDLINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = (
    b"0",
    b"1",
    b"2",
    b"3",
    b"4",
    b"5",
    b"6",
)
_KINDS = frozenset({REGULAR, HARDLINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO})
_EXTENSIONS = frozenset({b"x", b"g", b"L", b"K"})

_ZERO = bytes(BLOCK)
# name mode uid gid size mtime checksum kind link magic major minor prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_SCHILY, _LIBARCHIVE = b"SCHILY.xattr.", b"LIBARCHIVE.xattr."
_ADLER = 65521
_TIME = re.compile(rb"(-?)(\d{1,19})(?:\.(\d*))?")

Runs = tuple[tuple[int, int, int], ...]
"""(first block in the file, first block on the file system, blocks): what `store` made of a file's content."""

Parts = tuple[tuple[int, int], ...]
"""(offset in the file, bytes) of the ranges of a sparse file that have data, in order."""


class TarEntry(NamedTuple):
    """One member. `name` and `link` are as written, `size` is what the file will have, holes included."""

    name: bytes
    kind: bytes
    mode: int
    """Permission bits only, set-id and sticky bits included."""
    uid: int
    gid: int
    mtime_ns: int
    size: int
    link: bytes
    xattrs: dict[bytes, bytes] | None
    major: int
    minor: int
    runs: Runs


class ByteStream:
    """Chunks of bytes of any length as one stream. Who is in a hurry reads `data` from `at` on by himself."""

    __slots__ = ("_later", "_later_at", "_next", "at", "data")

    def __init__(self, next_chunk: Callable[[], bytes]) -> None:
        self._next = next_chunk
        self.data = b""
        self.at = 0
        # Where two chunks meet, `data` is a short bridge over the seam; the chunk goes on here behind it.
        self._later = b""
        self._later_at = 0

    def ensure(self, length: int) -> bool:
        """Have `length` bytes in `data` from `at` on; False when the stream ends before."""
        have = len(self.data) - self.at
        if have >= length:
            return True
        parts = [self.data[self.at :]] if have else []
        while True:
            chunk, at = self._later, self._later_at
            if at == len(chunk):
                chunk, at = self._next(), 0
            if not parts and len(chunk) - at >= length:
                self.data, self.at = chunk, at
                self._later, self._later_at = b"", 0
                return True
            piece = chunk[at : at + length - have]
            parts.append(piece)
            have += len(piece)
            self._later, self._later_at = chunk, at + len(piece)
            if have >= length or not chunk:
                self.data, self.at = b"".join(parts), 0
                return have >= length

    def take(self, length: int) -> bytes:
        """Exactly `length` bytes; fewer only when the stream has ended."""
        self.ensure(length)
        part = self.data[self.at : self.at + length]
        self.at += len(part)
        return part

    def drain(self) -> None:
        """Read to the end, so that a digest over the stream covers all of it."""
        self.data, self.at = b"", 0
        self._later, self._later_at = b"", 0
        while self._next():
            pass


Store = Callable[[ByteStream, int, Parts | None], Runs]
"""Takes a file's content from the stream: `size` bytes, or the given parts of a sparse file of `size` bytes."""


class _Numbers(dict[bytes, int]):
    """Header fields to numbers, remembered: an image has few owners, modes and sizes."""

    def __missing__(self, field: bytes) -> int:
        if field[0] & 0x80:  # GNU base-256: two's complement behind the mark
            bits = 8 * len(field) - 1
            value = int.from_bytes(field, "big") & ((1 << bits) - 1)
            if field[0] & 0x40:
                value -= 1 << bits
        else:
            text = field.strip(b" \0")
            if text and (not text.isdigit() or b"8" in text or b"9" in text):
                raise FormatError(f"{text[:12]!r} is no octal number")
            value = int(text, 8) if text else 0
        if len(self) > 20_000:
            self.clear()
        self[field] = value
        return value


def read_tar(stream: ByteStream, store: Store, *, max_entries: int = MAX_ENTRIES) -> Iterator[TarEntry]:
    """Members in order; content goes to `store`. Ends with the stream drained. Raises FormatError."""
    numbers = _Numbers()
    adler = isal_zlib.adler32
    unpack = _HEADER.unpack
    pax: dict[bytes, bytes] = {}
    standing: dict[bytes, bytes] = {}
    long_name = long_link = None
    entries = 0
    while True:
        if not stream.ensure(BLOCK):
            if len(stream.data) == stream.at and not (pax or long_name or long_link):
                return  # some writers leave the two zero blocks out
            raise FormatError("the tar stream ends inside a header")
        at = stream.at
        header = stream.data[at : at + BLOCK]
        stream.at = at + BLOCK
        if header == _ZERO:
            if stream.ensure(BLOCK) and not stream.data.startswith(_ZERO, stream.at):
                raise FormatError("the tar stream goes on behind its end mark")
            stream.drain()
            return
        name, mode, uid, gid, length, mtime, checksum, kind, link, magic, major, minor, prefix = unpack(
            header
        )
        # Adler-32's low half is one more than the sum of the bytes, modulo 65521, at memory speed.
        try:
            stated = numbers[checksum]
        except FormatError:
            raise FormatError("a tar header's checksum is no number") from None
        if adler(header) & 0xFFFF != (stated + sum(checksum) - 255) % _ADLER:
            _verify_signed(header, stated)
        name = name.rstrip(b"\0") if name[-1] == 0 else name
        if b"\0" in name:
            name = name[: name.index(b"\0")]
        if prefix[0] and magic[:6] == b"ustar\0":
            name = prefix[: 131 if header[508:] == b"tar\0" else 155].split(b"\0", 1)[0] + b"/" + name
        try:
            size = numbers[length]
            if kind in _EXTENSIONS:
                body = _extension(stream, size)
                if kind == b"x":
                    pax = _records(body)
                elif kind == b"g":
                    standing.update(_records(body))
                elif kind == b"L":
                    long_name = body.rstrip(b"\0")
                else:
                    long_link = body.rstrip(b"\0")
                continue
            link = long_link if long_link is not None else link.split(b"\0", 1)[0]
            if long_name is not None:
                name = long_name
            sparse: Parts | None = None
            xattrs: dict[bytes, bytes] | None = None
            mtime_ns = numbers[mtime] * 1_000_000_000
            owner, group = numbers[uid], numbers[gid]
            if pax or standing:
                pax = {**standing, **pax} if standing else pax
                name = pax.get(b"path") or name
                link = pax.get(b"linkpath") or link
                size = _decimal(pax, b"size", size)
                owner, group = _decimal(pax, b"uid", owner), _decimal(pax, b"gid", group)
                if b"mtime" in pax:
                    mtime_ns = _time(pax[b"mtime"])
                xattrs = _xattrs(pax)
            if size < 0:
                raise FormatError("a negative size")
            if kind in {b"\0", b"7"}:
                kind = DIRECTORY if kind == b"\0" and name.endswith(b"/") else REGULAR
            elif kind == b"S":
                size, sparse = _old_sparse(stream, header, numbers, size)
                kind = REGULAR
            if kind not in _KINDS:
                raise FormatError(f"a kind of tar member that is not known ({kind!r})")
            if kind == REGULAR:
                if any(key.startswith(b"GNU.sparse.") for key in pax):
                    name, size, sparse = _pax_sparse(stream, pax, name, size)
            else:
                size = 0  # links, devices and directories have no content, whatever the header says
            if not (0 <= owner < 0xFFFFFFFF and 0 <= group < 0xFFFFFFFF):
                raise FormatError(f"owner {owner}:{group} is out of range")
            if len(name) > MAX_NAME or len(link) > MAX_NAME:
                raise FormatError(f"a name longer than {MAX_NAME} bytes")
            if not name:
                raise FormatError("an empty name")
            if b"\0" in name or b"\0" in link:
                raise FormatError("a NUL byte in a name")
            entries += 1
            if entries > max_entries:
                raise FormatError(f"more than {max_entries} entries in the image")
            runs: Runs = ()
            if size:
                runs = store(stream, size, sparse)
                stored = sum(length for _, length in sparse) if sparse is not None else size
                padding = -stored % BLOCK
                if padding and len(stream.take(padding)) != padding:
                    raise FormatError("the tar stream ends inside this file")
            device = kind in {CHARACTER, BLOCK_DEVICE}
            entry = TarEntry(
                name,
                kind,
                numbers[mode] & 0o7777,
                owner,
                group,
                mtime_ns,
                size,
                link,
                xattrs,
                numbers[major] if device else 0,
                numbers[minor] if device else 0,
                runs,
            )
        except FormatError as e:
            shown = long_name or pax.get(b"path") or name
            raise FormatError(f"{show(shown)}: {e}") from None
        yield entry
        if pax:
            pax = {}
        long_name = long_link = None


def show(name: bytes) -> str:
    """A member's name for a message: readable, at most 120 characters."""
    text = name.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return text if len(text) <= 120 else text[:80] + "…" + text[-39:]


def _verify_signed(header: bytes, stated: int) -> None:
    """Some old writers summed signed characters. Raises FormatError when that isn't it either."""
    field = header[:148] + b" " * 8 + header[156:]
    if sum(field) != stated and sum(b - 256 if b > 127 else b for b in field) != stated:
        raise FormatError("a tar header's checksum is wrong")


def _extension(stream: ByteStream, size: int) -> bytes:
    if not 0 <= size <= MAX_PAX:
        raise FormatError(f"a tar extension header of {size} bytes; {MAX_PAX} are allowed")
    body = stream.take(size + -size % BLOCK)
    if len(body) < size + -size % BLOCK:
        raise FormatError("the tar stream ends inside an extension header")
    return body[:size]


def _records(body: bytes) -> dict[bytes, bytes]:
    """pax records, `length key=value LF`. GNU sparse 0.0 repeats two keys: they are gathered into a map."""
    records: dict[bytes, bytes] = {}
    pairs: list[bytes] = []
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        if space < 0 or not body[at:space].isdigit():
            raise FormatError("a damaged pax record")
        end = at + int(body[at:space])
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if end > len(body) or end <= space + 2 or not equals or not key or body[end - 1] != 0x0A:
            raise FormatError("a damaged pax record")
        if key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes"}:
            pairs.append(value)
        else:
            records[key] = value
        at = end
    if pairs:
        records[b"GNU.sparse.map"] = b",".join(pairs)
    return records


def _decimal(pax: dict[bytes, bytes], key: bytes, default: int) -> int:
    text = pax.get(key)
    if not text:  # an empty value takes a standing one back
        return default
    if not text.isdigit() or len(text) > 20:
        raise FormatError(f"{key.decode(errors='replace')} in a pax header is no number")
    return int(text)


def _time(text: bytes) -> int:
    """Seconds with a fraction, perhaps negative, to nanoseconds."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise FormatError("mtime in a pax header is no number")
    fraction = (found[3] or b"")[:9].ljust(9, b"0")
    ns = int(found[2]) * 1_000_000_000 + int(fraction)
    return -ns if found[1] else ns


def _xattrs(pax: dict[bytes, bytes]) -> dict[bytes, bytes] | None:
    found: dict[bytes, bytes] = {}
    for key, value in pax.items():
        if key.startswith(_SCHILY):
            found[key[len(_SCHILY) :]] = value
        elif key.startswith(_LIBARCHIVE):
            try:
                raw = base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
            except binascii.Error:
                raise FormatError("an extended attribute that is not base64") from None
            found.setdefault(unquote_to_bytes(key[len(_LIBARCHIVE) :]), raw)
    if any(not key or b"\0" in key for key in found):
        raise FormatError("an extended attribute with an impossible name")
    return found or None


# --- sparse files --------------------------------------------------------------------------------------------


def _old_sparse(stream: ByteStream, header: bytes, numbers: _Numbers, stored: int) -> tuple[int, Parts]:
    """Type S: four pairs in the header, 21 in each block that follows. (Size of the file, its parts.)"""
    numbers_of: list[int] = []

    def gather(block: bytes, start: int, count: int) -> None:
        for n in range(start, start + 24 * count, 24):
            offset, length = block[n : n + 12], block[n + 12 : n + 24]
            if offset[0] == 0:
                return
            numbers_of.extend((numbers[offset], numbers[length]))

    gather(header, 386, 4)
    more = header[482]
    while more:
        block = stream.take(BLOCK)
        if len(block) < BLOCK:
            raise FormatError("the tar stream ends inside a sparse map")
        gather(block, 0, 21)
        more = block[504]
        if len(numbers_of) > 2 * MAX_SPARSE_PARTS:
            break
    return _checked(numbers_of, numbers[header[483:495]], stored)


def _pax_sparse(
    stream: ByteStream, pax: dict[bytes, bytes], name: bytes, stored: int
) -> tuple[bytes, int, Parts]:
    """(Name, size of the file, parts) by the GNU.sparse.* records."""
    name = pax.get(b"GNU.sparse.name") or name
    size = _decimal(pax, b"GNU.sparse.realsize", _decimal(pax, b"GNU.sparse.size", -1))
    if size < 0:
        raise FormatError("a sparse file without a size")
    if pax.get(b"GNU.sparse.major") == b"1":
        values, used = _map_in_data(stream, stored)
        stored -= used
    else:
        text = pax.get(b"GNU.sparse.map", b"")
        values = [_plain(part) for part in text.split(b",")] if text else []
    size, parts = _checked(values, size, stored)
    return name, size, parts


def _map_in_data(stream: ByteStream, stored: int) -> tuple[list[int], int]:
    """Version 1.0: decimal lines before the data, filled up to a whole block. (Numbers, bytes taken.)"""
    text = b""
    used = 0
    wanted: int | None = None
    while True:
        if used + BLOCK > stored or used > 40 * MAX_SPARSE_PARTS:
            raise FormatError("a sparse map that does not end")
        block = stream.take(BLOCK)
        if len(block) < BLOCK:
            raise FormatError("the tar stream ends inside a sparse map")
        used += BLOCK
        text += block
        lines = text.split(b"\n")
        if wanted is None and len(lines) > 1:
            wanted = _plain(lines[0])
            if wanted > MAX_SPARSE_PARTS:
                raise FormatError("a sparse map with too many parts")
        if wanted is not None and len(lines) > 2 * wanted + 1:
            return [_plain(line) for line in lines[1 : 2 * wanted + 1]], used


def _checked(values: list[int], size: int, stored: int) -> tuple[int, Parts]:
    if len(values) % 2 or len(values) > 2 * MAX_SPARSE_PARTS:
        raise FormatError("a damaged sparse map")
    at = total = 0
    parts = []
    for offset, length in zip(values[::2], values[1::2], strict=True):
        if offset < at or length < 0 or offset + length > size:
            raise FormatError("a damaged sparse map")
        at = offset + length
        total += length
        if length:
            parts.append((offset, length))
    if total != stored:
        raise FormatError("a sparse map that does not fit the data")
    return size, tuple(parts)


def _plain(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise FormatError("a damaged sparse map")
    return int(text)

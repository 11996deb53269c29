"""Tar streams as container layers have them: ustar, pax and GNU headers, strictly read, once, forwards.

Sources: POSIX.1-2001 pax, GNU tar manual "Basic Tar Format", OCI image spec layer.md (xattrs in
SCHILY.xattr.* records). A header whose checksum is wrong, a stream that ends early, a length that can't be:
FormatError with the entry named. File content never passes through here as a whole: `store` takes it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from cos_console.formats.readat import FormatError

BLOCK = 512
MAX_NAME = 4096
MAX_PAX = 1 << 20
MAX_ENTRIES = 1_000_000

REGULAR, HARDLINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO = (
    b"0",
    b"1",
    b"2",
    b"3",
    b"4",
    b"5",
    b"6",
)

_ZERO = bytes(BLOCK)
_XATTR = (b"SCHILY.xattr.", b"LIBARCHIVE.xattr.")

Runs = tuple[tuple[int, int, int], ...]
"""(first block in the file, first block on the file system, blocks): what `store` made of a file's content."""


class TarEntry(NamedTuple):
    """One member. `kind` is the type flag; `name` and `link` are as written, without a trailing slash."""

    name: bytes
    kind: bytes
    mode: int
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
    """Chunks of bytes of any length, taken in pieces of a wanted length."""

    def __init__(self, next_chunk: Callable[[], bytes]) -> None:
        self._next = next_chunk
        self._data = b""
        self._at = 0

    def take(self, length: int) -> bytes:
        """Exactly `length` bytes; fewer only when the stream has ended."""
        data, at = self._data, self._at
        end = at + length
        if end <= len(data):
            self._at = end
            return data[at:end]
        parts = [data[at:]]
        have = len(data) - at
        while have < length:
            chunk = self._next()
            if not chunk:
                self._data, self._at = b"", 0
                return b"".join(parts)
            parts.append(chunk)
            have += len(chunk)
        joined = b"".join(parts)
        self._data, self._at = joined, length
        return joined[:length]

    def drain(self) -> None:
        """Read to the end, so that a digest over the stream covers all of it."""
        self._data, self._at = b"", 0
        while self._next():
            pass


Store = Callable[[ByteStream, int], Runs]


def read_tar(stream: ByteStream, store: Store) -> Iterator[TarEntry]:
    """Members in order; `store(stream, size)` must take exactly `size` bytes of content. Raises FormatError."""
    take = stream.take
    pax: dict[bytes, bytes] = {}
    global_pax: dict[bytes, bytes] = {}
    long_name = long_link = None
    count = 0
    while True:
        header = take(BLOCK)
        if len(header) == 0 and not (pax or long_name or long_link):
            return  # some writers leave the two zero blocks out
        if len(header) < BLOCK:
            raise FormatError("the tar stream ends inside a header")
        if header == _ZERO:
            stream.drain()
            return
        _verify(header)
        kind = header[156:157]
        size = _number(header[124:136], "size")
        if kind in b"xgLK" and kind:
            if size > MAX_PAX:
                raise FormatError(f"a tar extension header of {size} bytes; {MAX_PAX} are allowed")
            body = take(size + (-size % BLOCK))[:size]
            if len(body) < size:
                raise FormatError("the tar stream ends inside an extension header")
            if kind == b"x":
                pax = _records(body)
            elif kind == b"g":
                global_pax.update(_records(body))
            elif kind == b"L":
                long_name = body.rstrip(b"\0")
            else:
                long_link = body.rstrip(b"\0")
            continue
        count += 1
        if count > MAX_ENTRIES:
            raise FormatError(f"more than {MAX_ENTRIES} entries in one layer")
        entry, size = _entry(
            header, kind, size, {**global_pax, **pax} if global_pax else pax, long_name, long_link
        )
        if entry.kind == REGULAR:
            if size:
                entry = entry._replace(runs=store(stream, size))
            if len(take(-size % BLOCK)) != -size % BLOCK:
                raise FormatError(f"the tar stream ends inside {_show(entry.name)}")
        yield entry
        pax, long_name, long_link = {}, None, None


def _entry(
    header: bytes,
    kind: bytes,
    size: int,
    pax: dict[bytes, bytes],
    long_name: bytes | None,
    long_link: bytes | None,
) -> tuple[TarEntry, int]:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    name = pax.get(b"path", long_name if long_name is not None else name)
    link = long_link if long_link is not None else header[157:257].split(b"\0", 1)[0]
    link = pax.get(b"linkpath", link)
    if len(name) > MAX_NAME or len(link) > MAX_NAME:
        raise FormatError(f"{_show(name[:80])}…: a name longer than {MAX_NAME} bytes")
    if b"\0" in name or b"\0" in link:
        raise FormatError(f"{_show(name)}: a NUL byte in a name")
    if kind in {b"\0", b"7"}:
        kind = DIRECTORY if name.endswith(b"/") and kind == b"\0" else REGULAR
    if kind == b"S" or any(k.startswith(b"GNU.sparse.") for k in pax):
        raise FormatError(
            f"{_show(name)}: GNU sparse members don't occur in container layers and are refused"
        )
    if kind not in {REGULAR, HARDLINK, SYMLINK, CHARACTER, BLOCK_DEVICE, DIRECTORY, FIFO}:
        raise FormatError(f"{_show(name)}: unknown kind of tar member {kind!r}")
    mtime_ns = _number(header[136:148], "mtime") * 1_000_000_000
    uid, gid = _number(header[108:116], "uid"), _number(header[116:124], "gid")
    xattrs: dict[bytes, bytes] | None = None
    if pax:
        if b"size" in pax:
            size = _decimal(pax[b"size"], name)
        if b"uid" in pax:
            uid = _decimal(pax[b"uid"], name)
        if b"gid" in pax:
            gid = _decimal(pax[b"gid"], name)
        if b"mtime" in pax:
            mtime_ns = _time(pax[b"mtime"], name)
        xattrs = {k[len(p) :]: v for k, v in pax.items() for p in _XATTR if k.startswith(p)} or None
    if not (0 <= uid < 1 << 32 and 0 <= gid < 1 << 32):
        raise FormatError(f"{_show(name)}: owner {uid}:{gid} is out of range")
    if size < 0:
        raise FormatError(f"{_show(name)}: a negative size")
    if kind != REGULAR:
        size = 0
    device = kind in {CHARACTER, BLOCK_DEVICE}
    return (
        TarEntry(
            name=name.rstrip(b"/") if name != b"/" else name,
            kind=kind,
            mode=_number(header[100:108], "mode") & 0o7777,
            uid=uid,
            gid=gid,
            mtime_ns=mtime_ns,
            size=size,
            link=link,
            xattrs=xattrs,
            major=_number(header[329:337], "device") if device else 0,
            minor=_number(header[337:345], "device") if device else 0,
            runs=(),
        ),
        size,
    )


def _verify(header: bytes) -> None:
    stated = _number(header[148:156], "checksum")
    if sum(header[:148]) + 256 + sum(header[156:]) != stated:
        raise FormatError("a tar header's checksum is wrong")


def _number(field: bytes, what: str) -> int:
    """Octal text, or GNU base-256 (top bit set, two's complement)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        if field[0] & 0x40:
            value -= 1 << (8 * len(field) - 1)
        return value
    text = field.strip(b"\0 ")
    try:
        return int(text, 8) if text else 0
    except ValueError:
        raise FormatError(f"a tar header's {what} is no number") from None


def _records(body: bytes) -> dict[bytes, bytes]:
    """pax records: `length key=value LF`."""
    records = {}
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        if space < 0 or not body[at:space].isdigit():
            raise FormatError("a damaged pax record")
        length = int(body[at:space])
        end = at + length
        key, equals, value = body[space + 1 : end - 1].partition(b"=")
        if length < 5 or end > len(body) or not equals or body[end - 1] != 0x0A:
            raise FormatError("a damaged pax record")
        records[key] = value
        at = end
    return records


def _decimal(text: bytes, name: bytes) -> int:
    try:
        return int(text)
    except ValueError:
        raise FormatError(f"{_show(name)}: a pax number is none") from None


def _time(text: bytes, name: bytes) -> int:
    """Seconds with a fraction, perhaps negative, to nanoseconds."""
    whole, _, fraction = text.partition(b".")
    try:
        seconds = int(whole or b"0")
        ns = int((fraction[:9]).ljust(9, b"0")) if fraction else 0
    except ValueError:
        raise FormatError(f"{_show(name)}: a pax time is none") from None
    return seconds * 1_000_000_000 + (-ns if whole.startswith(b"-") else ns)


def _show(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")

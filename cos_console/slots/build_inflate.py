"""One layer's bytes, checked while they come, as the tar stream inside.

gzip (RFC 1952, several members) by isal, zstd (RFC 8878, several frames) by zstandard, or plain; told by the
first bytes, as the container runtimes do. What is taken in is hashed; output comes in pieces of at most 256 KiB,
however small the input that makes it. Limits stand before memory is taken: the zstd window, the inflated size.
"""

import hashlib
import queue
import threading
from collections.abc import Callable
from typing import Protocol, cast

import zstandard
from isal import igzip_lib

from cos_console.formats.readat import FormatError
from cos_console.model.image import Layer, LayerStream
from cos_console.model.problem import ExitCode, Problem

PIECE = 256 << 10
_READ = 256 << 10
_GZIP_ERROR = cast("type[Exception]", igzip_lib.IsalError)  # its type stub calls it an instance
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class _Decoder(Protocol):
    def read(self) -> bytes: ...


class LayerReader:
    """`read` gives the inflated bytes, b"" at the end; then everything was checked that can be.

    `came(count)` hears of transferred bytes, `grew(count)` of inflated ones; both may raise.
    """

    def __init__(
        self,
        stream: LayerStream,
        layer: Layer,
        *,
        window_limit: int,
        hash_plain: bool,
        came: Callable[[int], None],
        grew: Callable[[int], None],
    ) -> None:
        self._stream = stream
        self._layer = layer
        self._came = came
        self._grew = grew
        self._buffer = memoryview(bytearray(_READ))
        self._taken = 0
        self._ended = False
        self._hash = hashlib.new(layer.digest.partition(":")[0]) if layer.digest else None
        self._plain = hashlib.sha256() if hash_plain else None
        self._window_limit = window_limit
        self._decoder: _Decoder | None = None
        self._done = False

    @property
    def diff_id(self) -> str:
        """Of what was read; empty unless it was asked for."""
        return f"sha256:{self._plain.hexdigest()}" if self._plain is not None else ""

    def read(self) -> bytes:
        """Raises FormatError for damaged data, Problem COS-DIGEST, and what the stream raises."""
        if self._done:
            return b""
        self._done = True  # after an error there is nothing more
        try:
            if self._decoder is None:
                self._decoder = self._choose()
            data = self._decoder.read()
        except (_GZIP_ERROR, zstandard.ZstdError, EOFError) as e:
            self.verify()
            if "memory" in str(e) or "window" in str(e).lower():
                raise FormatError(
                    f"it was compressed with a window of more than {self._window_limit >> 20} MiB"
                ) from None
            raise FormatError(f"its compressed data is damaged ({e})") from None
        if not data:
            self.verify()
            return b""
        if self._plain is not None:
            self._plain.update(data)
        self._grew(len(data))
        self._done = False
        return data

    def verify(self) -> None:
        """Read what is left and compare the digest of all of it. Raises Problem COS-DIGEST."""
        while self.compressed():
            pass
        if self._hash is None or self._layer.digest is None:
            return
        algorithm = self._layer.digest.partition(":")[0]
        found = f"{algorithm}:{self._hash.hexdigest()}"
        if found != self._layer.digest:
            size = self._layer.size_bytes
            what = (
                f"it ends after {self._taken} of {size} bytes"
                if size and self._taken < size
                else f"{found[:19]}… came"
            )
            raise wrong_digest(f"A layer is not what its digest {self._layer.digest[:19]}… says: {what}.")

    def close(self) -> None:
        self._stream.close()

    def compressed(self) -> memoryview:
        """The next bytes as they are transferred; empty at the end."""
        count = 0 if self._ended else self._stream.readinto(self._buffer)
        if count == 0:
            self._ended = True
            return self._buffer[:0]
        self._taken += count
        if self._layer.digest is not None and 0 < self._layer.size_bytes < self._taken:
            raise wrong_digest(
                f"A layer is longer than the {self._layer.size_bytes} bytes that it should have."
            )
        piece = self._buffer[:count]
        if self._hash is not None:
            self._hash.update(piece)
        self._came(count)
        return piece

    def _choose(self) -> _Decoder:
        head = b""
        while len(head) < 4 and (piece := self.compressed()):
            head += piece
        if head[:2] == b"\x1f\x8b":
            return _Gzip(head, self.compressed)
        if head[:4] == _ZSTD_MAGIC or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):
            return _Zstd(head, self.compressed, self._window_limit)
        return _Plain(head, self.compressed)


class _Plain:
    def __init__(self, head: bytes, more: Callable[[], memoryview]) -> None:
        self._head = head
        self._more = more

    def read(self) -> bytes:
        if self._head:
            head, self._head = self._head, b""
            return head
        return bytes(self._more())


class _Gzip:
    def __init__(self, head: bytes, more: Callable[[], memoryview]) -> None:
        self._more = more
        self._input: bytes | memoryview = head
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    def read(self) -> bytes:
        while True:
            if self._member.eof and not self._next_member():
                return b""
            if self._member.needs_input and not self._input:
                self._input = self._more()
                if not self._input:
                    raise EOFError("it ends too early")
            piece, self._input = self._input, b""
            data = bytes(self._member.decompress(piece, PIECE))
            if data:
                return data

    def _next_member(self) -> bool:
        """Whether another member follows; zeros behind the last one are padding (gzip(1))."""
        rest = bytes(self._member.unused_data)
        while len(rest) < 2 and (piece := self._more()):
            rest += piece
        if rest[:2] == b"\x1f\x8b":
            self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            self._input = rest
            return True
        piece_or_rest: bytes | memoryview = rest
        while len(piece_or_rest):
            if any(piece_or_rest):
                raise EOFError("something else follows the compressed data")
            piece_or_rest = self._more()
        return False


class _Zstd:
    def __init__(self, head: bytes, more: Callable[[], memoryview], window_limit: int) -> None:
        self._reader = zstandard.ZstdDecompressor(max_window_size=window_limit).stream_reader(
            _Input(head, more),  # type: ignore[arg-type]  # any object with read(size) will do
            read_size=_READ,
            read_across_frames=True,
        )

    def read(self) -> bytes:
        return self._reader.read(PIECE)


class _Input:
    def __init__(self, head: bytes, more: Callable[[], memoryview]) -> None:
        self._head = head
        self._more = more

    def read(self, _size: int) -> bytes:
        head, self._head = self._head, b""
        return head or bytes(self._more())


class Ahead:
    """Reads a few pieces ahead in a thread, so that one stream keeps two processors busy."""

    def __init__(self, read: Callable[[], bytes], depth: int = 16) -> None:
        self._read = read
        self._pieces: queue.Queue[bytes | BaseException] = queue.Queue(depth)
        self._ended = False
        threading.Thread(target=self._run, daemon=True).start()

    def read(self) -> bytes:
        if self._ended:
            return b""
        piece = self._pieces.get()
        if isinstance(piece, BaseException):
            self._ended = True
            raise piece
        self._ended = not piece
        return piece

    def _run(self) -> None:
        try:
            while piece := self._read():
                self._pieces.put(piece)
            self._pieces.put(b"")
        except BaseException as e:  # noqa: BLE001 - it is raised where the piece is taken
            self._pieces.put(e)


def wrong_digest(what: str) -> Problem:
    return Problem(
        "COS-DIGEST",
        what,
        unchanged="active and passive are exactly as before.",
        now="Try again; if it stays, the source or something on the way to it changes data.",
        exit_code=ExitCode.VERIFICATION,
    )

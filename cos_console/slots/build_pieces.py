"""Pieces of an image file: written past the page cache, remembered by checksum, read back to prove them.

O_DIRECT wants aligned memory, offsets and lengths (open(2)); buffers are anonymous maps and lengths are whole
blocks. Where a file system refuses O_DIRECT, writes are buffered and the cache is dropped before reading.
A piece is proven when the medium returned its bytes after the write had completed; whether it is the medium's
cache or its cells is known only to the medium, before and after a flush.
"""

import fcntl
import mmap
import os
import queue
import threading
from collections.abc import Sequence
from typing import NamedTuple

from isal import isal_zlib

BUFFER = 4 << 20
PIECE = 128 << 10
"""Bytes of one checksum: small enough that a range can be taken out of what was written without reading much."""
_ALIGNMENT = 4096
_WRITE_BUFFERS = 3


class Piece(NamedTuple):
    """`length` bytes at `offset` of the image file, and their CRC-32."""

    offset: int
    length: int
    crc: int
    proven: bool = False
    """Read back from the medium already."""


class Mismatch(Exception):  # noqa: N818 - becomes a Problem in build.py
    """The medium returned other bytes than were written at `offset`."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def open_direct(fd: int, flags: int) -> tuple[int, bool]:
    """Another descriptor of the same file with O_DIRECT, and whether that worked."""
    path = f"/proc/self/fd/{fd}"
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError:
        return os.open(path, flags | os.O_CLOEXEC), False


def write_through(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`; a descriptor that refuses O_DIRECT here becomes a buffered one. Raises OSError."""
    while data:
        try:
            done = os.pwrite(fd, data, offset)
        except OSError:
            if not _undirect(fd):
                raise
            continue
        if done % _ALIGNMENT and done < len(data):
            _undirect(fd)  # the rest is not aligned any more
        data = data[done:]
        offset += done


class Reader:
    """Reads past the page cache into one aligned buffer."""

    def __init__(self, fd: int) -> None:
        self._fd, direct = open_direct(fd, os.O_RDONLY)
        self.method = "direct" if direct else "dropped"
        self._map = mmap.mmap(-1, BUFFER)
        self._view = memoryview(self._map)
        if not direct:
            self._drop()

    def read(self, offset: int, length: int) -> memoryview:
        """Up to `length` (at most BUFFER) bytes; good until the next call. Raises OSError."""
        got = 0
        while got < length:
            try:
                part = os.preadv(self._fd, [self._view[got:length]], offset + got)
            except OSError:
                if not _undirect(self._fd):
                    raise
                self.method = "dropped"
                self._drop()
                continue
            if part == 0:
                break
            got += part
        return self._view[:got]

    def close(self) -> None:
        os.close(self._fd)

    def _drop(self) -> None:
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)


class PieceWriter:
    """Collects consecutive bytes into aligned buffers; threads write them and read them back.

    Errors (OSError, Mismatch) come out of a later call, of `finish` at the latest.
    """

    def __init__(self, fd: int, *, prove: bool) -> None:
        self._fd, self._direct = open_direct(fd, os.O_RDWR)
        self._maps = [mmap.mmap(-1, BUFFER) for _ in range(_WRITE_BUFFERS)]
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for m in self._maps:
            self._free.put(memoryview(m))
        self._full: queue.SimpleQueue[tuple[memoryview, int, int] | None] = queue.SimpleQueue()
        self._written: queue.SimpleQueue[list[Piece] | None] = queue.SimpleQueue()
        self._error: OSError | Mismatch | None = None
        self._pieces: list[Piece] = []
        self._buffer = self._free.get()
        self._fill = 0
        self._at = 0
        self._writing = threading.Thread(target=self._write_all, daemon=True)
        self._writing.start()
        self._proving = threading.Thread(target=self._prove_all, args=(Reader(fd),), daemon=True)
        self._proves = prove and self._direct  # behind a page cache it would only be asked what it holds
        if self._proves:
            self._proving.start()

    def seek(self, offset: int) -> None:
        """The next bytes go to `offset` (a whole block)."""
        if self._at + self._fill != offset:
            self._flush()
            self._at = offset

    def put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        at, length = 0, len(view)
        while at < length:
            fill = self._fill
            take = min(length - at, BUFFER - fill)
            self._buffer[fill : fill + take] = view[at : at + take]
            self._fill = fill + take
            at += take
            if self._fill == BUFFER:
                self._flush()

    def zeros(self, count: int) -> None:
        """`count` zero bytes: what is missing to a whole block, say."""
        while count:
            take = min(count, BUFFER - self._fill)
            self._buffer[self._fill : self._fill + take] = bytes(take)
            self._fill += take
            count -= take
            if self._fill == BUFFER:
                self._flush()

    def write_blocks(self, block: int, data: bytes | memoryview) -> None:
        self.seek(block * _ALIGNMENT)
        self.put(data)

    def finish(self) -> list[Piece]:
        """Write the rest, wait, close; what was written. Raises OSError, Mismatch."""
        if self._fd < 0:
            return []
        try:
            self._flush()
        finally:
            self._full.put(None)
            self._writing.join()
            self._written.put(None)
            if self._proves:
                self._proving.join()
            fd, self._fd = self._fd, -1
            os.close(fd)
        if self._error is not None:
            raise self._error
        return self._pieces

    def _flush(self) -> None:
        if self._error is not None:
            raise self._error
        if self._fill:
            self._full.put((self._buffer, self._fill, self._at))
            self._at += self._fill
            self._fill = 0
            self._buffer = self._free.get()

    def _write_all(self) -> None:
        while (work := self._full.get()) is not None:
            buffer, length, offset = work
            try:
                if self._error is None:
                    pieces = [
                        Piece(offset + at, n, isal_zlib.crc32(buffer[at : at + n]), self._proves)
                        for at in range(0, length, PIECE)
                        for n in [min(PIECE, length - at)]
                    ]
                    write_through(self._fd, buffer[:length], offset)
                    self._pieces += pieces
                    self._written.put(pieces)
            except OSError as e:
                self._error = e
            self._free.put(buffer)

    def _prove_all(self, reader: Reader) -> None:
        while (pieces := self._written.get()) is not None:
            try:
                if self._error is None:
                    check_all(reader, pieces)
            except (OSError, Mismatch) as e:
                self._error = e
        reader.close()


def check_all(reader: Reader, pieces: Sequence[Piece]) -> None:
    """Read neighbouring pieces in one go and compare each. Raises Mismatch, OSError."""
    n = 0
    while n < len(pieces):
        start = pieces[n].offset
        end = start
        m = n
        while m < len(pieces) and pieces[m].offset == end and end + pieces[m].length - start <= BUFFER:
            end += pieces[m].length
            m += 1
        got = reader.read(start, end - start)
        for piece in pieces[n:m]:
            at = piece.offset - start
            if isal_zlib.crc32(got[at : at + piece.length]) != piece.crc:
                raise Mismatch(piece.offset)
        n = m


def without(reader: Reader, pieces: Sequence[Piece], ranges: Sequence[tuple[int, int]]) -> list[Piece]:
    """`pieces` less the bytes in `ranges` ((offset, end), both sorted): files that an upper layer hides.

    A piece that is hit in part is read back and checked first, and its rest gets its own checksums.
    Raises Mismatch, OSError.
    """
    kept: list[Piece] = []
    n = 0
    for piece in pieces:
        start, stop = piece.offset, piece.offset + piece.length
        while n < len(ranges) and ranges[n][1] <= start:
            n += 1
        live = []
        at, m = start, n
        while m < len(ranges) and ranges[m][0] < stop:
            if ranges[m][0] > at:
                live.append((at, ranges[m][0]))
            at = ranges[m][1]
            m += 1
        if m == n:
            kept.append(piece)
            continue
        if at < stop:
            live.append((at, stop))
        if live:
            data = reader.read(start, piece.length)
            if isal_zlib.crc32(data) != piece.crc:
                raise Mismatch(start)
            kept += [
                Piece(a, b - a, isal_zlib.crc32(data[a - start : b - start]), piece.proven) for a, b in live
            ]
    return kept


def _undirect(fd: int) -> bool:
    """Take O_DIRECT from a descriptor; False when it had none."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if not flags & os.O_DIRECT:
        return False
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return True

"""Pieces of an image file: written past the page cache, remembered by checksum, read back to prove them.

O_DIRECT wants aligned memory, offsets and lengths (open(2)); buffers are anonymous maps and lengths are whole
blocks. Where a file system refuses O_DIRECT, writes are buffered and the cache is dropped before reading.
"""

import ctypes
import fcntl
import mmap
import os
import queue
import struct
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from isal import isal_zlib

BUFFER = 4 << 20
_FS_IOC_FIEMAP = 0xC020660B
_UNWRITTEN, _DELALLOC, _LAST = 0x800, 0x4, 0x1
_libc = ctypes.CDLL(None, use_errno=True)


class Piece(NamedTuple):
    """`length` bytes at `offset` of the image file, and their CRC-32."""

    offset: int
    length: int
    crc: int


class ReadBack(NamedTuple):
    bytes_read: int
    method: str
    bad: int | None
    """Offset of the first piece that differs."""
    cancelled: bool


def open_direct(fd: int, flags: int) -> tuple[int, bool]:
    """Another descriptor of the same file with O_DIRECT, and whether that worked."""
    path = f"/proc/self/fd/{fd}"
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError:
        return os.open(path, flags | os.O_CLOEXEC), False


class PieceWriter:
    """Collects consecutive bytes into aligned buffers; a thread writes them. Errors come out of any call."""

    def __init__(self, fd: int, block: int) -> None:
        self._fd, _ = open_direct(fd, os.O_RDWR)
        self._block = block
        self._pieces: list[Piece] = []
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(4):
            self._free.put(memoryview(mmap.mmap(-1, BUFFER)))
        self._full: queue.SimpleQueue[tuple[memoryview, int, int] | None] = queue.SimpleQueue()
        self._error: OSError | None = None
        self._buffer = self._free.get()
        self._fill = 0
        self._at = 0
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def seek(self, offset: int) -> None:
        """The next bytes go to `offset` (a whole block)."""
        if self._at + self._fill != offset:
            self._flush()
            self._at = offset

    def put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        at, length = 0, len(view)
        while at < length:
            take = min(length - at, BUFFER - self._fill)
            self._buffer[self._fill : self._fill + take] = view[at : at + take]
            self._fill += take
            at += take
            if self._fill == BUFFER:
                self._flush()

    def pad(self) -> None:
        """Zeros up to the next whole block."""
        rest = -self._fill % self._block
        if rest:
            self.put(bytes(rest))

    def write_blocks(self, block: int, data: bytes) -> None:
        self.seek(block * self._block)
        self.put(data)

    def finish(self) -> list[Piece]:
        """Write the rest, wait, close; what was written. Raises OSError."""
        if self._fd < 0:
            return []
        try:
            self._flush()
        finally:
            self._full.put(None)
            self._thread.join()
            fd, self._fd = self._fd, -1
            try:
                os.fsync(fd)
            finally:
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
                    self._pieces.append(Piece(offset, length, isal_zlib.crc32(buffer[:length])))
                    self._write(buffer[:length], offset)
            except OSError as e:
                self._error = e
            self._free.put(buffer)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                done = os.pwrite(self._fd, data, offset)
            except OSError:
                flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
                if not flags & os.O_DIRECT:
                    raise
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                continue
            data = data[done:]
            offset += done


def read_back(fd: int, pieces: Iterable[Piece], progress: Callable[[int], bool]) -> ReadBack:
    """Compare every piece with what the medium holds. `progress(length)` returns whether to stop."""
    os.fsync(fd)
    handle, direct = open_direct(fd, os.O_RDONLY)
    done = 0
    buffer = mmap.mmap(-1, BUFFER)
    view = memoryview(buffer)
    try:
        if not direct:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        for piece in pieces:
            got = 0
            while got < piece.length:
                try:
                    part = os.preadv(handle, [view[got : piece.length]], piece.offset + got)
                except OSError:
                    if not direct:
                        raise
                    direct = False
                    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
                    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~os.O_DIRECT)
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                    continue
                if part == 0:
                    break
                got += part
            if got != piece.length or isal_zlib.crc32(view[:got]) != piece.crc:
                return ReadBack(done, "direct" if direct else "dropped", piece.offset, False)
            done += got
            if progress(got):
                return ReadBack(done, "direct" if direct else "dropped", None, True)
        return ReadBack(done, "direct" if direct else "dropped", None, False)
    finally:
        os.close(handle)
        view.release()


def unwritten_extents(fd: int) -> list[tuple[int, int]]:
    """(offset, length) of ranges that are reserved and not written, or not allocated yet (FIEMAP after sync).

    Linux reads them as zeros, GRUB as whatever the disk held before. Raises OSError.
    """
    found = []
    start = 0
    count = 256
    while True:
        request = bytearray(
            struct.pack("<QQIIII", start, (1 << 64) - 1 - start, 1, 0, count, 0) + bytes(56 * count)
        )
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        (mapped,) = struct.unpack_from("<I", request, 20)
        flags = _LAST
        for n in range(mapped):
            logical, _, length, _, _, flags = struct.unpack_from("<QQQQQI", request, 32 + 56 * n)
            if flags & (_UNWRITTEN | _DELALLOC):
                found.append((logical, length))
            start = logical + length
        if mapped == 0 or flags & _LAST:
            return found


def punch(fd: int, offset: int, length: int) -> None:
    """Make a hole (fallocate(2), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE). Raises OSError."""
    off_t = ctypes.c_int64
    if _libc.fallocate64(fd, 0x02 | 0x01, off_t(offset), off_t(length)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))

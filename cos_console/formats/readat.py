"""Random-access byte sources: what every reader of an on-disk format reads from.

A disk, a partition inside it, a file inside its file system and a file system inside that file are all the
same thing to a reader: bytes at an offset. Nothing here can write.
"""

import os
from typing import Protocol


class FormatError(ValueError):
    """The bytes are not what the format demands. The message names the place and the fault."""


class ReadAt(Protocol):
    """Bytes at an offset. `size_bytes` is the length of the source."""

    @property
    def size_bytes(self) -> int: ...

    def read_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; shorter only at the end of the source. Raises OSError."""
        ...


class FileReadAt:
    """An open descriptor as a source. Block devices are sized by seeking; the caller closes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._size = os.lseek(fd, 0, os.SEEK_END)

    @property
    def size_bytes(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        if offset >= self._size or length <= 0:
            return b""
        length = min(length, self._size - offset)
        parts: list[bytes] = []
        while length:
            part = os.pread(self._fd, length, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Window:
    """A slice of another source: a partition of a disk."""

    def __init__(self, source: ReadAt, start: int, size_bytes: int) -> None:
        self._source = source
        self._start = start
        self._size = max(0, min(size_bytes, source.size_bytes - start))

    @property
    def size_bytes(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        if offset >= self._size:
            return b""
        return self._source.read_at(self._start + offset, min(length, self._size - offset))


class BytesReadAt:
    """Bytes in memory as a source."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size_bytes(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]

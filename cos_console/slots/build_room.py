"""Room for an image file: reserved in full before it is filled, and nothing reserved but unwritten afterwards.

fallocate(2) gives extents that Linux reads as zeros and GRUB as whatever the disk held before: every range that
was never written must be a hole, or zeros, before GRUB may see the file. Holes it is: they read the same to
both, take no time and give the room back. While something will still mount the image and write into it, the
room has to stay reserved, or a full disk loses its files silently.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

from cos_console.model.problem import ExitCode, Problem

_FS_IOC_FIEMAP = 0xC020660B
_LAST, _UNKNOWN, _DELALLOC, _INLINE, _UNWRITTEN = 0x1, 0x2, 0x4, 0x200, 0x800
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_libc = ctypes.CDLL(None, use_errno=True)


def reserve(fd: int, size_bytes: int) -> None:
    """Empty the file and give it real blocks for `size_bytes`. Raises Problem COS-SPACE-STATE, COS-DISK-WRITE.

    Where the file system can't reserve (ext2, ext3), its free space is compared and the file is sparse: what
    is written past the page cache fails at once when the disk is full.
    """
    try:
        os.ftruncate(fd, 0)
        try:
            _fallocate(fd, 0, 0, size_bytes)
        except OSError as e:
            if e.errno not in {errno.EOPNOTSUPP, errno.ENOSYS}:
                raise
            free = os.fstatvfs(fd)
            if free.f_bavail * free.f_frsize < size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
            os.ftruncate(fd, size_bytes)
    except OSError as e:
        try:
            os.ftruncate(fd, 0)
        except OSError:
            pass
        if e.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise Problem(
                "COS-SPACE-STATE",
                f"There is no room for an image of {size_bytes >> 20} MiB: {os.strerror(e.errno)}.",
                unchanged="active and passive are exactly as before.",
                now="Remove left-overs, choose a smaller --size, or give up passive first.",
                exit_code=ExitCode.REFUSED,
            ) from None
        raise Problem(
            "COS-DISK-WRITE",
            f"Room for the new image could not be reserved: {os.strerror(e.errno or 0)}.",
            unchanged="active and passive are exactly as before.",
            now="Check the state partition (read-only? damaged?) and the kernel's messages.",
            detail=repr(e),
        ) from None


def unwritten_extents(fd: int) -> list[tuple[int, int]]:
    """(offset, length) of ranges that Linux and GRUB may read differently: reserved and not written, not yet
    allocated, or kept in the inode (FIEMAP, after a sync). Empty where the file system has no FIEMAP.

    Raises OSError.
    """
    return [
        (offset, length)
        for offset, length, flags in _extents(fd)
        if flags & (_UNWRITTEN | _DELALLOC | _INLINE | _UNKNOWN)
    ]


def data_ranges(fd: int) -> Iterator[tuple[int, int]]:
    """(offset, end) of what is not a hole, neighbours joined, in order. Raises OSError."""
    size = os.fstat(fd).st_size
    at = 0
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(fd, at, os.SEEK_HOLE)
        yield at, end
        at = end


def dig_unwritten(fd: int) -> int:
    """Make holes of everything that is reserved and not written; the bytes given back. Raises OSError.

    For an image that was kept reserved while something else wrote into it; `build_image` does it by itself.
    The first block is written in every image, so that GRUB 2.06 can read the file.
    """
    os.fsync(fd)
    given = 0
    for offset, length in unwritten_extents(fd):
        punch(fd, offset, length)
        given += length
    os.fsync(fd)
    return given


def punch(fd: int, offset: int, length: int) -> None:
    """Make a hole. Raises OSError."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    # Not os.posix_fallocate: the C library would write into every block where the file system can't reserve.
    off_t = ctypes.c_int64
    while _libc.fallocate64(fd, mode, off_t(offset), off_t(length)) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _extents(fd: int) -> Iterator[tuple[int, int, int]]:
    """(offset, length, flags) of each extent."""
    start = 0
    count = 256
    while True:
        request = bytearray(
            struct.pack("<QQIIII", start, (1 << 64) - 1 - start, 1, 0, count, 0) + bytes(56 * count)
        )
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        except OSError as e:
            if e.errno in {errno.EOPNOTSUPP, errno.ENOTTY}:
                return
            raise
        (mapped,) = struct.unpack_from("<I", request, 20)
        flags = _LAST
        for n in range(mapped):
            logical, _, length, _, _, flags = struct.unpack_from("<QQQQQI", request, 32 + 56 * n)
            yield logical, length, flags
            start = logical + length
        if mapped == 0 or flags & _LAST:
            return

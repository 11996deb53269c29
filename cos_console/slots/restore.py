"""A proven copy of one slot's image: filled through the port, zeros left as holes, read back past the cache.

GRUB 2.06 can't read a file whose first block is a hole, and reads reserved, never written blocks as whatever
was on the disk, so the first block is always written and what stays unwritten is dug out.
"""

import errno
import os
from collections.abc import Callable

from cos_console.slots.port import ExtentKind, Place, Port

PIECE = 1 << 20


class NotEqual(OSError):  # noqa: N818 - what was found, not what failed
    """The copy reads back other bytes than its source has."""


def copy(
    port: Port,
    source: Place,
    target: Place,
    *,
    report: Callable[[int, int], None] = lambda _done, _total: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> bool:
    """Copy `source` into the new file `target`, with room for all of it reserved first.

    False when `cancelled` said so: `target` is then incomplete and the caller removes it. On return True the
    bytes are durable and no block is reserved but unwritten. Raises OSError (ENOSPC before anything is
    filled), FileExistsError.
    """
    found = port.stat(source)
    if found is None:
        raise FileNotFoundError(2, "no such image", str(source))
    size = found.size_bytes
    port.create(target)
    reserve(port, target, size)

    def write(fd: int) -> bool:
        with port.reading(source) as origin:
            for offset in range(0, size, PIECE):
                if cancelled():
                    return False
                data = os.pread(origin, min(PIECE, size - offset), offset)
                if offset == 0 or any(data):
                    _pwrite(fd, data, offset)
                report(min(offset + PIECE, size), size)
        return True

    if not port.fill(target, write):
        return False
    port.fsync_file(target)
    dig_out_unwritten(port, target)
    return True


def reserve(port: Port, place: Place, size_bytes: int) -> None:
    """Real room for the whole file; where the file system can't reserve (ext2), by writing zeros."""
    try:
        port.reserve(place, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        port.fill(place, lambda fd: _zeros(fd, size_bytes))


def _zeros(fd: int, size_bytes: int) -> None:
    zero = bytes(PIECE)
    for offset in range(0, size_bytes, PIECE):
        _pwrite(fd, zero[: min(PIECE, size_bytes - offset)], offset)
    os.fsync(fd)


def dig_out_unwritten(port: Port, place: Place) -> None:
    """Punch a hole into each unwritten extent and make that durable. Raises OSError when one is left."""
    size = found.size_bytes if (found := port.stat(place)) else 0
    for extent in port.extents(place):
        if extent.kind is ExtentKind.UNWRITTEN:
            port.punch(place, extent.offset, min(extent.length, max(size - extent.offset, 0)))
    port.fsync_file(place)
    left = [e for e in port.extents(place) if e.kind is not ExtentKind.WRITTEN]
    if left:
        raise OSError(5, f"{len(left)} extents are not written", str(place))


def prove_equal(port: Port, source: Place, copied: Place) -> int:
    """Compare byte by byte, the copy read past the page cache. Bytes compared; raises NotEqual."""
    one, two = port.stat(source), port.stat(copied)
    if one is None or two is None or one.size_bytes != two.size_bytes:
        raise NotEqual(5, "the copy has another size than its source", str(copied))
    for offset in range(0, one.size_bytes, PIECE):
        if port.read(source, offset, PIECE) != port.read_back(copied, offset, PIECE):
            raise NotEqual(5, f"the copy differs in the MiB at byte {offset}", str(copied))
    return one.size_bytes


def _pwrite(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done

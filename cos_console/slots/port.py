"""The one narrow door through which every change of a file system goes.

What a switch, the guard, a record, a label or an environment block does to a disk is a row of these calls and
nothing else, so a test can stop before and after each of them and look at what a power cut leaves. A call is
one primitive: it is either not durable yet (create, write_at, link, rename, unlink, set_size, reserve, punch,
fill: the kernel may keep it in memory) or it makes things durable (fsync_file, fsync_dir, checkpoint).

Durable for whom: `fsync_file` and `fsync_dir` make data and names durable for Linux, which replays a journal.
GRUB does not replay it: names (create, link, rename, unlink) and sizes reach GRUB's eyes for certain only with
`checkpoint`. Bytes written in place over allocated, written blocks are not journaled: after `fsync_file` both
see them.

Files are named by `Place`: a volume of the installation and a path inside it. There are no open handles
between calls; `fill` and `reading` lend a descriptor for their own time only.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import stat as stat_module
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import NamedTuple, Protocol, TypeVar

from cos_console.slots import checkpoint as checkpoint_module

T = TypeVar("T")


class Volume(StrEnum):
    """The partitions of one installation that this tool may write to."""

    STATE = "state"
    OEM = "oem"
    RECOVERY = "recovery"
    BOOT = "boot"
    PERSISTENT = "persistent"


class Place(NamedTuple):
    """A file or directory of an installation. `path` is relative to the volume's root, "" is the root."""

    volume: Volume
    path: str

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def directory(self) -> "Place":
        return Place(self.volume, self.path.rpartition("/")[0])

    def beside(self, name: str) -> "Place":
        """Another name in the same directory."""
        head, slash, _ = self.path.rpartition("/")
        return Place(self.volume, f"{head}{slash}{name}")

    def __str__(self) -> str:
        return f"COS_{self.volume.value.upper()}:/{self.path}"


class FileStat(NamedTuple):
    """What stat(2) tells of a regular file."""

    inode: int
    size_bytes: int
    allocated_bytes: int
    mtime_ns: int
    links: int


class ExtentKind(StrEnum):
    """How one run of a file lies on the disk (FIEMAP)."""

    WRITTEN = "written"
    UNWRITTEN = "unwritten"
    """Reserved, never written: zeros for Linux, stale disk content for GRUB."""
    DELAYED = "delayed"
    """Not allocated yet."""
    INLINE = "inline"
    """Inside the inode: GRUB can't write it by block list."""


class Extent(NamedTuple):
    offset: int
    length: int
    kind: ExtentKind


class Port(Protocol):
    """Every change of an installation's file systems. All raise OSError; nothing is retried here."""

    # --- changes, not durable by themselves -----------------------------------------------------------------

    def create(self, place: Place) -> None:
        """A new empty regular file, mode 0600. Raises FileExistsError."""
        ...

    def reserve(self, place: Place, size_bytes: int) -> None:
        """Make the file `size_bytes` long with blocks for all of it (fallocate). Raises OSError(ENOSPC)."""
        ...

    def set_size(self, place: Place, size_bytes: int) -> None:
        """Truncate or extend with a hole."""
        ...

    def fill(self, place: Place, write: Callable[[int], T]) -> T:
        """Lend a read-write descriptor of an existing file to `write`: the bulk fill of an image.

        Everything done through the descriptor is one operation of the port. The descriptor must not be kept.
        """
        ...

    def write_at(self, place: Place, offset: int, data: bytes) -> None:
        """One pwrite(2) of all of `data` into an existing file; extends it when it reaches past its end."""
        ...

    def punch(self, place: Place, offset: int, length: int) -> None:
        """Make a hole there; the size stays. Blocks of that range are freed."""
        ...

    def link(self, place: Place, new: Place) -> None:
        """Give the file a second name. Raises FileExistsError."""
        ...

    def rename(self, place: Place, new: Place) -> None:
        """Atomically, over an existing name too. Does nothing when both names are one inode: callers check."""
        ...

    def unlink(self, place: Place) -> None: ...

    # --- what makes changes durable -------------------------------------------------------------------------

    def fsync_file(self, place: Place) -> None: ...

    def fsync_dir(self, place: Place) -> None:
        """`place` is the directory."""
        ...

    def checkpoint(self, volume: Volume) -> str:
        """Write the journal home, so that GRUB reads the same names as Linux. Returns how it was done."""
        ...

    # --- looking --------------------------------------------------------------------------------------------

    def has(self, volume: Volume) -> bool:
        """Whether that volume is there to be written."""
        ...

    def stat(self, place: Place) -> FileStat | None:
        """None when there is no regular file of that name."""
        ...

    def read(self, place: Place, offset: int, length: int) -> bytes:
        """Up to `length` bytes; shorter only at the end of the file."""
        ...

    def read_back(self, place: Place, offset: int, length: int) -> bytes:
        """Like `read`, but past the page cache (dropped first): what is on the medium."""
        ...

    def reading(self, place: Place) -> AbstractContextManager[int]:
        """A read-only descriptor for the time of a with block."""
        ...

    def names(self, place: Place) -> tuple[str, ...]:
        """Sorted names in a directory; empty when there is no such directory."""
        ...

    def extents(self, place: Place) -> tuple[Extent, ...]:
        """FIEMAP of the file after a sync of it; holes are not listed."""
        ...

    def free_bytes(self, volume: Volume) -> int:
        """Free for root."""
        ...

    def block_bytes(self, volume: Volume) -> int: ...


class MountedVolume(NamedTuple):
    """One mounted volume, held by a descriptor of its root directory, so no path can be swapped under us."""

    root_fd: int
    remount: Callable[[], int] | None = None
    """Unmount and mount again when the mount is our own; returns the new root descriptor."""


class RealPort:
    """The port onto mounted file systems."""

    def __init__(self, volumes: Mapping[Volume, MountedVolume]) -> None:
        self._volumes = dict(volumes)

    # --- changes

    def create(self, place: Place) -> None:
        with self._parent(place) as parent:
            os.close(
                os.open(
                    place.name,
                    os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    0o600,
                    dir_fd=parent,
                )
            )

    def reserve(self, place: Place, size_bytes: int) -> None:
        with self._open(place, os.O_WRONLY) as fd:
            # Not posix_fallocate: glibc falls back to writing a byte per block, which reserves nothing
            # on a file system that compresses or copies on write.
            _fallocate(fd, 0, 0, size_bytes)

    def set_size(self, place: Place, size_bytes: int) -> None:
        with self._open(place, os.O_WRONLY) as fd:
            os.ftruncate(fd, size_bytes)

    def fill(self, place: Place, write: Callable[[int], T]) -> T:
        with self._open(place, os.O_RDWR) as fd:
            return write(fd)

    def write_at(self, place: Place, offset: int, data: bytes) -> None:
        with self._open(place, os.O_WRONLY) as fd:
            view = memoryview(data)
            while view:
                done = os.pwrite(fd, view, offset)
                view, offset = view[done:], offset + done

    def punch(self, place: Place, offset: int, length: int) -> None:
        with self._open(place, os.O_WRONLY) as fd:
            _fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)

    def link(self, place: Place, new: Place) -> None:
        with self._parent(place) as source, self._parent(new) as target:
            os.link(place.name, new.name, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)

    def rename(self, place: Place, new: Place) -> None:
        with self._parent(place) as source, self._parent(new) as target:
            os.rename(place.name, new.name, src_dir_fd=source, dst_dir_fd=target)

    def unlink(self, place: Place) -> None:
        with self._parent(place) as parent:
            os.unlink(place.name, dir_fd=parent)

    # --- durable

    def fsync_file(self, place: Place) -> None:
        with self._open(place, os.O_RDONLY) as fd:
            os.fsync(fd)

    def fsync_dir(self, place: Place) -> None:
        with self._directory(place) as fd:
            os.fsync(fd)

    def checkpoint(self, volume: Volume) -> str:
        mounted = self._volumes[volume]
        how = checkpoint_module.checkpoint(mounted.root_fd)
        if how is not None:
            return how
        if mounted.remount is not None:
            self._volumes[volume] = mounted._replace(root_fd=mounted.remount())
            return "unmounted and mounted again"
        return checkpoint_module.freeze_and_thaw(mounted.root_fd)

    # --- looking

    def has(self, volume: Volume) -> bool:
        return volume in self._volumes

    def stat(self, place: Place) -> FileStat | None:
        try:
            with self._parent(place) as parent:
                found = os.stat(place.name, dir_fd=parent, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not stat_module.S_ISREG(found.st_mode):
            return None
        return FileStat(found.st_ino, found.st_size, found.st_blocks * 512, found.st_mtime_ns, found.st_nlink)

    def read(self, place: Place, offset: int, length: int) -> bytes:
        with self._open(place, os.O_RDONLY) as fd:
            return _pread_all(fd, offset, length)

    def read_back(self, place: Place, offset: int, length: int) -> bytes:
        with self._open(place, os.O_RDONLY) as fd:
            # Only clean pages are dropped: the caller has fsynced what it wants to see.
            os.posix_fadvise(fd, offset & ~0xFFFF, length + 0x20000, os.POSIX_FADV_DONTNEED)
            return _pread_all(fd, offset, length)

    @contextlib.contextmanager
    def reading(self, place: Place) -> Iterator[int]:
        with self._open(place, os.O_RDONLY) as fd:
            yield fd

    def names(self, place: Place) -> tuple[str, ...]:
        try:
            with self._directory(place) as fd:
                return tuple(sorted(os.listdir(fd)))
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def extents(self, place: Place) -> tuple[Extent, ...]:
        with self._open(place, os.O_RDONLY) as fd:
            return fiemap(fd)

    def free_bytes(self, volume: Volume) -> int:
        found = os.fstatvfs(self._volumes[volume].root_fd)
        return found.f_bfree * found.f_frsize

    def block_bytes(self, volume: Volume) -> int:
        return os.fstatvfs(self._volumes[volume].root_fd).f_frsize

    # --- descriptors

    @contextlib.contextmanager
    def _directory(self, place: Place) -> Iterator[int]:
        """The directory `place`, reached component by component without following a symbolic link."""
        if place.volume not in self._volumes:
            raise FileNotFoundError(errno.ENOENT, "this volume is not mounted here", str(place))
        fd = os.dup(self._volumes[place.volume].root_fd)
        try:
            for part in (p for p in place.path.split("/") if p):
                if part == "..":
                    raise PermissionError(errno.EPERM, "a path may not climb", str(place))
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = inner
            yield fd
        finally:
            os.close(fd)

    def _parent(self, place: Place) -> AbstractContextManager[int]:
        if place.name in {"", ".", ".."}:
            raise PermissionError(errno.EPERM, "not a file name", str(place))
        return self._directory(place.directory)

    @contextlib.contextmanager
    def _open(self, place: Place, flags: int) -> Iterator[int]:
        with self._parent(place) as parent:
            fd = os.open(place.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        try:
            if not stat_module.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(place))
            yield fd
        finally:
            os.close(fd)


def _pread_all(fd: int, offset: int, length: int) -> bytes:
    parts: list[bytes] = []
    while length > 0:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


# linux/falloc.h
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02

_libc = ctypes.CDLL(None, use_errno=True)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    result = _libc.fallocate64(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length))
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


# linux/fiemap.h: struct fiemap (32 bytes) followed by struct fiemap_extent (56 bytes each)
_FS_IOC_FIEMAP = 0xC020660B
_FIEMAP_FLAG_SYNC = 0x1
_EXTENT_LAST = 0x1
_EXTENT_DELALLOC = 0x4
_EXTENT_INLINE = 0x200
_EXTENT_UNWRITTEN = 0x800
_EXTENT_COUNT = 512


def fiemap(fd: int) -> tuple[Extent, ...]:
    """Extents of an open file, in order; the file is synced first. Raises OSError(EOPNOTSUPP) on FAT."""
    found: list[Extent] = []
    start, size = 0, os.fstat(fd).st_size
    while start < size:
        request = bytearray(
            struct.pack("=QQIIII", start, size - start, _FIEMAP_FLAG_SYNC, 0, _EXTENT_COUNT, 0)
        )
        request += bytes(56 * _EXTENT_COUNT)
        fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        (count,) = struct.unpack_from("=I", request, 20)
        if count == 0:
            break
        for index in range(count):
            logical, _, length, flags = struct.unpack_from("=QQQ16xI", request, 32 + 56 * index)
            if flags & _EXTENT_INLINE:
                kind = ExtentKind.INLINE
            elif flags & _EXTENT_UNWRITTEN:
                kind = ExtentKind.UNWRITTEN
            elif flags & _EXTENT_DELALLOC:
                kind = ExtentKind.DELAYED
            else:
                kind = ExtentKind.WRITTEN
            found.append(Extent(logical, length, kind))
            start = logical + length
            if flags & _EXTENT_LAST:
                return tuple(found)
    return tuple(found)

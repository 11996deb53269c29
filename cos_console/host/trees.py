"""A file system's tree, looked at without writing: through a mount that is there, or read in user space.

Through a mount every open is O_RDONLY|O_NOATIME|O_NOFOLLOW, so that no time stamp moves. Without one the ext2/3/4
or squashfs reader works on the bytes; nothing is ever mounted here.
"""

import mmap
import os
import stat as stat_module
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from cos_console.formats.ext4.reader import Ext4, Run
from cos_console.formats.readat import FileReadAt, FormatError, ReadAt

LOOK_ERRORS = (OSError, FormatError, ValueError)
"""What a look at a damaged or unreadable thing raises."""


@dataclass(frozen=True)
class Node:
    inode: int
    size_bytes: int
    allocated_bytes: int
    mtime_s: int
    is_dir: bool
    is_file: bool


class Tree(Protocol):
    """Paths are relative to the root of the file system. Everything raises OSError or FormatError on damage."""

    def node(self, path: str) -> Node | None:
        """None when there is no such thing."""
        ...

    def names(self, path: str) -> tuple[str, ...]:
        """Names in a directory, sorted; empty when there is none."""
        ...

    def open(self, path: str) -> ReadAt: ...

    def runs(self, path: str) -> tuple[Run, ...] | None:
        """Block runs of a file; None where this kind of look can't tell."""
        ...

    def close(self) -> None: ...


class ReadsFiles(Protocol):
    """What the user-space readers have in common."""

    def listdir(self, path: str = "/") -> tuple[str, ...]: ...
    def exists(self, path: str) -> bool: ...
    def read_file(self, path: str, limit: int = 1 << 20) -> bytes: ...
    def open_file(self, path: str) -> ReadAt: ...


def read_small(tree: Tree, path: str, limit: int = 1 << 18) -> bytes | None:
    """A small file's bytes, None when it is not there."""
    node = tree.node(path)
    if node is None or not node.is_file:
        return None
    return tree.open(path).read_at(0, min(limit, node.size_bytes))


class Ext4Tree:
    """An ext2/3/4 file system read in user space."""

    def __init__(self, fs: Ext4) -> None:
        self.fs = fs

    @classmethod
    def open_source(cls, source: ReadAt, journal: Literal["ignore", "replay"]) -> "Ext4Tree":
        return cls(Ext4.open(source, journal=journal))

    def node(self, path: str) -> Node | None:
        try:
            s = self.fs.stat(path)
        except FileNotFoundError:
            return None
        return Node(s.inode, s.size_bytes, s.allocated_bytes, s.mtime, s.is_dir, s.is_file)

    def names(self, path: str) -> tuple[str, ...]:
        try:
            return self.fs.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return ()

    def open(self, path: str) -> ReadAt:
        return self.fs.open_file(path)

    def runs(self, path: str) -> tuple[Run, ...] | None:
        return self.fs.runs(path)

    def close(self) -> None:
        return None


class MountTree:
    """A mounted file system, through the directory `point`. Symbolic links are not followed."""

    def __init__(self, point: str) -> None:
        self._root = os.open(point, _READ | os.O_DIRECTORY)
        self._files: list[int] = []

    def node(self, path: str) -> Node | None:
        try:
            parent, name = self._parent(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            s = os.stat(name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return None
        finally:
            os.close(parent)
        return Node(
            s.st_ino,
            s.st_size,
            s.st_blocks * 512,
            s.st_mtime_ns // 1_000_000_000,
            stat_module.S_ISDIR(s.st_mode),
            stat_module.S_ISREG(s.st_mode),
        )

    def names(self, path: str) -> tuple[str, ...]:
        try:
            fd = self._descend(path)
        except (FileNotFoundError, NotADirectoryError):
            return ()
        try:
            return tuple(sorted(os.listdir(fd)))
        finally:
            os.close(fd)

    def open(self, path: str) -> ReadAt:
        parent, name = self._parent(path)
        try:
            fd = os.open(name, _READ | os.O_NONBLOCK, dir_fd=parent)
        finally:
            os.close(parent)
        self._files.append(fd)
        if not stat_module.S_ISREG(os.fstat(fd).st_mode):
            raise FormatError(f"{path} is not a regular file")
        return FileReadAt(fd)

    def runs(self, path: str) -> tuple[Run, ...] | None:
        del path
        return None

    def close(self) -> None:
        for fd in (*self._files, self._root):
            os.close(fd)
        self._files = []

    def _parent(self, path: str) -> tuple[int, str]:
        head, _, name = path.strip("/").rpartition("/")
        return self._descend(head), name or "."

    def _descend(self, path: str) -> int:
        fd = os.dup(self._root)
        for part in path.strip("/").split("/"):
            if not part:
                continue
            try:
                below = os.open(part, _READ | os.O_DIRECTORY, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd


_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOATIME | os.O_NOFOLLOW


class DirectReadAt:
    """A mounted block device past the page cache (O_DIRECT): what is on the medium, which is what GRUB reads."""

    _ALIGN = 4096

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
        start = offset - offset % self._ALIGN
        span = -(-(offset + length - start) // self._ALIGN) * self._ALIGN
        with mmap.mmap(-1, span) as buffer:
            got = os.preadv(self._fd, [buffer], start)
            return buffer[offset - start : min(offset - start + length, got)]


class Sources:
    """Open descriptors of one look, closed together. Everything is opened O_RDONLY."""

    def __init__(self, wrap: Callable[[ReadAt], ReadAt] | None = None) -> None:
        self._wrap = wrap
        self._fds: list[int] = []
        self._trees: list[Tree] = []

    def open(self, path: str) -> ReadAt:
        fd = open_read_only(path)
        self._fds.append(fd)
        source = FileReadAt(fd)
        return self._wrap(source) if self._wrap is not None else source

    def open_direct(self, path: str) -> ReadAt:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT | os.O_NONBLOCK)
        self._fds.append(fd)
        return DirectReadAt(fd)

    def keep(self, tree: Tree) -> None:
        self._trees.append(tree)

    def close(self) -> None:
        for tree in self._trees:
            tree.close()
        for fd in self._fds:
            os.close(fd)
        self._trees, self._fds = [], []


def open_read_only(path: str) -> int:
    """O_RDONLY, without moving the access time of a regular file where that is ours to ask."""
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_NOATIME)
    except PermissionError:
        return os.open(path, flags)

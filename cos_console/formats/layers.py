"""Layers merged into one tree, in memory, by the rules of the OCI image spec (layer.md).

Whiteouts and opaque markers act on the layers below, wherever they stand in their own layer. Parents that are
symbolic links are followed inside the image's root, absolute ones from it, 40 at most; a link's own `..` stops
at the root, as it does for a process inside. Nothing leaves the root, because there is no other place: the tree
is a dictionary. A member name with `..` above the root, an absolute one and a loop of links are refused, with
the entry named. A directory entry replaces a link or file of that name and keeps a directory; every other entry
replaces whatever stands there (what umoci and containerd do). Member names are cleaned as text first, again as
they do: `a/../b` is `b`.

The content of /proc, /sys, /dev, /tmp, /run and /mnt stays as the layers have it: an image's own device nodes
and empty directories are part of it, and the patterns that the original excludes hit innocent paths elsewhere.
"""

import stat as stat_module
from collections.abc import Iterable, Iterator
from typing import NoReturn

from cos_console.formats import tar
from cos_console.formats.readat import FormatError
from cos_console.formats.tar import Runs, TarEntry, show

MAX_LINKS = 40
MAX_DEPTH = 1024
MAX_COMPONENT = 255
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."
_FORMAT = {
    tar.REGULAR: stat_module.S_IFREG,
    tar.SYMLINK: stat_module.S_IFLNK,
    tar.CHARACTER: stat_module.S_IFCHR,
    tar.BLOCK_DEVICE: stat_module.S_IFBLK,
    tar.DIRECTORY: stat_module.S_IFDIR,
    tar.FIFO: stat_module.S_IFIFO,
}


class Node:
    """One inode of the merged tree. Hard links are one Node under several names."""

    __slots__ = (
        "children",
        "gid",
        "inode",
        "link",
        "major",
        "minor",
        "mode",
        "mtime_ns",
        "names",
        "runs",
        "size",
        "uid",
        "xattrs",
    )

    def __init__(self, mode: int, mtime_ns: int = 0, children: "dict[bytes, Node] | None" = None) -> None:
        self.mode = mode
        """Type and permission bits, as in st_mode."""
        self.uid = 0
        self.gid = 0
        self.mtime_ns = mtime_ns
        self.size = 0
        self.link = b""
        self.xattrs: dict[bytes, bytes] | None = None
        self.major = 0
        self.minor = 0
        self.runs: Runs = ()
        self.children = children
        self.inode = 0
        """Set by the writer."""
        self.names = 0
        """Set by the writer: how many names it has."""

    @property
    def is_dir(self) -> bool:
        return self.children is not None

    @property
    def is_symlink(self) -> bool:
        return self.mode & 0o170000 == 0o120000


class Tree:
    """The merged tree. Apply layers lowest first."""

    def __init__(self, created_ns: int = 0) -> None:
        """`created_ns` is the time of directories that no layer describes."""
        self._created_ns = created_ns
        self.root = self._new_directory()

    def apply(self, entries: Iterable[TarEntry]) -> None:
        """Put one layer on top. Raises FormatError naming the entry that can't be."""
        placed: list[tuple[bytes, bytes, TarEntry]] = []
        hidden: dict[bytes, Node] = {}
        for entry in entries:
            path = clean(entry.name)
            head, _, last = path.rpartition(b"/")
            if b".wh." not in path:
                placed.append((head, last, entry))
            elif last.startswith(_WHITEOUT) and not (path.startswith(_AUFS) and path != _OPAQUE):
                self._hide(entry.name, head, last, hidden)
            elif not path.startswith(_AUFS):  # aufs kept its own books under such names
                placed.append((head, last, entry))
        parents: dict[bytes, Node] = {}
        for head, last, entry in placed:
            if not last:
                if entry.kind != tar.DIRECTORY:
                    _refuse(entry.name, "the root can only be a directory")
                _describe(self.root, entry)
                continue
            parent = parents.get(head)
            if parent is None:
                parent = parents[head] = self._directory(head, entry.name) if head else self.root
            if self._put(parent, last, entry, hidden):
                parents.clear()  # a link or directory that was on the way is another one now

    def ensure_directory(self, path: str) -> None:
        """Make `path` a directory (0755, root), links followed; what stands in its way is left as it is."""
        try:
            self._directory(path.strip("/").encode(), path.encode())
        except FormatError:
            pass

    def find(self, path: str) -> Node | None:
        """The node at `path`, links followed inside the root; None when there is none."""
        try:
            return self._walk(clean(path.strip("/").encode()), path.encode())
        except FormatError:
            return None

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """(path with leading slash, node) of everything, parents first; a hard link once for each name."""
        stack: list[tuple[bytes, Node]] = [(b"/", self.root)]
        while stack:
            path, node = stack.pop()
            yield path, node
            if node.children:
                base = path if path == b"/" else path + b"/"
                stack += [(base + name, child) for name, child in node.children.items()]

    def path_of(self, wanted: Node) -> str:
        """Some name of `wanted`, for a message."""
        return next((show(path) for path, node in self.walk() if node is wanted), "?")

    # --- one entry -------------------------------------------------------------------------------------------

    def _hide(self, named: bytes, head: bytes, last: bytes, hidden: dict[bytes, Node]) -> None:
        parent = self._walk(head, named)
        if parent is None or parent.children is None:
            return
        base = head + b"/" if head else b""
        if last == _OPAQUE:
            hidden.update({base + name: node for name, node in parent.children.items()})
            parent.children.clear()
            return
        name = last[len(_WHITEOUT) :]
        if name in {b"", b".", b".."}:
            _refuse(named, "a whiteout that names nothing")
        gone = parent.children.pop(name, None)
        if gone is not None:
            hidden[base + name] = gone

    def _put(self, parent: Node, name: bytes, entry: TarEntry, hidden: dict[bytes, Node]) -> bool:
        """Returns whether a directory or link was replaced, so that remembered parents are stale."""
        assert parent.children is not None  # noqa: S101 - for the type checker; _directory gives directories
        if len(name) > MAX_COMPONENT:
            _refuse(entry.name, f"a name longer than {MAX_COMPONENT} bytes")
        old = parent.children.get(name)
        if entry.kind == tar.HARDLINK:
            node = self._link_target(entry, hidden)
            if node is old:
                return False
        elif old is not None and old.children is not None and entry.kind == tar.DIRECTORY:
            _describe(old, entry)
            return False
        else:
            node = Node(0, 0, {} if entry.kind == tar.DIRECTORY else None)
            _describe(node, entry)
            if entry.kind == tar.SYMLINK and not entry.link:
                _refuse(entry.name, "a symbolic link to nothing")
        parent.children[name] = node
        return old is not None and (old.children is not None or old.is_symlink)

    def _link_target(self, entry: TarEntry, hidden: dict[bytes, Node]) -> Node:
        path = clean(entry.link.lstrip(b"/"), entry.name)
        head, _, last = path.rpartition(b"/")
        parent = self._walk(head, entry.name)
        node = parent.children.get(last) if parent is not None and parent.children is not None else None
        if node is None:
            node = _hidden(path, hidden)  # whited out by this same layer: the link was made before
        if node is None or not path:
            _refuse(entry.name, f"a hard link to {show(entry.link)}, which is not there")
        if node.children is not None:
            _refuse(entry.name, "a hard link to a directory")
        return node

    # --- walking ---------------------------------------------------------------------------------------------

    def _directory(self, path: bytes, named: bytes) -> Node:
        """The directory at `path`, made where it is missing. Raises FormatError where a file stands."""
        node = self._walk(path, named, make=True)
        if node is None or node.children is None:
            _refuse(named, "its parent is not a directory")
        return node

    def _walk(self, path: bytes, named: bytes, *, make: bool = False) -> Node | None:
        """The node at `path` (clean), every link followed; None when it is not there and not to be made."""
        if not path:
            return self.root
        trail = [self.root]
        todo = path.split(b"/")
        todo.reverse()
        if len(todo) > MAX_DEPTH:
            _refuse(named, f"more than {MAX_DEPTH} directories deep")
        links = 0
        while todo:
            part = todo.pop()
            if part == b"..":  # only from a link: names are clean
                if len(trail) > 1:
                    trail.pop()
                continue
            here = trail[-1].children
            if here is None:
                return trail[-1] if make else None  # the caller refuses what is no directory
            node = here.get(part)
            if node is None:
                if not make:
                    return None
                if len(part) > MAX_COMPONENT:
                    _refuse(named, f"a name longer than {MAX_COMPONENT} bytes")
                node = here[part] = self._new_directory()
            elif node.is_symlink:
                links += 1
                if links > MAX_LINKS:
                    _refuse(named, f"more than {MAX_LINKS} symbolic links on the way")
                if node.link.startswith(b"/"):
                    del trail[1:]
                todo += [p for p in reversed(node.link.split(b"/")) if p and p != b"."]
                continue
            trail.append(node)
        return trail[-1]

    def _new_directory(self) -> Node:
        return Node(stat_module.S_IFDIR | 0o755, self._created_ns, {})


def _hidden(path: bytes, hidden: dict[bytes, Node]) -> Node | None:
    """What stood at `path`, or at `path` inside a directory, that the layer has just hidden."""
    parts = path.split(b"/")
    for n in range(len(parts), 0, -1):
        node = hidden.get(b"/".join(parts[:n]))
        for part in parts[n:]:
            node = node.children.get(part) if node is not None and node.children is not None else None
        if node is not None:
            return node
    return None


def clean(name: bytes, named: bytes | None = None) -> bytes:
    """A member's name as a path from the root: no empty parts, `.` or `..`; empty for the root itself.

    Raises FormatError, naming `named`, for an absolute name and one that leads above the root.
    """
    if name and name[0] != 0x2F and b"/." not in name and b"//" not in name and name[0] != 0x2E:
        return name[:-1] if name[-1] == 0x2F else name
    if name.startswith(b"/"):
        _refuse(named or name, "an absolute name")
    kept: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if not kept:
                _refuse(named or name, "leads above the image's root")
            kept.pop()
        elif part and part != b".":
            kept.append(part)
    return b"/".join(kept)


def _describe(node: Node, entry: TarEntry) -> None:
    _, kind, mode, uid, gid, mtime_ns, size, link, xattrs, major, minor, runs = entry
    node.mode = _FORMAT[kind] | mode
    node.uid = uid
    node.gid = gid
    node.mtime_ns = mtime_ns
    node.xattrs = xattrs
    if kind == tar.REGULAR:
        node.size = size
        node.runs = runs
    elif kind == tar.SYMLINK:
        node.mode |= 0o777  # a link has no permissions of its own on Linux
        node.mode &= ~0o7000
        node.link = link
    else:
        node.major = major
        node.minor = minor


def _refuse(name: bytes, why: str) -> NoReturn:
    raise FormatError(f"{show(name)}: {why}")

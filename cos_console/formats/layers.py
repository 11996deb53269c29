"""Layers merged into one tree, in memory, by the rules of the OCI image spec (layer.md).

Whiteouts and opaque markers act on the layers below, wherever they stand in their own layer. Parents that are
symbolic links are followed inside the image's root, absolute ones from it, 40 at most. Nothing leaves the
root, because there is no other place: the tree is a dictionary. A name with `..` above the root, an absolute
name and a loop of links are refused, with the entry named.
"""

import stat as stat_module
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from cos_console.formats import tar
from cos_console.formats.readat import FormatError
from cos_console.formats.tar import Runs, TarEntry

MAX_LINKS = 40
_WHITEOUT = b".wh."
_OPAQUE = b".wh..wh..opq"
_FORMAT = {
    tar.REGULAR: stat_module.S_IFREG,
    tar.SYMLINK: stat_module.S_IFLNK,
    tar.CHARACTER: stat_module.S_IFCHR,
    tar.BLOCK_DEVICE: stat_module.S_IFBLK,
    tar.DIRECTORY: stat_module.S_IFDIR,
    tar.FIFO: stat_module.S_IFIFO,
}


@dataclass(slots=True, eq=False)
class Node:
    """One inode of the merged tree. Hard links are one Node under several names."""

    mode: int
    """Type and permission bits, as in st_mode."""
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    link: bytes = b""
    xattrs: dict[bytes, bytes] | None = None
    major: int = 0
    minor: int = 0
    runs: Runs = ()
    children: "dict[bytes, Node] | None" = None
    inode: int = field(default=0)
    """Set by the writer."""
    names: int = field(default=0)
    """Set by the writer: how many names it has."""

    @property
    def is_dir(self) -> bool:
        return self.children is not None

    @property
    def is_symlink(self) -> bool:
        return stat_module.S_ISLNK(self.mode)


class Tree:
    """The merged tree. Apply layers lowest first."""

    def __init__(self) -> None:
        self.root = Node(mode=stat_module.S_IFDIR | 0o755, children={})

    def apply(self, entries: Iterable[TarEntry]) -> None:
        """Put one layer on top. Raises FormatError naming the entry that can't be."""
        listed = list(entries)
        for entry in listed:
            head, _, last = entry.name.rpartition(b"/")
            if last.startswith(_WHITEOUT):
                self._hide(entry, head, last)
        parent_name: bytes | None = None
        parent = self.root
        for entry in listed:
            head, _, last = entry.name.rpartition(b"/")
            if last.startswith(_WHITEOUT):
                continue
            if head != parent_name or last in {b"", b".", b".."}:
                parent, last = self._place(entry)
                parent_name = head if last else None
            if not last:
                if entry.kind != tar.DIRECTORY:
                    raise FormatError(f"{_show(entry.name)}: the root can only be a directory")
                _describe(self.root, entry)
                continue
            if self._put(parent, last, entry):
                parent_name = None  # a link or directory on the way may have changed

    def ensure_directory(self, path: str) -> None:
        """Make `path` a directory (0755, root) where nothing stands in its way; links are followed."""
        self._directory([p for p in path.encode().split(b"/") if p], path.encode())

    def find(self, path: str) -> Node | None:
        """The node at `path`, links followed inside the root; None when there is none."""
        parts = [p for p in path.encode().split(b"/") if p and p != b"."]
        try:
            trail = self._walk(parts, path.encode(), make=False, follow_last=True)
        except FormatError:
            return None
        return trail[-1] if trail else None

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """(path with leading slash, node) of everything, parents first; a hard link once for each name."""
        stack: list[tuple[bytes, Node]] = [(b"/", self.root)]
        while stack:
            path, node = stack.pop()
            yield path, node
            if node.children:
                base = path if path.endswith(b"/") else path + b"/"
                stack += [(base + name, child) for name, child in node.children.items()]

    # --- one entry -------------------------------------------------------------------------------------------

    def _hide(self, entry: TarEntry, head: bytes, last: bytes) -> None:
        parts = _parts(head, entry.name)
        trail = self._walk(parts, entry.name, make=False, follow_last=True)
        if not trail or trail[-1].children is None:
            return
        if last == _OPAQUE:
            trail[-1].children.clear()
        else:
            trail[-1].children.pop(last[len(_WHITEOUT) :], None)

    def _place(self, entry: TarEntry) -> tuple[Node, bytes]:
        """The directory and the name an entry goes to; an empty name is the root itself."""
        parts = _parts(entry.name, entry.name)
        if not parts:
            return self.root, b""
        if parts[-1] == b"..":
            raise FormatError(f"{_show(entry.name)}: a name that ends in ..")
        return self._directory(parts[:-1], entry.name), parts[-1]

    def _put(self, parent: Node, name: bytes, entry: TarEntry) -> bool:
        """Returns whether a directory or link was replaced, so that remembered parents are stale."""
        assert parent.children is not None  # noqa: S101 - for the type checker; _directory gives directories
        if len(name) > 255:
            raise FormatError(f"{_show(entry.name)}: a name longer than 255 bytes")
        old = parent.children.get(name)
        if entry.kind == tar.HARDLINK:
            target = self._link_target(entry)
            parent.children[name] = target
            return old is not None and (old.is_dir or old.is_symlink)
        if entry.kind == tar.DIRECTORY and old is not None and old.is_dir:
            _describe(old, entry)
            return False
        node = Node(mode=0, children={} if entry.kind == tar.DIRECTORY else None)
        _describe(node, entry)
        if entry.kind == tar.SYMLINK and not entry.link:
            raise FormatError(f"{_show(entry.name)}: a symbolic link to nothing")
        parent.children[name] = node
        return old is not None and (old.is_dir or old.is_symlink)

    def _link_target(self, entry: TarEntry) -> Node:
        parts = _parts(entry.link.lstrip(b"/") if entry.link.startswith(b"/") else entry.link, entry.name)
        trail = self._walk(parts, entry.name, make=False, follow_last=False)
        if not trail or not parts:
            raise FormatError(f"{_show(entry.name)}: a hard link to {_show(entry.link)}, which is not there")
        if trail[-1].is_dir:
            raise FormatError(f"{_show(entry.name)}: a hard link to a directory")
        return trail[-1]

    # --- walking ---------------------------------------------------------------------------------------------

    def _directory(self, parts: list[bytes], named: bytes) -> Node:
        trail = self._walk(parts, named, make=True, follow_last=True)
        return trail[-1]

    def _walk(self, parts: list[bytes], named: bytes, *, make: bool, follow_last: bool) -> list[Node]:
        """Nodes from the root to the end of `parts`; empty when it is not there and not to be made."""
        trail = [self.root]
        todo = list(parts)
        links = 0
        while todo:
            part = todo.pop(0)
            if part == b"..":
                if len(trail) == 1:
                    raise FormatError(f"{_show(named)}: leads above the image's root")
                trail.pop()
                continue
            here = trail[-1].children
            if here is None:
                if make:
                    raise FormatError(f"{_show(named)}: its parent is not a directory")
                return []
            node = here.get(part)
            if node is None:
                if not make:
                    return []
                if len(part) > 255:
                    raise FormatError(f"{_show(named)}: a name longer than 255 bytes")
                node = here[part] = Node(mode=stat_module.S_IFDIR | 0o755, children={})
            elif node.is_symlink and (todo or follow_last):
                links += 1
                if links > MAX_LINKS:
                    raise FormatError(f"{_show(named)}: more than {MAX_LINKS} symbolic links on the way")
                if node.link.startswith(b"/"):
                    trail = trail[:1]
                target = [p for p in node.link.split(b"/") if p and p != b"."]
                # A link's own `..` at the root stays there, as it does for a process inside that root.
                todo = _inside(target, len(trail) - 1) + todo
                continue
            elif make and not node.is_dir and not todo:
                raise FormatError(f"{_show(named)}: its parent is not a directory")
            trail.append(node)
        return trail


def _inside(parts: list[bytes], depth: int) -> list[bytes]:
    """`parts` of a link without the `..` that would go above the root from `depth` directories down."""
    kept = []
    for part in parts:
        if part == b"..":
            if depth == 0:
                continue
            depth -= 1
        else:
            depth += 1
        kept.append(part)
    return kept


def _parts(path: bytes, named: bytes) -> list[bytes]:
    if path.startswith(b"/"):
        raise FormatError(f"{_show(named)}: an absolute name")
    parts = [p for p in path.split(b"/") if p and p != b"."]
    depth = 0
    for part in parts:
        depth += -1 if part == b".." else 1
        if depth < 0:
            raise FormatError(f"{_show(named)}: leads above the image's root")
    return parts


def _describe(node: Node, entry: TarEntry) -> None:
    node.mode = _FORMAT[entry.kind] | entry.mode
    node.uid, node.gid = entry.uid, entry.gid
    node.mtime_ns, node.size, node.link = entry.mtime_ns, entry.size, entry.link
    node.xattrs = entry.xattrs
    node.major, node.minor, node.runs = entry.major, entry.minor, entry.runs


def _show(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")

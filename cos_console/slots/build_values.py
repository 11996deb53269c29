"""What is asked of the image builder and what it answers."""

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from cos_console.formats.ext4 import layout
from cos_console.formats.layers import Node, Tree
from cos_console.slots.build_pieces import Piece

COS_DIRECTORIES = ("proc", "boot", "dev", "sys", "run", "tmp", "mnt", "host", "usr/local", "oem")
"""Mount points that cos-upgrade makes in a new image, and those that the workings of cOS want."""

Contexts = Callable[[bytes, int], bytes | None]
"""SELinux context, without the final NUL, for (path with leading slash, st_mode); None leaves the file as it is."""


@dataclass(frozen=True)
class ImageSpec:
    """What file system to make."""

    size_bytes: int
    label: str
    uuid: bytes | None = None
    """16 bytes; None: made from the image's digests, the label and the size."""
    created_s: int | None = None
    """Seconds since 1970; None: now."""
    directories: tuple[str, ...] = COS_DIRECTORIES
    contexts: Contexts | None = None
    contexts_from: "Callable[[ImageTree], Contexts | None] | None" = None
    """As `contexts`, but made from the merged tree: file_contexts lies inside the image."""
    keep_reserved: bool = False
    """Leave the room that was not written reserved, because the image will be mounted and written into; the
    caller ends that with `dig_unwritten` and proves the result by other means."""
    prove_while_writing: bool = True
    check_diff_ids: bool = False
    """Also where a layer has a digest that is checked: some 0.4 s more for a gigabyte."""
    workers: int = 2
    entry_limit: int = 500_000
    window_limit_bytes: int = 32 << 20
    """Of zstd, for each worker: what its level 20 wants. Bounds memory."""
    inflated_limit_bytes: int | None = None
    """Of all layers together; None: four times the image and a gigabyte."""


@dataclass(frozen=True)
class BuildProgress:
    """Bytes as transferred. `waiting_s` is the time since the last byte came."""

    bytes_done: int
    bytes_total: int
    """0 where not known."""
    rate_bps: float = 0.0
    waiting_s: float = 0.0
    detail: str = ""
    refetch_bytes: int = 0
    """What would be fetched again if it stopped now."""


@dataclass(frozen=True)
class BuildResult:
    """What was written. `pieces` is what a proof compares against."""

    entries: int
    """Inodes."""
    files: int
    directories: int
    transfer_bytes: int
    inflated_bytes: int
    written_bytes: int
    used_bytes: int
    """Blocks in use inside the image."""
    size_bytes: int
    uuid: str
    label: str
    warnings: tuple[str, ...]
    elapsed_s: float
    stamp_ns: int
    """Modification time given to the file at the end: another one means that somebody wrote into it since."""
    pieces: tuple[Piece, ...] = field(repr=False)


@dataclass(frozen=True)
class ProofResult:
    """`method` is direct (O_DIRECT) or dropped (page cache dropped first)."""

    files: int
    bytes_read: int
    """All that was written, whenever it was read back."""
    pieces: int
    method: str
    bytes_read_while_writing: int = 0


class ImageTree:
    """The merged image before its metadata is written: look into it, read its files."""

    def __init__(self, tree: Tree, fd: int) -> None:
        self._tree = tree
        self._fd = fd

    def find(self, path: str) -> Node | None:
        """The node at `path`, links followed inside the image; None when there is none."""
        return self._tree.find(path)

    def read_file(self, path: str, limit: int) -> bytes | None:
        """Up to `limit` bytes of a regular file; None when there is none. Raises OSError."""
        node = self._tree.find(path)
        if node is None or not stat.S_ISREG(node.mode):
            return None
        data = bytearray(min(limit, node.size))
        for logical, first, count in node.runs:
            at = logical * layout.BLOCK
            if at < len(data):
                part = os.pread(self._fd, min(count * layout.BLOCK, len(data) - at), first * layout.BLOCK)
                data[at : at + len(part)] = part
        return bytes(data)

"""One partition, looked at as Linux sees it and as GRUB sees it.

GRUB does not replay ext4's journal. So an unmounted file system whose superblock says needs_recovery is read twice,
raw and with the journal applied in memory. One that is mounted here is Linux's through its mount, and GRUB's as it
stands on the medium (O_DIRECT). Rules: switch.md of the design, measured with GRUB 2.06 and Linux 6.18.
"""

import os
from dataclasses import dataclass

from cos_console.formats.ext4.reader import Ext4, parse_superblock
from cos_console.formats.readat import FormatError, ReadAt
from cos_console.host.mounts import Mount
from cos_console.host.trees import LOOK_ERRORS, Ext4Tree, MountTree, Node, Sources, Tree, read_small
from cos_console.model.machine import Finding, Partition, Severity

EXT = {"ext2", "ext3", "ext4"}


@dataclass(frozen=True)
class Look:
    """`linux` and `grub` are the same object where there can be no difference; None where it can't be read."""

    partition: Partition
    linux: Tree | None
    grub: Tree | None
    mounted_at: str
    free_bytes: int
    findings: tuple[Finding, ...]

    @property
    def two_views(self) -> bool:
        return self.linux is not None and self.grub is not None and self.linux is not self.grub


def look_at(partition: Partition, source: ReadAt, mount: Mount | None, sources: Sources) -> Look:
    """Both views of `partition`, whose bytes are `source`. Never raises."""
    if partition.fs_type not in EXT:
        return Look(partition, None, None, mount.point if mount else "", 0, ())
    findings: list[Finding] = []
    linux: Tree | None = None
    grub: Tree | None = None
    free = 0
    if mount is not None:
        try:
            linux = MountTree(mount.point)
            sources.keep(linux)
            numbers = os.statvfs(mount.point)
            free = numbers.f_bfree * numbers.f_frsize
        except OSError as error:
            findings.append(_unreadable(partition, error))
    try:
        raw = _medium(partition, source, sources) if mount is not None else source
        grub = Ext4Tree.open_source(raw, "ignore")
        superblock = parse_superblock(raw.read_at(1024, 1024))
        if linux is None:
            linux = grub
            if superblock.needs_recovery:
                linux = Ext4Tree(Ext4.open(raw, journal="replay"))
            free = superblock.free_blocks * superblock.block_bytes
        if superblock.errors:
            what = f"The file system {partition.fs_label or partition.number} is marked as having errors."
            now = "Check it with e2fsck before the next upgrade."
            findings.append(Finding(code="COS-FS-ERRORS", severity=Severity.WARNING, what=what, now=now))
    except LOOK_ERRORS as error:
        findings.append(_unreadable(partition, error))
    return Look(partition, linux, grub, mount.point if mount else "", free, tuple(findings))


def disagreements(look: Look, watched: tuple[str, ...]) -> tuple[Finding, ...]:
    """What GRUB sees differently from Linux: names, inodes and sizes in cOS/, and the `watched` small files."""
    if not look.two_views or look.linux is None or look.grub is None:
        return ()
    found: list[str] = []
    try:
        ours, theirs = nodes(look.linux, "cOS"), nodes(look.grub, "cOS")
        for path in sorted(ours.keys() | theirs.keys()):
            mine, its = ours.get(path), theirs.get(path)
            if mine is None or its is None:
                sees, other = ("Linux", "GRUB") if its is None else ("GRUB", "Linux")
                found.append(f"{path} is there for {sees} and not for {other}")
            elif (mine.inode, mine.size_bytes) != (its.inode, its.size_bytes):
                found.append(f"{path} is file {mine.inode} for Linux and file {its.inode} for GRUB")
            elif mine.is_file and path.endswith(".img") and _head(look.linux, path) != _head(look.grub, path):
                found.append(f"the label or superblock of {path} differs")
        linux, grub = look.linux, look.grub
        changed = (p for p in watched if read_small(linux, p, 65536) != read_small(grub, p, 65536))
        found.extend(f"{path} differs" for path in changed)
    except LOOK_ERRORS as error:
        found.append(f"one of the two can't be read ({' '.join(str(error).split())})")
    if not found:
        return ()
    name = look.partition.fs_label or f"partition {look.partition.number}"
    return (
        Finding(
            code="COS-LOOKS-DISAGREE",
            severity=Severity.ERROR,
            what=f"GRUB and Linux see {name} differently: {'; '.join(found)}.",
            now="Finish or undo the interrupted operation; that brings both to the same state.",
        ),
    )


def nodes(tree: Tree, directory: str) -> dict[str, Node]:
    """Path to node of everything in `directory`. Raises OSError, FormatError."""
    found = {}
    for name in tree.names(directory):
        path = f"{directory}/{name}"
        node = tree.node(path)
        if node is not None:
            found[path] = node
    return found


def _head(tree: Tree, path: str) -> bytes:
    return tree.open(path).read_at(1024, 1024)


def _medium(partition: Partition, source: ReadAt, sources: Sources) -> ReadAt:
    """Past the page cache where there is a device; an image file's own bytes are what the loop device wrote."""
    if not partition.device:
        return source
    try:
        direct = sources.open_direct(partition.device)
        if len(direct.read_at(1024, 1024)) == 1024:
            return direct
    except OSError:
        pass
    return source


def _unreadable(partition: Partition, error: BaseException) -> Finding:
    words = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    name = partition.fs_label or f"partition {partition.number}"
    if isinstance(error, FormatError):
        what, now = f"The file system {name} is damaged: {words}.", "Check it with e2fsck."
    else:
        what, now = f"{name} can't be read: {words}.", "Look at the kernel's messages (dmesg) for the disk."
    return Finding(code="COS-FS-UNREADABLE", severity=Severity.ERROR, what=what, now=now)

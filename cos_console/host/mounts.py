"""What is mounted here, by device number, and which file a loop device stands on.

Sources: /proc/self/mountinfo (proc_pid_mountinfo(5)); LOOP_GET_STATUS64 of linux/loop.h. A loop device's backing
inode tells which image a root file system is on, whatever its label or the kernel line says.
"""

import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path

_LOOP_GET_STATUS64 = 0x4C05
_INFO64 = struct.Struct("<QQQQQIIII64s64s32s2Q")


@dataclass(frozen=True)
class Mount:
    devno: int
    root: str
    point: str
    fs_type: str
    read_only: bool
    """Of the file system (super options), not only of this mount."""


@dataclass(frozen=True)
class Loop:
    """One loop device in use."""

    name: str
    devno: int
    backing_dev: int
    """st_dev of the file system that holds the backing file."""
    backing_inode: int
    offset_bytes: int
    read_only: bool


def read_mounts(path: Path = Path("/proc/self/mountinfo")) -> tuple[Mount, ...]:
    """All mounts of this mount namespace, in order."""
    found = []
    for line in path.read_text(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, more = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(more) < 3:
            continue
        major, _, minor = fields[2].partition(":")
        found.append(
            Mount(
                os.makedev(int(major), int(minor)),
                _plain(fields[3]),
                _plain(fields[4]),
                more[0],
                "ro" in more[2].split(","),
            )
        )
    return tuple(found)


def mount_of(devno: int, mounts: tuple[Mount, ...]) -> Mount | None:
    """A mount through which the root directory of the file system on `devno` can be seen."""
    for mount in reversed(mounts):
        if mount.devno == devno and mount.root == "/":
            try:
                if os.stat(mount.point).st_dev == devno:
                    return mount
            except OSError:
                continue
    return None


def read_loops(block: Path = Path("/sys/block")) -> tuple[Loop, ...]:
    """All loop devices in use; one that can't be asked is left out."""
    found = []
    for entry in sorted(block.glob("loop*")):
        if not (entry / "loop/backing_file").exists():
            continue
        try:
            fd = os.open(f"/dev/{entry.name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            continue
        try:
            info = bytearray(_INFO64.size)
            fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
            devno = os.fstat(fd).st_rdev
        except OSError:
            continue
        finally:
            os.close(fd)
        values = _INFO64.unpack(info)
        found.append(
            Loop(entry.name, devno, _kernel_dev(values[0]), values[1], values[3], bool(values[8] & 1))
        )
    return tuple(found)


def running_image(mounts: tuple[Mount, ...], loops: tuple[Loop, ...]) -> tuple[int, int] | None:
    """(device number, inode) of the image file that the root of this machine is on; None when it is on none.

    With an overlay as root (immutable root of cOS) the loop device is looked for below the places where the
    initrd leaves it.
    """
    by_devno = {loop.devno: loop for loop in loops}
    for point in ("/", "/run/rootfsbase", "/run/initramfs/elemental-root", "/sysroot"):
        for mount in reversed(mounts):
            if mount.point == point and mount.devno in by_devno:
                loop = by_devno[mount.devno]
                return loop.backing_dev, loop.backing_inode
    return None


def _kernel_dev(value: int) -> int:
    """lo_device is huge_encode_dev: the same numbers that stat(2) gives."""
    return os.makedev((value >> 8) & 0xFFF, (value & 0xFF) | ((value >> 12) & 0xFFF00))


def _plain(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text

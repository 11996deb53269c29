"""One partition mounted for one operation, in a mount namespace that nobody else sees.

The namespace dies with the process, so a SIGKILL leaves no mount behind; the loop device of an image file is
made with autoclear by its detach right after the mount. Must be called in a process of its own with a single
thread (the engine's): unshare(CLONE_NEWNS) changes the whole process's view.
"""

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cos_console.process import run
from cos_console.slots.port import MountedVolume

_CLONE_NEWNS = 0x00020000
_libc = ctypes.CDLL(None, use_errno=True)


def enter_private_namespace() -> None:
    """From here on our mounts are ours alone, but what others unmount goes here too. Raises OSError (not root), Problem.

    Slave, not private: a private copy would keep the operator's USB stick mounted for as long as we run.
    """
    if _libc.unshare(_CLONE_NEWNS) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "unshare")
    run(["mount", "--make-rslave", "/"])


@contextlib.contextmanager
def mounted(source: Path, *, offset: int = 0, size_bytes: int = 0) -> Iterator[MountedVolume]:
    """Mount a partition's device, or the range of a whole-disk image file, read-write. Raises Problem.

    Its own mount, so `remount` (the checkpoint of kernels before 5.14) is a clean unmount and a new mount.
    """
    at = Path(tempfile.mkdtemp(prefix="cos-console-"))
    root = [_mount(source, at, offset, size_bytes)]

    def remount() -> int:
        os.close(root[0])
        run(["umount", str(at)])
        root[0] = _mount(source, at, offset, size_bytes)
        return root[0]

    try:
        yield MountedVolume(root[0], remount)
    finally:
        os.close(root[0])
        run(["umount", str(at)])
        at.rmdir()


def _mount(source: Path, at: Path, offset: int, size_bytes: int) -> int:
    options, device = "rw,noatime,nodev,nosuid,noexec", str(source)
    loop = ""
    if source.is_file():
        limits = ["-o", str(offset), *(["--sizelimit", str(size_bytes)] if size_bytes else [])]
        loop = device = run(["losetup", "-f", "--show", *limits, str(source)]).stdout.decode().strip()
    try:
        run(["mount", "-o", options, device, str(at)])
    finally:
        if loop:
            run(["losetup", "-d", loop])  # takes effect when the mount goes
    return os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

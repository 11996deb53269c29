"""Writing an ext3/ext4 journal home while the file system stays mounted.

GRUB reads a file system without replaying its journal, so a rename that is only committed is not there for it.
Three ways, best first: EXT4_IOC_CHECKPOINT (Linux 5.14, Documentation/filesystems/ext4/journal.rst), a clean
unmount (the caller's, when the mount is its own), and freezing the file system for a moment (FIFREEZE/FITHAW,
linux/fs.h), which flushes the journal too.

A process killed between freeze and thaw would leave the file system frozen and everything that touches it
hanging. So freezing is done by a process of its own which outlives ours, and a second one thaws as soon as
the first is gone, however it went: its end closes the pipe that the second one reads.
"""

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

_EXT4_IOC_CHECKPOINT = 0x4004662B  # _IOW('f', 43, __u32)
_NO_SUCH_WAY = {errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_NEVER_A_JOURNAL = {"ext2", "vfat", "msdos", "exfat"}

_libc = ctypes.CDLL(None, use_errno=True)


def checkpoint(fd: int) -> str | None:
    """Checkpoint the journal of the file system of `fd`; how it was done, or None when this kernel can't.

    A file system without a journal (ext2, FAT) is synced: there is nothing that could be replayed.
    """
    try:
        fcntl.ioctl(fd, _EXT4_IOC_CHECKPOINT, b"\0\0\0\0")
    except OSError as error:
        no_journal = error.errno == errno.ENODEV  # ext4's answer when there is no journal
        if error.errno in _NO_SUCH_WAY:
            no_journal = file_system_type(fd) in _NEVER_A_JOURNAL
            if not no_journal:
                return None
        if not no_journal:
            raise
        syncfs(fd)
        return "synced (no journal)"
    return "EXT4_IOC_CHECKPOINT"


def freeze_and_thaw(fd: int) -> str:
    """Freeze and thaw the file system of `fd` from processes of their own. Raises OSError when it fails."""
    # -I -S: nothing of the user's environment is imported, and it starts in milliseconds.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", FREEZER, str(fd)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        pass_fds=(fd,),
        start_new_session=True,
        check=False,
        timeout=300,
    )
    if done.returncode != 0:
        raise OSError(errno.EIO, f"freeze: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return "frozen and thawed"


FREEZER = """
import errno, fcntl, os, signal, sys, time
FREEZE, THAW = 0xC0045877, 0xC0045878
fd = int(sys.argv[1])
reader, writer = os.pipe()
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
    signal.signal(number, signal.SIG_IGN)

def thaw():
    try:
        fcntl.ioctl(fd, THAW, 0)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: it is not frozen
            raise

watcher = os.fork()
if watcher == 0:
    os.setsid()
    os.close(writer)
    os.read(reader, 1)  # returns when the freezer is gone or done
    while True:
        try:
            thaw()
            os._exit(0)
        except OSError:
            time.sleep(0.2)
os.close(reader)
try:
    fcntl.ioctl(fd, FREEZE, 0)
    if len(sys.argv) > 2:  # a test holds it frozen, to kill us here
        print("frozen", flush=True)
        time.sleep(float(sys.argv[2]))
finally:
    thaw()
    os.close(writer)
    os.waitpid(watcher, 0)
"""


def syncfs(fd: int) -> None:
    """syncfs(2), which reports write errors where plain sync does not. Raises OSError."""
    if _libc.syncfs(fd) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def file_system_type(fd: int) -> str:
    """Type of the mounted file system of `fd` as /proc/self/mountinfo names it; empty when not there."""
    device = os.fstat(fd).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/thread-self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) > 2 and fields[2] == wanted:
            return after.split()[0]
    return ""

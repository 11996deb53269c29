"""Small disks with a cOS layout, made so that every lie shows.

Three ext partitions at fixed offsets of one file (no table: nobody here looks for one). Free blocks of
COS_STATE hold 0xA5, so an extent that was reserved but never written reads differently for GRUB and Linux. Each
slot image has a build id in kernel, initrd and os-release, and os-release names the SHA-256 of both files.
"""

import contextlib
import hashlib
import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Part:
    name: str
    offset: int
    size: int


STATE = Part("state", 1 * MIB, 18 * MIB)
OEM = Part("oem", 20 * MIB, 3 * MIB)
RECOVERY = Part("recovery", 24 * MIB, 3 * MIB)
DISK_BYTES = 28 * MIB
IMAGE_BYTES = 512 * 1024
BOOTARGS = (
    "set kernel=/boot/vmlinuz\nset initramfs=/boot/initrd\n"
    'set kernelcmd="root=LABEL=$label cos-img/filename=$img panic=5"\n'
)


def tool(*argv: object) -> str:
    done = subprocess.run([str(a) for a in argv], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.returncode}: {done.stderr}")
    return done.stdout


class NotOurs(RuntimeError):
    """Another program took the loop device between attaching and mounting: nothing was tested yet."""


def _ours(loop: str, file: Path, part: Part, where: Path) -> None:
    """Loop devices are the whole machine's: be sure that what is mounted is what was meant."""
    info = Path("/sys/block", Path(loop).name)
    try:
        backing = (info / "loop/backing_file").read_text().strip()
        offset = int((info / "loop/offset").read_text())
        major, minor = (int(n) for n in (info / "dev").read_text().split(":"))
    except OSError as error:
        raise NotOurs(f"{loop} is gone: {error}") from error
    if (backing, offset, os.makedev(major, minor)) != (str(file.resolve()), part.offset, where.stat().st_dev):
        raise NotOurs(f"{loop} holds {backing} at {offset}, wanted {file} at {part.offset}")


@contextlib.contextmanager
def mounted(file: Path, part: Part, where: Path, options: str = "rw") -> Iterator[Path]:
    """One partition of a disk file, mounted through a loop device of its own."""
    where.mkdir(exist_ok=True)
    loop = tool("losetup", "-f", "--show", "-o", part.offset, "--sizelimit", part.size, file).strip()
    try:
        tool("mount", "-o", options, loop, where)
        try:
            _ours(loop, file, part, where)
            yield where
        finally:
            tool("umount", where)
    finally:
        tool("losetup", "-d", loop)


def make_image(path: Path, version: str, label: str, work: Path) -> Path:
    tree = work / f"tree-{path.name}"
    rng = random.Random(version)
    kernel = f"KERNEL {version}\n".encode() + bytes(128 * 1024) + rng.randbytes(20000)
    initrd = f"INITRD {version}\n".encode() + rng.randbytes(20000)
    (tree / "boot").mkdir(parents=True)
    (tree / "etc/cos").mkdir(parents=True)
    (tree / "boot/vmlinuz").write_bytes(kernel)
    (tree / "boot/initrd").write_bytes(initrd)
    (tree / "etc/cos/bootargs.cfg").write_text(BOOTARGS)
    (tree / "etc/os-release").write_text(
        f"NAME=cOS\nBUILD_ID={version}\nKERNEL_SHA256={hashlib.sha256(kernel).hexdigest()}\n"
        f"INITRD_SHA256={hashlib.sha256(initrd).hexdigest()}\n"
    )
    with path.open("wb") as f:
        f.truncate(IMAGE_BYTES)
    tool("mke2fs", "-q", "-F", "-t", "ext2", "-b", 1024, "-L", label, "-d", tree, path)
    with mounted(path, Part("image", 0, IMAGE_BYTES), work / "inner") as root:
        # mke2fs leaves zeros as holes of the image's own; the kernel's zeros must be blocks of the image,
        # which an outer file may then hold unwritten
        (root / "boot/vmlinuz").write_bytes(kernel)
    shutil.rmtree(tree)
    return path


def environment(path: Path, saved: str | None, once: str | None) -> None:
    path.unlink(missing_ok=True)
    tool("grub-editenv", path, "create")
    for name, value in (("saved_entry", saved), ("next_entry", once)):
        if value is not None:
            tool("grub-editenv", path, "set", f"{name}={value}")


@dataclass(frozen=True)
class Slots:
    """The images put on a new disk: name -> (version, label)."""

    files: Sequence[tuple[str, str, str]] = (
        ("active.img", "v1", "COS_ACTIVE"),
        ("passive.img", "v0", "COS_PASSIVE"),
        ("transition.img", "v2", "COS_ACTIVE"),
    )


def make_disk(
    path: Path,
    work: Path,
    *,
    slots: Slots = Slots(),
    block: int = 4096,
    saved: str | None = None,
    once: str | None = None,
) -> dict[str, int]:
    """Write the disk; returns the inodes of the images on COS_STATE."""
    work.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xa5" * DISK_BYTES)
    for part, label, kind, size in (
        (STATE, "COS_STATE", "ext4", block),
        (OEM, "COS_OEM", "ext4", 1024),
        (RECOVERY, "COS_RECOVERY", "ext2", 1024),
    ):
        raw = work / part.name
        raw.write_bytes(b"\xa5" * part.size)
        extra = ["-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", "-O", "^resize_inode"]
        if kind == "ext4":
            extra += ["-J", f"size={4 if size == 4096 else 1}"]
        tool("mke2fs", "-q", "-F", "-t", kind, "-b", size, "-N", 64, "-L", label, *extra, raw)
        with path.open("r+b") as f:
            f.seek(part.offset)
            f.write(raw.read_bytes())
        raw.unlink()
    inodes: dict[str, int] = {}
    with mounted(path, STATE, work / "mnt") as root:
        (root / "cOS").mkdir()
        for name, version, label in slots.files:
            image = make_image(work / name, version, label, work)
            # written block by block: no holes, as GRUB 2.06 needs for the first
            (root / "cOS" / name).write_bytes(image.read_bytes())
            inodes[name] = (root / "cOS" / name).stat().st_ino
    with mounted(path, OEM, work / "mnt") as root:
        environment(work / "env", saved, once)
        (root / "grubenv").write_bytes((work / "env").read_bytes())
    with mounted(path, RECOVERY, work / "mnt") as root:
        (root / "cOS").mkdir()
        image = make_image(work / "recovery.img", "r0", "COS_SYSTEM", work)
        (root / "cOS/recovery.img").write_bytes(image.read_bytes())
    return inodes

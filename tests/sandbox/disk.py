"""Whole-disk image files with the partitions and files of an installed cOS.

Partition order and labels are cos-installer's (GPT+EFI: COS_GRUB, COS_OEM, COS_STATE, COS_RECOVERY,
COS_PERSISTENT; MBR: the same without the first). Sizes are small so that a test takes a second.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.sandbox.grub import environment_block, grub_cfg
from tests.sandbox.tree import Derivative

MIB = 1 << 20


@dataclass(frozen=True)
class SandboxPartition:
    label: str
    number: int
    start_bytes: int
    size_bytes: int
    fs: str


@dataclass(frozen=True)
class SandboxDisk:
    """A made disk. `path` is the image file."""

    path: Path
    sector_bytes: int
    partitions: tuple[SandboxPartition, ...]

    def partition(self, label: str) -> SandboxPartition:
        return next(p for p in self.partitions if p.label == label)

    def read_partition(self, label: str, out: Path) -> Path:
        """Copy one partition into its own file, sparse; for a look with other tools."""
        p = self.partition(label)
        _copy_range(self.path, p.start_bytes, out, 0, p.size_bytes)
        return out

    def write_partition(self, label: str, source: Path) -> None:
        p = self.partition(label)
        _copy_range(source, 0, self.path, p.start_bytes, p.size_bytes)


@dataclass(frozen=True)
class Recipe:
    """What disk to make. None for a slot: the image is not there."""

    table: str = "gpt"
    sector_bytes: int = 512
    layout: str = "cos"
    active: Derivative | None = field(default_factory=lambda: Derivative("1.0"))
    passive: Derivative | None = field(default_factory=lambda: Derivative("0.9"))
    recovery: Derivative | None = field(default_factory=lambda: Derivative("0.9"))
    recovery_squashfs: bool = False
    image_mib: int = 24
    state_mib: int = 160
    recovery_mib: int = 64
    state_block_size: int = 4096
    state_fs: str = "ext4"
    image_fs: str = "ext2"
    grubenv: dict[str, str] | None = field(default_factory=dict)
    """Variables of COS_OEM:/grubenv; None: the file is not there."""
    grub_oem_env: dict[str, str] | None = None
    """Variables of COS_STATE:/grub_oem_env; None: not there (Elemental v1 and Harvester get their own)."""
    labels: dict[str, str] = field(default_factory=dict)
    """Slot name to another label than the right one."""
    oem_files: dict[str, bytes] = field(default_factory=dict)
    state_files: dict[str, bytes] = field(default_factory=dict)
    disk_id: str = ""
    """GPT GUID or MBR signature; empty: random."""


def make_disk(path: Path, recipe: Recipe | None = None) -> SandboxDisk:
    """Make the disk image `path` (sparse). Needs root only for 4096-byte sectors (a loop device tells sfdisk)."""
    r = recipe or Recipe()
    plan: list[tuple[str, int, str]] = []
    if r.table == "gpt":
        plan.append(("COS_GRUB", 8, "none"))
    plan += [
        ("COS_OEM", 16, "ext4"),
        ("COS_STATE", r.state_mib, r.state_fs),
        ("COS_RECOVERY", r.recovery_mib, "ext4"),
        ("COS_PERSISTENT", 24, "ext4"),
    ]
    start = 1
    partitions: list[SandboxPartition] = []
    for number, (label, mib, fs) in enumerate(plan, 1):
        partitions.append(SandboxPartition(label, number, start * MIB, mib * MIB, fs))
        start += mib
    with path.open("wb") as f:
        f.truncate((start + 1) * MIB)
    _write_table(path, r, partitions)
    disk = SandboxDisk(path, r.sector_bytes, tuple(partitions))
    with tempfile.TemporaryDirectory(prefix="cos-sandbox-") as tmp:
        work = Path(tmp)
        for p in partitions:
            if p.fs == "none":
                continue
            staging = work / p.label
            staging.mkdir()
            _fill(staging, p.label, r, work)
            image = work / f"{p.label}.fs"
            block = r.state_block_size if p.label == "COS_STATE" else 4096
            make_filesystem(image, p.size_bytes, p.fs, p.label, staging, block_size=block)
            disk.write_partition(p.label, image)
            shutil.rmtree(staging)
            image.unlink()
    return disk


def make_filesystem(
    image: Path, size_bytes: int, fs: str, label: str, tree: Path, *, block_size: int = 4096
) -> None:
    """An ext2/3/4 file system of `size_bytes` in `image`, filled from the directory `tree`."""
    with image.open("wb") as f:
        f.truncate(size_bytes)
    options = ["-E", "root_owner=0:0,lazy_itable_init=0", "-m", "0"]
    run(["mke2fs", "-q", "-F", "-t", fs, "-b", str(block_size), "-L", label, *options, "-d", tree, image])


def make_slot_image(
    image: Path, derivative: Derivative, label: str, *, size_mib: int, fs: str = "ext2", work: Path
) -> None:
    """A slot image as an installer leaves it."""
    tree = Path(tempfile.mkdtemp(dir=work))
    derivative.write(tree)
    make_filesystem(image, size_mib * MIB, fs, label, tree)
    shutil.rmtree(tree)


def _fill(staging: Path, label: str, r: Recipe, work: Path) -> None:
    if label == "COS_OEM":
        if r.grubenv is not None:
            (staging / "grubenv").write_bytes(environment_block(r.grubenv))
        (staging / "99_custom.yaml").write_text("#cloud-config\nhostname: sandbox\n")
        _write_all(staging, r.oem_files)
    elif label == "COS_STATE":
        cos = staging / "cOS"
        cos.mkdir()
        for name, derivative, right in (
            ("active", r.active, "COS_ACTIVE"),
            ("passive", r.passive, "COS_PASSIVE"),
        ):
            if derivative is not None:
                image_label = r.labels.get(name, right)
                make_slot_image(
                    cos / f"{name}.img",
                    derivative,
                    image_label,
                    size_mib=r.image_mib,
                    fs=r.image_fs,
                    work=work,
                )
        (staging / "grub2").mkdir()
        recovery = "recovery.squashfs" if r.recovery_squashfs else "recovery.img"
        (staging / "grub2/grub.cfg").write_text(grub_cfg(r.layout, recovery_file=recovery))
        oem_env = r.grub_oem_env
        if oem_env is None and r.layout in {"elemental-v1", "harvester"}:
            oem_env = {
                "state_label": "COS_STATE",
                "recovery_label": "COS_RECOVERY",
                "oem_label": "COS_OEM",
                "persistent_label": "COS_PERSISTENT",
                "default_menu_entry": "Elemental",
            }
        if oem_env is not None:
            (staging / "grub_oem_env").write_bytes(environment_block(oem_env))
        if r.layout in {"elemental-v1", "harvester"}:
            (staging / "state.yaml").write_text(_STATE_YAML)
        _write_all(staging, r.state_files)
    elif label == "COS_RECOVERY" and r.recovery is not None:
        cos = staging / "cOS"
        cos.mkdir()
        if r.recovery_squashfs:
            tree = Path(tempfile.mkdtemp(dir=work))
            r.recovery.write(tree)
            run(["mksquashfs", tree, cos / "recovery.squashfs", "-quiet", "-no-progress", "-comp", "xz"])
            shutil.rmtree(tree)
        else:
            right = r.labels.get("recovery", "COS_SYSTEM")
            make_slot_image(
                cos / "recovery.img", r.recovery, right, size_mib=r.image_mib, fs=r.image_fs, work=work
            )


_STATE_YAML = """\
# Autogenerated file by elemental client, do not edit

date: "2023-04-18T09:00:00Z"
state:
  active:
    source: oci://registry.example/os:1.0
    label: COS_ACTIVE
    fs: ext2
  label: COS_STATE
  passive:
    source: oci://registry.example/os:0.9
    label: COS_PASSIVE
    fs: ext2
"""


def _write_all(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def _write_table(path: Path, r: Recipe, partitions: Sequence[SandboxPartition]) -> None:
    lines = ["label: gpt" if r.table == "gpt" else "label: dos"]
    if r.disk_id:
        lines.append(f"label-id: {r.disk_id}")
    names = {
        "COS_GRUB": "efi",
        "COS_OEM": "oem",
        "COS_STATE": "state",
        "COS_RECOVERY": "recovery",
        "COS_PERSISTENT": "persistent",
    }
    for p in partitions:
        start, size = p.start_bytes // r.sector_bytes, p.size_bytes // r.sector_bytes
        if r.table == "gpt":
            kind = "uefi" if p.label == "COS_GRUB" else "linux"
            lines.append(f"start={start}, size={size}, type={kind}, name={names[p.label]}")
        else:
            boot = ", bootable" if p.label == "COS_STATE" else ""
            lines.append(f"start={start}, size={size}, type=83{boot}")
    script = ("\n".join(lines) + "\n").encode()
    if r.sector_bytes == 512:
        run(["sfdisk", "-q", "--no-reread", path], stdin=script)
        return
    loop = run(["losetup", "-f", "--show", "-b", str(r.sector_bytes), path]).decode().strip()
    try:
        run(["sfdisk", "-q", "--no-reread", "--no-tell-kernel", loop], stdin=script)
    finally:
        run(["losetup", "-d", loop])


def _copy_range(source: Path, source_at: int, target: Path, target_at: int, length: int) -> None:
    """Copy bytes and leave zero runs as holes; the target's range must be empty where the source has holes."""
    piece = 1 << 20
    zero = bytes(piece)
    target.touch()
    with source.open("rb") as src, target.open("r+b") as dst:
        end = os.fstat(dst.fileno()).st_size
        if end < target_at + length:
            dst.truncate(target_at + length)
        for offset in range(0, length, piece):
            data = os.pread(src.fileno(), min(piece, length - offset), source_at + offset)
            if data != zero[: len(data)] or end > target_at + offset:
                os.pwrite(dst.fileno(), data, target_at + offset)


def run(argv: Sequence[object], *, stdin: bytes | None = None) -> bytes:
    """Run a tool of the test machine; its output on failure."""
    done = subprocess.run([str(a) for a in argv], input=stdin, capture_output=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{argv[0]} failed ({done.returncode}): {(done.stderr or done.stdout).decode()}")
    return done.stdout

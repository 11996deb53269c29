"""Would this disk boot? Asked twice, of GRUB's own code and of the kernel, with nothing of the product.

GRUB's look: `grub-fstest` (GRUB's file system code as a program; no journal replay) reads the environment
block, the image file that an entry names, and inside that image its bootargs, kernel and initrd. The entry is
chosen by a cOS 0.7 grub.cfg's rules: next_entry, else saved_entry, an unknown id is the first entry; when an
entry's commands fail GRUB tries `fallback`, "0 1 2".

Linux's look: the kernel mounts a throw-away copy (which replays the journal), finds the file that the kernel
line names, looks for root=LABEL= in that very file, mounts it read-only, and compares the build: os-release
inside names the kernel and initrd that GRUB must have loaded. Anything else is a machine that hangs.

States are sets of changed 512-byte sectors over a base disk; equal states are judged once.
"""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.power.disks import OEM, RECOVERY, STATE, NotOurs, Part, mounted

SECTOR = 512
ENTRIES = (
    ("cos", "active.img", "COS_ACTIVE", STATE),
    ("fallback", "passive.img", "COS_PASSIVE", STATE),
    ("recovery", "recovery.img", "COS_SYSTEM", RECOVERY),
)


@dataclass(frozen=True)
class Verdict:
    boots: bool
    entry: str = ""
    version: str = ""
    fell_back: bool = False
    saved: str = ""
    once: str = ""
    why: str = ""


@dataclass(frozen=True)
class Inside:
    """What one reader sees in an image; `fault` is empty when all of it is readable."""

    kernel: str = ""
    initrd: str = ""
    bootargs: str = ""
    label: str = ""
    release: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""


Changed = dict[int, bytes]
"""Sector number -> its 512 bytes, where it differs from the base disk."""


class Judge:
    def __init__(self, base: Path, work: Path) -> None:
        self.base, self.work = base.read_bytes(), work
        work.mkdir(parents=True, exist_ok=True)
        self._cache: dict[bytes, Verdict] = {}
        self._grub_images: dict[bytes, Inside] = {}
        self._linux_images: dict[bytes, Inside] = {}

    @property
    def distinct(self) -> int:
        return len(self._cache)

    def key(self, changed: Changed) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for sector in sorted(changed):
            if self.base[sector * SECTOR : (sector + 1) * SECTOR] != changed[sector]:
                digest.update(sector.to_bytes(8, "little") + changed[sector])
        return digest.digest()

    def judge(self, changed: Changed) -> Verdict:
        key = self.key(changed)
        if key not in self._cache:
            try:
                self._cache[key] = self._look(changed)
            except NotOurs as error:  # another program had our loop device: this was no look at this disk
                print(f"looked again: {error}")
                self._cache[key] = self._look(changed)
        return self._cache[key]

    def write(self, changed: Changed, path: Path) -> None:
        disk = bytearray(self.base)
        for sector, data in changed.items():
            disk[sector * SECTOR : (sector + 1) * SECTOR] = data
        path.write_bytes(disk)

    def judge_file(self, disk: Path) -> Verdict:
        raw = disk.read_bytes()
        return self.judge(
            {
                at // SECTOR: raw[at : at + SECTOR]
                for page in range(0, len(raw), 65536)
                if raw[page : page + 65536] != self.base[page : page + 65536]
                for at in range(page, page + 65536, SECTOR)
                if raw[at : at + SECTOR] != self.base[at : at + SECTOR]
            }
        )

    def _look(self, changed: Changed) -> Verdict:
        disk = self.work / "disk"
        self.write(changed, disk)
        parts = {}
        raw = disk.read_bytes()
        for part in (STATE, OEM, RECOVERY):
            parts[part] = self.work / f"part-{part.name}"
            parts[part].write_bytes(raw[part.offset : part.offset + part.size])
        variables = self._environment(parts[OEM])
        once, saved = variables.get("next_entry", ""), variables.get("saved_entry", "")
        wanted = once or saved
        ids = [e[0] for e in ENTRIES]
        first = ids.index(wanted) if wanted in ids else int(wanted) if wanted in {"0", "1", "2"} else 0
        reasons = []
        for turn, index in enumerate((first, 0, 1, 2)):
            entry, file, label, part = ENTRIES[index]
            loaded = self._grub_inside(parts[part], f"/cOS/{file}")
            if loaded.fault:
                reasons.append(f"GRUB, {entry}: {loaded.fault}")
                continue
            # From here a kernel runs: GRUB's fallback is over.
            why = self._linux(disk, part, file, label, loaded)
            version = loaded.release.get("BUILD_ID", "")
            return Verdict(
                not why, entry, version, turn > 0, saved, once, f"Linux, {entry}: {why}" if why else ""
            )
        return Verdict(False, saved=saved, once=once, why="; ".join(reasons))

    # --- GRUB's eyes

    def _environment(self, oem: Path) -> dict[str, str]:
        block, _fault = _grub_cat(oem, "/grubenv")
        copy = self.work / "grubenv"
        copy.write_bytes(block)
        shown = subprocess.run(["grub-editenv", copy, "list"], capture_output=True, check=False)
        if shown.returncode:
            return {}
        lines = shown.stdout.decode(errors="replace").splitlines()
        return dict(line.partition("=")[::2] for line in lines)  # type: ignore[misc]

    def _grub_inside(self, part: Path, path: str) -> Inside:
        image, fault = _grub_cat(part, path)
        if fault:
            return Inside(fault=fault)
        key = hashlib.sha256(image).digest()
        if key not in self._grub_images:
            copy = self.work / "grub-image"
            copy.write_bytes(image)
            self._grub_images[key] = _grub_image(copy)
        return self._grub_images[key]

    # --- Linux's eyes

    def _linux(self, disk: Path, part: Part, file: str, label: str, loaded: Inside) -> str:
        """Why this does not come up; empty when it does."""
        if "root=LABEL=$label" not in loaded.bootargs:
            return "the kernel line names no root"
        try:
            with mounted(disk, part, self.work / "replayed") as root:
                path = root / "cOS" / file
                if not path.is_file():
                    return f"no {file}"
                image = path.read_bytes()
        except NotOurs:
            raise
        except RuntimeError as error:
            return f"{part.name} does not mount: {error}"
        key = hashlib.sha256(image).digest()
        if key not in self._linux_images:
            copy = self.work / "linux-image"
            copy.write_bytes(image)
            self._linux_images[key] = self._linux_image(copy)
        inside = self._linux_images[key]
        if inside.fault:
            return f"{file}: {inside.fault}"
        if inside.label != label:
            return f"{file} is labelled {inside.label!r}, the kernel waits for {label!r}"
        if loaded.kernel != inside.release.get("KERNEL_SHA256"):
            return "GRUB's kernel and Linux's root are from different images"
        if loaded.initrd != inside.release.get("INITRD_SHA256"):
            return "GRUB's initrd and Linux's root are from different images"
        if (inside.kernel, inside.initrd) != (loaded.kernel, loaded.initrd):
            return "GRUB and Linux read different kernels"
        return ""

    def _linux_image(self, image: Path) -> Inside:
        head = subprocess.run(["dumpe2fs", "-h", image], capture_output=True, text=True, check=False)
        if head.returncode:
            return Inside(fault="no ext superblock")
        named = [x for x in head.stdout.splitlines() if x.startswith("Filesystem volume name:")]
        label = named[0].partition(":")[2].strip()
        checked = subprocess.run(["e2fsck", "-fn", image], capture_output=True, check=False)
        if checked.returncode:
            return Inside(fault="e2fsck finds damage")
        whole = Part("image", 0, image.stat().st_size)
        try:
            with mounted(image, whole, self.work / "inside", "ro") as root:
                release = _release((root / "etc/os-release").read_bytes())
                kernel, initrd = (root / "boot/vmlinuz").read_bytes(), (root / "boot/initrd").read_bytes()
        except NotOurs:
            raise
        except (RuntimeError, OSError) as error:
            return Inside(fault=str(error))
        return Inside(_sha(kernel), _sha(initrd), "", label, release)


def _grub_cat(image: Path, path: str) -> tuple[bytes, str]:
    done = subprocess.run(["grub-fstest", image, "cat", path], capture_output=True, check=False)
    if done.returncode or done.stderr:
        return b"", f"{path}: {done.stderr.decode(errors='replace').strip()[-120:]}"
    return done.stdout, "" if done.stdout else f"{path}: empty"


def _grub_image(image: Path) -> Inside:
    found = []
    for path in ("/etc/cos/bootargs.cfg", "/boot/vmlinuz", "/boot/initrd", "/etc/os-release"):
        data, fault = _grub_cat(image, path)
        if fault:
            return Inside(fault=fault)
        found.append(data)
    text, kernel, initrd, release = found
    return Inside(_sha(kernel), _sha(initrd), text.decode(errors="replace"), "", _release(release))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _release(data: bytes) -> dict[str, str]:
    lines = data.decode(errors="replace").splitlines()
    return {k: v for k, _, v in (line.partition("=") for line in lines)}


def scratch(name: str) -> Path:
    """A fresh directory in memory: judging copies small disks thousands of times."""
    root = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    path = root / f"power-{os.getpid()}-{name}"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path

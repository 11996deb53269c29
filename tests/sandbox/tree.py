"""The file tree of a small cOS derivative: kernel, initrd, boot arguments, os-release, some files to carry."""

import random
from dataclasses import dataclass, field
from pathlib import Path

from tests.sandbox.grub import bootargs_cfg


@dataclass(frozen=True)
class Derivative:
    """What goes into one slot. Kernel, initrd and os-release carry `version`, so that a judge can tell mixes."""

    version: str
    layout: str = "cos"
    payload_mib: int = 2
    kernel: bool = True
    os_release: bool = True
    extra: dict[str, bytes] = field(default_factory=dict)

    def os_release_text(self) -> str:
        lines = [
            'NAME="cOS"',
            f'VERSION="{self.version}"',
            'ID="cos"',
            f'VERSION_ID="{self.version}"',
            f'PRETTY_NAME="cOS {self.version}"',
        ]
        if self.layout == "kairos":
            lines += ['KAIROS_NAME="kairos-core"', f'KAIROS_VERSION="v{self.version}"']
        if self.layout == "harvester":
            lines += [f'GRUB_ENTRY_NAME="Harvester {self.version}"']
        return "\n".join(lines) + "\n"

    def files(self) -> dict[str, bytes]:
        """Path (relative, no leading slash) to content."""
        rng = random.Random(self.version)
        files: dict[str, bytes] = {
            "etc/cos/bootargs.cfg": bootargs_cfg(self.layout).encode(),
            "etc/hostname": b"sandbox\n",
            "usr/bin/hello": b"#!/bin/sh\necho " + self.version.encode() + b"\n",
            "usr/lib/system.version": self.version.encode() + b"\n",
        }
        if self.os_release:
            files["usr/lib/os-release"] = self.os_release_text().encode()
        if self.kernel:
            files[f"boot/vmlinuz-{self.version}"] = _blob(rng, 700_000, f"KERNEL {self.version}")
            files[f"boot/initrd-{self.version}"] = _blob(rng, 1_500_000, f"INITRD {self.version}")
        for n in range(40):
            files[f"usr/share/data/{n:03d}.bin"] = _blob(rng, rng.randrange(200, 9000), f"data {n}")
        piece = 1 << 20
        for n in range(self.payload_mib):
            files[f"usr/share/payload/{n:04d}.bin"] = _blob(rng, piece, f"payload {n}")
        files.update(self.extra)
        return files

    def symlinks(self) -> dict[str, str]:
        links = {"lib": "usr/lib", "bin": "usr/bin"}
        if self.os_release:
            links["etc/os-release"] = "../usr/lib/os-release"
        if self.kernel:
            links["boot/vmlinuz"] = f"vmlinuz-{self.version}"
            links["boot/initrd"] = f"initrd-{self.version}"
        return links

    def directories(self) -> tuple[str, ...]:
        return ("proc", "sys", "dev", "run", "tmp", "oem", "usr/local", "system/oem", "root", "var/lib")

    def write(self, root: Path) -> None:
        """Write the tree below `root`."""
        for d in self.directories():
            (root / d).mkdir(parents=True, exist_ok=True)
        for name, data in self.files().items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        (root / "usr/bin/hello").chmod(0o755)
        for name, target in self.symlinks().items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)


def _blob(rng: random.Random, size: int, mark: str) -> bytes:
    head = f"{mark}\n".encode()
    return head + rng.randbytes(max(0, size - len(head)))

"""What kind of machine this is: name, maker, firmware, architecture, this boot."""

import os
import platform
import socket
from datetime import UTC, datetime
from pathlib import Path

_OCI_ARCHITECTURES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
}
"""uname -m to GOARCH, as the OCI image spec wants it."""


def now() -> str:
    """RFC 3339 UTC, seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def hostname() -> str:
    return socket.gethostname()


def product() -> str:
    """Vendor and model from DMI; empty where there is none."""
    return " ".join(p for p in (_dmi("sys_vendor"), _dmi("product_name")) if p)


def serial() -> str:
    return _dmi("product_serial")


def firmware() -> str:
    return "efi" if Path("/sys/firmware/efi").is_dir() else "bios"


def architecture() -> str:
    machine = platform.machine()
    return _OCI_ARCHITECTURES.get(machine, machine)


def boot_id() -> str:
    return _read("/proc/sys/kernel/random/boot_id")


def command_line() -> str:
    return _read("/proc/cmdline")


def _dmi(name: str) -> str:
    return _read(f"/sys/class/dmi/id/{name}")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read().strip()
    except OSError:
        return ""


def is_root() -> bool:
    return os.geteuid() == 0

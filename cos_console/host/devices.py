"""Which disks are there: pyudev's enumeration, sysfs for numbers; udev's properties only as hints.

Works without a running udevd (then model and serial come from sysfs alone). Left out: memory disks, loop devices
without a partition table, device-mapper devices other than multipath maps, and the single paths below such a map.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pyudev

from cos_console.host.mounts import Loop

_SKIP = ("ram", "zram", "fd", "sr", "md", "nbd", "mtdblock")


@dataclass(frozen=True)
class BlockPartition:
    """A partition as the kernel knows it."""

    number: int
    start_bytes: int
    size_bytes: int
    device: str
    devno: int


@dataclass(frozen=True)
class BlockDisk:
    """What to open and what to show; the table is read from the disk itself."""

    path: str
    name: str
    devno: int
    size_bytes: int
    sector_bytes: int
    model: str = ""
    serial: str = ""
    removable: bool = False
    read_only: bool = False
    is_image_file: bool = False
    partitions: tuple[BlockPartition, ...] = ()


def list_disks() -> tuple[BlockDisk, ...]:
    """Every whole disk of the machine, by name."""
    context = pyudev.Context()
    found = []
    for device in context.list_devices(subsystem="block", DEVTYPE="disk"):
        name = device.sys_name
        if name.startswith(_SKIP):
            continue
        sys = Path(device.sys_path)
        mapper = _attr(sys, "dm/uuid")
        if name.startswith("dm-") and not mapper.startswith("mpath-"):
            continue
        if any(_attr(h, "dm/uuid").startswith("mpath-") for h in _holders(sys)):
            continue
        disk = from_sysfs(sys, device.device_node or f"/dev/{name}", _hints(device))
        if disk.size_bytes:
            found.append(disk)
    return tuple(sorted(found, key=lambda d: (len(d.name), d.name)))


def from_device(path: Path) -> BlockDisk:
    """The disk behind a device node. A partition's node gives its whole disk. Raises OSError."""
    devno = os.stat(path).st_rdev
    sys = Path(f"/sys/dev/block/{os.major(devno)}:{os.minor(devno)}").resolve(strict=True)
    if (sys / "partition").exists():
        sys = sys.parent
    hints = {}
    try:
        hints = _hints(pyudev.Devices.from_path(pyudev.Context(), str(sys)))
    except pyudev.DeviceNotFoundError:
        pass
    return from_sysfs(sys, f"/dev/{sys.name.replace('!', '/')}", hints)


def from_file(path: Path, sector_bytes: int, loops: tuple[Loop, ...]) -> BlockDisk:
    """A whole-disk image file, with the partitions of a loop device that happens to stand on it. Raises OSError."""
    stat = os.stat(path)
    partitions: tuple[BlockPartition, ...] = ()
    for loop in loops:
        if (loop.backing_dev, loop.backing_inode) != (stat.st_dev, stat.st_ino):
            continue
        if loop.offset_bytes:
            size = int(_attr(Path("/sys/block") / loop.name, "size") or 0) * 512
            one = BlockPartition(0, loop.offset_bytes, size, f"/dev/{loop.name}", loop.devno)
            partitions = (*partitions, one)
        else:
            partitions = (*partitions, *_partitions(Path("/sys/block") / loop.name))
    return BlockDisk(
        path=str(path),
        name=path.name,
        devno=0,
        size_bytes=stat.st_size,
        sector_bytes=sector_bytes,
        read_only=not os.access(path, os.W_OK),
        is_image_file=True,
        partitions=partitions,
    )


def from_sysfs(sys: Path, node: str, hints: dict[str, str]) -> BlockDisk:
    """A disk from its /sys directory; `hints` are udev's properties."""
    return BlockDisk(
        path=node,
        name=sys.name,
        devno=_devno(sys),
        size_bytes=int(_attr(sys, "size") or 0) * 512,
        sector_bytes=int(_attr(sys, "queue/logical_block_size") or 512),
        model=_attr(sys, "device/model") or hints.get("ID_MODEL", "").replace("_", " "),
        serial=hints.get("ID_SERIAL_SHORT", "") or _attr(sys, "device/serial") or _attr(sys, "serial"),
        removable=_attr(sys, "removable") == "1" or hints.get("ID_BUS") == "usb",
        read_only=_attr(sys, "ro") == "1",
        partitions=_partitions(sys),
    )


def _partitions(sys: Path) -> tuple[BlockPartition, ...]:
    found = []
    for entry in sorted(sys.glob(f"{sys.name}*")):
        number = _attr(entry, "partition")
        if number:
            start, size = int(_attr(entry, "start") or 0) * 512, int(_attr(entry, "size") or 0) * 512
            node = f"/dev/{entry.name.replace('!', '/')}"
            found.append(BlockPartition(int(number), start, size, node, _devno(entry)))
    for holder in _holders(sys):  # partitions of a multipath map are maps of their own
        kind, _, rest = _attr(holder, "dm/uuid").partition("-")
        if kind.startswith("part") and rest.startswith("mpath-"):
            size = int(_attr(holder, "size") or 0) * 512
            found.append(BlockPartition(int(kind[4:]), -1, size, f"/dev/{holder.name}", _devno(holder)))
    return tuple(found)


def _holders(sys: Path) -> list[Path]:
    try:
        return [p.resolve() for p in (sys / "holders").iterdir()]
    except OSError:
        return []


def _hints(device: pyudev.Device) -> dict[str, str]:
    return {k: v for k, v in device.properties.items() if k.startswith("ID_")}


def _devno(sys: Path) -> int:
    major, _, minor = _attr(sys, "dev").partition(":")
    return os.makedev(int(major), int(minor)) if minor else 0


def _attr(sys: Path, name: str) -> str:
    try:
        return (sys / name).read_text(errors="replace").strip("\0\n ")
    except OSError:
        return ""

"""Partition tables through pyparted, without opening the disk for writing.

libparted opens what it is given read-write, and closing it makes udev announce a change (`parted print` does
so). So it is given a sparse in-memory copy of the disk: the same length, with only the table areas (the first
and the last MiB) copied in. libparted takes a plain file's sector as 512 bytes; the GPT of a 4096-byte disk is
therefore read here (UEFI specification 2.10, section 5.3).
"""

import os
import struct
import uuid
import zlib
from dataclasses import dataclass

import parted

from cos_console.formats.readat import ReadAt
from cos_console.model.machine import TableKind

_AREA = 1 << 20
_FLAGS = {
    parted.PARTITION_BOOT: "boot",
    parted.PARTITION_ESP: "esp",
    parted.PARTITION_BIOS_GRUB: "bios_grub",
    parted.PARTITION_LVM: "lvm",
    parted.PARTITION_RAID: "raid",
}
_ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
_BIOS_GRUB = uuid.UUID("21686148-6449-6e6f-744e-656564454649")


@dataclass(frozen=True)
class TableEntry:
    number: int
    start_bytes: int
    size_bytes: int
    name: str
    part_uuid: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    kind: TableKind
    disk_id: str
    entries: tuple[TableEntry, ...]
    fault: str = ""
    """One clause when the table is there but damaged."""


def read_table(source: ReadAt, sector_bytes: int) -> Table:
    """The partition table of a whole disk. Raises OSError when the disk can't be read."""
    head = source.read_at(0, _AREA)
    if sector_bytes != 512 and head[sector_bytes : sector_bytes + 8] == b"EFI PART":
        return _gpt(source, sector_bytes)
    if head[510:512] != b"\x55\xaa" and head[512:520] != b"EFI PART":
        return Table(TableKind.NONE, "", ())
    try:
        return _parted(source, head)
    except Exception as e:  # noqa: BLE001 - pyparted raises several unrelated types for a damaged table
        return Table(TableKind.NONE, "", (), fault=str(e).strip() or type(e).__name__)


def _parted(source: ReadAt, head: bytes) -> Table:
    fd = os.memfd_create("cos-table")
    try:
        os.ftruncate(fd, source.size_bytes)
        os.pwrite(fd, head, 0)
        tail_at = max(len(head), (source.size_bytes - _AREA) // 512 * 512)
        os.pwrite(fd, source.read_at(tail_at, source.size_bytes - tail_at), tail_at)
        device = parted.getDevice(f"/proc/self/fd/{fd}")
        disk = parted.newDisk(device)
        gpt = disk.type == "gpt"
        if disk.type not in {"gpt", "msdos"}:
            return Table(TableKind.NONE, "", ())
        disk_id = (
            str(uuid.UUID(bytes_le=head[568:584])) if gpt else f"{struct.unpack_from('<I', head, 440)[0]:08x}"
        )
        ids = _gpt_ids(source, head) if gpt else {}
        entries = []
        for part in disk.partitions:
            if part.type & parted.PARTITION_EXTENDED:
                continue
            number = int(part.number)
            entries.append(
                TableEntry(
                    number=number,
                    start_bytes=int(part.geometry.start) * 512,
                    size_bytes=int(part.geometry.length) * 512,
                    name=str(part.name or "") if gpt else "",
                    part_uuid=ids.get(number, "") if gpt else f"{disk_id}-{number:02x}",
                    flags=tuple(name for flag, name in _FLAGS.items() if part.getFlag(flag)),
                )
            )
        return Table(TableKind.GPT if gpt else TableKind.MBR, disk_id, tuple(entries))
    finally:
        os.close(fd)


def _gpt_ids(source: ReadAt, head: bytes) -> dict[int, str]:
    """Partition GUIDs: libparted 3.5 has them, pyparted 3.13 on that library does not show them."""
    lba, count, size = struct.unpack_from("<QII", head, 512 + 72)
    if not 128 <= size <= 4096 or count > 1024:
        return {}
    raw = source.read_at(lba * 512, count * size)
    return {
        n + 1: str(uuid.UUID(bytes_le=raw[n * size + 16 : n * size + 32]))
        for n in range(len(raw) // size)
        if any(raw[n * size : n * size + 16])
    }


def _gpt(source: ReadAt, sector: int) -> Table:
    header = source.read_at(sector, 92)
    lba, count, size, crc = struct.unpack_from("<QIII", header, 72)
    if not 128 <= size <= 4096 or count > 1024:
        return Table(TableKind.NONE, "", (), fault="the GPT header is damaged")
    raw = source.read_at(lba * sector, count * size)
    if zlib.crc32(raw) != crc:
        return Table(TableKind.NONE, "", (), fault="the GPT's entries do not match their checksum")
    entries = []
    for n in range(count):
        entry = raw[n * size : (n + 1) * size]
        if not any(entry[:16]):
            continue
        kind = uuid.UUID(bytes_le=entry[:16])
        first, last = struct.unpack_from("<QQ", entry, 32)
        entries.append(
            TableEntry(
                number=n + 1,
                start_bytes=first * sector,
                size_bytes=(last - first + 1) * sector,
                name=entry[56:128].decode("utf-16-le", "replace").split("\0", 1)[0],
                part_uuid=str(uuid.UUID(bytes_le=entry[16:32])),
                flags=("esp",) if kind == _ESP else ("bios_grub",) if kind == _BIOS_GRUB else (),
            )
        )
    return Table(TableKind.GPT, str(uuid.UUID(bytes_le=header[56:72])), tuple(entries))

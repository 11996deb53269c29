"""Partition tables, read by libparted from a copy in memory, so that no device is ever opened for writing.

libparted opens what it is given read-write, and closing that makes udev announce a change. So it gets a sparse
memory file of the disk's length that holds only the sectors a table can stand in: the first and the last MiB and,
for MBR, the chain of extended boot records. Its own switch for tests, the variable PARTED_SECTOR_SIZE, tells it
about 4096-byte sectors. GUIDs are not offered by pyparted and come from the headers themselves (UEFI 2.10
chapter 5; MBR: signature at byte 440).
"""

import os
import re
import resource
import select
import signal
import time
import uuid
import zlib
from dataclasses import dataclass, field

import _ped
import msgspec
import parted

from cos_console.formats.readat import ReadAt
from cos_console.model.machine import Finding, Severity, TableKind

_EDGE = 1 << 20
_EXTENDED = {0x05, 0x0F, 0x85}

_NO_DATA = parted.PARTITION_FREESPACE | parted.PARTITION_METADATA | parted.PARTITION_EXTENDED
_ESP_TYPE = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
_ESP_MBR_TYPE = 0xEF

FLAGS = {
    "bios_grub": "PARTITION_BIOS_GRUB",
    "boot": "PARTITION_BOOT",
    "legacy_boot": "PARTITION_LEGACY_BOOT",
    "lvm": "PARTITION_LVM",
    "raid": "PARTITION_RAID",
}


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
    sector_bytes: int
    disk_id: str = ""
    entries: tuple[TableEntry, ...] = ()
    findings: tuple[Finding, ...] = field(default=())


def guess_sector_bytes(source: ReadAt) -> int:
    """Sector size of a disk image: where the GPT header stands tells; 512 without one."""
    for size in (512, 4096):
        if (
            source.read_at(size, 8) == b"EFI PART"
            or source.read_at(source.size_bytes - size, 8) == b"EFI PART"
        ):
            return size
    return 512


def read_table(source: ReadAt, sector_bytes: int) -> Table:
    """The partition table of a disk. A damaged one comes back as findings. Raises OSError when unreadable."""
    size = source.size_bytes
    if size < 2 * sector_bytes:
        return Table(TableKind.NONE, sector_bytes)
    head = source.read_at(0, min(_EDGE, size))
    tail = source.read_at(max(0, size - _EDGE), _EDGE)
    gpt = head[sector_bytes : sector_bytes + 8] == b"EFI PART" or tail[-sector_bytes:][:8] == b"EFI PART"
    if not gpt and not _looks_like_mbr(head):
        return Table(TableKind.NONE, sector_bytes)
    memory = os.memfd_create("partition-table", os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, size)
        os.pwrite(memory, head, 0)
        os.pwrite(memory, tail, max(0, size - _EDGE))
        if not gpt:
            _copy_extended(source, head, memory, sector_bytes)
        return _parse(memory, head, tail, sector_bytes)
    finally:
        os.close(memory)


def _looks_like_mbr(head: bytes) -> bool:
    if head[510:512] != b"\x55\xaa":
        return False
    entries = [head[446 + 16 * n : 462 + 16 * n] for n in range(4)]
    # A FAT boot sector ends in the same two bytes; its "entries" are code or zeros.
    used = [e for e in entries if e[4]]
    return bool(used) and all(e[0] in {0, 0x80} for e in entries) and all(any(e[8:16]) for e in used)


def _copy_extended(source: ReadAt, head: bytes, memory: int, sector: int) -> None:
    """Follow the chain of extended boot records; at most 64, loops end it."""
    base = 0
    for n in range(4):
        entry = head[446 + 16 * n : 462 + 16 * n]
        if entry[4] in _EXTENDED:
            base = int.from_bytes(entry[8:12], "little")
    at, seen = base, set[int]()
    while at and at not in seen and len(seen) < 64:
        seen.add(at)
        record = source.read_at(at * sector, sector)
        if record[510:512] != b"\x55\xaa":
            return
        os.pwrite(memory, record, at * sector)
        following = record[462:478]
        at = base + int.from_bytes(following[8:12], "little") if following[4] in _EXTENDED else 0


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What the child that ran libparted found out."""

    kind: TableKind
    entries: tuple[TableEntry, ...] = ()
    said: tuple[str, ...] = ()
    failed: bool = False


def _parse(memory: int, head: bytes, tail: bytes, sector: int) -> Table:
    answer = _in_child(memory, head, tail, sector)
    if answer.failed:
        words = answer.said[-1] if answer.said else "libparted can't make sense of it"
        return Table(TableKind.NONE, sector, findings=(_damaged(words, lost=True),))
    kind, entries, said = answer.kind, answer.entries, answer.said
    disk_id = _gpt_disk_id(head, tail, sector) if kind is TableKind.GPT else ""
    if kind is TableKind.MBR:
        disk_id = head[440:444][::-1].hex()
    return Table(kind, sector, disk_id, entries, tuple(_damaged(w, lost=False) for w in said))


def _in_child(memory: int, head: bytes, tail: bytes, sector: int) -> _Answer:
    """libparted aborts the process on some damaged tables (seen with 3.5), so a short-lived child runs it."""
    nothing = _Answer(kind=TableKind.NONE, failed=True)
    reading, writing = os.pipe2(os.O_CLOEXEC)
    child = os.fork()
    if child == 0:
        try:
            _quiet()
            os.environ["PARTED_SECTOR_SIZE"] = str(sector)
            answer = _ask_libparted(f"/proc/self/fd/{memory}", head, tail, sector)
            with os.fdopen(writing, "wb") as out:
                out.write(msgspec.msgpack.encode(answer))
        finally:
            os._exit(0)
    os.close(writing)
    data = bytearray()
    deadline = time.monotonic() + _CHILD_S
    try:
        while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = os.read(reading, 65536)
            if not piece:
                return msgspec.msgpack.decode(bytes(data), type=_Answer) if data else nothing
            data += piece
        os.kill(child, signal.SIGKILL)
        return nothing
    except msgspec.DecodeError:
        return nothing
    finally:
        os.close(reading)
        os.waitpid(child, 0)


def _quiet() -> None:
    """In the child: no words of libparted on the operator's screen, no core file."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGABRT, signal.SIGSEGV):
        signal.signal(number, signal.SIG_DFL)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _ask_libparted(path: str, head: bytes, tail: bytes, sector: int) -> _Answer:
    said: list[str] = []
    choices = [getattr(parted, f"EXCEPTION_RESOLVE_{c}") for c in ("IGNORE", "OK", "NO", "CANCEL")]

    def decide(_kind: int, options: int, message: str) -> int:
        """libparted asks what to do about an oddity: never repair, go on with what is there."""
        said.append(" ".join(message.split()))
        return int(next((c for c in choices if options & c), parted.EXCEPTION_RESOLVE_UNHANDLED))

    parted.register_exn_handler(decide)
    try:
        disk = _ped.disk_new(_ped.device_get(path))
        kind = {"gpt": TableKind.GPT, "msdos": TableKind.MBR}.get(disk.type.name, TableKind.NONE)
        return _Answer(kind=kind, entries=_entries(disk, kind, head, tail, sector), said=tuple(said))
    except _PARTED_ERRORS as error:
        words = said or [" ".join(str(error).split())]
        return _Answer(kind=TableKind.NONE, said=tuple(words), failed=True)


_CHILD_S = 10.0
_PARTED_ERRORS = (
    _ped.DiskException,
    _ped.DiskLabelException,
    _ped.IOException,
    _ped.DeviceException,
    _ped.PartedException,
    _ped.PartitionException,
)


def _entries(
    disk: "_ped.Disk", kind: TableKind, head: bytes, tail: bytes, sector: int
) -> tuple[TableEntry, ...]:
    found: list[TableEntry] = []
    guids = _gpt_guids(head, tail, sector) if kind is TableKind.GPT else {}
    signature = head[440:444][::-1].hex()
    partition = disk.next_partition()
    while partition is not None:
        special = partition.type & (
            parted.PARTITION_FREESPACE | parted.PARTITION_METADATA | parted.PARTITION_EXTENDED
        )
        if partition.num > 0 and not special and kind is not TableKind.NONE:
            flags = []
            for flag, constant in FLAGS.items():
                value = getattr(_ped, constant, None)
                if value is not None and partition.is_flag_available(value) and partition.get_flag(value):
                    flags.append(flag)
            start = partition.geom.start * sector
            part_uuid = f"{signature}-{partition.num:02x}"
            if kind is TableKind.GPT:
                part_uuid, type_guid = guids.get(partition.num, ("", ""))
                if type_guid == _ESP_TYPE:
                    flags = ["esp", *(f for f in flags if f != "boot")]
            elif partition.num <= 4 and head[446 + 16 * partition.num - 12] == _ESP_MBR_TYPE:
                flags.insert(0, "esp")
            name = (partition.get_name() or "") if kind is TableKind.GPT else ""
            length = partition.geom.length * sector
            found.append(TableEntry(partition.num, start, length, name, part_uuid, tuple(flags)))
        partition = disk.next_partition(partition)
    return tuple(sorted(found, key=lambda e: e.number))


def _gpt_header(head: bytes, tail: bytes, sector: int) -> tuple[bytes, bool]:
    """The header that can be used, and whether it is the primary one."""
    primary, backup = head[sector : 2 * sector], tail[-sector:]
    if _checks(primary) or not _checks(backup):
        return primary, True
    return backup, False


def _checks(header: bytes) -> bool:
    """The header's own checksum, taken with its field as zero (UEFI 2.10, table 5.5)."""
    size = int.from_bytes(header[12:16], "little")
    if header[:8] != b"EFI PART" or not 92 <= size <= len(header):
        return False
    zeroed = header[:16] + bytes(4) + header[20:size]
    return zlib.crc32(zeroed) == int.from_bytes(header[16:20], "little")


def _gpt_disk_id(head: bytes, tail: bytes, sector: int) -> str:
    header, _ = _gpt_header(head, tail, sector)
    return str(uuid.UUID(bytes_le=header[56:72]))


def _gpt_guids(head: bytes, tail: bytes, sector: int) -> dict[int, tuple[str, str]]:
    """Number to (partition GUID, type GUID)."""
    header, primary = _gpt_header(head, tail, sector)
    count = min(int.from_bytes(header[80:84], "little"), 1024)
    size = int.from_bytes(header[84:88], "little")
    if primary:
        at = int.from_bytes(header[72:80], "little") * sector
        table = head[at : at + count * size]
    else:
        mine = int.from_bytes(header[24:32], "little")
        behind = (mine - int.from_bytes(header[72:80], "little") + 1) * sector
        table = tail[len(tail) - behind :] if 0 < behind <= len(tail) else b""
    guids = {}
    for n in range(count):
        entry = table[n * size : (n + 1) * size]
        if len(entry) >= 32 and any(entry[:16]):
            guids[n + 1] = (str(uuid.UUID(bytes_le=entry[16:32])), str(uuid.UUID(bytes_le=entry[:16])))
    return guids


def _damaged(words: str, *, lost: bool) -> Finding:
    words = re.sub(r"/proc/self/fd/\d+", "the disk", words)
    return Finding(
        code="COS-DISK-TABLE-DAMAGED" if lost else "COS-DISK-TABLE-WARNING",
        severity=Severity.ERROR if lost else Severity.WARNING,
        what=f"The partition table is damaged: {words}" if lost else f"The partition table: {words}",
        now="Restore the table from its backup with sgdisk or testdisk before anything else." if lost else "",
    )

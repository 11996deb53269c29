"""One look at the machine: every disk, every installation on them, nothing written.

Every descriptor is opened O_RDONLY; partition tables are parsed from a copy in memory (tables.py); file systems are
read in user space or through mounts that are there already. A thing that can't be read becomes a finding.
"""

import os
import stat as stat_module
from collections.abc import Callable
from pathlib import Path

import msgspec

from cos_console.formats.readat import FileReadAt, ReadAt, Window
from cos_console.formats.superblock import Probe, probe
from cos_console.host import devices, facts, mounts
from cos_console.host.devices import BlockDisk, BlockPartition
from cos_console.host.installation import group, is_uki, look_installation
from cos_console.host.looks import Look, look_at
from cos_console.host.tables import Table, TableEntry, guess_sector_bytes, read_table
from cos_console.host.trees import Sources, open_read_only
from cos_console.model.machine import (
    BootedFrom,
    Disk,
    Finding,
    Installation,
    Machine,
    Partition,
    Severity,
    SlotName,
    TableKind,
)
from cos_console.model.problem import ExitCode, Problem

Wrap = Callable[[ReadAt], ReadAt]


def scan(target: Path | None = None, *, wrap: Wrap | None = None) -> Machine:
    """All disks, or only `target` (a block device or a whole-disk image file).

    Raises Problem COS-TARGET-MISSING or COS-TARGET-KIND for a target that can't be looked at. `wrap` is put
    round every opened disk; a test gives one that fails as a dying disk does.
    """
    table = mounts.read_mounts()
    loops = mounts.read_loops()
    root = mounts.running_image(table, loops)
    blocks = devices.list_disks() if target is None else (_target(target, loops),)
    disks: list[Disk] = []
    found: list[Installation] = []
    for block in blocks:
        disk, installation = _look_disk(block, table, root, wrap)
        if target is None and block.name.startswith("loop") and disk.table is TableKind.NONE:
            continue
        disks.append(disk)
        if installation is not None:
            found.append(installation)
    installations, findings = _told_apart(found)
    return Machine(
        scanned_at=facts.now(),
        hostname=facts.hostname(),
        product=facts.product(),
        serial=facts.serial(),
        booted_from=_booted_from(installations, facts.command_line()),
        firmware=facts.firmware(),
        architecture=facts.architecture(),
        disks=tuple(disks),
        installations=installations,
        findings=findings,
    )


def inspect(installation: Installation) -> Installation | None:
    """Look at one installation again; None when it is not there any more. Raises Problem like `scan`."""
    again = scan(Path(installation.disk.path)).installations
    plain = installation.id.partition("@")[0]
    return next((i for i in again if i.id in {installation.id, plain}), None)


def damaged(machine: Machine) -> bool:
    """Whether an installation can't boot what it would boot next: `status` then ends with ExitCode.DAMAGED."""
    return any(
        i.layout.handled
        and (i.boot.next is None or (i.boot.chosen is not None and i.boot.next is not i.boot.chosen))
        for i in machine.installations
    )


def _target(target: Path, loops: tuple[mounts.Loop, ...]) -> BlockDisk:
    try:
        mode = os.stat(target).st_mode
        if stat_module.S_ISBLK(mode):
            return devices.from_device(target)
        if stat_module.S_ISREG(mode):
            fd = open_read_only(str(target))
            try:
                sector = guess_sector_bytes(FileReadAt(fd))
            finally:
                os.close(fd)
            return devices.from_file(target.resolve(), sector, loops)
    except OSError as error:
        raise Problem(
            "COS-TARGET-MISSING",
            f"{target} can't be looked at: {error.strerror or error}.",
            now="Name a disk such as /dev/sda, or a whole-disk image file.",
            exit_code=ExitCode.NOT_FOUND,
        ) from None
    raise Problem(
        "COS-TARGET-KIND",
        f"{target} is neither a block device nor a file.",
        now="Name a disk such as /dev/sda, or a whole-disk image file.",
        exit_code=ExitCode.NOT_FOUND,
    )


def _look_disk(
    block: BlockDisk, table: tuple[mounts.Mount, ...], root: tuple[int, int] | None, wrap: Wrap | None
) -> tuple[Disk, Installation | None]:
    sources = Sources(wrap)
    try:
        try:
            whole = sources.open(block.path)
            read = read_table(whole, block.sector_bytes)
        except OSError as error:
            return _disk(block, None, (), (_unreadable(block, error),)), None
        partitions: list[Partition] = []
        looks: dict[int, Look] = {}
        uki: set[int] = set()
        findings = list(read.findings)
        for entry in read.entries:
            known = _known(block, entry)
            source: ReadAt = Window(whole, entry.start_bytes, entry.size_bytes)
            found = Probe("")
            try:
                if known is not None and not block.is_image_file:
                    source = sources.open(known.device)
                found = probe(source)
            except OSError as error:
                what = f"Partition {entry.number} of {block.name} can't be read: {error.strerror}."
                findings.append(_finding("COS-PARTITION-UNREADABLE", what, _DMESG))
            partition = _partition(entry, known, found)
            partitions.append(partition)
            if found.fs_type == "vfat" and is_uki(source):
                uki.add(entry.number)
            mount = mounts.mount_of(known.devno, table) if known is not None else None
            # An image file is read by its own bytes, also where a loop device stands on it.
            looks[entry.number] = look_at(
                partition if not block.is_image_file else msgspec.structs.replace(partition, device=""),
                source,
                mount,
                sources,
            )
        disk = _disk(block, read, tuple(partitions), tuple(findings))
        members = group(disk, looks, frozenset(uki))
        if members is None:
            return disk, None
        running = _running(block, looks, root)
        return disk, look_installation(disk, members, looks, _identity(disk, members.roles), running)
    finally:
        sources.close()


def _known(block: BlockDisk, entry: TableEntry) -> BlockPartition | None:
    """The kernel's partition that is this entry, by place (by number for multipath, where no place is known)."""
    for p in block.partitions:
        if p.start_bytes == entry.start_bytes or (p.start_bytes == -1 and p.number == entry.number):
            return p
    return None


def _partition(entry: TableEntry, known: BlockPartition | None, found: Probe) -> Partition:
    return Partition(
        number=entry.number,
        start_bytes=entry.start_bytes,
        size_bytes=entry.size_bytes,
        name=entry.name,
        part_uuid=entry.part_uuid,
        device=known.device if known is not None else "",
        fs_type=found.fs_type,
        fs_label=found.label,
        fs_uuid=found.uuid,
        flags=entry.flags,
    )


def _disk(
    block: BlockDisk, table: Table | None, partitions: tuple[Partition, ...], findings: tuple[Finding, ...]
) -> Disk:
    return Disk(
        path=block.path,
        name=block.name,
        model=block.model,
        serial=block.serial,
        size_bytes=block.size_bytes,
        sector_bytes=block.sector_bytes,
        table=table.kind if table is not None else TableKind.NONE,
        disk_id=table.disk_id if table is not None else "",
        partitions=partitions,
        is_image_file=block.is_image_file,
        removable=block.removable,
        read_only=block.read_only,
        findings=findings,
    )


def _identity(disk: Disk, roles: dict[str, Partition]) -> str:
    partition = roles.get("state") or roles.get("recovery") or roles["boot"]
    return partition.part_uuid or f"{disk.path}#{partition.number}"


def _running(
    block: BlockDisk, looks: dict[int, Look], root: tuple[int, int] | None
) -> frozenset[tuple[int, int]]:
    if root is None:
        return frozenset()
    devno, inode = root
    for p in block.partitions:
        if p.devno == devno:
            for number, look in looks.items():
                if look.partition.start_bytes == p.start_bytes or p.number == number:
                    return frozenset({(number, inode)})
    return frozenset()


def _told_apart(found: list[Installation]) -> tuple[tuple[Installation, ...], tuple[Finding, ...]]:
    """Disks copied byte by byte have equal PARTUUIDs: their ids get the disk's name, and that is said."""
    findings: list[Finding] = []
    result = []
    for one in found:
        twins = [i for i in found if i.id == one.id]
        if len(twins) == 1:
            result.append(one)
            continue
        result.append(msgspec.structs.replace(one, id=f"{one.id}@{one.disk.name}"))
        names = ", ".join(t.disk.name for t in twins)
        what = f"The disks {names} are copies of one another (same partition UUIDs)."
        finding = Finding(
            code="COS-DISK-CLONE",
            severity=Severity.WARNING,
            what=what,
            now="Detach the copy, because GRUB and Linux may take either of them.",
        )
        if finding not in findings:
            findings.append(finding)
    return tuple(result), tuple(findings)


def _booted_from(installations: tuple[Installation, ...], cmdline: str) -> BootedFrom:
    for installation in installations:
        if installation.running is not None:
            return BootedFrom(installation.running.value)
    words = cmdline.split()
    if any("CDLABEL=" in w or w in {"rd.cos.disable", "elemental.disable"} for w in words):
        return BootedFrom.LIVECD
    image = next(
        (w.partition("=")[2] for w in words if w.startswith(("cos-img/filename=", "iso-scan/filename="))), ""
    )
    for slot in SlotName:
        if image.endswith(f"/{slot.value}.img") and not installations:
            return BootedFrom(slot.value)
    if any("COS_RECOVERY" in w or "COS_SYSTEM" in w for w in words) or image.endswith("/recovery.img"):
        return BootedFrom.RECOVERY
    return BootedFrom.OTHER


_DMESG = "Look at the kernel's messages (dmesg); the disk may be failing."


def _unreadable(block: BlockDisk, error: OSError) -> Finding:
    words = error.strerror or str(error)
    return _finding("COS-DISK-UNREADABLE", f"The disk {block.name} can't be read: {words}.", _DMESG)


def _finding(code: str, what: str, now: str) -> Finding:
    return Finding(code=code, severity=Severity.ERROR, what=what, now=now)

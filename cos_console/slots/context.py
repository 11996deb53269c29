"""What the steps of one operation share: the partitions, mounted for it alone, the port onto them, the lock.

OSError and FormatError become a Problem here, in three sentences.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.grubcfg import parse_bootargs
from cos_console.formats.readat import FileReadAt, FormatError
from cos_console.model.machine import Installation, SlotName, SlotState
from cos_console.model.plan import Plan
from cos_console.model.problem import ExitCode, Problem
from cos_console.process import run as run_tool
from cos_console.slots import mounts
from cos_console.slots.build import BuildProgress, BuildResult
from cos_console.slots.port import MountedVolume, Place, Port, RealPort, Volume
from cos_console.slots.switch import Entries, Guard, Move, Situation

UNTOUCHED = "active and passive are exactly as before."


@dataclass
class OperationContext:
    """One operation in the making. `note` takes a sentence for the log."""

    plan: Plan
    installation: Installation
    port: Port
    environment: tuple[Place, ...]
    report: Callable[[BuildProgress], None]
    cancelled: Callable[[], bool]
    note: Callable[[str], None]
    built: BuildResult | None = None
    entries: Entries = field(default_factory=Entries)
    passive_given_up: bool = False
    """With the operator's consent: there was no room for three images."""

    @property
    def situation(self) -> Situation:
        """What decides the order of the switch's moves."""
        inst = self.installation
        sound = {s.name for s in inst.slots if s.state is SlotState.SOUND}
        kept = inst.slot(SlotName.PASSIVE) or inst.slot(SlotName.ACTIVE)
        return Situation(
            labels=bool(kept and kept.expected_label),
            active_sound=SlotName.ACTIVE in sound,
            passive_sound=SlotName.PASSIVE in sound and not self.passive_given_up,
            recovery_sound=SlotName.RECOVERY in sound,
            final=Guard("fallback", "cos") if self.plan.request.try_once else Guard("cos"),
            entries=self.entries,
        )


@contextlib.contextmanager
def open_operation(
    plan: Plan,
    installation: Installation,
    *,
    report: Callable[[BuildProgress], None],
    cancelled: Callable[[], bool],
    note: Callable[[str], None],
) -> Iterator[OperationContext]:
    """Mount what the plan writes to, privately, and hold the lock on /cOS. Raises Problem.

    Call it in a process of its own with one thread: the mounts are in a namespace that dies with it.
    """
    with contextlib.ExitStack() as stack, spoken("The installation's partitions could not be mounted"):
        mounts.enter_private_namespace()
        volumes: dict[Volume, MountedVolume] = {}
        for volume, number in (
            (Volume.STATE, installation.state_partition),
            (Volume.OEM, installation.oem_partition),
            (Volume.RECOVERY, installation.recovery_partition),
        ):
            if number is not None:
                volumes[volume] = stack.enter_context(_volume(installation, number))
        port = RealPort(volumes)
        stack.enter_context(_locked(volumes[Volume.STATE]))
        yield OperationContext(
            plan, installation, port, _environment(installation, port), report, cancelled, note
        )


@contextlib.contextmanager
def _volume(inst: Installation, number: int) -> Iterator[MountedVolume]:
    partition = inst.partition(number)
    if partition is None:
        raise OSError(2, f"partition {number} is not there")
    if number == inst.state_partition and inst.state_mounted_at:
        with _remounted(Path(inst.state_mounted_at)) as volume:
            yield volume
    elif partition.device:
        with mounts.mounted(Path(partition.device)) as volume:
            yield volume
    else:
        image = Path(inst.disk.path)
        with mounts.mounted(image, offset=partition.start_bytes, size_bytes=partition.size_bytes) as volume:
            yield volume


@contextlib.contextmanager
def _remounted(point: Path) -> Iterator[MountedVolume]:
    """COS_STATE is mounted on this machine already (it runs from it): writable for this time, then as before."""
    writable = not os.statvfs(point).f_flag & os.ST_RDONLY
    if not writable:
        run_tool(["mount", "-o", "remount,rw", str(point)])
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield MountedVolume(fd)
    finally:
        os.close(fd)
        if not writable:
            run_tool(["mount", "-o", "remount,ro", str(point)], ok=(0, 32))


@contextlib.contextmanager
def _locked(state: MountedVolume) -> Iterator[None]:
    """flock on the cOS directory: it holds across containers and namespaces."""
    fd = os.open("cOS", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=state.root_fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Problem(
            "COS-BUSY",
            "Another operation is at work on this disk.",
            now="Watch it with: cos-console attach",
            exit_code=ExitCode.BUSY,
        ) from None
    try:
        yield
    finally:
        os.close(fd)


def _environment(inst: Installation, port: Port) -> tuple[Place, ...]:
    """Every grubenv that the installed GRUB may load last; none where it reads none."""
    if not inst.boot.reads_environment:
        return ()
    volumes = {
        inst.state_partition: Volume.STATE,
        inst.oem_partition: Volume.OEM,
        inst.recovery_partition: Volume.RECOVERY,
    }
    found = [
        Place(volumes[f.partition], f.path.lstrip("/"))
        for f in inst.boot_files
        if f.partition in volumes and f.path.endswith("grubenv")
    ]
    return tuple(found) or ((Place(Volume.OEM, "grubenv"),) if port.has(Volume.OEM) else ())


@contextlib.contextmanager
def spoken(what: str, unchanged: str = UNTOUCHED) -> Iterator[None]:
    """Turn what the disk says into a Problem."""
    try:
        yield
    except OSError as e:
        read_only = e.errno == 30
        raise Problem(
            "COS-DISK",
            f"{what}: {e.strerror or e}.",
            unchanged=unchanged,
            now="The file system is read-only: check it."
            if read_only
            else "Check the disk (SMART, kernel messages).",
            detail=repr(e),
        ) from None
    except FormatError as e:
        raise Problem(
            "COS-DISK",
            f"{what}: {e}.",
            unchanged=unchanged,
            now="Check the file system (e2fsck) and the GRUB environment.",
        ) from None


def guarded_moves(ctx: OperationContext, moves: tuple[Move, ...]) -> tuple[Move, ...]:
    """A boot loader that reads no environment has no guard to write."""
    return moves if ctx.environment else tuple(m for m in moves if not isinstance(m, Guard))


def inode_of(ctx: OperationContext, place: Place) -> int | None:
    found = ctx.port.stat(place)
    return found.inode if found else None


def what_keeps_from_booting(ctx: OperationContext, place: Place) -> str:
    """The first thing that an image lacks: boot arguments, the kernel and initrd they name; empty: nothing.

    Raises OSError, FormatError.
    """
    with ctx.port.reading(place) as fd:
        image = Ext4.open(FileReadAt(fd))
        missing = ""
        path = next(
            (p for p in ("etc/cos/bootargs.cfg", "etc/elemental/bootargs.cfg") if image.exists(p)), ""
        )
        if not path:
            missing = "/etc/cos/bootargs.cfg"
        else:
            arguments = parse_bootargs(image.read_file(path))
            named = [n for n in (arguments.kernel, arguments.initramfs) if n and "$" not in n]
            missing = next((n for n in named if not image.exists(n)), "")
    return missing

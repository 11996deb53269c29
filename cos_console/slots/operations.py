"""The steps of a plan, done: what the engine calls one after the other.

A context holds the installation's partitions, mounted for this operation alone, and the port onto them. Every
change of a disk goes through that port. OSError and FormatError become a Problem here, in three sentences.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cos_console.formats import grubenv
from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.grubcfg import parse_bootargs
from cos_console.formats.readat import FileReadAt, FormatError
from cos_console.model.image import Content
from cos_console.model.machine import Installation, SlotName, SlotState
from cos_console.model.plan import Action, Plan
from cos_console.model.problem import ExitCode, Problem
from cos_console.process import run as run_tool
from cos_console.slots import guard, mounts, record, recover, restore, switch
from cos_console.slots.build import (
    BuildProgress,
    BuildResult,
    ImageSpec,
    build_image,
    prove_image,
)
from cos_console.slots.label import set_label
from cos_console.slots.port import MountedVolume, Place, Port, RealPort, Volume
from cos_console.slots.switch import ACTIVE, PASSIVE, RETIRED, TRANSITION, Entries, Guard, Situation

HISTORY = Place(Volume.STATE, "cOS/.cos-console-history.jsonl")
HISTORY_ENTRIES = 100
_UNTOUCHED = "active and passive are exactly as before."
_ENTRY = {SlotName.ACTIVE: "cos", SlotName.PASSIVE: "fallback", SlotName.RECOVERY: "recovery"}


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
def spoken(what: str, unchanged: str = _UNTOUCHED) -> Iterator[None]:
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


# --- steps ---------------------------------------------------------------------------------------------------


def reserve(ctx: OperationContext) -> None:
    """A fresh transition.img, and the record that says what is going on."""
    with spoken("The new image could not be begun"):
        discard_transition(ctx)
        if ctx.plan.request.remove_passive_first:
            _give_up_passive(ctx)
        record.write(ctx.port, _record(ctx, "filling"))
        ctx.port.create(TRANSITION)
    free = ctx.port.free_bytes(Volume.STATE)
    if ctx.plan.request.action is Action.UPGRADE and free < ctx.plan.image_size_bytes:
        raise Problem(
            "COS-SPACE-STATE",
            f"COS_STATE has {free >> 20} MiB free and the image needs {ctx.plan.image_size_bytes >> 20} MiB.",
            unchanged=_UNTOUCHED,
            now="Choose a smaller --size, or free space on the state partition.",
            exit_code=ExitCode.REFUSED,
        )


def _give_up_passive(ctx: OperationContext) -> None:
    """Nothing may name passive when it goes: active is the default first, and no other boot is pending."""
    if ctx.port.stat(PASSIVE) is None:
        return
    guard.write(ctx.port, ctx.environment, {"saved_entry": ctx.entries.active, "next_entry": ""})
    ctx.passive_given_up = True
    switch.run(ctx.port, (switch.Unlink(PASSIVE),), ctx.environment)
    ctx.note("passive was removed, as consented; until the upgrade is done there is no fallback but recovery")


def fetch(ctx: OperationContext, content: Content) -> None:
    """Fill transition.img from an image, labelled COS_ACTIVE from its first byte on."""
    spec = ImageSpec(ctx.plan.image_size_bytes, "COS_ACTIVE")
    with spoken("The new image could not be written"):
        ctx.built = ctx.port.fill(
            TRANSITION,
            lambda fd: build_image(content, fd, spec, report=ctx.report, cancelled=ctx.cancelled),
        )
        ctx.port.fsync_file(TRANSITION)
    ctx.note(f"{ctx.built.entries} entries, {ctx.built.transfer_bytes} bytes moved")


def copy(ctx: OperationContext) -> None:
    """Fill transition.img from another slot of this installation."""
    source = _copy_source(ctx)

    def report(done: int, total: int) -> None:
        ctx.report(BuildProgress(done, total, detail=f"copying {source.name}"))

    with spoken("The copy could not be written"):
        if ctx.port.stat(TRANSITION) is not None:
            ctx.port.unlink(TRANSITION)
        if not restore.copy(ctx.port, source, TRANSITION, report=report, cancelled=ctx.cancelled):
            raise Problem(
                "COS-CANCELLED",
                "The operation was stopped on request.",
                unchanged=_UNTOUCHED,
                now="Start it again whenever you like.",
                exit_code=ExitCode.CANCELLED,
            )


def prove(ctx: OperationContext) -> str:
    """Read everything back past the page cache, and look whether it can boot. Returns how it was done."""
    with spoken("The new image could not be read back"):
        if ctx.built is not None:
            with ctx.port.reading(TRANSITION) as fd:
                proof = prove_image(fd, ctx.built, report=ctx.report, cancelled=ctx.cancelled)
            text = f"{proof.bytes_read} bytes read back and equal ({proof.method})"
        else:
            compared = restore.prove_equal(ctx.port, _copy_source(ctx), TRANSITION)
            text = f"{compared} bytes read back and equal"
            set_label(ctx.port, TRANSITION, "COS_ACTIVE")
        _can_boot(ctx)
        ctx.port.fsync_file(TRANSITION)
        found = ctx.port.stat(TRANSITION)
        record.write(
            ctx.port,
            msgspec.structs.replace(_record(ctx, "proven"), new_inode=found.inode if found else None),
        )
    return text


def do_switch(ctx: OperationContext) -> None:
    """The new image becomes active, or the slots change places; from here on nothing is cancelled."""
    if _instant_swap(ctx.plan):
        with spoken("The swap could not be recorded"):
            record.write(ctx.port, _record(ctx, "proven"))
        moves = switch.swap(ctx.situation)
    else:
        moves = switch.upgrade(ctx.situation, keep_active=_keeps_active(ctx))
    with spoken(
        "The switch stopped", "What boots is whole; the rest is finished or undone with: cos-console repair"
    ):
        switch.run(ctx.port, _for(ctx, moves), ctx.environment)


def boot_choice(ctx: OperationContext) -> None:
    """Write the choice into the environment block, in place."""
    slot = ctx.plan.boots_after.next or SlotName.ACTIVE
    changes: dict[str, str | None]
    if ctx.plan.request.action is Action.BOOT_ONCE:
        changes = {"next_entry": _ENTRY[slot]}
    else:
        changes = {"saved_entry": _ENTRY[slot], "next_entry": ""}
    with spoken("The boot choice could not be written"):
        guard.write(ctx.port, ctx.environment, changes)


def relabel(ctx: OperationContext) -> None:
    slot = ctx.installation.slot(ctx.plan.request.target_slot or SlotName.ACTIVE)
    if slot is None or slot.name is SlotName.RECOVERY:
        raise Problem("COS-SLOT", "That slot can't be relabelled here.", now="Choose active or passive.")
    place = ACTIVE if slot.name is SlotName.ACTIVE else PASSIVE
    with spoken("The label could not be written"):
        set_label(ctx.port, place, slot.expected_label)


def repair(ctx: OperationContext) -> None:
    """Finish or undo what the record tells; without one, remove an unfinished image."""
    finish = ctx.plan.request.action is Action.FINISH
    with spoken("The repair stopped", "What boots is whole."):
        try:
            found = record.read(ctx.port)
        except msgspec.MsgspecError:
            found = None
        if found is None:
            if finish:
                raise Problem(
                    "COS-NO-RECORD",
                    "There is no record of the interrupted operation, so it can't be finished.",
                    now="Undo it instead: cos-console repair undo.",
                    exit_code=ExitCode.REFUSED,
                )
            discard_transition(ctx)
            return
        seen = recover.Observed(*(_inode(ctx, p) for p in (ACTIVE, PASSIVE, RETIRED, TRANSITION)))
        told = recover.Recorded(
            kind=found.kind,
            active=found.active_inode,
            passive=found.passive_inode,
            new=found.new_inode,
            before=Guard(found.saved_entry, found.next_entry),
        )
        try:
            situation = _recorded_situation(found.plan, ctx)
            moves = recover.finish(seen, told, situation) if finish else recover.undo(seen, told, situation)
        except recover.Unrecognised as e:
            raise Problem(
                "COS-UNRECOGNISED",
                f"Somebody else changed this disk since: {e}.",
                now="Look closer, then relabel or restore the slot that is wrong.",
                exit_code=ExitCode.REFUSED,
            ) from None
        if moves is None and finish:
            raise Problem(
                "COS-NOT-PROVEN",
                "The new image was never proven, so the operation can't be finished.",
                now="Undo it and start again: cos-console repair undo.",
                exit_code=ExitCode.REFUSED,
            )
        if moves is None:
            ctx.note("the operation was done already; swap brings the other system back")
        else:
            switch.run(ctx.port, _for(ctx, moves), ctx.environment)
            if not finish:
                _environment_back(ctx, found)
        record.drop(ctx.port)


def _recorded_situation(plan: Plan, ctx: OperationContext) -> Situation:
    """What is sound is looked at now, for the guard must boot now; how it shall end is the recorded plan's."""
    final = Guard("fallback", "cos") if plan.request.try_once else Guard("cos")
    return dataclasses.replace(ctx.situation, final=final)


def _environment_back(ctx: OperationContext, found: record.Record) -> None:
    """What was unset before is unset again, block by block; the undone guard has set it empty."""
    for place in ctx.environment:
        before = grubenv.variables(found.environment.get(str(place), grubenv.empty_block()))
        guard.write(ctx.port, (place,), {k: before.get(k) for k in ("saved_entry", "next_entry")})


def discard_transition(ctx: OperationContext) -> None:
    """Remove an unfinished image and the record: what a cancelled or failed operation leaves."""
    with spoken("The unfinished image could not be removed"):
        if ctx.port.stat(TRANSITION) is not None:
            ctx.port.unlink(TRANSITION)
            ctx.port.fsync_dir(TRANSITION.directory)
        record.drop(ctx.port)


def clean(ctx: OperationContext) -> None:
    """Drop the record: the operation is over."""
    with spoken("The record could not be removed", "The operation itself is done."):
        record.drop(ctx.port)


def write_history(ctx: OperationContext, entry: bytes) -> None:
    """Append one JSON line to the machine's history; the oldest of more than 100 go."""
    with spoken("The history could not be written", "The operation itself is done."):
        old = ctx.port.stat(HISTORY)
        lines = ctx.port.read(HISTORY, 0, old.size_bytes).splitlines() if old else []
        lines = [*lines, entry][-HISTORY_ENTRIES:]
        temporary = HISTORY.beside(HISTORY.name + ".new")
        if ctx.port.stat(temporary) is not None:
            ctx.port.unlink(temporary)
        ctx.port.create(temporary)
        ctx.port.write_at(temporary, 0, b"\n".join(lines) + b"\n")
        ctx.port.fsync_file(temporary)
        ctx.port.rename(temporary, HISTORY)
        ctx.port.fsync_dir(HISTORY.directory)


# --- parts ---------------------------------------------------------------------------------------------------


def _for(ctx: OperationContext, moves: tuple[switch.Move, ...]) -> tuple[switch.Move, ...]:
    """A boot loader that reads no environment has no guard to write."""
    return moves if ctx.environment else tuple(m for m in moves if not isinstance(m, Guard))


def _instant_swap(plan: Plan) -> bool:
    """A swap through a copy writes an image, and is an upgrade to that copy."""
    return plan.request.action is Action.SWAP and plan.image_size_bytes == 0


def _keeps_active(ctx: OperationContext) -> bool:
    return ctx.plan.keep is SlotName.ACTIVE


def _copy_source(ctx: OperationContext) -> Place:
    if ctx.plan.request.action is Action.RESTORE_FROM_RECOVERY:
        slot = ctx.installation.slot(SlotName.RECOVERY)
        return Place(Volume.RECOVERY, slot.file if slot else "cOS/recovery.img")
    return PASSIVE


def _inode(ctx: OperationContext, place: Place) -> int | None:
    found = ctx.port.stat(place)
    return found.inode if found else None


def _record(ctx: OperationContext, stage: str) -> record.Record:
    kind = (
        "swap"
        if _instant_swap(ctx.plan)
        else "upgrade-keep-active"
        if _keeps_active(ctx)
        else "upgrade-keep-passive"
    )
    return record.Record(
        operation=ctx.plan.id,
        kind=kind,
        stage=stage,
        plan=ctx.plan,
        active_inode=_inode(ctx, ACTIVE),
        passive_inode=_inode(ctx, PASSIVE),
        new_digest=(ctx.plan.image.digest or "") if ctx.plan.image else "",
        saved_entry=ctx.installation.boot.saved_entry,
        next_entry=ctx.installation.boot.next_entry,
        environment={
            str(p): ctx.port.read(p, 0, 1024) for p in ctx.environment if ctx.port.stat(p) is not None
        },
    )


def _can_boot(ctx: OperationContext) -> None:
    """The new image has boot arguments, and the kernel and initrd that they name. Raises Problem."""
    with ctx.port.reading(TRANSITION) as fd:
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
    if missing:
        raise Problem(
            "COS-CANT-BOOT",
            f"The new image has no {missing}, so it would not boot.",
            unchanged=_UNTOUCHED,
            now="Choose another image; this one is not a bootable derivative.",
            exit_code=ExitCode.REFUSED,
        )

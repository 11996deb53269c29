"""The steps of a plan, done: what the engine calls one after the other.

Every change of a disk goes through the context's port; repairs have their own module.
"""

import msgspec

from cos_console.model.image import Content
from cos_console.model.machine import SlotName
from cos_console.model.plan import Action, Plan
from cos_console.model.problem import ExitCode, Problem
from cos_console.slots import guard, record, restore, selinux, switch
from cos_console.slots.build import BuildProgress, ImageSpec, build_image, prove_image
from cos_console.slots.context import (
    UNTOUCHED,
    OperationContext,
    guarded_moves,
    inode_of,
    open_operation,
    spoken,
    what_keeps_from_booting,
)
from cos_console.slots.label import set_label
from cos_console.slots.port import Place, Volume
from cos_console.slots.squashfs_content import SquashfsContent
from cos_console.slots.switch import ACTIVE, PASSIVE, TRANSITION

__all__ = ["OperationContext", "open_operation"]
HISTORY = Place(Volume.STATE, "cOS/.cos-console-history.jsonl")
HISTORY_ENTRIES = 100
_ENTRY = {SlotName.ACTIVE: "cos", SlotName.PASSIVE: "fallback", SlotName.RECOVERY: "recovery"}


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
            unchanged=UNTOUCHED,
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
    spec = ImageSpec(ctx.plan.image_size_bytes, "COS_ACTIVE", contexts_from=selinux.contexts_from)
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
    slot = ctx.installation.slot(SlotName.RECOVERY)
    if source.volume is Volume.RECOVERY and slot is not None and slot.fs_type == "squashfs":
        with spoken("The recovery image could not be read"), ctx.port.reading(source) as fd:
            fetch(ctx, SquashfsContent(fd, slot.version))
        return

    def report(done: int, total: int) -> None:
        ctx.report(BuildProgress(done, total, detail=f"copying {source.name}"))

    with spoken("The copy could not be written"):
        if ctx.port.stat(TRANSITION) is not None:
            ctx.port.unlink(TRANSITION)
        if not restore.copy(ctx.port, source, TRANSITION, report=report, cancelled=ctx.cancelled):
            raise Problem(
                "COS-CANCELLED",
                "The operation was stopped on request.",
                unchanged=UNTOUCHED,
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
        switch.run(ctx.port, guarded_moves(ctx, moves), ctx.environment)


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
    if slot is None:
        raise Problem("COS-SLOT", "That slot is not there.", now="Look again: cos-console status.")
    place = Place(Volume.RECOVERY if slot.name is SlotName.RECOVERY else Volume.STATE, slot.file)
    with spoken("The label could not be written"):
        set_label(ctx.port, place, slot.expected_label)


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
        active_inode=inode_of(ctx, ACTIVE),
        passive_inode=inode_of(ctx, PASSIVE),
        new_digest=(ctx.plan.image.digest or "") if ctx.plan.image else "",
        saved_entry=ctx.installation.boot.saved_entry,
        next_entry=ctx.installation.boot.next_entry,
        environment={
            str(p): ctx.port.read(p, 0, 1024) for p in ctx.environment if ctx.port.stat(p) is not None
        },
    )


def _can_boot(ctx: OperationContext) -> None:
    """Raises Problem when the new image would not boot."""
    missing = what_keeps_from_booting(ctx, TRANSITION)
    if missing:
        raise Problem(
            "COS-CANT-BOOT",
            f"The new image has no {missing}, so it would not boot.",
            unchanged=UNTOUCHED,
            now="Choose another image; this one is not a bootable derivative.",
            exit_code=ExitCode.REFUSED,
        )

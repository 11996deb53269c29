"""The next start after an interruption: finish or undo, from the record or, where there is none, from the files."""

import dataclasses
import os

import msgspec

from cos_console.formats import grubenv
from cos_console.formats.readat import FormatError
from cos_console.model.machine import SlotName, SlotState
from cos_console.model.plan import Action, Plan
from cos_console.model.problem import ExitCode, Problem
from cos_console.process import run as run_tool
from cos_console.slots import guard, record, recover, restore, switch, unrecorded
from cos_console.slots.context import (
    OperationContext,
    guarded_moves,
    inode_of,
    spoken,
    what_keeps_from_booting,
)
from cos_console.slots.label import read_label, set_label
from cos_console.slots.port import Place, Volume
from cos_console.slots.switch import ACTIVE, PASSIVE, RETIRED, TRANSITION, Guard, Situation

_USABLE = {SlotState.SOUND, SlotState.MISLABELLED}


def repair(ctx: OperationContext) -> None:
    """Finish or undo what the record tells; without one, what the files themselves tell."""
    finish = ctx.plan.request.action is Action.FINISH
    with spoken("The repair stopped", "What boots is whole."):
        try:
            found = record.read(ctx.port)
        except msgspec.MsgspecError:
            found = None
        if found is None:
            _without_record(ctx, finish=finish)
            return
        seen = _observed(ctx)
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
            raise _unrecognised(e) from None
        if moves is None and finish:
            raise Problem(
                "COS-NOT-PROVEN",
                "The new image was never proven, so the operation can't be finished.",
                now="Undo it and start again: cos-console repair undo.",
                exit_code=ExitCode.REFUSED,
            )
        if moves is None:
            ctx.note("the operation was done already; swap brings the other system back")
            switch.run(ctx.port, guarded_moves(ctx, (situation.final,)), ctx.environment)
        else:
            switch.run(ctx.port, guarded_moves(ctx, moves), ctx.environment)
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


def _without_record(ctx: OperationContext, *, finish: bool) -> None:
    """An interruption of another program, or of ours before its record: told from names, labels and content."""
    usable = {s.name for s in ctx.installation.slots if s.state in _USABLE}
    files = unrecorded.Files(
        inodes=_observed(ctx),
        active_label=_label(ctx, ACTIVE),
        passive_label=_label(ctx, PASSIVE),
        active_usable=SlotName.ACTIVE in usable,
        passive_usable=SlotName.PASSIVE in usable,
        retired_boots=_boots(ctx, RETIRED),
        new_boots=_boots(ctx, TRANSITION),
    )
    try:
        decide = unrecorded.finish if finish else unrecorded.undo
        moves = decide(files, ctx.situation)
    except recover.Unrecognised as e:
        raise _unrecognised(e) from None
    if any(isinstance(m, switch.Rename) and m.place == TRANSITION for m in moves):
        restore.dig_out_unwritten(ctx.port, TRANSITION)
    switch.run(ctx.port, guarded_moves(ctx, moves), ctx.environment)
    recovery = ctx.installation.slot(SlotName.RECOVERY)
    if recovery is not None and recovery.state is SlotState.MISLABELLED:
        set_label(ctx.port, Place(Volume.RECOVERY, recovery.file), recovery.expected_label)
    record.drop(ctx.port)


def _observed(ctx: OperationContext) -> recover.Observed:
    return recover.Observed(*(inode_of(ctx, p) for p in (ACTIVE, PASSIVE, RETIRED, TRANSITION)))


def _label(ctx: OperationContext, place: Place) -> str | None:
    """None: no such image, or none that has a label."""
    try:
        return read_label(ctx.port, place) if ctx.port.stat(place) is not None else None
    except FormatError:
        return None


def _boots(ctx: OperationContext, place: Place) -> bool:
    """A whole file system with boot arguments, kernel and initrd: nobody has proven it, so it is checked in full."""
    try:
        if ctx.port.stat(place) is None or what_keeps_from_booting(ctx, place):
            return False
        with ctx.port.reading(place) as fd:
            checked = run_tool(
                ["e2fsck", "-fn", f"/proc/{os.getpid()}/fd/{fd}"], ok=range(256), timeout_s=600.0
            )
        return checked.returncode == 0
    except (FormatError, FileNotFoundError):
        return False


def _unrecognised(error: recover.Unrecognised) -> Problem:
    return Problem(
        "COS-UNRECOGNISED",
        f"This disk can't be repaired by itself: {error}.",
        now="Look closer, then relabel or restore the slot that is wrong.",
        exit_code=ExitCode.REFUSED,
    )

"""Active from a proven copy of passive or of recovery."""

from cos_console.model.machine import SlotName
from cos_console.model.plan import Action, Plan, SlotChange, SpacePhase, Step, StepKind
from cos_console.planner import space
from cos_console.planner.given import CHECK, CLEAN, NEW_IMAGE, USABLE, WRITE_BPS, Given
from cos_console.planner.words import disk, refused, version, what


def plan_restore(given: Given) -> Plan:
    """Raises Problem: the source is not sound, this machine runs from active, no room."""
    from_recovery = given.request.action is Action.RESTORE_FROM_RECOVERY
    source = given.recovery if from_recovery else given.passive
    name = "recovery" if from_recovery else "passive"
    if source is None or source.state not in USABLE:
        raise refused(
            "COS-SLOT",
            f"{name} is not sound, so active can't be restored from it.",
            "Upgrade active instead.",
        )
    if given.inst.running is SlotName.ACTIVE:
        raise refused("COS-RUNNING", "This machine runs from active.", "Boot passive or the LiveCD first.")
    unpacks = source.fs_type == "squashfs"
    room = space.room(given.inst)
    size, needed = source.size_bytes, source.allocated_bytes
    if unpacks:
        size, _ = space.image_size(
            asked=given.request.image_size_bytes,
            unpacked=None,
            transfer=source.size_bytes,
            configured=given.settings.image_size_bytes,
            room=room,
        )
        needed = size
    phase = SpacePhase(
        phase=f"unpacked {name}" if unpacks else f"copy of {name}",
        where="COS_STATE",
        needed_bytes=needed,
        available_bytes=room,
        estimated=unpacks,
    )
    space.must_fit((phase,))
    proof = "Prove: read back every byte from disk" if unpacks else "Prove: the copy is equal on disk"
    return given.assemble(
        title=f"Restore active of {disk(given.inst)} from {name} {source.version}",
        steps=copying_steps(
            f"Unpack {name}" if unpacks else f"Copy {name}", proof, size, source.allocated_bytes
        ),
        changes=[
            SlotChange(
                slot=SlotName.ACTIVE,
                now=what(given.active),
                after=source.version,
                note=f"{'unpacked from' if unpacks else 'a copy of'} {name}",
            ),
            SlotChange(slot=SlotName.PASSIVE, now=what(given.passive), after=what(given.passive)),
        ],
        boots_after=given.outlook(SlotName.ACTIVE, SlotName.ACTIVE),
        space=(phase,),
        fate=f"passive {what(given.passive)} stays",
        undo=f"none: active {what(given.active)} is gone then",
        keep=SlotName.PASSIVE,
        image_size=size,
        estimate=2 + 2 * source.allocated_bytes / WRITE_BPS,
        from_version=version(given.active),
        to_version=source.version,
    )


def copying_steps(fill: str, proof: str, size: int, filled: int, undo: str = "") -> list[Step]:
    """A new image filled from a slot, and the switch to it. `size`, `filled`: bytes."""
    return [
        CHECK,
        Step(kind=StepKind.RESERVE, title="Space reserved", writes=NEW_IMAGE, size_bytes=size),
        Step(kind=StepKind.COPY, title=fill, writes=NEW_IMAGE, size_bytes=filled),
        Step(kind=StepKind.PROVE, title=proof, writes=""),
        Step(
            kind=StepKind.SWITCH,
            title="Switch",
            writes="names and labels in COS_STATE:/cOS, the GRUB environment",
            cancellable=False,
            undo=undo,
        ),
        CLEAN,
    ]

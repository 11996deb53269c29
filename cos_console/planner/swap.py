"""Active and passive change places: at once with recovery as guard, else through a copy."""

from cos_console.model.machine import Slot, SlotName, SlotState
from cos_console.model.plan import Plan, SlotChange, SpacePhase, Step, StepKind
from cos_console.planner import space
from cos_console.planner.given import CHECK, HISTORY, USABLE, WRITE_BPS, Given
from cos_console.planner.restore import copying_steps
from cos_console.planner.words import disk, refused, what


def plan_swap(given: Given) -> Plan:
    """Raises Problem: a slot is not sound; through a copy: this machine runs from passive, no room."""
    active, passive = given.active, given.passive
    if not (active and passive and active.state in USABLE and passive.state in USABLE):
        raise refused(
            "COS-SLOT", "Swapping needs a sound active and a sound passive.", "Restore or upgrade active."
        )
    guarded = given.recovery is not None and given.recovery.state is SlotState.SOUND
    if given.request.swap_by_copy or (active.expected_label and not guarded):
        return _through_a_copy(given, active, passive)
    return given.assemble(
        title=f"Swap active {active.version} and passive {passive.version} of {disk(given.inst)}",
        steps=[
            CHECK,
            Step(
                kind=StepKind.SWITCH,
                title="Swap",
                writes="names and labels in COS_STATE:/cOS, the GRUB environment",
                cancellable=False,
                undo="swap again",
            ),
            HISTORY,
        ],
        changes=_changes(given),
        boots_after=given.outlook(SlotName.ACTIVE, SlotName.ACTIVE),
        fate="passive becomes active",
        undo="swap again",
        estimate=1.0,
        from_version=active.version,
        to_version=passive.version,
    )


def _through_a_copy(given: Given, active: Slot, passive: Slot) -> Plan:
    """A copy of passive becomes active, and active becomes passive: the upgrade's moves, which need no recovery."""
    if given.inst.running is SlotName.PASSIVE:
        raise refused(
            "COS-RUNNING",
            "This machine runs from passive, whose image would be given up for its copy.",
            "Make passive the default instead: cos-console rollback default.",
        )
    phase = SpacePhase(
        phase="copy of passive",
        where="COS_STATE",
        needed_bytes=passive.allocated_bytes,
        available_bytes=space.room(given.inst),
    )
    space.must_fit((phase,))
    return given.assemble(
        title=f"Swap active {active.version} and passive {passive.version} of {disk(given.inst)} through a copy",
        steps=copying_steps(
            "Copy passive",
            "Prove: the copy is equal on disk",
            passive.size_bytes,
            passive.allocated_bytes,
            "swap again",
        ),
        changes=_changes(given),
        boots_after=given.outlook(SlotName.ACTIVE, SlotName.ACTIVE),
        space=(phase,),
        fate="a copy of passive becomes active, and active becomes passive",
        undo="swap again",
        keep=SlotName.ACTIVE,
        image_size=passive.size_bytes,
        estimate=2 + 2 * passive.allocated_bytes / WRITE_BPS,
        from_version=active.version,
        to_version=passive.version,
    )


def _changes(given: Given) -> list[SlotChange]:
    return [
        SlotChange(slot=SlotName.ACTIVE, now=what(given.active), after=what(given.passive)),
        SlotChange(slot=SlotName.PASSIVE, now=what(given.passive), after=what(given.active)),
    ]

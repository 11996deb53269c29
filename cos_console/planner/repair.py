"""What an interruption left: finished, undone, or a label put right."""

from cos_console.model.machine import BootOutlook, SlotName, SlotState
from cos_console.model.plan import Action, Plan, SlotChange, Step, StepKind
from cos_console.planner.given import CHECK, HISTORY, STATE_DIRECTORY, Given
from cos_console.planner.words import disk, refused

_MENDED = {"finish", "undo", "relabel"}
"""Repairs of a left-over that finish and undo do; a missing slot alone needs a restore or an upgrade."""


def plan_repair(given: Given) -> Plan:
    """Finish or undo. Raises Problem when nothing is left over."""
    inst = given.inst
    if not any(x.repair in _MENDED for x in inst.leftovers):
        raise refused(
            "COS-NOTHING", "Nothing is left over from an interrupted operation.", "There is nothing to do."
        )
    word = "Finish" if given.request.action is Action.FINISH else "Undo"
    return given.assemble(
        title=f"{word} what was interrupted on {disk(inst)}",
        steps=[
            CHECK,
            Step(
                kind=StepKind.SWITCH,
                title=word,
                writes="names and labels in COS_STATE:/cOS",
                cancellable=False,
            ),
            Step(
                kind=StepKind.CLEAN,
                title="Remove left-overs, write history",
                writes=STATE_DIRECTORY,
                cancellable=False,
            ),
        ],
        changes=[],
        boots_after=_boots_after(given),
        fate="; ".join(f"{x.path}: {x.meaning}" for x in inst.leftovers),
        undo="none needed",
        estimate=2.0,
    )


def _boots_after(given: Given) -> BootOutlook:
    """As before, unless the repair gives active its name back."""
    found = {x.kind: x for x in given.inst.leftovers}
    if "missing-active" not in found or "operation-record" in found:
        return given.inst.boot
    finish = given.request.action is Action.FINISH
    named = "transition-image" in found if finish else found["missing-active"].repair == "undo"
    return given.outlook(SlotName.ACTIVE, SlotName.ACTIVE) if named else given.inst.boot


def plan_relabel(given: Given) -> Plan:
    """Raises Problem when the label is right."""
    inst = given.inst
    slot = inst.slot(given.request.target_slot or SlotName.ACTIVE)
    if slot is None or slot.state is not SlotState.MISLABELLED:
        raise refused("COS-NOTHING", "That slot's label is right already.", "There is nothing to do.")
    return given.assemble(
        title=f"Label {slot.name.value} of {disk(inst)} {slot.expected_label}",
        steps=[
            CHECK,
            Step(
                kind=StepKind.RELABEL,
                title="Label",
                writes=f"{'COS_RECOVERY' if slot.name is SlotName.RECOVERY else 'COS_STATE'}:/{slot.file}",
                cancellable=False,
            ),
            HISTORY,
        ],
        changes=[
            SlotChange(
                slot=slot.name, now=f"label {slot.label or 'none'}", after=f"label {slot.expected_label}"
            )
        ],
        boots_after=inst.boot,
        fate="no content is touched",
        undo="none needed",
        estimate=1.0,
    )

"""What boots next, and from then on: the GRUB environment alone."""

from cos_console.model.machine import SlotName, SlotState
from cos_console.model.plan import Action, Plan, Step, StepKind
from cos_console.planner.given import CHECK, HISTORY, Given
from cos_console.planner.words import disk, refused, version

_SAVED = {"fallback": SlotName.PASSIVE, "recovery": SlotName.RECOVERY}


def plan_boot_choice(given: Given) -> Plan:
    """Raises Problem: GRUB reads no environment here, the slot is not sound."""
    inst, action = given.inst, given.request.action
    if not inst.boot.reads_environment:
        raise refused(
            "COS-NO-ENVIRONMENT",
            "The installed boot loader reads no environment, so a choice can't be left for it.",
            "Swap active and passive instead.",
        )
    slot, once = _chosen(given)
    found = inst.slot(slot)
    if found is None or found.state is not SlotState.SOUND:
        raise refused("COS-SLOT", f"{slot.value} is not sound.", "Choose another slot.")
    stays = _SAVED.get(inst.boot.saved_entry, SlotName.ACTIVE) if once else slot
    if action is Action.CONFIRM:
        title = f"Keep {slot.value} {found.version} of {disk(inst)} as the default"
    elif once:
        title = f"Boot {slot.value} {found.version} of {disk(inst)} once"
    else:
        title = f"Make {slot.value} {found.version} of {disk(inst)} the default"
    return given.assemble(
        title=title,
        steps=[
            CHECK,
            Step(
                kind=StepKind.BOOT_CHOICE,
                title="Boot choice",
                writes="the GRUB environment, in place",
                cancellable=False,
            ),
            HISTORY,
        ],
        changes=[],
        boots_after=given.outlook(slot, stays),
        fate="no image is touched",
        undo="the same with the other slot",
        estimate=1.0,
        from_version=version(given.active),
        to_version=found.version,
    )


def _chosen(given: Given) -> tuple[SlotName, bool]:
    """(slot, once)"""
    request, inst = given.request, given.inst
    if request.action is Action.CONFIRM:
        return request.target_slot or inst.running or SlotName.ACTIVE, False
    other = SlotName.ACTIVE if inst.boot.after is SlotName.PASSIVE else SlotName.PASSIVE
    return request.target_slot or other, request.action is Action.BOOT_ONCE

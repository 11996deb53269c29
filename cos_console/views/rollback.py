"""The ways back, in exact words: what boots next, what after that, what each overwrites and undoes."""

from cos_console.model.machine import Installation, Machine, SlotName, SlotState
from cos_console.model.plan import Action, Request
from cos_console.views import words
from cos_console.views.page import Block, Choice, Facts, Gap, Lines, Page, Span, Table, Tone, line

HELP = (
    "Boot once: only the next boot uses the other slot. The boot after it is as it was before.",
    "Make the default: from now on the other slot boots, until you change it.",
    "Swap: the two images change places. What was passive becomes active.",
    "Restore: a copy of the other image replaces active. What was in active is gone, so it asks for a typed word.",
    "Each way first shows its plan. Nothing is done from this page.",
)


def other_slot(inst: Installation) -> SlotName:
    """The slot a way back leads to: the one that does not boot by default now."""
    usual = inst.boot.after or inst.boot.next
    return SlotName.ACTIVE if usual is SlotName.PASSIVE else SlotName.PASSIVE


def rollback_request(inst: Installation, choice: str) -> Request:
    """The request behind a choice of this page (or the same one offered on the first page)."""
    other = other_slot(inst)
    match choice:
        case "once":
            return Request(action=Action.BOOT_ONCE, installation=inst.id, target_slot=other)
        case "recovery-once":
            return Request(action=Action.BOOT_ONCE, installation=inst.id, target_slot=SlotName.RECOVERY)
        case "default":
            return Request(action=Action.DEFAULT, installation=inst.id, target_slot=other)
        case "default-passive":
            return Request(action=Action.DEFAULT, installation=inst.id, target_slot=SlotName.PASSIVE)
        case "swap":
            return Request(action=Action.SWAP, installation=inst.id)
        case "restore":
            return Request(action=Action.RESTORE, installation=inst.id)
        case "restore-recovery":
            return Request(action=Action.RESTORE_FROM_RECOVERY, installation=inst.id)
        case "confirm":
            return Request(action=Action.CONFIRM, installation=inst.id)
        case "finish":
            return Request(action=Action.FINISH, installation=inst.id)
        case "undo":
            return Request(action=Action.UNDO, installation=inst.id)
        case _:
            if choice.startswith("relabel-"):
                slot = SlotName(choice.removeprefix("relabel-"))
                return Request(action=Action.RELABEL, installation=inst.id, target_slot=slot)
            raise ValueError(choice)


def rollback_page(machine: Machine, inst: Installation, now: str, chosen: str = "once") -> Page:
    """`chosen` is the choice the pointer is on: its boots are shown below the table."""
    active, passive = inst.slot(SlotName.ACTIVE), inst.slot(SlotName.PASSIVE)
    recovery = inst.slot(SlotName.RECOVERY)
    other = other_slot(inst)
    slot = inst.slot(other)
    usual = inst.boot.after or inst.boot.next
    there = words.version(slot) or other.value
    here = words.version(inst.slot(usual)) if usual else ""
    here = here or (usual.value if usual else "what boots now")
    unsound = "" if slot is not None and slot.state is SlotState.SOUND else f"{other.value} is not sound."
    both = (
        ""
        if not unsound and active and active.state is not SlotState.MISSING
        else "Both slots are needed for a swap."
    )
    from_passive = "" if passive and passive.state is SlotState.SOUND else "passive is not sound."
    choices = [
        Choice(
            "once",
            f"Boot {other.value} once",
            f"next boot {there}, the one after it {here} again",
            refusal=unsound,
        ),
        Choice(
            "default",
            f"Make {other.value} the default",
            f"from now on {there}, until you change it",
            refusal=unsound,
        ),
        Choice(
            "swap",
            "Swap active and passive",
            f"{words.version(passive) or 'passive'} becomes active, {words.version(active) or 'active'} passive",
            refusal=both,
        ),
        Choice(
            "restore",
            "Restore active",
            f"a copy of {words.version(passive) or 'passive'} replaces {words.version(active) or 'active'}",
            refusal=from_passive,
            dangerous=True,
        ),
    ]
    if recovery is not None:
        no = "" if recovery.state is SlotState.SOUND else "recovery is not sound."
        choices += [
            Choice("recovery-once", "Boot recovery once", "next boot recovery, then as before", refusal=no),
            Choice(
                "restore-recovery",
                "Restore from recovery",
                f"a copy of recovery {words.version(recovery)} replaces active",
                refusal=no,
                dangerous=True,
            ),
        ]
    gone = f"no ({words.version(active) or 'active'} is gone)"
    costs: Block = Table(
        ("", "Overwrites", "Takes", "Undo"),
        (
            (Span("Boot once"), Span("nothing"), Span("1 s"), Span("press it again")),
            (Span("Default"), Span("nothing"), Span("1 s"), Span("the same for the other slot")),
            (Span("Swap"), Span("nothing"), Span("1 s"), Span("swap again")),
            (Span("Restore"), Span("active"), Span("~40 s"), Span(gone)),
        ),
    )
    boots = _boots(inst, chosen, other)
    label = next((c.label for c in choices if c.id == chosen), "")
    after: list[Block] = [Gap(), costs]
    if boots:
        after += [
            Gap(),
            Lines((line((f"After “{label}”", Tone.QUIET)),)),
            Facts(tuple((f"  {n}", line(what)) for n, what in boots)),
        ]
    return Page(
        name="rollback",
        head=("cOS recovery", machine.hostname, words.disk_short(inst.disk)),
        right=f"Roll back   {now}",
        mark=Tone.ACCENT,
        verdict=f"{len(choices)} ways back. They differ in what happens later.",
        blocks=(
            Lines(
                (
                    (
                        Span("Next boot as it is now:  ", Tone.QUIET),
                        Span(
                            words.slot_words(
                                inst.boot.next, inst.slot(inst.boot.next) if inst.boot.next else None
                            )
                        ),
                    ),
                )
            ),
        ),
        prompt="Choose one to see its plan",
        choices=tuple(choices),
        after=tuple(after),
        keys=(words.MOVE, words.ENTER, words.BACK, words.HELP),
        help=HELP,
    )


def _boots(inst: Installation, chosen: str, other: SlotName) -> list[tuple[str, str]]:
    usual = inst.boot.after or inst.boot.next
    there = words.slot_words(other, inst.slot(other))
    back = words.slot_words(usual, inst.slot(usual) if usual else None)
    active = words.version(inst.slot(SlotName.ACTIVE)) or "the old one"
    passive = words.version(inst.slot(SlotName.PASSIVE)) or "passive"
    recovery = words.version(inst.slot(SlotName.RECOVERY))
    return {
        "once": [("1st boot", there), ("2nd boot", back)],
        "default": [("every boot", there)],
        "swap": [("every boot", f"active {passive}"), ("if it fails", f"passive {active}")],
        "restore": [("every boot", f"active {passive} (the copy)"), ("if it fails", f"passive {passive}")],
        "recovery-once": [("1st boot", f"recovery {recovery}".strip()), ("2nd boot", back)],
        "restore-recovery": [
            ("every boot", f"active {recovery} (the copy)"),
            ("if it fails", f"passive {passive}"),
        ],
    }.get(chosen, [])

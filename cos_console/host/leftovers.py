"""What an interrupted operation left behind, and the way out of each. Pure, from names and looks.

The windows are those of the original cos-upgrade (rename active to passive, label it, rename the new image, label
it) and of this tool's own switch.
"""

from cos_console.host.trees import Node
from cos_console.model.machine import Leftover, Slot, SlotName, SlotState

RECORD = "cOS/.cos-console.json"
_LABELS = {"COS_ACTIVE", "COS_PASSIVE"}


def find_leftovers(
    state_files: dict[str, Node], recovery_files: dict[str, Node], slots: tuple[Slot, ...]
) -> tuple[Leftover, ...]:
    """`state_files`, `recovery_files`: path to node of what lies in cOS/ of the two partitions."""
    found: list[Leftover] = []
    record = RECORD in state_files
    active = next((s for s in slots if s.name is SlotName.ACTIVE), None)
    cut = active is not None and active.state is SlotState.MISSING
    """The switch itself was cut: the new image waits for active's name."""
    repair = "finish" if record or cut else "undo"
    if record:
        found.append(
            Leftover(
                kind="operation-record",
                path=RECORD,
                meaning="An operation of this tool began and has not ended.",
                way_out="Finish it, or undo it.",
                repair="finish",
            )
        )
    for path, node in state_files.items():
        name = path.rpartition("/")[2]
        if name in {"transition.img", "transition.squashfs"}:
            found.append(_waiting(path, node) if cut else _transition(path, node, "upgrade", repair))
        elif name == "retired.img":
            found.append(
                Leftover(
                    kind="retired-image",
                    path=path,
                    meaning="The switch of an operation was under way; this is the former active image.",
                    way_out="Finish the operation." if record else "It can be removed.",
                    repair=repair,
                    size_bytes=node.size_bytes,
                )
            )
    for path, node in recovery_files.items():
        if path.rpartition("/")[2] in {"transition.img", "transition.squashfs"}:
            found.append(_transition(path, node, "recovery upgrade", repair))
    return (*found, *_slot_leftovers({s.name: s for s in slots}, record))


def _waiting(path: str, node: Node) -> Leftover:
    return Leftover(
        kind="transition-image",
        path=path,
        meaning="The new image of an upgrade that was cut off before it was named active.",
        way_out="Finish it, if the image is whole, or undo it.",
        repair="finish",
        size_bytes=node.size_bytes,
    )


def _transition(path: str, node: Node, what: str, repair: str) -> Leftover:
    return Leftover(
        kind="transition-image",
        path=path,
        meaning=f"An {what} stopped before its switch."
        if what[0] == "u"
        else f"A {what} stopped before its switch.",
        way_out="The slots are as before; it can be removed."
        if repair == "undo"
        else "Finish or undo the operation.",
        repair=repair,
        size_bytes=node.size_bytes,
    )


def _slot_leftovers(slots: dict[SlotName, Slot], record: bool) -> tuple[Leftover, ...]:
    active, passive = slots.get(SlotName.ACTIVE), slots.get(SlotName.PASSIVE)
    if active is None or passive is None:
        return ()
    found: list[Leftover] = []
    mend = "finish" if record else ""
    if active.state is SlotState.MISSING and passive.state is not SlotState.MISSING:
        moved = passive.label == "COS_ACTIVE" and bool(passive.expected_label)
        found.append(
            Leftover(
                kind="missing-active",
                path=active.file,
                meaning="An upgrade moved active to passive and was cut off before the new active came."
                + (" Passive still has active's label, so it does not boot either." if moved else ""),
                way_out="Undo it: passive becomes active again." if moved else "Restore active from passive.",
                repair=mend or ("undo" if moved else "restore"),
            )
        )
    if passive.state is SlotState.MISSING and active.state is not SlotState.MISSING:
        found.append(
            Leftover(
                kind="missing-passive",
                path=passive.file,
                meaning="There is no passive image, so nothing to fall back to.",
                way_out="The next upgrade makes a new passive.",
                repair=mend,
            )
        )
    recovery = slots.get(SlotName.RECOVERY)
    wrong = [
        s
        for s in (active, passive, *((recovery,) if recovery and recovery.fs_type != "squashfs" else ()))
        if s.state is not SlotState.MISSING and s.expected_label and s.label != s.expected_label
    ]
    if wrong[:2] == [active, passive] and {s.label for s in wrong[:2]} == _LABELS:
        found.append(
            Leftover(
                kind="swapped-labels",
                path=active.file,
                meaning="Active and passive carry each other's label, so neither finds its root.",
                way_out="Give each the label that its name demands.",
                repair=mend or "relabel",
            )
        )
        wrong = wrong[2:]
    for slot in wrong:
        twice = slot is passive and slot.label == "COS_ACTIVE" == active.label
        if slot is passive and slot.label == "COS_ACTIVE" and active.state is SlotState.MISSING:
            continue  # told with the missing active
        if twice:
            meaning = "Active and passive both have the label COS_ACTIVE, so passive does not find its root."
        elif slot.label == "" and slot.fs_type:
            meaning = (
                f"The new image was given its name but not its label, so {slot.name} does not find its root."
            )
        elif slot.label in _LABELS:
            meaning = f"The image of {slot.name} still has the label {slot.label} of its former place."
        else:
            continue
        found.append(
            Leftover(
                kind="two-active-labels" if twice else "wrong-label",
                path=slot.file,
                meaning=meaning,
                way_out=f"Give it the label {slot.expected_label}.",
                repair=mend or "relabel",
            )
        )
    return tuple(found)

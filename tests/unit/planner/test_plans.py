"""Plan arithmetic: what holds for every machine and every request, and the cases that were thought of."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cos_console.model.image import ResolvedImage
from cos_console.model.machine import Installation, SlotName, SlotState
from cos_console.model.plan import Action, Plan, Request, StepKind
from cos_console.model.problem import ExitCode, Problem
from cos_console.planner import PlanSettings, make_plan, plan_text, space
from tests.unit.planner.machines import (
    MIB,
    image,
    images,
    installation,
    installations,
    leftover,
    machine,
    requests,
    slot,
)

A, P, R = SlotName.ACTIVE, SlotName.PASSIVE, SlotName.RECOVERY
WRITES_IMAGE = {Action.UPGRADE, Action.RESTORE, Action.RESTORE_FROM_RECOVERY}


def planned(inst: Installation, request: Request, new: ResolvedImage | None = None) -> Plan | Problem:
    try:
        return make_plan(machine(inst), request, new)
    except Problem as refused:
        return refused


def plan_of(inst: Installation, action: Action, new: ResolvedImage | None = None, **more: object) -> Plan:
    request = msgspec.convert({"action": action, "installation": "x", **more}, Request)
    return make_plan(machine(inst), request, new)


@settings(max_examples=600, deadline=None)
@given(installations(), requests(), images)
def test_every_plan_fits_says_its_undo_and_survives_text_and_json(
    inst: Installation, request: Request, new: ResolvedImage
) -> None:
    made = planned(inst, request, new if request.action is Action.UPGRADE else None)
    if isinstance(made, Problem):
        r = made.report
        assert r.code.startswith("COS-")
        assert r.what.endswith(".")
        assert r.now
        assert r.exit_code in {ExitCode.REFUSED, ExitCode.ATTENTION, ExitCode.NOT_FOUND, ExitCode.USAGE}
        return
    assert made.undo
    assert made.passive_fate
    assert all(phase.fits for phase in made.space)
    again = msgspec.json.decode(msgspec.json.encode(made), type=Plan)
    assert again == made
    text = plan_text(made)
    assert made.title in text
    assert made.undo in text
    assert text.startswith(made.title + ".\nNothing has been changed yet.\n")
    assert made.steps[0].kind is StepKind.CHECK
    assert made.steps[-1].kind is StepKind.CLEAN
    # once something can't be cancelled, nothing after it can
    free = [s.cancellable for s in made.steps]
    assert free == sorted(free, reverse=True)
    writes = any(s.kind is StepKind.RESERVE for s in made.steps)
    assert writes is (made.image_size_bytes > 0)
    assert writes or not made.space
    assert writes is any(s.kind is StepKind.PROVE for s in made.steps)
    assert inst.layout.handled
    shown = [line for line in text.splitlines() if line.startswith("Space ")]
    assert ["needs ~" in line for line in shown] == [phase.estimated for phase in made.space]


@settings(max_examples=400, deadline=None)
@given(installations(), requests(), images)
def test_an_upgrade_keeps_what_runs_or_what_is_sound_and_says_what_boots(
    inst: Installation, request: Request, new: ResolvedImage
) -> None:
    request = msgspec.structs.replace(request, action=Action.UPGRADE)
    made = planned(inst, request, new)
    if isinstance(made, Problem):
        return
    sound = {s.name for s in inst.slots if s.state is SlotState.SOUND}
    if request.keep is not None:
        assert made.keep is request.keep
    elif inst.running in (A, P):
        assert made.keep is inst.running
    elif made.keep is None:
        assert not sound & {A, P}
    else:
        assert made.keep in sound
    assert made.boots_after.next is A
    assert made.boots_after.after is (P if request.try_once else A)
    after = {c.slot: c.after for c in made.changes}
    assert after[A] == new.version
    kept = inst.slot(made.keep) if made.keep else inst.slot(P)
    if kept is not None and kept.state is SlotState.SOUND and kept.version:
        assert after[P] == kept.version
    if request.remove_passive_first:
        passive = inst.slot(P)
        assert passive is not None
        assert not passive.running
        assert made.keep is A
        assert A in sound
        assert any(w.code == "COS-NO-FALLBACK-MEANWHILE" for w in made.warnings)


@given(
    st.none() | st.integers(1, 9000 * MIB),
    st.none() | st.integers(0, 9000 * MIB),
    st.integers(0, 9000 * MIB),
    st.integers(16, 9000).map(lambda n: n * MIB),
    st.integers(0, 20000 * MIB),
)
def test_the_size_rule(
    asked: int | None, unpacked: int | None, transfer: int, configured: int, room: int
) -> None:
    size, estimated = space.image_size(
        asked=asked, unpacked=unpacked, transfer=transfer, configured=configured, room=room
    )
    assert size % MIB == 0
    assert size >= space.SMALLEST
    assert estimated is (asked is None)
    if asked is not None:
        assert size <= max(asked, space.SMALLEST)
    elif unpacked is not None:
        assert size >= unpacked * 5 // 4 + 64 * MIB
        assert size < max(space.SMALLEST, unpacked * 5 // 4 + 64 * MIB) + MIB
    else:
        least = max(space.SMALLEST, min(transfer * 3, configured))
        assert size >= least
        assert size <= max(configured, least + MIB)
        if (
            size >= least + MIB and size < configured
        ):  # what fits: 32 MiB stay free, and not a MiB more than needed
            assert 0 <= room - size - space.RESERVE < MIB


@settings(max_examples=300, deadline=None)
@given(installations(), images)
def test_room_counts_what_will_be_removed_and_nothing_else(inst: Installation, new: ResolvedImage) -> None:
    left = sum(x.size_bytes for x in inst.leftovers if x.kind == "transition-image")
    passive = inst.slot(P)
    assert space.room(inst) == inst.state_free_bytes + left
    assert space.room(inst, without_passive=True) - space.room(inst) == (
        passive.allocated_bytes if passive else 0
    )
    made = planned(inst, Request(action=Action.UPGRADE, installation="x"), new)
    if isinstance(made, Plan):
        (phase,) = made.space
        assert phase.available_bytes == space.room(inst)
        assert phase.needed_bytes == made.image_size_bytes


def both(**more: object) -> Installation:
    return installation((slot(A), slot(P, version="0.9"), slot(R, version="0.9")), **more)  # type: ignore[arg-type]


def test_an_unknown_size_takes_the_configured_one_or_what_fits_and_is_marked() -> None:
    made = plan_of(both(free=4000 * MIB), Action.UPGRADE, image())
    assert (made.image_size_bytes, made.space[0].estimated) == (3240 * MIB, True)
    assert "needs ~3.4 GB" in plan_text(made)
    made = plan_of(both(free=1000 * MIB), Action.UPGRADE, image())
    assert made.image_size_bytes == 968 * MIB
    made = make_plan(
        machine(both(free=4000 * MIB)),
        Request(action=Action.UPGRADE, installation="x"),
        image(),
        PlanSettings(image_size_bytes=500 * MIB),
    )
    assert made.image_size_bytes == 500 * MIB


def test_too_little_room_is_refused_with_the_last_way_out_only_where_it_helps() -> None:
    with pytest.raises(Problem) as caught:
        plan_of(both(free=20 * MIB), Action.UPGRADE, image(), image_size_bytes=30 * MIB)
    assert caught.value.report.code == "COS-SPACE-STATE"
    assert "--remove-passive-first" in caught.value.report.now
    made = plan_of(
        both(free=20 * MIB), Action.UPGRADE, image(), image_size_bytes=30 * MIB, remove_passive_first=True
    )
    assert made.space[0].available_bytes == 38 * MIB
    assert "passive 0.9 is removed first" in made.passive_fate
    with pytest.raises(Problem) as caught:
        plan_of(both(free=20 * MIB), Action.UPGRADE, image(), image_size_bytes=90 * MIB)
    assert "--remove-passive-first" not in caught.value.report.now


@pytest.mark.parametrize(
    "slots",
    [
        (slot(A, SlotState.DAMAGED), slot(P)),
        (slot(A), slot(P, running=True)),
        (slot(A),),
        (slot(A), slot(P, SlotState.MISSING)),
    ],
)
def test_passive_is_never_given_up_when_it_is_what_boots(slots: tuple) -> None:
    with pytest.raises(Problem) as caught:
        plan_of(installation(slots), Action.UPGRADE, image(), remove_passive_first=True)
    assert caught.value.report.code in {"COS-KEEP-PASSIVE", "COS-NOTHING"}


def test_a_swap_is_instant_with_a_sound_recovery_and_else_goes_through_a_copy() -> None:
    assert plan_of(both(), Action.SWAP).image_size_bytes == 0
    broken = installation((slot(A), slot(P), slot(R, SlotState.DAMAGED)))
    assert plan_of(broken, Action.SWAP).image_size_bytes == 24 * MIB
    assert plan_of(both(), Action.SWAP, swap_by_copy=True).space[0].needed_bytes == 18 * MIB
    by_name = installation((slot(A, labels=False), slot(P, labels=False)))
    assert plan_of(by_name, Action.SWAP).image_size_bytes == 0
    with pytest.raises(Problem, match="runs from passive"):
        plan_of(installation((slot(A), slot(P, running=True))), Action.SWAP)
    with pytest.raises(Problem) as caught:
        plan_of(installation((slot(A), slot(P)), free=17 * MIB), Action.SWAP)
    assert caught.value.report.code == "COS-SPACE-STATE"


@pytest.mark.parametrize("action", [a for a in Action if a not in {Action.FINISH, Action.UNDO}])
def test_an_interrupted_operation_comes_first(action: Action) -> None:
    with pytest.raises(Problem) as caught:
        plan_of(both(leftovers=(leftover("operation-record", "finish"),)), action, image())
    assert (caught.value.report.code, caught.value.report.exit_code) == (
        "COS-INTERRUPTED",
        ExitCode.ATTENTION,
    )


@pytest.mark.parametrize(
    ("saved", "action", "target", "expected"),
    [
        ("", Action.BOOT_ONCE, None, (P, A)),
        ("fallback", Action.BOOT_ONCE, A, (A, P)),
        ("recovery", Action.BOOT_ONCE, P, (P, R)),
        ("", Action.DEFAULT, None, (P, P)),
        ("fallback", Action.DEFAULT, A, (A, A)),
        ("", Action.BOOT_ONCE, R, (R, A)),
        ("fallback", Action.CONFIRM, None, (A, A)),
    ],
)
def test_what_boots_after_a_boot_choice(
    saved: str, action: Action, target: SlotName | None, expected: tuple[SlotName, SlotName]
) -> None:
    made = plan_of(both(saved=saved), action, target_slot=target)
    assert (made.boots_after.next, made.boots_after.after) == expected
    assert made.boots_after.next not in made.boots_after.if_fails

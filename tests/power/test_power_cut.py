"""At every instant of every switch GRUB's chosen entry boots a whole system; and a judge that would notice."""

import os
from pathlib import Path

import pytest

from cos_console.slots import guard, recover, switch
from cos_console.slots.port import Volume
from cos_console.slots.switch import (
    ACTIVE,
    PASSIVE,
    RETIRED,
    TRANSITION,
    Guard,
    Label,
    Link,
    Rename,
    Situation,
)
from tests.power import blocklog
from tests.power.cuts import ENV, SUPERBLOCK, Bench, Case, Operation, moves, restore_active
from tests.power.disks import Slots
from tests.power.recorder import Recorder

pytestmark = [pytest.mark.disk, pytest.mark.slow]

TWO = Slots((("active.img", "v1", "COS_ACTIVE"), ("passive.img", "v0", "COS_PASSIVE")))
BROKEN = Slots(
    (
        ("active.img", "v1", "nothing-boots-me"),
        ("passive.img", "v0", "COS_PASSIVE"),
        ("transition.img", "v2", "COS_ACTIVE"),
    )
)
UPGRADE = moves(*switch.upgrade(Situation(), keep_active=True))
KEEP_PASSIVE = moves(*switch.upgrade(Situation(), keep_active=False))
SWAP = moves(*switch.swap(Situation()))


def reference(port: Recorder) -> None:
    """The measured sequence, written by hand: what the harness itself is held against."""
    env = lambda saved: guard.write(port, (ENV,), {"saved_entry": saved, "next_entry": ""})  # noqa: E731
    directory = ACTIVE.directory
    port.link(ACTIVE, RETIRED)
    port.fsync_dir(directory)
    env("fallback")
    port.rename(TRANSITION, ACTIVE)
    port.fsync_dir(directory)
    port.checkpoint(Volume.STATE)
    env("cos")
    port.write_at(RETIRED, 1144, b"COS_PASSIVE".ljust(16, b"\0"))
    port.fsync_file(RETIRED)
    port.rename(RETIRED, PASSIVE)
    port.fsync_dir(directory)
    port.checkpoint(Volume.STATE)


def original(port: Recorder) -> None:
    """cos-upgrade's order: names first, labels after them, one sync at the end."""
    port.rename(ACTIVE, PASSIVE)
    port.write_at(PASSIVE, 1144, b"COS_PASSIVE".ljust(16, b"\0"))
    port.fsync_file(PASSIVE)
    port.rename(TRANSITION, ACTIVE)
    port.write_at(ACTIVE, 1144, b"COS_ACTIVE".ljust(16, b"\0"))
    port.fsync_file(ACTIVE)
    port.fsync_dir(ACTIVE.directory)


STARTS = [
    ("unset", None, None),
    ("saved cos", "cos", None),
    ("saved fallback", "fallback", None),
    ("saved recovery", "recovery", None),
    ("next cos", None, "cos"),
    ("next fallback", "cos", "fallback"),
    ("next recovery", "fallback", "recovery"),
]
PRODUCT = [
    *(
        Case(f"upgrade, {name}, {block}", UPGRADE, saved=saved, once=once, block=block)
        for name, saved, once in STARTS
        for block in ((4096, 1024) if name == "unset" else (4096,))
    ),
    Case("passive kept", KEEP_PASSIVE, kind="upgrade-keep-passive"),
    Case(
        "passive kept, active broken",
        KEEP_PASSIVE,
        slots=BROKEN,
        kind="upgrade-keep-passive",
        saved="fallback",
    ),
    Case("swap", SWAP, slots=TWO, kind="swap"),
    Case("swap back", moves(*switch.swap(Situation())), slots=TWO, kind="swap", saved="fallback"),
    Case("restore", restore_active, slots=TWO, kind="upgrade-keep-passive"),
]
STEPPED = [PRODUCT[0], PRODUCT[3], next(c for c in PRODUCT if c.name == "passive kept")] + PRODUCT[-3:]


def test_the_harness_finds_the_original_order_unbootable_and_the_reference_sound(work: Path) -> None:
    bad = Bench(Case("original", original), work / "original").blocks(40)
    good = Bench(Case("reference", reference), work / "reference").blocks(40)
    print(f"\noriginal: {bad}\nreference: {good}")
    assert bad.unbootable > 0
    assert good.unbootable == 0, good
    assert {"cos v1", "cos v2"} <= set(good.seen)


@pytest.mark.parametrize("case", PRODUCT, ids=lambda c: c.name)
def test_whatever_a_drive_kept_of_the_writes_something_whole_boots(
    case: Case, work: Path, random_points: int
) -> None:
    tally = Bench(case, work).blocks(random_points)
    print(f"\nblocks, {case.name}: {tally}")
    assert tally.tried > random_points
    assert tally.unbootable == 0, tally


@pytest.mark.parametrize("case", STEPPED, ids=lambda c: c.name)
def test_cut_before_and_after_every_call_it_boots_and_the_next_start_repairs(case: Case, work: Path) -> None:
    # a restore is recorded with its copy's inode once proven; its cuts before that have nothing to finish
    repair = case.operation is not restore_active
    tally = Bench(case, work).steps(repair=repair)
    print(f"\nsteps, {case.name}: {tally.calls} calls, {tally}")
    assert tally.tried == 5 * (tally.calls + 1)
    assert tally.unbootable == 0, tally
    assert tally.unrepaired == 0, tally
    assert tally.repaired > 0 or not repair


def next_kept(port: Recorder) -> None:
    """The guard as it must not be: saved_entry is set, a pending next_entry stays."""
    for move in switch.upgrade(Situation(), keep_active=True):
        if isinstance(move, Guard):
            guard.write(port, (ENV,), {"saved_entry": move.saved})
        else:
            switch.run(port, (move,), (ENV,))


NO_GUARD = moves(*(m for m in switch.upgrade(Situation(), keep_active=True) if not isinstance(m, Guard)))
LABEL_LATE = moves(
    Link(ACTIVE, RETIRED),
    Guard("fallback"),
    Rename(TRANSITION, ACTIVE),
    Guard("cos"),
    Rename(RETIRED, PASSIVE),
    Guard("fallback"),
    Label(PASSIVE, "COS_PASSIVE"),
    Guard("cos"),
)


def unwritten(port: Recorder) -> None:
    """An image that was reserved and filled sparsely, its rest never dug out or written."""
    port.create(TRANSITION)
    size = port.stat(PASSIVE).size_bytes
    port.reserve(TRANSITION, size)
    data = port.read(PASSIVE, 0, size)

    def write(fd: int) -> None:
        for at in range(0, size, 4096):
            if at == 0 or any(data[at : at + 4096]):
                os.pwrite(fd, data[at : at + 4096], at)

    port.fill(TRANSITION, write)
    port.fsync_file(TRANSITION)
    switch.label.set_label(port, TRANSITION, "COS_ACTIVE")
    switch.run(port, switch.upgrade(Situation(), keep_active=False), (ENV,))


FAULTS = [
    Case("no guard", NO_GUARD),
    Case("next_entry left pending", next_kept, once="cos"),
    Case("label after rename", LABEL_LATE),
    Case("no checkpoint", UPGRADE, without=frozenset({"checkpoint"})),
    Case("unwritten extents", unwritten, slots=TWO),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda c: c.name)
def test_a_seeded_fault_turns_the_judge_red(fault: Case, work: Path) -> None:
    tally = Bench(fault, work).blocks(60)
    print(f"\nfault, {fault.name}: {tally}")
    assert tally.unbootable > 0


def test_a_copy_by_the_product_leaves_nothing_unwritten_for_grub_to_misread(work: Path) -> None:
    bench = Bench(Case("restore", restore_active, slots=TWO, kind="upgrade-keep-passive"), work)
    _, _, after = bench.run(None)
    verdict = bench.judge.judge(blocklog.replay(after))
    assert (verdict.boots, verdict.entry, verdict.version) == (True, "cos", "v0"), verdict


def test_a_mount_alone_can_tear_the_superblock_and_no_order_of_ours_bears_on_it(work: Path) -> None:
    bench = Bench(Case("a file is made, no slot touched", touch, slots=TWO), work)
    _, _, after = bench.run(None)
    whole = blocklog.replay(after)
    assert bench.judge.judge(whole).boots
    torn = {**whole, SUPERBLOCK: bench.judge.base[SUPERBLOCK * 512 : SUPERBLOCK * 512 + 512]}
    verdict = bench.judge.judge(torn)
    assert not verdict.boots
    assert "state does not mount" in verdict.why


def touch(port: Recorder) -> None:
    port.create(RETIRED)
    port.fsync_dir(RETIRED.directory)
    port.checkpoint(Volume.STATE)


def interrupted(kind: str, row: tuple[switch.Move, ...], count: int, way: str) -> Operation:
    """The first `count` moves, then what the next start does; both are cut."""

    def inode(port: Recorder, name: str) -> int | None:
        found = port.stat(ACTIVE.beside(name))
        return found.inode if found else None

    def run(port: Recorder) -> None:
        names = ("active.img", "passive.img", "retired.img", "transition.img")
        a, p, _, n = (inode(port, name) for name in names)
        recorded = recover.Recorded(kind, a, p, n, Guard("cos"))
        switch.run(port, row[:count], (ENV,))
        seen = recover.Observed(*(inode(port, name) for name in names))
        decide = recover.finish if way == "finish" else recover.undo
        switch.run(port, decide(seen, recorded, Situation()) or (), (ENV,))

    return run


UP_ROW, SWAP_ROW = switch.upgrade(Situation(), keep_active=True), switch.swap(Situation())
REPAIRS = [
    *(
        Case(f"{way} of an upgrade after {n} moves", interrupted("upgrade-keep-active", UP_ROW, n, way))
        for n in range(1, len(UP_ROW))
        for way in ("finish", "undo")
    ),
    *(
        Case(
            f"{way} of a swap after {n} moves", interrupted("swap", SWAP_ROW, n, way), slots=TWO, kind="swap"
        )
        for n in range(1, len(SWAP_ROW))
        for way in ("finish", "undo")
    ),
]


@pytest.mark.parametrize("case", REPAIRS, ids=lambda c: c.name)
def test_a_repair_that_is_cut_too_leaves_something_whole_that_boots(case: Case, work: Path) -> None:
    tally = Bench(case, work).blocks(10)
    print(f"\nrepair, {case.name}: {tally}")
    assert tally.unbootable == 0, tally

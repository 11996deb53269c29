"""Swap and restore, killed at every call that changes the disk; then the next start finishes or undoes."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from cos_console.model.machine import Installation, SlotName, SlotState
from cos_console.model.problem import Problem
from tests.disk import stopped
from tests.sandbox.disk import Recipe, SandboxDisk, make_disk
from tests.sandbox.disk import run as tool
from tests.sandbox.tree import Derivative

pytestmark = pytest.mark.disk
A, P = SlotName.ACTIVE, SlotName.PASSIVE


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SandboxDisk:
    """Active 1.0, passive 0.9, recovery 0.8, with little payload: it is copied hundreds of times."""
    one, two, three = (Derivative(v, payload_mib=0) for v in ("1.0", "0.9", "0.8"))
    recipe = Recipe(active=one, passive=two, recovery=three, image_mib=16, state_mib=64, recovery_mib=32)
    return make_disk(tmp_path_factory.mktemp("small") / "disk.img", recipe)


def shape(inst: Installation) -> str:
    """Versions of active and passive, with whatever is not as it must be."""
    words = []
    for name in (A, P):
        found = inst.slot(name)
        assert found is not None
        words.append(
            found.version if found.state is SlotState.SOUND else f"{found.version} {found.state.value}"
        )
    return " ".join([*words, *(x.kind for x in inst.leftovers)])


def fresh(pristine: SandboxDisk, path: Path) -> Path:
    subprocess.run(["cp", "--sparse=always", pristine.path, path], check=True)
    return path


def whole(pristine: SandboxDisk, disk: Path, work: Path) -> None:
    """The file systems are clean, and the names in cOS/ are those of a healthy disk."""
    copy = SandboxDisk(disk, pristine.sector_bytes, pristine.partitions)
    part = copy.read_partition("COS_STATE", work / "whole.part")
    tool(["e2fsck", "-fn", part])
    names = tool(["grub-fstest", part, "ls", "--", "(loop0)/cOS/"]).decode().split()
    assert sorted(n for n in names if n[0] != ".") == ["active.img", "passive.img"]
    assert ".cos-console.json" not in names


def repair(disk: Path, way: str, calls: Path) -> str:
    """What the next start does; empty, or why it refused."""
    _, inst = stopped.look(disk)
    try:
        assert stopped.run(stopped.plan(disk, way), inst, cut=None, calls=calls)
    except Problem as refused:
        return refused.report.code
    except RuntimeError as refused:
        return str(refused)
    return ""


OPERATIONS = [
    pytest.param("swap", {}, "1.0 0.9", "0.9 1.0", True, id="swap"),
    pytest.param("swap", {"swap_by_copy": True}, "1.0 0.9", "0.9 1.0", True, id="swap-by-copy"),
    pytest.param("restore", {}, "1.0 0.9", "0.9 0.9", False, id="restore"),
    pytest.param("restore-from-recovery", {}, "1.0 0.9", "0.8 0.9", False, id="restore-from-recovery"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("action", "more", "before", "after", "kept"), OPERATIONS)
def test_stopped_at_every_call_the_next_start_finishes_or_undoes(
    small: SandboxDisk,
    tmp_path: Path,
    action: str,
    more: dict[str, object],
    before: str,
    after: str,
    kept: bool,
) -> None:
    work, calls = tmp_path / "work.img", tmp_path / "calls"
    fresh(small, work)
    _, inst = stopped.look(work)
    assert shape(inst) == before
    assert stopped.run(stopped.plan(work, action, **more), inst, cut=None, calls=calls)
    assert shape(stopped.look(work)[1]) == after
    whole(small, work, tmp_path)
    total = len(calls.read_text().splitlines())
    assert total > 15
    ends: Counter[str] = Counter()
    for cut in range(total):
        fresh(small, work)
        _, inst = stopped.look(work)
        assert not stopped.run(stopped.plan(work, action, **more), inst, cut=cut, calls=calls)
        last = (calls.read_text().splitlines() or ["nothing"])[-1]
        where = f"{action}: {cut} of {total} calls, after {last}"
        _, left = stopped.look(work)
        boots = left.boot.next
        assert boots is not None, where
        chosen = left.slot(boots)
        assert chosen is not None, where
        assert chosen.state is SlotState.SOUND, f"{where}: {boots} boots and is {chosen.state}"
        for way in ("finish", "undo"):
            repaired = tmp_path / "repaired.img"
            subprocess.run(["cp", "--sparse=always", work, repaired], check=True)
            _, inst = stopped.look(repaired)
            refused = repair(repaired, way, calls)
            if refused:
                ends[f"{way} refused"] += 1
                # nothing is left over; or it was never proven, and the operator is told to undo it
                if refused == "COS-NOTHING":
                    assert shape(inst) in {before, after}, where
                else:
                    assert way == "finish", f"{where}: {refused}"
                    assert "was never proven" in refused or "is no record" in refused, f"{where}: {refused}"
                continue
            found = shape(stopped.look(repaired)[1])
            ends[f"{way} {found}"] += 1
            # an undo after the last move leaves the operation done: a swap is its own inverse, a restore has none
            assert found == (after if way == "finish" else before) or (way == "undo" and found == after), (
                f"{where}, {way}: {found}"
            )
            whole(small, repaired, tmp_path)
            _, inst = stopped.look(repaired)
            assert inst.boot.next is A, f"{where}, {way}: {inst.boot.next}"
    print(f"\n{action} {more}: {total} stops, {dict(ends)}")
    assert ends[f"finish {after}"] > 5
    assert ends[f"undo {before}"] > (5 if kept else 3)


@pytest.mark.parametrize("way", ["finish", "undo"])
def test_a_repair_that_is_stopped_itself_is_repaired_by_the_next(
    small: SandboxDisk, tmp_path: Path, way: str
) -> None:
    work, calls, half = tmp_path / "work.img", tmp_path / "calls", tmp_path / "half.img"
    fresh(small, half)
    _, inst = stopped.look(half)
    made = stopped.plan(half, "swap")
    fresh(small, work)
    assert stopped.run(stopped.plan(work, "swap"), stopped.look(work)[1], cut=None, calls=calls)
    row = calls.read_text().splitlines()
    named = next(
        n for n, c in enumerate(row) if c.startswith("unlink") or ("transition.img" in c and "rename" in c)
    )
    assert not stopped.run(made, inst, cut=named + 3, calls=calls)
    fresh_half = SandboxDisk(half, small.sector_bytes, small.partitions)
    fresh(fresh_half, work)
    _, inst = stopped.look(work)
    assert stopped.run(stopped.plan(work, way), inst, cut=None, calls=calls)
    total = len(calls.read_text().splitlines())
    for cut in range(total):
        fresh(fresh_half, work)
        _, inst = stopped.look(work)
        assert not stopped.run(stopped.plan(work, way), inst, cut=cut, calls=calls)
        assert repair(work, way, calls) in {"", "COS-NOTHING"}
        assert shape(stopped.look(work)[1]) == ("0.9 1.0" if way == "finish" else "1.0 0.9"), cut
        whole(small, work, tmp_path)

"""Every prefix of every sequence leaves a slot that boots, and can be finished and undone.

The model knows names, inodes, labels and the environment. It looks as GRUB does between a rename and its
checkpoint too: each rename is judged with the old names, the new ones, and those of GRUB against Linux.
"""

import itertools
from dataclasses import dataclass, field

import pytest

from cos_console.slots.recover import Observed, Recorded, Unrecognised, finish, undo
from cos_console.slots.switch import (
    ACTIVE,
    PASSIVE,
    RETIRED,
    TRANSITION,
    Guard,
    Label,
    Link,
    Move,
    Rename,
    Situation,
    Unlink,
    swap,
    upgrade,
)

NAMES = {"cos": (ACTIVE.path, "COS_ACTIVE"), "fallback": (PASSIVE.path, "COS_PASSIVE")}
A, P, N = 11, 12, 13


@dataclass
class Disk:
    names: dict[str, int]
    labels: dict[int, str]
    saved: str = ""
    once: str = ""
    broken: set[int] = field(default_factory=set)
    by_label: bool = True
    unbootable: list[str] = field(default_factory=list)

    def judge(self, where: str, grub_names: dict[str, int] | None = None) -> None:
        entry = self.once or self.saved or "cos"
        if entry == "recovery":
            return
        path, label = NAMES[entry]
        kernel = (grub_names or self.names).get(path)
        root = self.names.get(path)
        right = kernel == root and root is not None and root not in self.broken
        if not right or (self.by_label and self.labels[root] != label):
            self.unbootable.append(f"{where}: {entry} kernel={kernel} root={root} {self.labels}")

    def apply(self, move: Move) -> None:
        before = dict(self.names)
        match move:
            case Link(place, new):
                assert new.path not in self.names
                self.names[new.path] = self.names[place.path]
            case Rename(place, new):
                inode = self.names.pop(place.path)
                self.names[new.path] = inode
                self.judge(f"{move} before the checkpoint", before)
            case Unlink(place):
                del self.names[place.path]
            case Label(place, label):
                self.labels[self.names[place.path]] = label
            case Guard(saved, once):
                self.saved, self.once = saved, once
        self.judge(str(move))

    def observed(self) -> Observed:
        return Observed(*(self.names.get(p.path) for p in (ACTIVE, PASSIVE, RETIRED, TRANSITION)))

    def state(self) -> tuple[object, ...]:
        return self.names, self.labels, self.saved, self.once


def disk(kind: str, before: Guard, by_label: bool = True) -> Disk:
    names = {ACTIVE.path: A, PASSIVE.path: P}
    if kind != "swap":
        names[TRANSITION.path] = N
    return Disk(
        names,
        {A: "COS_ACTIVE", P: "COS_PASSIVE", N: "COS_ACTIVE"},
        before.saved,
        before.next,
        by_label=by_label,
    )


def moves_of(kind: str, situation: Situation) -> tuple[Move, ...]:
    return swap(situation) if kind == "swap" else upgrade(situation, keep_active=kind.endswith("active"))


def recorded(kind: str, before: Guard) -> Recorded:
    return Recorded(kind, A, P, None if kind == "swap" else N, before)


KINDS = ("upgrade-keep-active", "upgrade-keep-passive", "swap")
ENTRIES = ("", "cos", "fallback", "recovery")
STARTS = [Guard(s, n) for s, n in itertools.product(ENTRIES, ENTRIES)]
every = pytest.mark.parametrize(
    ("kind", "before", "by_label"), list(itertools.product(KINDS, STARTS, (True, False)))
)


@every
def test_what_grub_chooses_boots_after_each_move(kind: str, before: Guard, by_label: bool) -> None:
    d = disk(kind, before, by_label)
    for move in moves_of(kind, Situation(labels=by_label)):
        d.apply(move)
    assert d.unbootable == []
    assert RETIRED.path not in d.names
    assert TRANSITION.path not in d.names


@every
def test_each_prefix_is_finished_to_the_same_end(kind: str, before: Guard, by_label: bool) -> None:
    situation = Situation(labels=by_label)
    moves = moves_of(kind, situation)
    whole = disk(kind, before, by_label)
    for move in moves:
        whole.apply(move)
    for cut in range(len(moves) + 1):
        d = disk(kind, before, by_label)
        for move in moves[:cut]:
            d.apply(move)
        rest = finish(d.observed(), recorded(kind, before), situation)
        assert rest is not None
        for move in rest:
            d.apply(move)
        assert d.unbootable == []
        assert d.state() == whole.state()


@every
def test_each_prefix_is_undone_to_the_start_or_is_already_done(
    kind: str, before: Guard, by_label: bool
) -> None:
    situation = Situation(labels=by_label)
    moves = moves_of(kind, situation)
    start = disk(kind, before, by_label)
    for cut in range(len(moves) + 1):
        d = disk(kind, before, by_label)
        for move in moves[:cut]:
            d.apply(move)
        way = undo(d.observed(), recorded(kind, before), situation)
        if way is None:
            assert d.names[ACTIVE.path] in (N, P)
            continue
        for move in way:
            d.apply(move)
        assert d.unbootable == []
        assert d.names[ACTIVE.path] == A
        assert d.names[PASSIVE.path] == P
        assert set(d.names) == {ACTIVE.path, PASSIVE.path}
        if by_label:
            assert d.labels[A] == start.labels[A]
            assert d.labels[P] == start.labels[P]
        assert (d.saved, d.once) == (before.saved, before.next)


@every
def test_an_undo_or_finish_that_is_cut_is_finished_again(kind: str, before: Guard, by_label: bool) -> None:
    situation = Situation(labels=by_label)
    moves, record = moves_of(kind, situation), recorded(kind, before)
    for cut in range(len(moves) + 1):
        for way_out in (finish, undo):
            reached = disk(kind, before, by_label)
            for move in moves[:cut]:
                reached.apply(move)
            way = way_out(reached.observed(), record, situation)
            for second in range(len(way or ())):
                d = disk(kind, before, by_label)
                for move in (*moves[:cut], *(way or ())[:second]):
                    d.apply(move)
                again = way_out(d.observed(), record, situation)
                for move in again or ():
                    d.apply(move)
                assert d.unbootable == []


def test_without_the_guard_the_model_turns_red() -> None:
    d = disk("upgrade-keep-active", Guard("cos"))
    for move in upgrade(Situation(), keep_active=True):
        if not isinstance(move, Guard):
            d.apply(move)
    assert d.unbootable


def test_a_pending_next_entry_left_alone_turns_red() -> None:
    d = disk("upgrade-keep-active", Guard("", "cos"))
    for move in upgrade(Situation(), keep_active=True):
        d.apply(Guard(move.saved, "cos") if isinstance(move, Guard) else move)
    assert d.unbootable


def test_a_disk_that_somebody_else_changed_is_not_touched() -> None:
    with pytest.raises(Unrecognised):
        finish(Observed(99, P, None, None), recorded("upgrade-keep-active", Guard("")), Situation())


def test_an_image_that_was_not_proven_is_never_finished() -> None:
    record = Recorded("upgrade-keep-active", A, P, None, Guard(""))
    assert finish(Observed(A, P, None, N), record, Situation()) is None


def test_an_instant_swap_without_recovery_is_refused() -> None:
    with pytest.raises(ValueError, match="recovery"):
        swap(Situation(recovery_sound=False))

"""Repairs without a record, for every combination of files, labels and content: no move fails, nothing whole is lost."""

from itertools import product

from cos_console.slots import unrecorded
from cos_console.slots.recover import Observed, Unrecognised
from cos_console.slots.switch import Label, Link, Rename, Situation, Unlink
from cos_console.slots.unrecorded import Files

NAMES = ("active", "passive", "retired", "transition")


def every_state() -> list[Files]:
    """Inodes 1 to 4 for the four names, links of one another included; labels; what is whole."""
    found: list[Files] = []
    for active, passive, retired, transition in product(
        (None, 1), (None, 1, 2), (None, 1, 2, 3), (None, 2, 4)
    ):
        for labels in product(("", "COS_ACTIVE", "COS_PASSIVE"), repeat=2):
            found += [
                Files(
                    Observed(active, passive, retired, transition),
                    None if active is None else labels[0],
                    None if passive is None else labels[1],
                    active is not None and usable[0],
                    passive is not None and usable[1],
                    retired is not None and usable[2],
                    transition is not None and usable[3],
                )
                for usable in product((True, False), repeat=4)
            ]
    return found


def after(files: Files, moves: tuple[object, ...]) -> tuple[dict[str, int], dict[int, str]]:
    """Names to inodes and inodes to labels when the moves are made; AssertionError for one that can't be."""
    names = {n: i for n in NAMES if (i := getattr(files.inodes, n)) is not None}
    labels: dict[int, str] = {}
    for name, label in (("active", files.active_label), ("passive", files.passive_label)):
        if name in names and label is not None:
            labels[names[name]] = label
    for move in moves:
        if isinstance(move, Rename):
            source, target = (p.name.removesuffix(".img") for p in (move.place, move.new))
            assert source in names, move
            names[target] = names.pop(source)
        elif isinstance(move, Unlink):
            assert move.place.name.removesuffix(".img") in names, move
            del names[move.place.name.removesuffix(".img")]
        elif isinstance(move, Label):
            assert move.place.name.removesuffix(".img") in names, move
            labels[names[move.place.name.removesuffix(".img")]] = move.label
        elif isinstance(move, Link):
            assert move.new.name.removesuffix(".img") not in names, move
            names[move.new.name.removesuffix(".img")] = names[move.place.name.removesuffix(".img")]
    return names, labels


def test_every_move_can_be_made_and_what_is_whole_stays() -> None:
    done = refused = 0
    for files in every_state():
        for decide in (unrecorded.finish, unrecorded.undo):
            try:
                moves = decide(files, Situation())
            except Unrecognised:
                refused += 1
                continue
            done += 1
            names, labels = after(files, moves)
            where = f"{decide.__name__} {files}: {moves}"
            assert set(names) <= {"active", "passive"}, where
            seen = files.inodes
            before = {
                getattr(seen, n)
                for n, ok in (("active", files.active_usable), ("passive", files.passive_usable))
                if ok
            }
            # an image that a slot held whole is given up only for another whole one in the same repair
            lost = before - set(names.values())
            assert not lost, where
            if len(set(names.values())) == 2:
                for name, label in (("active", "COS_ACTIVE"), ("passive", "COS_PASSIVE")):
                    assert labels.get(names[name], label) == label, where
    assert done > 2000
    assert refused > 500


def test_without_labels_in_use_none_is_written() -> None:
    for files in every_state():
        for decide in (unrecorded.finish, unrecorded.undo):
            try:
                moves = decide(files, Situation(labels=False))
            except Unrecognised:
                continue
            assert not any(isinstance(m, Label) for m in moves)

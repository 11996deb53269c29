"""From what is on the disk after an interruption to the moves that finish it or undo it.

A, P: old active and old passive; N: the new image; by inode, from the operation's record.

upgrade that keeps active          active  passive  retired  transition   finish            undo
  before the switch, not proven    A       P        -        N or part    (impossible)      drop transition
  before the switch, proven        A       P        -        N            whole switch      drop transition
  linked                           A       P        A        N            from the guard    drop both
  new one named                    N       P        A        -            retire, final     rename retired back
  retired                          N       A        -        -            final value       (a swap)
upgrade that keeps passive
  before the rename                A       P        -        N            whole switch      drop transition
  after it                         N       P        -        -            final value       (A is gone)
swap
  linked, once or twice            A       P        A|-      P|-          from the links    drop both
  passive named active             P       P        A        -            flip, rename      rename retired back
  swapped                          P       A        -        -            final value       (a swap)
"""

from dataclasses import dataclass

from cos_console.slots.port import Volume
from cos_console.slots.switch import (
    ACTIVE,
    PASSIVE,
    RETIRED,
    TRANSITION,
    Checkpoint,
    Guard,
    Label,
    Link,
    Move,
    Rename,
    Situation,
    Unlink,
    upgrade,
)


@dataclass(frozen=True)
class Observed:
    """Inodes behind the four names; None: no such file."""

    active: int | None
    passive: int | None
    retired: int | None
    transition: int | None


@dataclass(frozen=True)
class Recorded:
    """What the record tells. `new` is the proven image's inode, None before the proof."""

    kind: str
    """upgrade-keep-active, upgrade-keep-passive, swap."""
    active: int | None
    passive: int | None
    new: int | None
    before: Guard
    """saved_entry and next_entry as they were."""


class Unrecognised(ValueError):  # noqa: N818 - the field says so
    """The disk shows none of the states of that operation: somebody else changed it. Nothing is touched."""


_START = Checkpoint(Volume.STATE)  # GRUB may still see the names from before the replay


def finish(seen: Observed, record: Recorded, situation: Situation) -> tuple[Move, ...] | None:
    """Moves that end the operation as planned; None when it can't be (not proven yet)."""
    if record.kind == "swap":
        return _finish_swap(seen, record, situation)
    keep_active = record.kind == "upgrade-keep-active"
    a, p, n = record.active, record.passive, record.new
    whole = upgrade(situation, keep_active=keep_active)
    if n is None:
        _expect(seen.active == a and seen.passive == p)
        return None
    if seen.active == a and seen.passive == p and seen.transition == n:
        if seen.retired is None:
            return (_START, *whole)
        _expect(keep_active and seen.retired == a)
        return (_START, *(m for m in whole if not isinstance(m, Link)))
    _expect(seen.active == n and seen.transition is None)
    if not keep_active:
        _expect(seen.passive == p)
        return (_START, situation.final)
    if seen.retired is None:
        _expect(seen.passive == a)
        return (_START, situation.final)
    _expect(seen.passive == p and seen.retired == a)
    named = whole.index(Rename(TRANSITION, ACTIVE))
    return (_START, *whole[named + 1 :])


def undo(seen: Observed, record: Recorded, situation: Situation) -> tuple[Move, ...] | None:
    """Moves that bring back what was; None when only a swap can (the operation is done)."""
    a, p = record.active, record.passive
    # The environment is put back last: until then the guard stays on a slot that is right.
    back = (record.before,)
    if seen.active == a and seen.passive == p:
        # Guard first: with active's name never changed, active is right whatever the guard was on.
        return (_START, *_drop(seen), *back)
    if record.kind == "upgrade-keep-passive" or seen.retired is None:
        return None
    _expect(seen.passive == p and seen.retired == a)
    relabel: tuple[Move, ...] = (Label(RETIRED, "COS_ACTIVE"),) if situation.labels else ()
    ids = situation.entries
    if record.kind == "swap":
        # active.img is passive's inode here, and its label may be flipped already.
        mend: tuple[Move, ...] = ()
        if situation.labels:
            mend = (Guard(ids.recovery), Label(PASSIVE, "COS_PASSIVE"))
        return (_START, *mend, Guard(ids.passive), *relabel, Rename(RETIRED, ACTIVE), *back)
    hold: tuple[Move, ...] = ()
    if situation.passive_sound:
        hold = (Guard(ids.passive),)
    elif situation.recovery_sound:
        hold = (Guard(ids.recovery),)
    return (_START, *hold, *relabel, Rename(RETIRED, ACTIVE), *back)


def _finish_swap(seen: Observed, record: Recorded, situation: Situation) -> tuple[Move, ...]:
    a, p, ids = record.active, record.passive, situation.entries
    flip: tuple[Move, ...] = ()
    if situation.labels:
        flip = (Label(RETIRED, "COS_PASSIVE"), Guard(ids.recovery), Label(ACTIVE, "COS_ACTIVE"))
    tail = (*flip, Guard(ids.active), Rename(RETIRED, PASSIVE), situation.final)
    if seen.active == a and seen.passive == p:
        _expect(seen.retired in (None, a) and seen.transition in (None, p))
        links: list[Move] = []
        if seen.retired is None:
            links.append(Link(ACTIVE, RETIRED))
        if seen.transition is None:
            links.append(Link(PASSIVE, TRANSITION))
        return (_START, *links, Guard(ids.passive), Rename(TRANSITION, ACTIVE), *tail)
    _expect(seen.active == p and seen.transition is None)
    if seen.retired is None:
        _expect(seen.passive == a)
        return (_START, situation.final)
    _expect(seen.passive == p and seen.retired == a)
    return (_START, *tail)


def _drop(seen: Observed) -> tuple[Move, ...]:
    return (
        *((Unlink(RETIRED),) if seen.retired is not None else ()),
        *((Unlink(TRANSITION),) if seen.transition is not None else ()),
    )


def _expect(holds: bool) -> None:
    if not holds:
        raise Unrecognised("the files are not as any step of the recorded operation leaves them")

"""From names, labels and content alone to the moves that finish or undo: the windows of the original cos-upgrade.

The original renames active to passive (W1), labels it COS_PASSIVE (W2), renames transition to active (W3) and
labels it COS_ACTIVE; its old passive is gone with the first rename. This tool's own switch is told apart by
retired.img, and by active and passive being one file (a swap).

                          active  passive        retired  transition   finish                    undo
  W1                      -       COS_ACTIVE     -        new          label both, name it       passive becomes active again
  W2                      -       COS_PASSIVE    -        new          label, name it active     drop transition
  W1, W2, no new image    -       any            -        -            label passive             as W1, W2
  W3, W5, swapped labels  wrong   any            -        -            label each as named       the same
  stopped in filling      A       P              -        any          (impossible)              drop transition
  own, retired linked     A       P              A        any          (impossible)              drop both
  own, new one named      N       P              A        -            drop retired: both slots are whole
  own, a slot not whole   broken  P              A        -            retired takes the broken one's place
  own swap                P       P              A        -            as recorded               as recorded
"""

from dataclasses import dataclass, replace

from cos_console.slots.port import Volume
from cos_console.slots.recover import Observed, Recorded, Unrecognised
from cos_console.slots.recover import finish as finish_recorded
from cos_console.slots.recover import undo as undo_recorded
from cos_console.slots.switch import (
    ACTIVE,
    PASSIVE,
    RETIRED,
    TRANSITION,
    Checkpoint,
    Guard,
    Label,
    Move,
    Rename,
    Situation,
    Unlink,
)

_START = Checkpoint(Volume.STATE)


@dataclass(frozen=True)
class Files:
    """What lies in cOS/ of COS_STATE. A label is None where there is no ext image."""

    inodes: Observed
    active_label: str | None
    passive_label: str | None
    active_usable: bool
    """Its content is whole, whatever its label."""
    passive_usable: bool
    retired_boots: bool
    new_boots: bool
    """transition.img is a whole file system with a kernel and an initrd."""


def finish(files: Files, situation: Situation) -> tuple[Move, ...]:
    """Moves that end what was begun. Raises Unrecognised when nothing can be finished."""
    seen, ids = files.inodes, situation.entries
    if seen.active is None and seen.passive is not None and seen.retired is None:
        labelled = _label_passive(files, situation)
        if seen.transition is None:
            return (_START, *labelled, Guard(ids.passive))
        if not files.new_boots:
            raise Unrecognised("transition.img is not a whole image that boots, so undo it instead")
        label = (Label(TRANSITION, "COS_ACTIVE"),) if situation.labels else ()
        return (
            _START,
            *labelled,
            Guard(ids.passive),
            *label,
            Rename(TRANSITION, ACTIVE),
            Guard(ids.active),
        )
    if seen.transition is not None and seen.active is not None and seen.transition != seen.passive:
        raise Unrecognised("there is no record that proves transition.img, so undo it instead")
    return _own(files, situation, finishing=True)


def undo(files: Files, situation: Situation) -> tuple[Move, ...]:
    """Moves that take back what was begun as far as its old images are still there. Raises Unrecognised."""
    seen, ids = files.inodes, situation.entries
    if seen.active is None and seen.passive is not None and seen.retired is None:
        if situation.labels and files.passive_label != "COS_ACTIVE":
            return (_START, *_label_passive(files, situation), *_drop(seen))
        return (_START, Rename(PASSIVE, ACTIVE), *_drop(seen), Guard(ids.active))
    return _own(files, situation, finishing=False)


def _own(files: Files, situation: Situation, *, finishing: bool) -> tuple[Move, ...]:
    seen, ids = files.inodes, situation.entries
    if seen.active is None and seen.retired is None:
        raise Unrecognised("neither active nor passive is there; restore active from recovery")
    if seen.active is not None and seen.active == seen.passive:
        if seen.retired in (None, seen.active):
            raise Unrecognised("active and passive are one file, and the other image is gone")
        told = Recorded("swap", seen.retired, seen.passive, None, Guard(ids.active))
        bare = replace(seen, transition=None)
        moves = (finish_recorded if finishing else undo_recorded)(bare, told, situation)
        return (*_drop_new(seen), *(moves or ()))
    if seen.retired is None or seen.retired in (seen.active, seen.passive):
        return (_START, *_drop(seen), *_labels(files, situation))
    hold = _hold(situation)
    if not files.active_usable and files.retired_boots:
        label = (Label(RETIRED, "COS_ACTIVE"),) if situation.labels else ()
        mend = _label_passive(files, situation)
        return (_START, *_drop_new(seen), *mend, *hold, *label, Rename(RETIRED, ACTIVE), Guard(ids.active))
    if files.active_usable and not files.passive_usable and files.retired_boots:
        label = (Label(RETIRED, "COS_PASSIVE"),) if situation.labels else ()
        return (
            _START,
            *_drop_new(seen),
            *_labels(files, situation),
            Guard(ids.active),
            *label,
            Rename(RETIRED, PASSIVE),
        )
    if not (files.active_usable and files.passive_usable):
        raise Unrecognised("retired.img does not boot, and a slot is not whole either")
    return (_START, *_drop(seen), *_labels(files, situation))


def _hold(situation: Situation) -> tuple[Move, ...]:
    if situation.passive_sound:
        return (Guard(situation.entries.passive),)
    return (Guard(situation.entries.recovery),) if situation.recovery_sound else ()


def _label_passive(files: Files, situation: Situation) -> tuple[Move, ...]:
    wrong = situation.labels and files.passive_label not in (None, "COS_PASSIVE")
    return (Label(PASSIVE, "COS_PASSIVE"),) if wrong else ()


def _labels(files: Files, situation: Situation) -> tuple[Move, ...]:
    """Each image gets the label that its name demands."""
    wrong = situation.labels and files.active_label not in (None, "COS_ACTIVE")
    active: tuple[Move, ...] = (Label(ACTIVE, "COS_ACTIVE"),) if wrong else ()
    return (*active, *_label_passive(files, situation))


def _drop_new(seen: Observed) -> tuple[Move, ...]:
    return (Unlink(TRANSITION),) if seen.transition is not None else ()


def _drop(seen: Observed) -> tuple[Move, ...]:
    return (*((Unlink(RETIRED),) if seen.retired is not None else ()), *_drop_new(seen))

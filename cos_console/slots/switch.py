"""The switch as data: ordered moves after each of which what GRUB chooses boots, and the one that runs them.

A slot boots when file name, label and content agree. Names reach GRUB with a checkpoint only; until then the
guard (saved_entry in the environment block, next_entry emptied with it) names a slot that nobody touches.
`retired.img` and `transition.img` are names that no boot entry uses.
"""

from collections.abc import Callable
from dataclasses import dataclass

from cos_console.slots import guard, label
from cos_console.slots.port import Place, Port, Volume

ACTIVE = Place(Volume.STATE, "cOS/active.img")
PASSIVE = Place(Volume.STATE, "cOS/passive.img")
RETIRED = Place(Volume.STATE, "cOS/retired.img")
TRANSITION = Place(Volume.STATE, "cOS/transition.img")


@dataclass(frozen=True)
class Link:
    place: Place
    new: Place


@dataclass(frozen=True)
class Rename:
    """Followed by fsync of the directory and a checkpoint: done when GRUB sees it."""

    place: Place
    new: Place


@dataclass(frozen=True)
class Unlink:
    place: Place


@dataclass(frozen=True)
class Label:
    place: Place
    label: str


@dataclass(frozen=True)
class Guard:
    """saved_entry, with next_entry, in every environment block that could win."""

    saved: str
    next: str = ""


@dataclass(frozen=True)
class Checkpoint:
    volume: Volume


Move = Link | Rename | Unlink | Label | Guard | Checkpoint


@dataclass(frozen=True)
class Entries:
    """GRUB ids of the three slots (cos, fallback, recovery in every handled layout)."""

    active: str = "cos"
    passive: str = "fallback"
    recovery: str = "recovery"


@dataclass(frozen=True)
class Situation:
    """What decides the order of moves."""

    labels: bool = True
    """The initrd finds the root by label; False: by file name (Elemental v1, Harvester)."""
    active_sound: bool = True
    passive_sound: bool = True
    recovery_sound: bool = True
    final: Guard = Guard("cos")
    entries: Entries = Entries()


def upgrade(situation: Situation, *, keep_active: bool) -> tuple[Move, ...]:
    """transition.img, proven and labelled COS_ACTIVE, becomes active; the kept slot is passive then.

    `keep_active` False keeps passive as it is: booted from passive, or active is broken.
    """
    ids = situation.entries
    if not keep_active:
        return (
            *_maybe_guard(situation, passive=situation.passive_sound),
            Rename(TRANSITION, ACTIVE),
            situation.final,
        )
    return (
        Link(ACTIVE, RETIRED),
        *_maybe_guard(situation, passive=situation.passive_sound),
        Rename(TRANSITION, ACTIVE),
        Guard(ids.active),
        *_retire(situation),
        situation.final,
    )


def swap(situation: Situation) -> tuple[Move, ...]:
    """Instant swap. With labels in use recovery guards the flip of one label: it must be sound.

    Raises ValueError when that is needed and not there: swap through a copy then (`upgrade`).
    """
    ids = situation.entries
    flip: tuple[Move, ...] = ()
    if situation.labels:
        if not situation.recovery_sound:
            raise ValueError("an instant swap needs a sound recovery")
        flip = (Label(RETIRED, "COS_PASSIVE"), Guard(ids.recovery), Label(ACTIVE, "COS_ACTIVE"))
    return (
        Link(ACTIVE, RETIRED),
        Link(PASSIVE, TRANSITION),
        Guard(ids.passive),
        Rename(TRANSITION, ACTIVE),
        *flip,
        Guard(ids.active),
        Rename(RETIRED, PASSIVE),
        situation.final,
    )


def window(situation: Situation, *, keep_active: bool) -> str:
    """The moment that nothing guards, for the plan; empty when there is none."""
    guarded = situation.passive_sound or situation.recovery_sound
    if not keep_active or guarded:
        return ""
    return "Between the rename and the checkpoint nothing sound guards: passive and recovery do not boot."


def _retire(situation: Situation) -> tuple[Move, ...]:
    relabel = (Label(RETIRED, "COS_PASSIVE"),) if situation.labels else ()
    return (*relabel, Rename(RETIRED, PASSIVE))


def _maybe_guard(situation: Situation, *, passive: bool) -> tuple[Guard, ...]:
    if passive:
        return (Guard(situation.entries.passive),)
    return (Guard(situation.entries.recovery),) if situation.recovery_sound else ()


def run(
    port: Port,
    moves: tuple[Move, ...],
    environment: tuple[Place, ...],
    *,
    done: Callable[[int, Move], None] = lambda _index, _move: None,
) -> None:
    """Run the moves. `environment`: every block that GRUB may load. Raises OSError, FormatError."""
    for index, move in enumerate(moves):
        match move:
            case Link(place, new):
                port.link(place, new)
                port.fsync_dir(new.directory)
            case Rename(place, new):
                _rename(port, place, new)
            case Unlink(place):
                port.unlink(place)
                port.fsync_dir(place.directory)
                port.checkpoint(place.volume)
            case Label(place, text):
                label.set_label(port, place, text)
            case Guard(saved, once):
                guard.write(port, environment, {"saved_entry": saved, "next_entry": once})
            case Checkpoint(volume):
                port.checkpoint(volume)
        done(index, move)


def _rename(port: Port, place: Place, new: Place) -> None:
    source, target = port.stat(place), port.stat(new)
    if source is None:
        raise FileNotFoundError(2, "the image to rename is not there", str(place))
    if target is not None and source.inode == target.inode:
        port.unlink(place)  # rename(2) between two names of one inode does nothing
    else:
        port.rename(place, new)
    port.fsync_dir(new.directory)
    port.checkpoint(new.volume)

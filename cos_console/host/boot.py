"""What GRUB will choose at the next boot and the one after, by its own rules. Pure.

Rules (GRUB 2.06 normal/main.c and normal/menu.c; the stock grub.cfg of cOS, Elemental v1, Kairos, Harvester): a
`next_entry` is used once and emptied, else `saved_entry`; a value is an id, a title or an index, an unknown one
means the first entry; when the entry's own commands fail, the entries in `fallback` are tried in order. Once a
kernel runs there is no way back: a slot whose root can't be found stops there.
"""

from dataclasses import dataclass

from cos_console.model.machine import BootOutlook, SlotName

STOCK_FALLBACK = "0 1 2"


@dataclass(frozen=True)
class MenuEntry:
    """One entry of the installed menu, in its order. `slot` is None for an entry that boots something else."""

    id: str
    title: str
    slot: SlotName | None


@dataclass(frozen=True)
class Bootable:
    """How far a slot gets: `loads`: GRUB can read image, kernel, initrd; `starts`: Linux finds its root."""

    loads: bool
    starts: bool


STOCK_MENU: tuple[MenuEntry, ...] = (
    MenuEntry("cos", "", SlotName.ACTIVE),
    MenuEntry("fallback", "", SlotName.PASSIVE),
    MenuEntry("recovery", "", SlotName.RECOVERY),
)


def outlook(
    menu: tuple[MenuEntry, ...],
    variables: dict[str, str],
    slots: dict[SlotName, Bootable],
    *,
    reads_environment: bool = True,
    fallback: str = STOCK_FALLBACK,
    notes: str = "",
) -> BootOutlook:
    """The outlook from the loaded environment's `variables`. `notes` is added to the explanation."""
    env = variables if reads_environment else {}
    next_entry, saved_entry = env.get("next_entry", ""), env.get("saved_entry", "")
    fallback = env.get("default_fallback", "") or fallback
    once = _walk(menu, next_entry or saved_entry, fallback, slots)
    later = _walk(menu, saved_entry, fallback, slots)
    why = "next_entry asks for it once" if next_entry else "saved_entry names it" if saved_entry else ""
    return BootOutlook(
        next=once.boots,
        after=later.boots,
        if_fails=once.if_fails,
        next_entry=next_entry,
        saved_entry=saved_entry,
        reads_environment=reads_environment,
        explained=" ".join(p for p in (_explain(once, why), notes) if p),
        chosen=once.chosen,
    )


def resolve_entry(menu: tuple[MenuEntry, ...], value: str) -> MenuEntry | None:
    """The entry that GRUB takes for a `default` of `value`; None only for an empty menu."""
    for entry in menu:
        if value and value in {entry.id, entry.title}:
            return entry
    if value.isdecimal() and int(value) < len(menu):
        return menu[int(value)]
    return menu[0] if menu else None


@dataclass(frozen=True)
class _Walk:
    chosen: SlotName | None
    boots: SlotName | None
    stops_at: SlotName | None
    if_fails: tuple[SlotName, ...]


def _walk(menu: tuple[MenuEntry, ...], default: str, fallback: str, slots: dict[SlotName, Bootable]) -> _Walk:
    first = resolve_entry(menu, default)
    order = [first] if first else []
    for word in fallback.split():
        entry = _exactly(menu, word)
        if entry is not None and entry not in order:
            order.append(entry)
    able = [e.slot for e in order if e.slot is not None and slots.get(e.slot, Bootable(False, False)).loads]
    boots = able[0] if able else None
    stops = boots if boots is not None and not slots[boots].starts else None
    rest = tuple(s for s in able[1:] if slots[s].starts)
    return _Walk(first.slot if first else None, None if stops else boots, stops, rest)


def _exactly(menu: tuple[MenuEntry, ...], word: str) -> MenuEntry | None:
    if word.isdecimal():
        return menu[int(word)] if int(word) < len(menu) else None
    return next((e for e in menu if word in {e.id, e.title}), None)


def _explain(walk: _Walk, why: str) -> str:
    if walk.stops_at is not None:
        return f"GRUB starts {walk.stops_at} but its root will not be found, so the boot stops there."
    if walk.boots is None:
        return "GRUB finds no slot that it can load."
    if walk.chosen is not None and walk.boots is not walk.chosen:
        return f"GRUB can't load {walk.chosen} and falls back to {walk.boots}."
    return f"GRUB boots {walk.boots}: {why or 'it is the first entry of the menu'}."

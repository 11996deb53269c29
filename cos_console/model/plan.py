"""Request, Plan and Step: what is wanted, what will be done, and the facts it rests on.

A plan is made by `planner/` without I/O, shown, saved or carried, and run by `engine/`, which checks the
facts again and refuses a stale plan.
"""

from enum import StrEnum

import msgspec

from cos_console.model.image import ImageReference, ResolvedImage
from cos_console.model.machine import BootOutlook, FileIdentity, Finding, SlotName


class Action(StrEnum):
    UPGRADE = "upgrade"
    BOOT_ONCE = "once"
    DEFAULT = "default"
    SWAP = "swap"
    RESTORE = "restore"
    RESTORE_FROM_RECOVERY = "restore-from-recovery"
    CONFIRM = "confirm"
    """Keep the slot that was tried once."""
    FINISH = "finish"
    """Finish an interrupted operation from its record and what the disk shows."""
    UNDO = "undo"
    """Undo an interrupted operation, or remove its left-overs."""
    RELABEL = "relabel"
    """Give a slot image the label its name demands."""


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator wants, before anything is decided."""

    action: Action
    installation: str
    """Installation.id"""
    target_slot: SlotName | None = None
    """once, default: which slot; relabel: which slot. None: the other one of what boots now."""
    image: ImageReference | None = None
    """upgrade: from where."""
    try_once: bool = False
    """upgrade: passive stays the default, the new active boots once until confirmed."""
    keep: SlotName | None = None
    """upgrade: which of active and passive to keep; None: by the rules."""
    image_size_bytes: int | None = None
    """Size of the new image's file system; None: the configured or computed one."""
    strict_hooks: bool = False
    remove_passive_first: bool = False
    """Typed consent: there is no room for three images, passive is given up before the upgrade."""
    swap_by_copy: bool = False
    """swap: through a copy (no recovery needed) and not with recovery as guard."""


class StepKind(StrEnum):
    """Steps in the words of the progress screen; the engine runs them in the plan's order."""

    CHECK = "check"
    """Facts of the plan looked at again."""
    TRUST = "trust"
    """Who made the image. Not built yet: the step is there and says 'not checked'."""
    RESERVE = "reserve"
    FETCH = "fetch"
    """Download, unpack and write the new image."""
    COPY = "copy"
    """Fill the new image from another slot."""
    RELABEL = "relabel"
    HOOKS = "hooks"
    PROVE = "prove"
    SWITCH = "switch"
    BOOT_CHOICE = "boot-choice"
    """The GRUB environment only."""
    CLEAN = "clean"
    """Remove left-overs, write history."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    kind: StepKind
    title: str
    writes: str
    """What is written where, in words; empty for a step that writes nothing."""
    size_bytes: int | None = None
    cancellable: bool = True
    undo: str = ""


class SpacePhase(msgspec.Struct, frozen=True, kw_only=True):
    """Room needed against room there, for one phase on one file system."""

    phase: str
    where: str
    needed_bytes: int
    available_bytes: int
    estimated: bool = False

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.available_bytes


class SlotChange(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the plan's table: what a slot is now and what it will be."""

    slot: SlotName
    now: str
    after: str
    note: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the plan rests on. The engine looks again and refuses when one has changed."""

    disk_path: str
    disk_id: str
    part_uuid: str
    slots: dict[str, FileIdentity | None]
    """Slot name to the image's identity; None: no such file."""
    environment: dict[str, str]
    """`<partition number>:<path>` of each GRUB environment block to sha256 of its 1024 bytes."""
    boots_next: SlotName | None
    running: SlotName | None
    leftovers: tuple[str, ...] = ()


class SignatureStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What was checked about who made the image."""

    status: str = "not-checked"
    text: str = "signature: not checked (this release has no signature check yet)"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    made_at: str
    request: Request
    title: str
    """One sentence: Upgrade sda (SAMSUNG MZ7LH480, serial ..0M1847) from 0.5.3 to 0.5.8."""
    image: ResolvedImage | None
    """The image that will be written, pinned; None when none is."""
    keep: SlotName | None
    """Of active and passive, the slot whose image survives and becomes or stays passive."""
    image_size_bytes: int
    """Size of the new image file; 0 when none is written."""
    steps: tuple[Step, ...]
    changes: tuple[SlotChange, ...]
    boots_before: BootOutlook
    boots_after: BootOutlook
    space: tuple[SpacePhase, ...]
    passive_fate: str
    undo: str
    warnings: tuple[Finding, ...]
    facts: Facts
    estimate_s: float | None
    signature: SignatureStatus = SignatureStatus()
    from_version: str = ""
    to_version: str = ""

"""How each action becomes a plan: what is written, what is kept, what boots then, how it is undone.

Size of a new image, by this rule: what was asked for with --size; else, where the source tells its unpacked
size, that and a quarter more and 64 MiB; else the configured 3240 MiB (cOS's own) or, where COS_STATE has less
free, what fits when 32 MiB stay free there, marked as estimated. An image may never be smaller than three
times what is transferred when the unpacked size is unknown, or 16 MiB.
"""

import hashlib
import json
import time

import msgspec

from cos_console.model.image import ResolvedImage, Transport
from cos_console.model.machine import (
    BootFile,
    BootOutlook,
    Finding,
    Installation,
    Machine,
    Severity,
    Slot,
    SlotName,
    SlotState,
)
from cos_console.model.plan import (
    Action,
    Facts,
    Plan,
    Request,
    SlotChange,
    SpacePhase,
    Step,
    StepKind,
)
from cos_console.model.problem import ExitCode, Problem
from cos_console.slots.keep import choose_keep

MIB = 1 << 20
_RESERVE = 32 * MIB
_SMALLEST = 16 * MIB
_ALIGN = MIB
_WRITE_BPS = 150e6
_COPYING = {Action.RESTORE, Action.RESTORE_FROM_RECOVERY}
_BOOT_ONLY = {Action.BOOT_ONCE, Action.DEFAULT, Action.CONFIRM}


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says."""

    image_size_bytes: int = 3240 * MIB
    """DEFAULT_IMAGE_SIZE of cos-upgrade."""
    network_bps: float = 10e6
    """Only for the estimate of the time."""


def make_plan(
    machine: Machine,
    request: Request,
    image: ResolvedImage | None = None,
    settings: PlanSettings | None = None,
) -> Plan:
    """The plan for `request`. `image` is the resolved image of an upgrade. Raises Problem; changes nothing."""
    s = settings or PlanSettings()
    inst = machine.installation(request.installation)
    if inst is None:
        raise _refused(
            "COS-NO-INSTALLATION",
            "That installation is not there any more.",
            "Look again.",
            ExitCode.NOT_FOUND,
        )
    if not inst.layout.handled:
        raise _refused(
            "COS-LAYOUT",
            f"{_disk(inst)} has the layout {inst.layout.value}, which is recognised and not changed by this tool.",
            "Use that system's own tool for it.",
        )
    interrupted = [x for x in inst.leftovers if x.kind == "operation-record"]
    if interrupted and request.action not in {Action.FINISH, Action.UNDO}:
        raise _refused(
            "COS-INTERRUPTED",
            "An interrupted operation is waiting on this disk.",
            "Finish or undo it first: cos-console repair finish, or cos-console repair undo.",
            ExitCode.ATTENTION,
        )
    return _Maker(machine, inst, request, image, s).plan()


class _Maker:
    def __init__(
        self,
        machine: Machine,
        inst: Installation,
        request: Request,
        image: ResolvedImage | None,
        settings: PlanSettings,
    ) -> None:
        self.machine, self.inst, self.request, self.image, self.settings = (
            machine,
            inst,
            request,
            image,
            settings,
        )
        self.active, self.passive = inst.slot(SlotName.ACTIVE), inst.slot(SlotName.PASSIVE)
        self.recovery = inst.slot(SlotName.RECOVERY)

    def plan(self) -> Plan:
        match self.request.action:
            case Action.UPGRADE:
                return self._upgrade()
            case Action.RESTORE | Action.RESTORE_FROM_RECOVERY:
                return self._restore()
            case Action.SWAP:
                return self._swap()
            case Action.BOOT_ONCE | Action.DEFAULT | Action.CONFIRM:
                return self._boot_choice()
            case Action.FINISH | Action.UNDO:
                return self._repair()
            case Action.RELABEL:
                return self._relabel()

    # --- actions ---------------------------------------------------------------------------------------------

    def _upgrade(self) -> Plan:
        image = self.image
        if image is None:
            raise _refused(
                "COS-USAGE", "No image was named.", "Name the image to upgrade to.", ExitCode.USAGE
            )
        keep = self.request.keep or choose_keep(self.inst)
        size, estimated = self._image_size(image)
        replaced = SlotName.ACTIVE
        old_active, old_passive = _what(self.active), _what(self.passive)
        new = image.version or "new image"
        keeps_active = keep is SlotName.ACTIVE
        changes = [
            SlotChange(slot=SlotName.ACTIVE, now=old_active, after=new),
            SlotChange(
                slot=SlotName.PASSIVE,
                now=old_passive,
                after=_what(self.active if keeps_active else self.passive),
                note="" if keeps_active else self._why_passive_stays(),
            ),
        ]
        fate = (
            f"passive {old_passive} is replaced by today's active {old_active}"
            if keeps_active
            else f"passive {old_passive} stays; active {old_active} is replaced"
        )
        warnings = [
            _warning("COS-UNSIGNED", "signature: not checked (this release has no signature check yet)")
        ]
        if keep is None:
            warnings.append(
                _warning(
                    "COS-NO-FALLBACK",
                    "Neither active nor passive is sound: there is no fallback until this is done.",
                )
            )
        if not self.inst.boot.reads_environment:
            warnings.append(
                _warning(
                    "COS-WINDOW",
                    "This boot loader reads no environment: during the switch a power cut has a short window.",
                )
            )
        if self.active and image.version and image.version == self.active.version:
            warnings.append(_warning("COS-SAME-VERSION", f"active is {image.version} already."))
        after_next = SlotName.ACTIVE
        boots_after = self._outlook(
            after_next, SlotName.PASSIVE if self.request.try_once else SlotName.ACTIVE
        )
        network = image.reference.transport is Transport.DOCKER
        steps = [
            _step(StepKind.CHECK, "Plan checked again"),
            _step(StepKind.TRUST, "Signature: not checked"),
            _step(StepKind.RESERVE, "Space reserved", writes="COS_STATE:/cOS/transition.img", size=size),
            _step(
                StepKind.FETCH,
                "Download and write" if network else "Read and write",
                writes="COS_STATE:/cOS/transition.img",
                size=image.transfer_bytes or None,
                undo="the new image is removed, nothing else was touched",
            ),
            _step(StepKind.PROVE, "Prove: read back every byte from disk", size=None),
            _step(
                StepKind.SWITCH,
                "Switch",
                writes="names and labels in COS_STATE:/cOS, the GRUB environment",
                cancellable=False,
                undo="swap back",
            ),
            _step(
                StepKind.CLEAN, "Write history, remove left-overs", writes="COS_STATE:/cOS", cancellable=False
            ),
        ]
        space = (
            SpacePhase(
                phase="new image beside active and passive",
                where="COS_STATE",
                needed_bytes=size,
                available_bytes=self._room(),
                estimated=estimated,
            ),
        )
        self._fits(space)
        estimate = (
            2
            + (image.transfer_bytes / (self.settings.network_bps if network else _WRITE_BPS))
            + size / _WRITE_BPS / 3
        )
        return self._make(
            title=f"Upgrade {_disk(self.inst)} from {old_active} to {new}",
            steps=steps,
            changes=changes,
            boots_after=boots_after,
            space=space,
            fate=fate,
            undo=f"swap back to {_what(self.active if keeps_active else self.passive)} at any time",
            warnings=warnings,
            keep=keep,
            image_size=size,
            estimate=estimate,
            from_version=_version(self.active),
            to_version=image.version,
            replaced=replaced,
        )

    def _restore(self) -> Plan:
        from_recovery = self.request.action is Action.RESTORE_FROM_RECOVERY
        source = self.recovery if from_recovery else self.passive
        name = "recovery" if from_recovery else "passive"
        if source is None or source.state not in {SlotState.SOUND, SlotState.MISLABELLED}:
            raise _refused(
                "COS-SLOT",
                f"{name} is not sound, so active can't be restored from it.",
                "Upgrade active instead.",
            )
        if source.fs_type == "squashfs":
            raise _refused(
                "COS-SQUASHFS",
                "The recovery image is a squashfs; it can't be copied into a slot here.",
                "Upgrade active instead.",
            )
        if self.inst.running is SlotName.ACTIVE:
            raise _refused(
                "COS-RUNNING", "This machine runs from active.", "Boot passive or the LiveCD first."
            )
        size = source.size_bytes
        space = (
            SpacePhase(
                phase=f"copy of {name}",
                where="COS_STATE",
                needed_bytes=source.allocated_bytes,
                available_bytes=self._room(),
            ),
        )
        self._fits(space)
        steps = [
            _step(StepKind.CHECK, "Plan checked again"),
            _step(StepKind.RESERVE, "Space reserved", writes="COS_STATE:/cOS/transition.img", size=size),
            _step(
                StepKind.COPY,
                f"Copy {name}",
                writes="COS_STATE:/cOS/transition.img",
                size=source.allocated_bytes,
            ),
            _step(StepKind.PROVE, "Prove: the copy is equal on disk"),
            _step(
                StepKind.SWITCH,
                "Switch",
                writes="names in COS_STATE:/cOS, the GRUB environment",
                cancellable=False,
            ),
            _step(
                StepKind.CLEAN, "Write history, remove left-overs", writes="COS_STATE:/cOS", cancellable=False
            ),
        ]
        return self._make(
            title=f"Restore active of {_disk(self.inst)} from {name} {source.version}",
            steps=steps,
            changes=[
                SlotChange(
                    slot=SlotName.ACTIVE,
                    now=_what(self.active),
                    after=source.version,
                    note=f"a copy of {name}",
                ),
                SlotChange(slot=SlotName.PASSIVE, now=_what(self.passive), after=_what(self.passive)),
            ],
            boots_after=self._outlook(SlotName.ACTIVE, SlotName.ACTIVE),
            space=space,
            fate=f"passive {_what(self.passive)} stays",
            undo=f"none: active {_what(self.active)} is gone then",
            warnings=[],
            keep=SlotName.PASSIVE,
            image_size=size,
            estimate=2 + 2 * source.allocated_bytes / _WRITE_BPS,
            from_version=_version(self.active),
            to_version=source.version,
        )

    def _swap(self) -> Plan:
        usable = {SlotState.SOUND, SlotState.MISLABELLED}
        if not (
            self.active and self.passive and self.active.state in usable and self.passive.state in usable
        ):
            raise _refused(
                "COS-SLOT", "Swapping needs a sound active and a sound passive.", "Restore or upgrade active."
            )
        labels = bool(self.active.expected_label)
        if labels and not (self.recovery and self.recovery.state is SlotState.SOUND):
            raise _refused(
                "COS-SWAP-GUARD",
                "An instant swap needs a sound recovery as guard, and there is none.",
                "Make passive the default instead: cos-console rollback default.",
            )
        return self._make(
            title=f"Swap active {self.active.version} and passive {self.passive.version} of {_disk(self.inst)}",
            steps=[
                _step(StepKind.CHECK, "Plan checked again"),
                _step(
                    StepKind.SWITCH,
                    "Swap",
                    writes="names and labels in COS_STATE:/cOS, the GRUB environment",
                    cancellable=False,
                    undo="swap again",
                ),
                _step(StepKind.CLEAN, "Write history", writes="COS_STATE:/cOS", cancellable=False),
            ],
            changes=[
                SlotChange(slot=SlotName.ACTIVE, now=_what(self.active), after=_what(self.passive)),
                SlotChange(slot=SlotName.PASSIVE, now=_what(self.passive), after=_what(self.active)),
            ],
            boots_after=self._outlook(SlotName.ACTIVE, SlotName.ACTIVE),
            space=(),
            fate="passive becomes active",
            undo="swap again",
            warnings=[],
            keep=None,
            estimate=1.0,
            from_version=self.active.version,
            to_version=self.passive.version,
        )

    def _boot_choice(self) -> Plan:
        if not self.inst.boot.reads_environment:
            raise _refused(
                "COS-NO-ENVIRONMENT",
                "The installed boot loader reads no environment, so a choice can't be left for it.",
                "Swap active and passive instead.",
            )
        slot, once = self._chosen()
        found = self.inst.slot(slot)
        if found is None or found.state is not SlotState.SOUND:
            raise _refused("COS-SLOT", f"{slot.value} is not sound.", "Choose another slot.")
        stays = (
            {"fallback": SlotName.PASSIVE, "recovery": SlotName.RECOVERY}.get(
                self.inst.boot.saved_entry, SlotName.ACTIVE
            )
            if once
            else slot
        )
        if self.request.action is Action.CONFIRM:
            title = f"Keep {slot.value} {found.version} of {_disk(self.inst)} as the default"
        elif once:
            title = f"Boot {slot.value} {found.version} of {_disk(self.inst)} once"
        else:
            title = f"Make {slot.value} {found.version} of {_disk(self.inst)} the default"
        return self._make(
            title=title,
            steps=[
                _step(StepKind.CHECK, "Plan checked again"),
                _step(
                    StepKind.BOOT_CHOICE,
                    "Boot choice",
                    writes="the GRUB environment, in place",
                    cancellable=False,
                ),
                _step(StepKind.CLEAN, "Write history", writes="COS_STATE:/cOS", cancellable=False),
            ],
            changes=[],
            boots_after=self._outlook(slot, stays),
            space=(),
            fate="no image is touched",
            undo="the same with the other slot",
            warnings=[],
            keep=None,
            estimate=1.0,
            from_version=_version(self.active),
            to_version=found.version,
        )

    def _chosen(self) -> tuple[SlotName, bool]:
        """(slot, once)"""
        action = self.request.action
        if action is Action.CONFIRM:
            return self.request.target_slot or self.inst.running or SlotName.ACTIVE, False
        other = SlotName.ACTIVE if self.inst.boot.after is SlotName.PASSIVE else SlotName.PASSIVE
        return self.request.target_slot or other, action is Action.BOOT_ONCE

    def _repair(self) -> Plan:
        if not self.inst.leftovers:
            raise _refused(
                "COS-NOTHING",
                "Nothing is left over from an interrupted operation.",
                "There is nothing to do.",
            )
        word = "Finish" if self.request.action is Action.FINISH else "Undo"
        return self._make(
            title=f"{word} what was interrupted on {_disk(self.inst)}",
            steps=[
                _step(StepKind.CHECK, "Plan checked again"),
                _step(StepKind.SWITCH, word, writes="names and labels in COS_STATE:/cOS", cancellable=False),
                _step(
                    StepKind.CLEAN,
                    "Remove left-overs, write history",
                    writes="COS_STATE:/cOS",
                    cancellable=False,
                ),
            ],
            changes=[],
            boots_after=self.inst.boot,
            space=(),
            fate="; ".join(f"{x.path}: {x.meaning}" for x in self.inst.leftovers),
            undo="none needed",
            warnings=[],
            keep=None,
            estimate=2.0,
        )

    def _relabel(self) -> Plan:
        slot = self.inst.slot(self.request.target_slot or SlotName.ACTIVE)
        if slot is None or slot.state is not SlotState.MISLABELLED:
            raise _refused("COS-NOTHING", "That slot's label is right already.", "There is nothing to do.")
        return self._make(
            title=f"Label {slot.name.value} of {_disk(self.inst)} {slot.expected_label}",
            steps=[
                _step(StepKind.CHECK, "Plan checked again"),
                _step(StepKind.RELABEL, "Label", writes=f"COS_STATE:/{slot.file}", cancellable=False),
                _step(StepKind.CLEAN, "Write history", writes="COS_STATE:/cOS", cancellable=False),
            ],
            changes=[
                SlotChange(
                    slot=slot.name, now=f"label {slot.label or 'none'}", after=f"label {slot.expected_label}"
                )
            ],
            boots_after=self.inst.boot,
            space=(),
            fate="no content is touched",
            undo="none needed",
            warnings=[],
            keep=None,
            estimate=1.0,
        )

    # --- parts -----------------------------------------------------------------------------------------------

    def _image_size(self, image: ResolvedImage) -> tuple[int, bool]:
        """(bytes, estimated) by the rule in the module's head. Raises Problem when it can't be."""
        asked = self.request.image_size_bytes
        if asked is not None:
            return max(_SMALLEST, asked // _ALIGN * _ALIGN), False
        if image.unpacked_bytes is not None:
            return _up(max(_SMALLEST, image.unpacked_bytes * 5 // 4 + 64 * MIB)), True
        fitting = (self._room() - _RESERVE) // _ALIGN * _ALIGN
        size = min(self.settings.image_size_bytes, fitting)
        least = max(_SMALLEST, min(_up(image.transfer_bytes * 3), self.settings.image_size_bytes))
        size = max(size, least)  # shown, and refused, as what is needed
        return size, True

    def _room(self) -> int:
        freed = sum(x.size_bytes for x in self.inst.leftovers if x.kind == "transition-image")
        return self.inst.state_free_bytes + freed

    def _fits(self, space: tuple[SpacePhase, ...]) -> None:
        for phase in space:
            if not phase.fits:
                raise Problem(
                    "COS-SPACE-STATE",
                    f"{phase.where} has {phase.available_bytes // MIB} MiB free;"
                    f" the {phase.phase} needs {'~' if phase.estimated else ''}{phase.needed_bytes // MIB} MiB.",
                    now="Choose a smaller --size, remove left-overs, or free space on the state partition.",
                    exit_code=ExitCode.REFUSED,
                )

    def _why_passive_stays(self) -> str:
        if self.inst.running is SlotName.PASSIVE:
            return "kept, because this machine runs from it"
        if self.active is None or self.active.state is not SlotState.SOUND:
            return "kept, because active is broken"
        return "kept"

    def _outlook(self, first: SlotName, second: SlotName) -> BootOutlook:
        fallback = tuple(n for n in (SlotName.ACTIVE, SlotName.PASSIVE, SlotName.RECOVERY) if n is not first)
        return BootOutlook(
            next=first,
            after=second,
            if_fails=tuple(n for n in fallback if self.inst.slot(n) is not None),
            reads_environment=self.inst.boot.reads_environment,
            explained=f"GRUB boots {first.value}"
            + ("." if first is second else f" once, and {second.value} from then on."),
        )

    def _make(
        self,
        *,
        title: str,
        steps: list[Step],
        changes: list[SlotChange],
        boots_after: BootOutlook,
        space: tuple[SpacePhase, ...],
        fate: str,
        undo: str,
        warnings: list[Finding],
        keep: SlotName | None,
        estimate: float,
        image_size: int = 0,
        from_version: str = "",
        to_version: str = "",
        replaced: SlotName | None = None,
    ) -> Plan:
        del replaced
        made_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = facts_of(self.inst)
        seed = json.dumps([made_at, title, self.inst.id]).encode() + msgspec.json.encode(facts)
        return Plan(
            id=hashlib.sha256(seed).hexdigest()[:12],
            made_at=made_at,
            request=self.request,
            title=title,
            image=self.image,
            keep=keep,
            image_size_bytes=image_size,
            steps=tuple(steps),
            changes=tuple(changes),
            boots_before=self.inst.boot,
            boots_after=boots_after,
            space=space,
            passive_fate=fate,
            undo=undo,
            warnings=tuple(warnings),
            facts=facts,
            estimate_s=round(estimate, 1),
            from_version=from_version,
            to_version=to_version,
        )


def facts_of(inst: Installation) -> Facts:
    """What a plan for `inst` rests on; the engine compares them with a fresh look."""
    state = inst.partition(inst.state_partition)
    return Facts(
        disk_path=inst.disk.path,
        disk_id=inst.disk.disk_id,
        part_uuid=state.part_uuid if state else "",
        slots={n.value: (slot.identity if (slot := inst.slot(n)) else None) for n in SlotName},
        environment={f"{f.partition}:{f.path}": _environment_digest(f) for f in inst.boot_files},
        boots_next=inst.boot.next,
        running=inst.running,
        leftovers=tuple(sorted(x.path for x in inst.leftovers)),
    )


def _environment_digest(file: BootFile) -> str:
    return hashlib.sha256(json.dumps(sorted(file.variables.items())).encode()).hexdigest()


def _step(
    kind: StepKind,
    title: str,
    *,
    writes: str = "",
    size: int | None = None,
    cancellable: bool = True,
    undo: str = "",
) -> Step:
    return Step(kind=kind, title=title, writes=writes, size_bytes=size, cancellable=cancellable, undo=undo)


def _what(slot: Slot | None) -> str:
    """A slot in a few words: its version, or what is wrong with it."""
    if slot is None or slot.state is SlotState.MISSING:
        return "missing"
    if slot.state is SlotState.DAMAGED:
        return f"{slot.version} (damaged)".strip()
    return slot.version or "unknown"


def _version(slot: Slot | None) -> str:
    return slot.version if slot else ""


def _disk(inst: Installation) -> str:
    return " ".join(p for p in (inst.disk.name, inst.disk.model) if p)


def _up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _warning(code: str, text: str) -> Finding:
    return Finding(code=code, severity=Severity.WARNING, what=text)


def _refused(code: str, what: str, now: str, exit_code: ExitCode = ExitCode.REFUSED) -> Problem:
    return Problem(code, what, now=now, exit_code=exit_code)

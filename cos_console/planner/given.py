"""What a plan is made from, and the one place where a Plan is put together."""

import hashlib
import json
import time
from dataclasses import dataclass

import msgspec

from cos_console.model.image import ResolvedImage
from cos_console.model.machine import BootOutlook, Finding, Installation, Slot, SlotName, SlotState
from cos_console.model.plan import Plan, Request, SlotChange, SpacePhase, Step, StepKind
from cos_console.planner.facts import facts_of
from cos_console.planner.space import MIB

WRITE_BPS = 150e6
"""For estimates of the time only."""
USABLE = frozenset({SlotState.SOUND, SlotState.MISLABELLED})
"""States of a slot whose content can be copied."""
CHECK = Step(kind=StepKind.CHECK, title="Plan checked again", writes="")
STATE_DIRECTORY = "COS_STATE:/cOS"
NEW_IMAGE = "COS_STATE:/cOS/transition.img"
HISTORY = Step(kind=StepKind.CLEAN, title="Write history", writes=STATE_DIRECTORY, cancellable=False)
CLEAN = Step(
    kind=StepKind.CLEAN,
    title="Write history, remove left-overs",
    writes=STATE_DIRECTORY,
    cancellable=False,
)


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration says."""

    image_size_bytes: int = 3240 * MIB
    """DEFAULT_IMAGE_SIZE of cos-upgrade."""
    network_bps: float = 10e6
    """Only for the estimate of the time."""


@dataclass(frozen=True)
class Given:
    """One installation, one request."""

    inst: Installation
    request: Request
    image: ResolvedImage | None
    settings: PlanSettings

    @property
    def active(self) -> Slot | None:
        return self.inst.slot(SlotName.ACTIVE)

    @property
    def passive(self) -> Slot | None:
        return self.inst.slot(SlotName.PASSIVE)

    @property
    def recovery(self) -> Slot | None:
        return self.inst.slot(SlotName.RECOVERY)

    def outlook(self, first: SlotName, second: SlotName) -> BootOutlook:
        """What GRUB will choose when the plan is done: `first` next, `second` after that."""
        fallback = tuple(n for n in (SlotName.ACTIVE, SlotName.PASSIVE, SlotName.RECOVERY) if n is not first)
        return BootOutlook(
            next=first,
            after=second,
            if_fails=tuple(n for n in fallback if self.inst.slot(n) is not None),
            reads_environment=self.inst.boot.reads_environment,
            explained=f"GRUB boots {first.value}"
            + ("." if first is second else f" once, and {second.value} from then on."),
        )

    def assemble(
        self,
        *,
        title: str,
        steps: list[Step],
        changes: list[SlotChange],
        boots_after: BootOutlook,
        fate: str,
        undo: str,
        estimate: float,
        space: tuple[SpacePhase, ...] = (),
        warnings: list[Finding] | None = None,
        keep: SlotName | None = None,
        image_size: int = 0,
        from_version: str = "",
        to_version: str = "",
    ) -> Plan:
        """The plan. `estimate` in seconds, `image_size` in bytes."""
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
            warnings=tuple(warnings or ()),
            facts=facts,
            estimate_s=round(estimate, 1),
            from_version=from_version,
            to_version=to_version,
        )

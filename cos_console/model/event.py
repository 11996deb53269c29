"""Events of one operation, as JSON lines, and the state that a reader folds from them.

The first line is `started` and carries the protocol version. A late reader starts at the first line and
arrives at the same state: state = fold(events). Progress comes at most five times a second and, while the
operation lives, at least every two seconds. Every `time` is RFC 3339 UTC with milliseconds.
"""

from enum import StrEnum

import msgspec

from cos_console.model.plan import Plan, StepKind
from cos_console.model.problem import ProblemReport

PROTOCOL_VERSION = 1


class Started(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="started"):
    time: str
    version: int = PROTOCOL_VERSION
    plan: Plan
    pid: int
    boot_id: str


class StepBegun(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="step-begun"):
    time: str
    index: int
    """Into plan.steps."""
    kind: StepKind


class StepDone(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="step-done"):
    time: str
    index: int
    kind: StepKind
    note: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="progress"):
    time: str
    index: int
    bytes_done: int
    bytes_total: int
    """0 where not known."""
    bytes_cached: int = 0
    """Part of bytes_done that did not have to be moved."""
    rate_bps: float = 0.0
    """Bytes a second over the last seconds."""
    waiting_s: float = 0.0
    """Seconds since the last byte came."""
    detail: str = ""
    """layer 5 of 8; waits for quay.io."""
    refetch_bytes: int = 0
    """What would have to be fetched again if it stopped now."""


class Note(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="note"):
    time: str
    text: str


class Warned(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="warning"):
    time: str
    code: str
    text: str


class NeedsAttention(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="needs-attention"):
    time: str
    text: str


class Result(StrEnum):
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag="finished"):
    time: str
    result: Result
    text: str
    """The verdict, one sentence."""
    exit_code: int
    problem: ProblemReport | None = None
    elapsed_s: float = 0.0
    bytes_moved: int = 0
    facts: dict[str, str] = {}
    """digest, from_version, to_version, boots_next, files_proven, ..."""


Event = Started | StepBegun | StepDone | Progress | Note | Warned | NeedsAttention | Finished


class StepStatus(StrEnum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class StepView(msgspec.Struct, frozen=True, kw_only=True):
    kind: StepKind
    title: str
    status: StepStatus
    started: str = ""
    ended: str = ""
    note: str = ""


class OperationState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a screen needs to draw an operation, at any time, from any console."""

    plan: Plan | None = None
    started: str = ""
    pid: int = 0
    steps: tuple[StepView, ...] = ()
    current: int | None = None
    progress: Progress | None = None
    log: tuple[tuple[str, str], ...] = ()
    """(time, text), oldest first, the last 500."""
    warnings: tuple[Warned, ...] = ()
    attention: str = ""
    finished: Finished | None = None

    @property
    def cancellable(self) -> bool:
        """Whether a request to stop is still safe: nothing from the switch on has begun."""
        if self.plan is None or self.finished is not None:
            return False
        return self.current is None or self.plan.steps[self.current].cancellable


_LOG_LIMIT = 500


def fold(state: OperationState, event: Event) -> OperationState:
    """The state after `event`. Pure; unknown order is tolerated, so that a torn log still shows something."""
    replace = msgspec.structs.replace
    match event:
        case Started():
            steps = tuple(
                StepView(kind=s.kind, title=s.title, status=StepStatus.WAITING) for s in event.plan.steps
            )
            return replace(state, plan=event.plan, started=event.time, pid=event.pid, steps=steps)
        case StepBegun():
            return replace(
                state,
                current=event.index,
                progress=None,
                steps=_set(state.steps, event.index, status=StepStatus.RUNNING, started=event.time),
            )
        case StepDone():
            return replace(
                state,
                steps=_set(
                    state.steps, event.index, status=StepStatus.DONE, ended=event.time, note=event.note
                ),
            )
        case Progress():
            return replace(state, progress=event)
        case Note():
            return replace(state, log=_logged(state, event.time, event.text))
        case Warned():
            return replace(
                state, warnings=(*state.warnings, event), log=_logged(state, event.time, event.text)
            )
        case NeedsAttention():
            return replace(state, attention=event.text, log=_logged(state, event.time, event.text))
        case Finished():
            steps = state.steps
            if event.result is not Result.DONE and state.current is not None:
                steps = _set(steps, state.current, status=StepStatus.FAILED, ended=event.time)
            return replace(state, steps=steps, finished=event, log=_logged(state, event.time, event.text))


def _set(steps: tuple[StepView, ...], index: int, **changes: object) -> tuple[StepView, ...]:
    if not 0 <= index < len(steps):
        return steps
    return (*steps[:index], msgspec.structs.replace(steps[index], **changes), *steps[index + 1 :])


def _logged(state: OperationState, time: str, text: str) -> tuple[tuple[str, str], ...]:
    return (*state.log, (time, text))[-_LOG_LIMIT:]

"""What the screens ask for: to look, to plan, to act. Imports wait until they are needed: first paint first."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from cos_console.model.event import OperationState, fold
from cos_console.model.machine import Installation, Machine
from cos_console.model.plan import Plan, Request
from cos_console.model.problem import ExitCode, Problem


class Services(Protocol):
    """All but `at_work` may take time and raise Problem."""

    def look(self) -> Machine: ...

    def plan(self, machine: Machine, request: Request, reference: str) -> Plan:
        """`reference` names the image of an upgrade, else it is empty."""
        ...

    def start(self, plan: Plan) -> None: ...

    def at_work(self) -> bool:
        """Whether an operation is under way on this machine."""
        ...

    def follow(self) -> Iterator[OperationState]:
        """States of the operation at work, or that ended last, from its first event on."""
        ...

    def stop(self) -> str: ...

    def history(self, inst: Installation) -> tuple[tuple[str, str, str, str], ...]:
        """(time, action, result, text), oldest first."""
        ...


class RealServices:
    """This machine, or one disk of it."""

    def __init__(self, target: Path | None, *, dry_run: bool = False) -> None:
        self._target = target
        self._dry_run = dry_run

    def look(self) -> Machine:
        from cos_console.host.scan import scan

        return scan(self._target)

    def plan(self, machine: Machine, request: Request, reference: str) -> Plan:
        return _plan(machine, request, reference)

    def start(self, plan: Plan) -> None:
        from cos_console import engine

        if self._dry_run:
            raise _only_looking()
        engine.start(plan)

    def at_work(self) -> bool:
        from cos_console import engine

        try:
            return engine.current() is not None
        except OSError:
            return False

    def follow(self) -> Iterator[OperationState]:
        from cos_console import engine

        handle = engine.latest()
        state = OperationState()
        if handle is not None:
            for event in engine.follow(handle):
                state = fold(state, event)
                yield state

    def stop(self) -> str:
        from cos_console import engine

        handle = engine.current()
        return engine.cancel(handle) if handle else "No operation is at work."

    def history(self, inst: Installation) -> tuple[tuple[str, str, str, str], ...]:
        from cos_console import engine

        return tuple((e.time, e.action, e.result, e.text) for e in engine.history(inst))


class RecordedServices:
    """A machine from a file: every screen works, nothing can be changed."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def look(self) -> Machine:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Machine)
        except (OSError, msgspec.MsgspecError):
            raise Problem(
                "COS-MACHINE-FILE",
                f"{self._file} is not a recorded machine.",
                now="Give a file made by: cos-console status --json",
                exit_code=ExitCode.USAGE,
            ) from None

    def plan(self, machine: Machine, request: Request, reference: str) -> Plan:
        return _plan(machine, request, reference)

    def start(self, plan: Plan) -> None:
        del plan
        raise _only_looking()

    def at_work(self) -> bool:
        return False

    def follow(self) -> Iterator[OperationState]:
        return iter(())

    def stop(self) -> str:
        return "No operation is at work."

    def history(self, inst: Installation) -> tuple[tuple[str, str, str, str], ...]:
        del inst
        return ()


def _plan(machine: Machine, request: Request, reference: str) -> Plan:
    from cos_console.planner import make_plan

    image = None
    if reference:
        from cos_console.sources import SourceSettings, parse_reference, resolve

        named = parse_reference(reference)
        content = resolve(named, SourceSettings())
        image = content.image
        content.close()
        request = msgspec.structs.replace(request, image=named)
    return make_plan(machine, request, image)


def _only_looking() -> Problem:
    return Problem(
        "COS-DRY-RUN",
        "This console only shows plans: it was started with --dry-run or on a recorded machine.",
        now="Start it without, on the machine itself.",
        exit_code=ExitCode.REFUSED,
    )

"""An operation in a process of its own that dies at a chosen call of the port, as the engine would by SIGKILL.

What the dead process had mounted is unmounted by the kernel, so what it had written is on the disk: the cuts in
which a drive loses writes are `tests/power`'s.
"""

import os
import traceback
from pathlib import Path

import msgspec

from cos_console.host.scan import scan
from cos_console.model.machine import Installation, Machine
from cos_console.model.plan import Plan, Request, StepKind
from cos_console.planner import make_plan
from cos_console.slots import operations, repairs
from cos_console.slots.operations import OperationContext
from tests.power.recorder import PowerCut, Recorder

_STOPPED = 77


def look(disk: Path) -> tuple[Machine, Installation]:
    machine = scan(disk)
    return machine, machine.installations[0]


def plan(disk: Path, action: str, **more: object) -> Plan:
    machine, inst = look(disk)
    request = msgspec.convert({"action": action, "installation": inst.id, **more}, Request)
    return make_plan(machine, request)


def run(made: Plan, inst: Installation, *, cut: int | None, calls: Path) -> bool:
    """Every step of the plan, in a child; False when it was stopped before call `cut`.

    `calls` gets the names of the port's calls, one a line. Raises RuntimeError with the child's traceback.
    """
    errors = calls.with_suffix(".errors")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with operations.open_operation(
                made, inst, report=lambda _: None, cancelled=lambda: False, note=lambda _: None
            ) as ctx:
                recorder = Recorder(ctx.port, cut=cut)  # type: ignore[arg-type]
                ctx.port = recorder  # type: ignore[assignment]
                try:
                    _steps(ctx)
                except PowerCut:
                    os._exit(_STOPPED)  # nothing is unwound, nothing unmounted
                finally:
                    calls.write_text("\n".join(recorder.calls))
            code = 0
        except BaseException:
            errors.write_text(traceback.format_exc())
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, _STOPPED):
        raise RuntimeError(errors.read_text())
    return code == 0


def _steps(ctx: OperationContext) -> None:
    done = {
        StepKind.RESERVE: operations.reserve,
        StepKind.COPY: operations.copy,
        StepKind.PROVE: operations.prove,
        StepKind.BOOT_CHOICE: operations.boot_choice,
        StepKind.RELABEL: operations.relabel,
        StepKind.CLEAN: operations.clean,
        StepKind.SWITCH: repairs.repair
        if ctx.plan.request.action.value in {"finish", "undo"}
        else operations.do_switch,
    }
    for step in ctx.plan.steps[1:]:
        done[step.kind](ctx)

"""The engine's process: one plan, step by step, every step an event.

It outlives its starter: own session, SIGHUP and SIGINT ignored. SIGTERM and the control socket cancel while
that is safe, and are refused from the switch on. The plan's facts are looked at again first.
"""

import fcntl
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import msgspec

from cos_console.engine.follow import stamp
from cos_console.engine.history import HistoryEntry
from cos_console.host import facts
from cos_console.host.scan import scan
from cos_console.model.event import (
    Event,
    Finished,
    Note,
    Progress,
    Result,
    Started,
    StepBegun,
    StepDone,
    Warned,
)
from cos_console.model.image import Content
from cos_console.model.machine import Installation
from cos_console.model.plan import Action, Plan, StepKind
from cos_console.model.problem import ExitCode, Problem, from_report
from cos_console.planner import facts_of
from cos_console.slots import operations, repairs
from cos_console.slots.build import BuildProgress
from cos_console.slots.operations import OperationContext
from cos_console.sources import SourceSettings, open_pinned

_REPORT_S = 0.2
_HEARTBEAT_S = 1.5


class Engine:
    """Runs one plan. All events go to `directory`/events.jsonl."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._plan = msgspec.json.decode((directory / "plan.json").read_bytes(), type=Plan)
        self._settings = msgspec.json.decode((directory / "settings.json").read_bytes(), type=SourceSettings)
        self._log = (directory / "events.jsonl").open("ab", buffering=0)
        self._emitting = threading.Lock()
        self._cancel = threading.Event()
        self._gate = threading.RLock()  # the signal handler runs in the thread that may hold it
        self._step = 0
        self._last_progress: Progress | None = None
        self._last_time = 0.0
        self._moved = 0
        self._begun = time.monotonic()

    def run(self) -> int:
        """Everything; the exit code."""
        if not self._lock():
            return self._finish(
                Problem(
                    "COS-BUSY",
                    "Another operation is at work on this machine.",
                    now="Watch it with: cos-console attach",
                    exit_code=ExitCode.BUSY,
                ),
                None,
            )
        self._emit(Started(time=stamp(), plan=self._plan, pid=os.getpid(), boot_id=facts.boot_id()))
        self._listen()
        try:
            installation = self._check()
            content = self._content()
            with operations.open_operation(
                self._plan,
                installation,
                report=self._report,
                cancelled=self._cancel.is_set,
                note=lambda text: self._emit(Note(time=stamp(), text=text)),
            ) as ctx:
                return self._steps(ctx, content)
        except Problem as problem:
            return self._finish(problem, None)
        except Exception:  # noqa: BLE001 - the last line: no traceback reaches the screen
            return self._finish(self._internal(), None)

    # --- steps -----------------------------------------------------------------------------------------------

    def _check(self) -> Installation:
        self._begin(StepKind.CHECK)
        plan = self._plan
        found = [
            i
            for i in scan(Path(plan.facts.disk_path)).installations
            if (state := i.partition(i.state_partition)) and state.part_uuid == plan.facts.part_uuid
        ]
        if len(found) != 1 or facts_of(found[0]) != plan.facts:
            raise Problem(
                "COS-PLAN-STALE",
                "The disk has changed since the plan was made.",
                now="Make a new plan and look at it again.",
                exit_code=ExitCode.REFUSED,
            )
        self._done("facts as planned")
        return found[0]

    def _content(self) -> Content | None:
        if self._plan.image is None:
            return None
        return open_pinned(self._plan.image, self._settings)

    def _steps(self, ctx: OperationContext, content: Content | None) -> int:
        switching = False
        try:
            for step in self._plan.steps[1:]:
                # One lock for both: a cancel that was accepted is never overtaken by the switch.
                with self._gate:
                    stopped = self._cancel.is_set() and not switching
                    if not stopped:
                        self._step = self._plan.steps.index(step)
                if stopped:
                    raise Problem(
                        "COS-CANCELLED",
                        "The operation was stopped on request.",
                        unchanged="active and passive are exactly as before.",
                        now="Start it again whenever you like.",
                        exit_code=ExitCode.CANCELLED,
                    )
                self._begin(step.kind)
                switching = switching or step.kind in {
                    StepKind.SWITCH,
                    StepKind.RELABEL,
                    StepKind.BOOT_CHOICE,
                }
                self._done(self._one(ctx, step.kind, content))
        except Problem as problem:
            return self._failed(ctx, problem, switching)
        except Exception:  # noqa: BLE001 - saved, told in one sentence, and cleaned up after
            return self._failed(ctx, self._internal(), switching)
        return self._finish(None, ctx)

    def _one(self, ctx: OperationContext, kind: StepKind, content: Content | None) -> str:
        """Do one step; a note about it."""
        match kind:
            case StepKind.TRUST:
                self._emit(Warned(time=stamp(), code="COS-UNSIGNED", text=self._plan.signature.text))
                return "not checked"
            case StepKind.RESERVE:
                operations.reserve(ctx)
            case StepKind.FETCH:
                assert content is not None  # noqa: S101 - an upgrade has an image
                operations.fetch(ctx, content)
                self._moved = ctx.built.transfer_bytes if ctx.built else 0
            case StepKind.COPY:
                operations.copy(ctx)
            case StepKind.PROVE:
                return operations.prove(ctx)
            case StepKind.SWITCH:
                if self._plan.request.action in {Action.FINISH, Action.UNDO}:
                    repairs.repair(ctx)
                else:
                    operations.do_switch(ctx)
            case StepKind.BOOT_CHOICE:
                operations.boot_choice(ctx)
            case StepKind.RELABEL:
                operations.relabel(ctx)
            case StepKind.CLEAN:
                operations.clean(ctx)
            case StepKind.CHECK | StepKind.HOOKS:
                pass
        return ""

    def _failed(self, ctx: OperationContext, problem: Problem, switching: bool) -> int:
        """Before the switch nothing of ours stays; after it the record does, for repair."""
        if not switching:
            try:
                operations.discard_transition(ctx)
            except Problem as second:
                self._emit(Warned(time=stamp(), code=second.report.code, text=second.report.what))
            if ctx.passive_given_up:
                left = "active is exactly as before; passive was removed first, as consented."
                problem = from_report(msgspec.structs.replace(problem.report, unchanged=left))
        return self._finish(problem, ctx)

    # --- ending ----------------------------------------------------------------------------------------------

    def _finish(self, problem: Problem | None, ctx: OperationContext | None) -> int:
        plan = self._plan
        code = 0 if problem is None else problem.report.exit_code
        result = (
            Result.DONE
            if problem is None
            else Result.CANCELLED
            if code == ExitCode.CANCELLED
            else Result.FAILED
        )
        text = self._verdict() if problem is None else problem.report.what
        if ctx is not None:
            entry = HistoryEntry(
                id=plan.id,
                time=stamp(),
                action=plan.request.action.value,
                result=result.value,
                exit_code=code,
                text=text,
                from_version=plan.from_version,
                to_version=plan.to_version,
                digest=(plan.image.digest or "") if plan.image else "",
                signature=plan.signature.status if plan.image else "",
            )
            try:
                operations.write_history(ctx, msgspec.json.encode(entry))
            except Problem as second:
                self._emit(Warned(time=stamp(), code=second.report.code, text=second.report.what))
        self._emit(
            Finished(
                time=stamp(),
                result=result,
                text=text,
                exit_code=code,
                problem=problem.report if problem else None,
                elapsed_s=round(time.monotonic() - self._begun, 1),
                bytes_moved=self._moved,
                facts={
                    "action": plan.request.action.value,
                    "from": plan.from_version,
                    "to": plan.to_version,
                    "digest": (plan.image.digest or "") if plan.image else "",
                    "boots_next": plan.boots_after.next.value if plan.boots_after.next else "",
                    "signature": plan.signature.text if plan.image else "",
                },
            )
        )
        return code

    def _verdict(self) -> str:
        plan = self._plan
        boots = plan.boots_after.next.value if plan.boots_after.next else "nothing"
        match plan.request.action:
            case Action.UPGRADE:
                return f"active is {plan.to_version or 'the new image'}, proven on disk. {boots} boots next."
            case Action.RESTORE | Action.RESTORE_FROM_RECOVERY:
                return f"active is {plan.to_version} again, proven equal. {boots} boots next."
            case Action.SWAP:
                return f"active is {plan.to_version} and passive is {plan.from_version}. {boots} boots next."
            case Action.BOOT_ONCE:
                then = plan.boots_after.after.value if plan.boots_after.after else "nothing"
                return f"{boots} boots next, once; {then} boots after that."
            case Action.DEFAULT | Action.CONFIRM:
                return f"{boots} is the default: it boots next, and from now on."
            case Action.FINISH:
                return "The interrupted operation is finished."
            case Action.UNDO:
                return "What was interrupted is undone."
            case Action.RELABEL:
                return "The label is right now."

    def _internal(self) -> Problem:
        report = self._directory / "report.txt"
        report.write_text(traceback.format_exc())
        return Problem(
            "COS-INTERNAL",
            "The program made an error of its own and stopped.",
            unchanged="Before the switch nothing of the slots was changed; look with: cos-console status.",
            now=f"Send {report} to the makers.",
            exit_code=ExitCode.INTERNAL,
        )

    # --- events ----------------------------------------------------------------------------------------------

    def _begin(self, kind: StepKind) -> None:
        self._step = next(
            (n for n, s in enumerate(self._plan.steps) if s.kind is kind and n >= self._step), self._step
        )
        self._last_progress = None
        self._emit(StepBegun(time=stamp(), index=self._step, kind=kind))

    def _done(self, note: str) -> None:
        self._last_progress = None
        self._emit(
            StepDone(time=stamp(), index=self._step, kind=self._plan.steps[self._step].kind, note=note)
        )

    def _report(self, p: BuildProgress) -> None:
        event = Progress(
            time=stamp(),
            index=self._step,
            bytes_done=p.bytes_done,
            bytes_total=p.bytes_total,
            rate_bps=round(p.rate_bps),
            waiting_s=round(p.waiting_s, 1),
            detail=p.detail,
            refetch_bytes=p.refetch_bytes,
        )
        self._last_progress = event
        if time.monotonic() - self._last_time >= _REPORT_S:
            self._emit(event)

    def _emit(self, event: Event) -> None:
        with self._emitting:
            self._last_time = time.monotonic()
            self._log.write(msgspec.json.encode(event) + b"\n")

    def _heartbeat(self) -> None:
        while True:
            time.sleep(0.5)
            last = self._last_progress
            if last is not None and time.monotonic() - self._last_time >= _HEARTBEAT_S:
                self._emit(msgspec.structs.replace(last, time=stamp()))

    # --- control ---------------------------------------------------------------------------------------------

    def _lock(self) -> bool:
        self._lock_fd = os.open(self._directory.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{self._plan.id} {os.getpid()}\n".encode(), 0)
        return True

    def request_cancel(self) -> str:
        """`ok …` or `refused …`."""
        with self._gate:
            if not self._plan.steps[self._step].cancellable:
                return "refused The switch has begun; it is too late to stop."
            self._cancel.set()
        return "ok The operation is being stopped; nothing of the slots was changed."

    def _listen(self) -> None:
        path = self._directory / "control"
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        old = os.umask(0o177)
        server.bind(str(path))
        os.umask(old)
        server.listen(2)
        threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        threading.Thread(target=self._heartbeat, daemon=True).start()

    def _serve(self, server: socket.socket) -> None:
        while True:
            peer, _ = server.accept()
            with peer:
                peer.settimeout(2.0)
                try:
                    if peer.recv(100).strip() == b"cancel":
                        peer.sendall(self.request_cancel().encode() + b"\n")
                except OSError:
                    continue


def main() -> int:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    directory = Path(sys.argv[1])
    engine = Engine(directory)
    signal.signal(signal.SIGTERM, lambda _n, _f: (engine.request_cancel(), None)[1])
    (directory / "pid.new").write_text(str(os.getpid()))
    (directory / "pid.new").rename(directory / "pid")
    return engine.run()


if __name__ == "__main__":
    sys.exit(main())

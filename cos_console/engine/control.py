"""Starting an operation, finding the one at work, asking it to stop."""

import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from cos_console.model.plan import Plan
from cos_console.model.problem import ExitCode, Problem
from cos_console.process import run
from cos_console.sources import SourceSettings

KEPT_OPERATIONS = 20


class OperationHandle(msgspec.Struct, frozen=True):
    """Where an operation's files are."""

    run_dir: str
    id: str
    pid: int

    @property
    def directory(self) -> Path:
        return Path(self.run_dir) / self.id


def run_directory() -> Path:
    """$COS_CONSOLE_RUN_DIR, else /run/cos-console; made with mode 0700."""
    path = Path(os.environ.get("COS_CONSOLE_RUN_DIR", "/run/cos-console"))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def start(plan: Plan, settings: SourceSettings | None = None) -> OperationHandle:
    """Start the engine on `plan`, detached from this terminal. Raises Problem COS-BUSY, COS-NEEDS-ROOT."""
    if os.geteuid() != 0:
        raise Problem(
            "COS-NEEDS-ROOT",
            "Changing a disk needs root.",
            now="Run the same command as root.",
            exit_code=ExitCode.REFUSED,
        )
    busy = current()
    if busy is not None:
        raise busy_problem(busy)
    base = run_directory()
    _forget_old(base)
    directory = base / plan.id
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / "plan.json").write_bytes(msgspec.json.encode(plan))
    (directory / "settings.json").write_bytes(msgspec.json.encode(settings or SourceSettings()))
    command = [sys.executable, "-m", "cos_console.engine.worker", str(directory)]
    if not _started_by_systemd(plan.id, command, base):
        with (directory / "stderr").open("wb") as errors:
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                cwd="/",
            )
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        text = _text(directory / "pid")
        if text:
            return OperationHandle(str(base), plan.id, int(text))
        time.sleep(0.02)
    raise Problem(
        "COS-ENGINE-START",
        "The engine did not start.",
        now=f"Look at {directory}/stderr.",
        exit_code=ExitCode.INTERNAL,
    )


def current() -> OperationHandle | None:
    """The operation at work on this machine, if there is one."""
    base = run_directory()
    try:
        fd = os.open(base / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        words = os.pread(fd, 200, 0).decode().split()
        return OperationHandle(str(base), words[0], int(words[1])) if len(words) == 2 else None
    finally:
        os.close(fd)
    return None


def latest() -> OperationHandle | None:
    """The operation at work, else the one that ended last in this boot."""
    if (found := current()) is not None:
        return found
    base = run_directory()
    ended = sorted(base.glob("*/events.jsonl"), key=lambda p: p.stat().st_mtime)
    if not ended:
        return None
    text = _text(ended[-1].parent / "pid")
    return OperationHandle(str(base), ended[-1].parent.name, int(text or 0))


def cancel(handle: OperationHandle) -> str:
    """Ask the engine to stop; its answer, one sentence. Raises Problem when it isn't there or refuses."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5.0)
        try:
            s.connect(str(handle.directory / "control"))
            s.sendall(b"cancel\n")
            answer = s.recv(1000).decode().strip()
        except OSError:
            raise Problem(
                "COS-NOT-RUNNING",
                "That operation is not at work.",
                now="Look at what it did: cos-console attach.",
                exit_code=ExitCode.NOT_FOUND,
            ) from None
    verdict, _, words = answer.partition(" ")
    if verdict != "ok":
        raise Problem(
            "COS-TOO-LATE",
            words or "It is too late to stop.",
            unchanged="The operation goes on.",
            now="Wait for its end; undo it then with: cos-console rollback swap.",
            exit_code=ExitCode.REFUSED,
        )
    return words


def busy_problem(handle: OperationHandle) -> Problem:
    return Problem(
        "COS-BUSY",
        f"Operation {handle.id} is at work on this machine (process {handle.pid}).",
        now="Watch it with: cos-console attach",
        exit_code=ExitCode.BUSY,
    )


def _started_by_systemd(operation: str, command: list[str], base: Path) -> bool:
    """A transient unit of its own, so that restarting the console's unit never reaches the engine."""
    if not Path("/run/systemd/system").is_dir():
        return False
    keep = [
        f"--setenv={k}={v}"
        for k, v in os.environ.items()
        if k.lower().endswith("_proxy") or k.startswith("DOCKER_")
    ]
    unit = f"--unit=cos-console-{operation}"
    head = ["systemd-run", "--quiet", "--collect", unit, f"--setenv=COS_CONSOLE_RUN_DIR={base}", *keep]
    try:
        run([*head, "--", *command], timeout_s=10.0)
    except Problem:
        return False
    return True


def _forget_old(base: Path) -> None:
    ended = sorted(base.glob("*/events.jsonl"), key=lambda p: p.stat().st_mtime)
    for events in ended[: -KEPT_OPERATIONS or None]:
        for file in events.parent.iterdir():
            file.unlink(missing_ok=True)
        events.parent.rmdir()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""

"""A machine as a file: a recorded scan runs the console without the hardware."""

from pathlib import Path

import msgspec

from cos_console.model.machine import SCHEMA_VERSION, Machine
from cos_console.model.problem import ExitCode, Problem


def load_machine(path: Path) -> Machine:
    """The machine recorded in `path` (JSON, as `status --json` prints it). Raises Problem."""
    try:
        machine = msgspec.json.decode(path.read_bytes(), type=Machine)
    except OSError as error:
        raise Problem(
            "COS-MACHINE-FILE",
            f"The recorded machine {path} can't be read: {error.strerror}.",
            now="Name a file that status --json wrote.",
            exit_code=ExitCode.NOT_FOUND,
        ) from None
    except msgspec.DecodeError as error:
        raise Problem(
            "COS-MACHINE-FILE",
            f"{path} is not a recorded machine: {error}.",
            now="Name a file that status --json wrote.",
            exit_code=ExitCode.USAGE,
        ) from None
    if machine.api_version != SCHEMA_VERSION:
        raise Problem(
            "COS-MACHINE-FILE",
            f"{path} was recorded as {machine.api_version}; this program reads {SCHEMA_VERSION}.",
            now="Record it again with this version.",
            exit_code=ExitCode.USAGE,
        )
    return machine


def record(machine: Machine, path: Path) -> None:
    """Write `machine` as JSON that a person can read."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(machine), indent=2) + b"\n")

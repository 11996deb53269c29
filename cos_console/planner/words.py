"""Slots and disks in a few words, refusals and warnings: what every plan speaks with."""

from cos_console.model.machine import Finding, Installation, Severity, Slot, SlotState
from cos_console.model.problem import ExitCode, Problem


def what(slot: Slot | None) -> str:
    """A slot in a few words: its version, or what is wrong with it."""
    if slot is None or slot.state is SlotState.MISSING:
        return "missing"
    if slot.state is SlotState.DAMAGED:
        return f"{slot.version} (damaged)".strip()
    return slot.version or "unknown"


def version(slot: Slot | None) -> str:
    return slot.version if slot else ""


def disk(inst: Installation) -> str:
    return " ".join(p for p in (inst.disk.name, inst.disk.model) if p)


def warning(code: str, text: str) -> Finding:
    return Finding(code=code, severity=Severity.WARNING, what=text)


def refused(code: str, what: str, now: str, exit_code: ExitCode = ExitCode.REFUSED) -> Problem:
    return Problem(code, what, now=now, exit_code=exit_code)

"""One look at the machine: every disk, every installation on them, nothing written."""

from pathlib import Path

from cos_console.model.machine import Installation, Machine


def scan(target: Path | None = None) -> Machine:
    """All disks, or only `target` (a block device or a whole-disk image file). Raises Problem for a bad target."""
    raise NotImplementedError


def inspect(installation: Installation) -> Installation | None:
    """Look at one installation again; None when it is not there any more."""
    raise NotImplementedError

"""How large a new image is, and whether COS_STATE has room for it.

Size of a new image, by this rule: what was asked for with --size; else, where the source tells its unpacked
size, that and a quarter more and 64 MiB; else the configured 3240 MiB (cOS's own) or, where COS_STATE has less
free, what fits when 32 MiB stay free there, marked as estimated. An image may never be smaller than three
times what is transferred when the unpacked size is unknown, or 16 MiB.
"""

from cos_console.model.machine import Installation, SlotName
from cos_console.model.plan import SpacePhase
from cos_console.model.problem import ExitCode, Problem

MIB = 1 << 20
RESERVE = 32 * MIB
SMALLEST = 16 * MIB
_ALIGN = MIB


def image_size(
    *, asked: int | None, unpacked: int | None, transfer: int, configured: int, room: int
) -> tuple[int, bool]:
    """(bytes, whole MiB; whether it is an estimate) by the rule in the module's head. All in bytes."""
    if asked is not None:
        return max(SMALLEST, asked // _ALIGN * _ALIGN), False
    if unpacked is not None:
        return _up(max(SMALLEST, unpacked * 5 // 4 + 64 * MIB)), True
    size = min(configured, (room - RESERVE) // _ALIGN * _ALIGN)
    least = max(SMALLEST, min(_up(transfer * 3), configured))
    return max(size, least), True  # too much is shown, and refused, as what is needed


def room(inst: Installation, *, without_passive: bool = False) -> int:
    """Bytes free on COS_STATE once an unfinished image is gone, and passive where it is given up."""
    freed = sum(x.size_bytes for x in inst.leftovers if x.kind == "transition-image")
    passive = inst.slot(SlotName.PASSIVE)
    if without_passive and passive is not None:
        freed += passive.allocated_bytes
    return inst.state_free_bytes + freed


def must_fit(space: tuple[SpacePhase, ...], *, more: str = "") -> None:
    """Raises Problem COS-SPACE-STATE for the first phase without room; `more` is one more way out."""
    for phase in space:
        if not phase.fits:
            raise Problem(
                "COS-SPACE-STATE",
                f"{phase.where} has {phase.available_bytes // MIB} MiB free;"
                f" the {phase.phase} needs {'~' if phase.estimated else ''}{phase.needed_bytes // MIB} MiB.",
                now="Choose a smaller --size, remove left-overs, or free space on the state partition."
                + more,
                exit_code=ExitCode.REFUSED,
            )


def _up(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN

"""How sizes, times, disks and slots are written: the same way on every screen."""

from datetime import UTC, datetime

from cos_console.model.machine import Disk, Machine, Slot, SlotName, SlotState
from cos_console.views.page import Key, Span, Tone

BACK = Key("Esc", "back")
HELP = Key("?", "help")
MOVE = Key("↑↓", "choose")
ENTER = Key("Enter", "go on")
SHELL = Key("F2", "shell")
LEAVE = Key("q", "leave")

NOT_CHECKED = "not checked: this release has no signature check yet"


def size(count: int | None) -> str:
    """Decimal units as disks are sold: 412 MB, 3.2 GB."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            digits = 1 if unit in {"GB", "TB"} and value < 99.5 else 0
            return f"{value:.{digits}f} {unit}"
        value /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """3 s, 2 min 05 s, 1 h 10 min."""
    if seconds < 1:
        return "< 1 s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def parse_time(text: str) -> datetime | None:
    """RFC 3339 as UTC; None for anything else."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        return None


def clock(text: str, *, seconds: bool = False) -> str:
    when = parse_time(text)
    return when.strftime("%H:%M:%S" if seconds else "%H:%M UTC") if when else ""


def day(text: str) -> str:
    when = parse_time(text)
    return when.strftime("%Y-%m-%d") if when else "-"


def serial_tail(disk: Disk) -> str:
    """`..0M1847`, or empty where the disk tells no serial number."""
    return f"..{disk.serial[-6:]}" if disk.serial else ""


def disk_short(disk: Disk) -> str:
    """sda ..0M1847"""
    return f"{disk.name} {serial_tail(disk)}".strip()


def disk_long(disk: Disk) -> str:
    parts = [disk.name, disk.model, size(disk.size_bytes)]
    if disk.serial:
        parts.append(f"SN {serial_tail(disk)}")
    if disk.is_image_file:
        parts.append("image file")
    return "   ".join(p for p in parts if p)


def confirmation(disk: Disk, word: str) -> str:
    """What has to be typed before something is lost: the end of the disk's serial number, else the word."""
    tail = disk.serial.strip()[-4:]
    return tail if len(tail) == 4 else word


def machine_head(machine: Machine) -> tuple[str, ...]:
    serial = f"SN {machine.serial}" if machine.serial else ""
    return tuple(p for p in ("cOS recovery", machine.hostname, machine.product, serial) if p)


def version(slot: Slot | None) -> str:
    if slot is None or slot.state is SlotState.MISSING:
        return ""
    return slot.version


def slot_words(name: SlotName | None, slot: Slot | None) -> str:
    """active 0.5.3"""
    if name is None:
        return "nothing"
    return f"{name.value} {version(slot)}".strip()


STATE_WORDS = {
    SlotState.SOUND: ("sound", Tone.GOOD),
    SlotState.MISLABELLED: ("wrong label", Tone.WARN),
    SlotState.DAMAGED: ("damaged", Tone.BAD),
    SlotState.MISSING: ("missing", Tone.BAD),
    SlotState.UNKNOWN: ("not known", Tone.WARN),
}

SHORT_FINDINGS = {
    "COS-SLOT-NO-KERNEL": "kernel missing",
    "COS-SLOT-NO-INITRD": "initrd missing",
    "COS-SLOT-NO-BOOTARGS": "boot arguments missing",
    "COS-SLOT-NO-OS-RELEASE": "no os-release",
    "COS-SLOT-EMPTY": "empty file",
    "COS-SLOT-NO-SUPERBLOCK": "no file system",
    "COS-SLOT-NO-FILESYSTEM": "no file system",
}


def state_word(slot: Slot) -> str:
    """sound, kernel missing, wrong label, ..."""
    if slot.state is SlotState.DAMAGED:
        for finding in slot.findings:
            if finding.code in SHORT_FINDINGS:
                return SHORT_FINDINGS[finding.code]
    return STATE_WORDS[slot.state][0]


def state_span(slot: Slot) -> Span:
    tone = STATE_WORDS[slot.state][1]
    mark = {Tone.GOOD: "✓", Tone.WARN: "!", Tone.BAD: "✗"}[tone]
    return Span(f"{mark} {state_word(slot)}", tone)


def joined(words: list[str]) -> str:
    """a, b and c"""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

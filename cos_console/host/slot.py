"""One slot's image, looked at: label, os-release, kernel, and whether GRUB and Linux can use it.

Rules: a slot boots when file name, label and content agree (see the layouts' bootargs.cfg); GRUB reads unwritten
extents as stale data, and GRUB 2.06 can't read a file of more than four extents whose first block is a hole.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from cos_console.formats import osrelease
from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.grubcfg import parse_bootargs
from cos_console.formats.readat import FormatError, ReadAt
from cos_console.formats.superblock import probe
from cos_console.host.boot import Bootable
from cos_console.host.trees import LOOK_ERRORS, Node, ReadsFiles, Tree
from cos_console.model.machine import (
    FileIdentity,
    Finding,
    OsRelease,
    Severity,
    Slot,
    SlotName,
    SlotState,
)

LABELS = {SlotName.ACTIVE: "COS_ACTIVE", SlotName.PASSIVE: "COS_PASSIVE", SlotName.RECOVERY: "COS_SYSTEM"}
BOOTARGS = ("etc/elemental/bootargs.cfg", "etc/cos/bootargs.cfg")
_FATAL_LABEL = "COS-SLOT-MISLABELLED"


@dataclass(frozen=True)
class SlotLook:
    """A slot and what the boot outlook needs to know about it."""

    slot: Slot
    bootable: Bootable


def missing_slot(name: SlotName, file: str, expected_label: str) -> SlotLook:
    """A slot whose image is not there."""
    finding = _error(
        "COS-SLOT-MISSING", f"The image of {name}, {file}, is missing.", "Restore it from another slot."
    )
    slot = Slot(
        name=name,
        file=file,
        state=SlotState.MISSING,
        label="",
        expected_label=expected_label,
        fs_type="",
        os_release=None,
        size_bytes=0,
        allocated_bytes=0,
        created="",
        identity=None,
        findings=(finding,),
    )
    return SlotLook(slot, Bootable(False, False))


def look_slot(
    name: SlotName, file: str, tree: Tree, grub_tree: Tree | None, *, by_label: bool, running: bool
) -> SlotLook:
    """Look at `file`. `by_label`: whether this layout finds the root by the image's label where the image itself
    does not say. `grub_tree`: GRUB's view of the same partition, for its own hazards. Never raises."""
    expected = LABELS[name] if by_label else ""
    findings: list[Finding] = []
    try:
        node = tree.node(file)
        if node is None:
            return missing_slot(name, file, expected)
        if not node.is_file:
            raise FormatError("it is not a regular file")
        source = tree.open(file)
        return _look_image(name, file, node, source, tree, grub_tree, by_label, running)
    except LOOK_ERRORS as error:
        findings.append(
            _error("COS-SLOT-UNREADABLE", f"The image of {name} can't be read: {_words(error)}.", _RESTORE)
        )
        slot = missing_slot(name, file, expected).slot
        return SlotLook(
            _replace(slot, state=SlotState.DAMAGED, findings=tuple(findings)), Bootable(False, False)
        )


_RESTORE = "Restore or upgrade this slot from another one."


def _look_image(
    name: SlotName,
    file: str,
    node: Node,
    source: ReadAt,
    tree: Tree,
    grub_tree: Tree | None,
    by_label: bool,
    running: bool,
) -> SlotLook:
    findings: list[Finding] = []
    fs: ReadsFiles | None = None
    found = probe(source)
    label, fs_uuid, created = found.label, found.uuid, ""
    kernel = initrd = ""
    release: OsRelease | None = None
    if node.size_bytes == 0:
        findings.append(_error("COS-SLOT-EMPTY", f"The image of {name} is empty (0 bytes).", _RESTORE))
    elif found.fs_type in {"ext2", "ext3", "ext4"}:
        ext = Ext4.open(source, journal="replay")
        fs = ext
        created = _time(ext.superblock.mkfs_time)
        if ext.superblock.size_bytes > node.size_bytes:
            missing = ext.superblock.size_bytes - node.size_bytes
            findings.append(
                _error(
                    "COS-SLOT-TRUNCATED",
                    f"The image of {name} is cut off: {missing} bytes are missing.",
                    _RESTORE,
                )
            )
        if ext.superblock.errors:
            findings.append(
                _warn(
                    "COS-SLOT-FS-ERRORS", f"The file system of {name} is marked as having errors.", _RESTORE
                )
            )
        if ext.superblock.needs_recovery and not running:
            findings.append(
                _warn("COS-SLOT-DIRTY", f"The file system of {name} was not unmounted cleanly.", "")
            )
    elif found.fs_type == "squashfs":
        fs, created = _squashfs(source)
    else:
        findings.append(
            _error(
                "COS-SLOT-NO-FILESYSTEM", f"The image of {name} holds no file system that is known.", _RESTORE
            )
        )
    if fs is not None:
        kernel, initrd, by_label, more = _look_inside(name, fs, by_label)
        findings += more
        release, more = _os_release(name, fs)
        findings += more
    loads = bool(kernel and initrd) and not _truncated(findings)
    hazards = _grub_hazards(name, file, grub_tree or tree)
    findings += hazards
    loads = loads and not any(f.severity is Severity.ERROR for f in hazards)
    if found.fs_type == "squashfs":
        by_label = False
    expected = LABELS[name] if by_label else ""
    if fs is not None and expected and label != expected:
        has = f"labelled {label}" if label else "not labelled"
        findings.append(
            _error(
                _FATAL_LABEL,
                f"The image of {name} is {has} instead of {expected}, so its root will not be found.",
                f"Give it the label {expected}.",
            )
        )
    errors = {f.code for f in findings if f.severity is Severity.ERROR}
    if not errors:
        state = SlotState.SOUND
    elif errors == {_FATAL_LABEL}:
        state = SlotState.MISLABELLED
    else:
        state = SlotState.DAMAGED
    slot = Slot(
        name=name,
        file=file,
        state=state,
        label=label,
        expected_label=expected,
        fs_type=found.fs_type,
        os_release=release,
        size_bytes=node.size_bytes,
        allocated_bytes=node.allocated_bytes,
        created=created,
        identity=FileIdentity(
            inode=node.inode,
            size_bytes=node.size_bytes,
            mtime_ns=node.mtime_s * 1_000_000_000,
            fs_uuid=fs_uuid,
        ),
        running=running,
        kernel=kernel,
        initrd=initrd,
        findings=tuple(findings),
    )
    return SlotLook(slot, Bootable(loads, not errors))


def _squashfs(source: ReadAt) -> tuple[ReadsFiles | None, str]:
    from cos_console.formats.squashfs import Squashfs

    fs = Squashfs.open(source)
    return fs, _time(int.from_bytes(source.read_at(8, 4), "little"))


def _look_inside(name: SlotName, fs: ReadsFiles, by_label: bool) -> tuple[str, str, bool, list[Finding]]:
    """(kernel, initrd, whether the root is found by label, findings)."""
    path = next((p for p in BOOTARGS if fs.exists(p)), None)
    if path is None:
        text = f"The image of {name} has no boot arguments (etc/cos/bootargs.cfg), so GRUB can't boot it."
        return "", "", by_label, [_error("COS-SLOT-NO-BOOTARGS", text, _RESTORE)]
    try:
        arguments = parse_bootargs(fs.read_file(path, 65536))
    except LOOK_ERRORS as error:
        text = f"The boot arguments of {name} ({path}) can't be used: {_words(error)}."
        return "", "", by_label, [_error("COS-SLOT-NO-BOOTARGS", text, _RESTORE)]
    if arguments.command_line:
        by_label = arguments.root_by_image_label
    found: dict[str, str] = {}
    findings: list[Finding] = []
    places = {"kernel": arguments.kernel, "initrd": arguments.initramfs}
    for word, place in places.items():
        problem = _unreadable(fs, place) if place else "is not named by its boot arguments"
        if problem:
            where = f" ({place})" if place else ""
            text = f"The {word} of {name}{where} {problem}."
            findings.append(_error(f"COS-SLOT-NO-{word.upper()}", text, _RESTORE))
        else:
            found[word] = place
    return found.get("kernel", ""), found.get("initrd", ""), by_label, findings


def _unreadable(fs: ReadsFiles, path: str) -> str:
    """Why a file can't be loaded, empty when its first and last bytes can be read."""
    try:
        if not fs.exists(path):
            return "is missing"
        file = fs.open_file(path)
        if not file.size_bytes:
            return "is empty"
        for at in (0, max(0, file.size_bytes - 4096)):
            if not file.read_at(at, 4096):
                return "can't be read"
    except LOOK_ERRORS as error:
        return f"can't be read ({_words(error)})"
    return ""


def _os_release(name: SlotName, fs: ReadsFiles) -> tuple[OsRelease | None, list[Finding]]:
    for path in ("etc/os-release", "usr/lib/os-release"):
        try:
            if not fs.exists(path):
                continue
            fields = osrelease.parse(fs.read_file(path, 65536))
        except LOOK_ERRORS:
            continue
        if fields:
            return (
                OsRelease(
                    name=fields.get("NAME", ""),
                    version=osrelease.version(fields),
                    pretty_name=fields.get("PRETTY_NAME", ""),
                    fields=fields,
                ),
                [],
            )
    text = f"The image of {name} has no os-release, so it is no complete system."
    return None, [_error("COS-SLOT-NO-OSRELEASE", text, _RESTORE)]


def _grub_hazards(name: SlotName, file: str, tree: Tree) -> list[Finding]:
    """What Linux reads well and GRUB does not."""
    try:
        node, runs = tree.node(file), tree.runs(file)
    except LOOK_ERRORS:
        return []
    if node is None or not node.size_bytes or not runs:
        return []
    found = []
    if any(not r.written for r in runs):
        text = f"The image of {name} has reserved but never written blocks, which GRUB reads as old disk content."
        found.append(_warn("COS-SLOT-UNWRITTEN", text, "Rewrite this slot: upgrade or restore it."))
    if runs[0].logical > 0 and len(runs) > 4:
        text = f"The first block of {name}'s image is a hole, and GRUB 2.06 can't read such a file."
        found.append(_error("COS-SLOT-FIRST-BLOCK-HOLE", text, "Rewrite this slot: upgrade or restore it."))
    return found


def _truncated(findings: list[Finding]) -> bool:
    return any(f.code == "COS-SLOT-TRUNCATED" for f in findings)


def _error(code: str, what: str, now: str) -> Finding:
    return Finding(code=code, severity=Severity.ERROR, what=what, now=now)


def _warn(code: str, what: str, now: str) -> Finding:
    return Finding(code=code, severity=Severity.WARNING, what=what, now=now)


def _replace(slot: Slot, *, state: SlotState, findings: tuple[Finding, ...]) -> Slot:
    import msgspec

    return msgspec.structs.replace(slot, state=state, findings=findings)


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if seconds > 0 else ""

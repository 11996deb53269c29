"""Partitions of one disk that belong together, and what is installed on them.

Grouping is by disk and never by label alone. The order of the layout tests is from cheap to dear: UKI files on an
ESP, a snapshotter, /cOS images, then what the images and the disk say about their maker.
"""

from dataclasses import dataclass

from cos_console.formats.fat import Fat
from cos_console.formats.readat import ReadAt
from cos_console.host.boot import Bootable, outlook
from cos_console.host.grub import GrubLook, PlacedTree, look_grub
from cos_console.host.leftovers import find_leftovers
from cos_console.host.looks import Look, disagreements, nodes
from cos_console.host.slot import LABELS, SlotLook, look_slot, missing_slot
from cos_console.host.trees import LOOK_ERRORS, Node, Tree
from cos_console.model.machine import (
    BootOutlook,
    Disk,
    Finding,
    Installation,
    Layout,
    Leftover,
    Partition,
    Severity,
    Slot,
    SlotName,
)

ROLES = {
    "state": "COS_STATE",
    "recovery": "COS_RECOVERY",
    "oem": "COS_OEM",
    "persistent": "COS_PERSISTENT",
    "boot": "COS_GRUB",
}
_TITLES = {
    Layout.COS: "cOS",
    Layout.ELEMENTAL_V1: "Elemental",
    Layout.KAIROS: "Kairos",
    Layout.HARVESTER: "Harvester",
    Layout.ELEMENTAL_V2: "Elemental (snapshots)",
    Layout.KAIROS_UKI: "Kairos (UKI)",
    Layout.VANILLA: "Vanilla image",
    Layout.UNKNOWN: "Unknown layout",
}
_IMAGES = {SlotName.ACTIVE: "cOS/active.img", SlotName.PASSIVE: "cOS/passive.img"}
_RECOVERY_FILES = ("cOS/recovery.squashfs", "cOS/recovery.img", "boot/recovery.img")


@dataclass(frozen=True)
class Members:
    """Partition numbers of one installation."""

    roles: dict[str, Partition]
    findings: tuple[Finding, ...]
    uki: bool = False
    """The boot partition holds unified kernel images: the layout without slots."""


def is_uki(source: ReadAt) -> bool:
    """Whether an EFI system partition holds Kairos' unified kernel images. Never raises."""
    try:
        fat = Fat(source)
        kairos = any(n.lower().endswith(".efi") for n in fat.listdir("EFI/kairos"))
        return kairos and bool(fat.listdir("loader/entries"))
    except LOOK_ERRORS:
        return False


def group(disk: Disk, looks: dict[int, Look], uki: frozenset[int] = frozenset()) -> Members | None:
    """The partitions of `disk` that make an installation, None when there is none on it.

    `uki`: numbers of the partitions for which `is_uki` holds.
    """
    roles: dict[str, Partition] = {}
    findings: list[Finding] = []
    for role, label in ROLES.items():
        same = [p for p in disk.partitions if p.fs_label == label]
        if not same and role in {"state", "recovery"}:
            same = [
                p for p in disk.partitions if p.fs_label not in ROLES.values() and _has_images(looks, p, role)
            ]
            if same:
                what = f"Partition {same[0].number} holds {role} images but is not labelled {label}."
                findings.append(
                    _warn("COS-PARTITION-LABEL", what, f"Give it the label {label}, or GRUB won't find it.")
                )
        if not same:
            continue
        if len(same) > 1:
            same.sort(key=lambda p: (not _has_images(looks, p, role), p.number))
            numbers = ", ".join(str(p.number) for p in sorted(same, key=lambda p: p.number))
            what = f"Partitions {numbers} of {disk.name} are all labelled {label}; {same[0].number} is used."
            now = "Relabel the ones that don't belong, because GRUB takes the first it finds."
            findings.append(_warn("COS-DUPLICATE-LABEL", what, now))
        roles[role] = same[0]
    if "boot" not in roles:
        for flag in ("esp", "bios_grub"):
            boot = next((p for p in disk.partitions if flag in p.flags), None)
            if boot is not None:
                roles["boot"] = boot
                break
    if uki and "state" not in roles:
        roles["boot"] = next(p for p in disk.partitions if p.number in uki)
        return Members(roles, tuple(findings), uki=True)
    if "state" not in roles and "recovery" not in roles:
        return None
    return Members(roles, tuple(findings))


def _has_images(looks: dict[int, Look], partition: Partition, role: str) -> bool:
    look = looks.get(partition.number)
    if look is None or look.linux is None:
        return False
    try:
        names = look.linux.names("cOS")
    except LOOK_ERRORS:
        return False
    wanted = {"active.img", "passive.img"} if role == "state" else {"recovery.img", "recovery.squashfs"}
    return bool(wanted & set(names))


def look_installation(
    disk: Disk,
    members: Members,
    looks: dict[int, Look],
    installation_id: str,
    running: frozenset[tuple[int, int]],
) -> Installation:
    """Look inside; never raises. `running`: (partition number, inode) of the image our root is on."""
    roles = members.roles
    state, recovery = _look_of(looks, roles.get("state")), _look_of(looks, roles.get("recovery"))
    findings: list[Finding] = list(members.findings)
    used = {p.number: looks[p.number] for p in roles.values() if p.number in looks}
    for look in used.values():
        findings += look.findings
    layout = Layout.KAIROS_UKI if members.uki else _first_layout(roles, state)
    slots: tuple[SlotLook, ...] = ()
    leftovers: tuple[Leftover, ...] = ()
    boot = BootOutlook(next=None, after=None, if_fails=(), explained=_NOT_HANDLED)
    grub = GrubLook((), (), {}, True, "", "", ())
    if layout is None:
        by_label = _root_by_label(state)
        slots = _slots(state, recovery, roles, by_label, running)
        layout = _layout(disk, state, looks, roles, slots)
        grub = _grub(state, recovery, looks)
        findings += grub.findings
        able = {s.slot.name: s.bootable for s in slots}
        _grub_names(state, able)
        boot = outlook(
            grub.menu,
            grub.variables,
            able,
            reads_environment=grub.reads_environment,
            fallback=grub.fallback,
            notes=grub.notes,
        )
        leftovers = find_leftovers(_nodes(state), _nodes(recovery), tuple(s.slot for s in slots))
    for look in used.values():
        findings += disagreements(look, ("grubenv", "grub_oem_env"))
    if not layout.handled and layout is not Layout.VANILLA:
        findings.append(_not_handled(layout))
    return Installation(
        id=installation_id,
        disk=disk,
        layout=layout,
        state_partition=_number(roles.get("state")),
        recovery_partition=_number(roles.get("recovery")),
        oem_partition=_number(roles.get("oem")),
        persistent_partition=_number(roles.get("persistent")),
        boot_partition=_number(roles.get("boot")),
        slots=tuple(s.slot for s in slots),
        boot=boot,
        boot_files=grub.files,
        leftovers=leftovers,
        findings=tuple(findings),
        state_free_bytes=state.free_bytes if state else 0,
        recovery_free_bytes=recovery.free_bytes if recovery else 0,
        state_mounted_at=state.mounted_at if state else "",
        title=_title(layout, grub, slots),
    )


_NOT_HANDLED = "This layout chooses what boots in its own way, which is not looked at here."


def _first_layout(roles: dict[str, Partition], state: Look | None) -> Layout | None:
    """Layouts that are told without looking at images and are not handled; None to go on."""
    partition = roles.get("state")
    if partition is None:
        return None
    if partition.fs_type == "btrfs":
        return Layout.ELEMENTAL_V2
    if partition.fs_type not in {"ext2", "ext3", "ext4"}:
        return Layout.UNKNOWN
    if state is not None and state.linux is not None and ".snapshots" in _names(state.linux, ""):
        return Layout.ELEMENTAL_V2
    return None


def _layout(
    disk: Disk,
    state: Look | None,
    looks: dict[int, Look],
    roles: dict[str, Partition],
    slots: tuple[SlotLook, ...],
) -> Layout:
    if state is None or state.linux is None:
        return Layout.VANILLA if state is None else Layout.UNKNOWN
    root = _names(state.linux, "")
    if "cOS" not in root:
        return Layout.VANILLA
    fields: dict[str, str] = {}
    for look in slots:
        if look.slot.os_release is not None:
            fields = {**look.slot.os_release.fields, **fields}
    oem = _look_of(looks, roles.get("oem"))
    oem_names = _names(oem.linux, "") if oem is not None and oem.linux is not None else ()
    if (
        any(p.fs_label == "HARV_LH_DEFAULT" for p in disk.partitions)
        or "harvester.config" in oem_names
        or fields.get("GRUB_ENTRY_NAME", "").startswith("Harvester")
    ):
        return Layout.HARVESTER
    if any(key.startswith("KAIROS_") for key in fields):
        return Layout.KAIROS
    if "state.yaml" in root:
        return Layout.ELEMENTAL_V1
    return Layout.COS


def _root_by_label(state: Look | None) -> bool:
    """For an image that does not tell itself: cOS and Kairos find the root by label, Elemental v1 doesn't."""
    if state is None or state.linux is None:
        return True
    return "state.yaml" not in _names(state.linux, "")


def _slots(
    state: Look | None,
    recovery: Look | None,
    roles: dict[str, Partition],
    by_label: bool,
    running: frozenset[tuple[int, int]],
) -> tuple[SlotLook, ...]:
    found: list[SlotLook] = []
    for name, file in _IMAGES.items():
        found.append(_one(name, file, state, by_label, running))
    if recovery is not None:
        file = "cOS/recovery.img"
        if recovery.linux is not None:
            for candidate in _RECOVERY_FILES:
                if _node(recovery.linux, candidate) is not None:
                    file = candidate
                    break
        found.append(_one(SlotName.RECOVERY, file, recovery, by_label, running))
    elif "recovery" in roles:
        found.append(missing_slot(SlotName.RECOVERY, "cOS/recovery.img", ""))
    return tuple(found)


def _one(
    name: SlotName, file: str, look: Look | None, by_label: bool, running: frozenset[tuple[int, int]]
) -> SlotLook:
    if look is None or look.linux is None:
        return missing_slot(name, file, LABELS[name] if by_label else "")
    node = _node(look.linux, file)
    runs = node is not None and (look.partition.number, node.inode) in running
    return look_slot(name, file, look.linux, look.grub, by_label=by_label, running=runs)


def _grub_names(state: Look | None, able: dict[SlotName, Bootable]) -> None:
    """GRUB loads only what it sees itself: a name that the journal still holds is not there for it."""
    if state is None or not state.two_views or state.grub is None:
        return
    for name, file in _IMAGES.items():
        if name in able and able[name].loads and _node(state.grub, file) is None:
            able[name] = Bootable(False, False)


def _grub(state: Look | None, recovery: Look | None, looks: dict[int, Look]) -> GrubLook:
    others = tuple(
        PlacedTree(look.partition, look.grub) for _, look in sorted(looks.items()) if look.grub is not None
    )
    place = PlacedTree(state.partition, state.grub) if state is not None and state.grub is not None else None
    second = None
    if recovery is not None and recovery.grub is not None:
        second = PlacedTree(recovery.partition, recovery.grub)
    return look_grub(place, others, second)


def _title(layout: Layout, grub: GrubLook, slots: tuple[SlotLook, ...]) -> str:
    named = grub.variables.get("default_menu_entry", "")
    if named:
        return named
    for look in slots:
        release: Slot = look.slot
        if release.os_release is not None and release.os_release.fields.get("GRUB_ENTRY_NAME"):
            return release.os_release.fields["GRUB_ENTRY_NAME"]
    return _TITLES[layout]


def _not_handled(layout: Layout) -> Finding:
    tool = {
        Layout.ELEMENTAL_V2: "Upgrade it with the elemental tool on the running system.",
        Layout.KAIROS_UKI: "Upgrade it with kairos-agent on the running system.",
    }.get(layout, "Look at it with the shell.")
    return Finding(
        code="COS-LAYOUT-NOT-HANDLED",
        severity=Severity.WARNING,
        what=f"This is {_TITLES[layout]}, which is recognised but never changed here.",
        now=tool,
    )


def _look_of(looks: dict[int, Look], partition: Partition | None) -> Look | None:
    return looks.get(partition.number) if partition is not None else None


def _number(partition: Partition | None) -> int | None:
    return partition.number if partition is not None else None


def _names(tree: Tree, path: str) -> tuple[str, ...]:
    try:
        return tree.names(path)
    except LOOK_ERRORS:
        return ()


def _node(tree: Tree, path: str) -> Node | None:
    try:
        return tree.node(path)
    except LOOK_ERRORS:
        return None


def _nodes(look: Look | None) -> dict[str, Node]:
    if look is None or look.linux is None:
        return {}
    try:
        return nodes(look.linux, "cOS")
    except LOOK_ERRORS:
        return {}


def _warn(code: str, what: str, now: str) -> Finding:
    return Finding(code=code, severity=Severity.WARNING, what=what, now=now)

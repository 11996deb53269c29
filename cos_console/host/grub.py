"""The installed boot loader's menu and environment: which files it loads, from where, in which order.

Rules per family (grub.cfg of cOS 0.5-0.7, Kairos; Elemental v1, Harvester): cOS and Kairos take the first device in
GRUB's enumeration that has /grub_oem_env, then the first with /grubenv; Elemental v1 reads /grub_oem_env on
COS_STATE and /grubenv on the partition that its oem_label names. The later file wins. cOS 0.5.3 loads none.
"""

import re
from dataclasses import dataclass

from cos_console.formats import grubcfg, grubenv
from cos_console.host.boot import STOCK_FALLBACK, STOCK_MENU, MenuEntry
from cos_console.host.trees import LOOK_ERRORS, Tree, read_small
from cos_console.model.machine import BootFile, Finding, Partition, Severity, SlotName

CONFIG_PATHS = ("grub2/grub.cfg", "grub/grub.cfg", "boot/grub2/grub.cfg", "boot/grub/grub.cfg")
_IMAGES = {
    "active": SlotName.ACTIVE,
    "passive": SlotName.PASSIVE,
    "recovery": SlotName.RECOVERY,
}
_NAME = re.compile(r"\$\{?(\w+)\}?")
_STOCK_LOADS: tuple[grubcfg.EnvironmentFile, ...] = (
    grubcfg.EnvironmentFile("grub_oem_env", "file"),
    grubcfg.EnvironmentFile("grubenv", "file"),
)
_IDS = {"cos": SlotName.ACTIVE, "fallback": SlotName.PASSIVE, "recovery": SlotName.RECOVERY}


@dataclass(frozen=True)
class GrubLook:
    """What the installed GRUB knows. `variables` are those it has after loading its environment."""

    menu: tuple[MenuEntry, ...]
    files: tuple[BootFile, ...]
    variables: dict[str, str]
    reads_environment: bool
    fallback: str
    notes: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class PlacedTree:
    """A partition of the installation's disk and GRUB's view of its file system."""

    partition: Partition
    tree: Tree


def look_grub(
    state: PlacedTree | None, others: tuple[PlacedTree, ...], fallback_place: PlacedTree | None
) -> GrubLook:
    """`others`: all readable partitions of the disk, by number. `fallback_place`: where to look for grub.cfg when
    COS_STATE has none (a raw image's recovery partition). Never raises."""
    findings: list[Finding] = []
    config, words = None, ""
    for place in (p for p in (state, fallback_place) if p is not None):
        config, words = _config(place)
        if config is not None:
            break
    menu, fallback, notes = STOCK_MENU, STOCK_FALLBACK, ""
    loads = _STOCK_LOADS
    reads = True
    if config is None:
        notes = "The installed grub.cfg could not be read, so the stock rules of this layout are assumed."
        what = f"The installed grub.cfg can't be read: {words or 'there is none'}."
        findings.append(
            _finding("COS-GRUB-CONFIG", Severity.WARNING, what, "Look at COS_STATE with the shell.")
        )
    else:
        menu = tuple(MenuEntry(e.entry_id, e.title, _slot_of(e)) for e in config.entries)
        fallback = " ".join(config.fallback) or STOCK_FALLBACK
        loads, reads = config.environment, config.reads_environment
        if reads and not config.honours_next_entry:
            notes = "The installed grub.cfg does not know next_entry."
        if config.unknown:
            notes = f"{notes} Not understood in grub.cfg: {'; '.join(config.unknown[:3])}.".strip()
    files, variables, more = _environment(loads, state, others)
    findings += more
    title = variables.get("default_menu_entry") or "cOS"
    menu = tuple(MenuEntry(e.id, e.title.replace("${default_menu_entry}", title), e.slot) for e in menu)
    if config is not None and not config.honours_next_entry:
        variables = {k: v for k, v in variables.items() if k != "next_entry"}
    return GrubLook(menu, files, variables, reads, fallback, notes, tuple(findings))


def _config(place: PlacedTree) -> tuple[grubcfg.GrubConfig | None, str]:
    words = ""
    for path in CONFIG_PATHS:
        try:
            data = read_small(place.tree, path)
            if data is None:
                continue
            return grubcfg.parse_grub_cfg(data), ""
        except LOOK_ERRORS as error:
            words = " ".join(str(error).split())
    return None, words


def _slot_of(entry: grubcfg.Entry) -> SlotName | None:
    stem = entry.image.rpartition("/")[2].partition(".")[0]
    return _IMAGES.get(stem) or _IDS.get(entry.entry_id)


def _environment(
    loads: tuple[grubcfg.EnvironmentFile, ...], state: PlacedTree | None, others: tuple[PlacedTree, ...]
) -> tuple[tuple[BootFile, ...], dict[str, str], list[Finding]]:
    files: list[BootFile] = []
    variables: dict[str, str] = {}
    findings: list[Finding] = []
    for load in loads:
        name = load.path
        if load.found_by == "root":
            places: tuple[PlacedTree, ...] = (state,) if state else ()
        elif load.found_by == "label":
            label = _NAME.sub(lambda m: variables.get(m[1], ""), load.key) or "COS_OEM"
            places = tuple(p for p in others if p.partition.fs_label == label)
        else:
            places = others
        copies = [b for b in (_boot_file(p, name) for p in places) if b is not None]
        # The first copy is the one that GRUB's search finds, as far as the disk alone can tell: it ranks highest.
        for place, (file, broken) in enumerate(reversed(copies)):
            wins = place == len(copies) - 1
            files.append(_ranked(file, len(files)))
            if wins:
                variables.update(file.variables)
            if broken:
                what = f"The boot environment {name} on partition {file.partition} is damaged: {broken}."
                now = "Write it anew by choosing what boots next."
                findings.append(_finding("COS-GRUBENV-DAMAGED", Severity.WARNING, what, now))
        if len(copies) > 1:
            where = ", ".join(str(file.partition) for file, _ in copies)
            what = f"{name} is on several partitions of this disk ({where}); GRUB takes the first it finds."
            now = "Remove the copies that do not belong there."
            findings.append(_finding("COS-GRUBENV-AMBIGUOUS", Severity.WARNING, what, now))
    return tuple(files), variables, findings


def _boot_file(place: PlacedTree, name: str) -> tuple[BootFile, str] | None:
    broken, variables = "", dict[str, str]()
    try:
        block = read_small(place.tree, name, 65536)
        if block is None:
            return None
        if block:
            variables = grubenv.variables(block)
        if len(block) != grubenv.BLOCK_BYTES:
            broken = f"it has {len(block)} bytes instead of {grubenv.BLOCK_BYTES}"
    except LOOK_ERRORS as error:
        broken = " ".join(str(error).split())
    file = BootFile(
        partition=place.partition.number, path=name, variables=variables, valid=not broken, rank=0
    )
    return file, broken


def _ranked(file: BootFile, rank: int) -> BootFile:
    return BootFile(
        partition=file.partition, path=file.path, variables=file.variables, valid=file.valid, rank=rank
    )


def _finding(code: str, severity: Severity, what: str, now: str) -> Finding:
    return Finding(code=code, severity=severity, what=what, now=now)

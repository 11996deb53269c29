"""Look closer: everything the scan found about one installation. Reads only."""

from cos_console.model.machine import Installation, Machine
from cos_console.views import words
from cos_console.views.home import boots_line, judge, slot_table
from cos_console.views.page import Block, Facts, Gap, Key, Line, Lines, Page, Span, Table, Tone, line

HELP = (
    "Everything the look at this disk found. Nothing here changes anything.",
    "The partitions are read from the disk itself, not from what the system remembers of it.",
    "GRUB environment: the variables GRUB keeps on the disk, such as next_entry and saved_entry.",
)


def details_page(machine: Machine, inst: Installation, now: str) -> Page:
    mark, verdict = judge(inst)
    rows = tuple(
        (
            Span(str(p.number)),
            Span(p.fs_label or p.name or "-"),
            Span(p.fs_type or "-"),
            Span(words.size(p.size_bytes)),
            Span(p.part_uuid, Tone.QUIET),
        )
        for p in inst.disk.partitions
    )
    blocks: list[Block] = [
        Facts(
            (
                ("Disk", line(words.disk_long(inst.disk))),
                ("Path", line(inst.disk.path)),
                ("Layout", line(f"{inst.layout.value}   {inst.title}".strip())),
                (
                    "Table",
                    line(
                        f"{inst.disk.table.value}, {inst.disk.sector_bytes}-byte sectors   {inst.disk.disk_id}"
                    ),
                ),
                ("Free", line(f"{words.size(inst.state_free_bytes)} on COS_STATE")),
            )
        ),
        Gap(),
        Table(("No", "Label", "Kind", "Size", "PARTUUID"), rows),
        Gap(),
        slot_table(inst),
        Lines((boots_line(inst),)),
    ]
    if inst.boot.explained:
        blocks.append(Lines((line((inst.boot.explained, Tone.QUIET)),)))
    for slot in inst.slots:
        facts: list[tuple[str, Line]] = [
            (
                "File",
                line(
                    f"{slot.file}   {words.size(slot.size_bytes)}, {words.size(slot.allocated_bytes)} on disk"
                ),
            ),
            ("Label", line(f"{slot.label or '-'}   {slot.fs_type}")),
        ]
        if slot.os_release:
            facts.append(("System", line(slot.os_release.pretty_name or slot.os_release.name or "-")))
        if slot.kernel:
            facts.append(("Kernel", line(f"{slot.kernel}   {slot.initrd}")))
        facts += [("!", line((f.what, Tone.WARN), f" {f.now}")) for f in slot.findings]
        blocks += [
            Gap(),
            Lines((line((slot.name.value, Tone.STRONG), "   ", words.state_span(slot)),)),
            Facts(tuple(facts)),
        ]
    for file in inst.boot_files:
        what = ", ".join(f"{k}={v}" for k, v in sorted(file.variables.items())) or "empty"
        where = f"{file.path} on partition {file.partition}"
        blocks += [
            Gap(),
            Facts((("GRUB environment", line(where)), ("", line(what if file.valid else "not valid")))),
        ]
    trouble = [(x.kind, line((x.meaning, Tone.WARN), f" {x.way_out}")) for x in inst.leftovers]
    trouble += [("Note", line((f.what, Tone.WARN), f" {f.now}")) for f in (*inst.findings, *machine.findings)]
    if trouble:
        blocks += [Gap(), Facts(tuple(trouble))]
    return Page(
        name="details",
        head=(*words.machine_head(machine)[:2], words.disk_short(inst.disk)),
        right=f"Look closer   {now}",
        mark=mark,
        verdict=verdict,
        blocks=tuple(blocks),
        keys=(Key("↑↓", "scroll"), words.BACK, words.HELP),
        help=HELP,
    )

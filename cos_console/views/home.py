"""The first page: which machine, what is installed, what is broken, what boots next, what to do."""

from cos_console.model.machine import (
    Installation,
    Machine,
    Severity,
    Slot,
    SlotName,
    SlotState,
)
from cos_console.views import words
from cos_console.views.page import Block, Choice, Facts, Gap, Key, Line, Lines, Page, Span, Table, Tone, line

MENDERS = {"finish": "Finish what was interrupted", "undo": "Undo what was interrupted"}

HELP = (
    "This page shows one installed system: the partitions of one disk that belong together.",
    (
        "A slot is a whole system image. active boots by default, passive is the one before it, recovery is for"
        " emergencies."
    ),
    "Boots: 'next' is what GRUB chooses now; 'if that fails' is what it falls back to.",
    "Nothing is changed from this page. Each choice first shows a plan, and the plan's default answer is no.",
    "← → (or Tab) shows the next installation, r looks at the disks again, h shows the history.",
)


def scanning_page(now: str) -> Page:
    """While the first look is under way."""
    return Page(
        name="home",
        head=("cOS recovery",),
        right=now,
        mark=Tone.ACCENT,
        verdict="Looking at the disks. Nothing is written.",
        keys=(words.SHELL, words.LEAVE, words.HELP),
        help=HELP,
    )


def home_page(machine: Machine, index: int, now: str) -> Page:
    """The installation at `index`; `now` is the clock as shown."""
    head = words.machine_head(machine)
    right = "   ".join(p for p in (_mode(machine), now) if p)
    if not machine.installations:
        return _nothing(machine, head, right)
    index %= len(machine.installations)
    inst = machine.installations[index]
    mark, verdict = judge(inst)
    count = len(machine.installations)
    blocks: list[Block] = [
        Lines(
            (
                line(
                    (f"Installation {index + 1} of {count}", Tone.STRONG),
                    f"   {words.disk_long(inst.disk)}",
                ),
            )
        ),
        slot_table(inst),
        Lines((boots_line(inst),)),
    ]
    troubles = _troubles(inst, verdict)
    if troubles:
        blocks += [Gap(), Facts(tuple(troubles[:3]))]
    after: list[Block] = []
    for other_number, other in enumerate(machine.installations):
        if other_number != index:
            tone, sentence = judge(other)
            name = words.disk_short(other.disk)
            after.append(
                Lines(
                    (
                        line(
                            (f"Installation {other_number + 1} of {count}   {name}   ", Tone.QUIET),
                            (_mark(tone) + " " + sentence, tone),
                        ),
                    )
                )
            )
    if after:
        after.insert(0, Gap())
    keys = [words.MOVE, words.ENTER]
    if count > 1:
        keys.append(Key("→", "next"))
    keys += [Key("r", "look again"), Key("h", "history"), words.SHELL, words.LEAVE, words.HELP]
    return Page(
        name="home",
        head=head,
        right=right,
        mark=mark,
        verdict=verdict,
        blocks=tuple(blocks),
        prompt="What to do",
        choices=home_choices(inst),
        after=tuple(after[:4]),
        keys=tuple(keys),
        help=HELP,
    )


def judge(inst: Installation) -> tuple[Tone, str]:
    """The verdict: one sentence a tired person can act on."""
    if not inst.layout.handled:
        return Tone.WARN, f"{inst.disk.name} has a {inst.layout.value} layout. It is shown and left alone."
    active, passive = inst.slot(SlotName.ACTIVE), inst.slot(SlotName.PASSIVE)
    broken = [s for s in inst.slots if s.state in {SlotState.DAMAGED, SlotState.MISSING}]
    left = next((x for x in inst.leftovers if x.repair in MENDERS), None)
    boots = inst.boot.next
    if boots is None:
        return Tone.BAD, "What GRUB chooses can't boot. " + _sound_sentence(inst)
    if left is not None:
        return (
            Tone.WARN,
            f"An operation was interrupted. {words.slot_words(boots, inst.slot(boots))} boots next.",
        )
    for slot in (active, passive):
        if slot is not None and slot in broken:
            other = passive if slot is active else active
            rest = f" {words.slot_words(other.name, other)} is sound." if _sound(other) and other else ""
            why = words.state_word(slot)
            tone = Tone.BAD if slot is active else Tone.WARN
            if slot.state is SlotState.MISSING:
                return tone, f"{slot.name.value} is missing.{rest}"
            return tone, f"{words.slot_words(slot.name, slot)} won't boot: {why}.{rest}"
    mislabelled = [s for s in inst.slots if s.state is SlotState.MISLABELLED]
    if mislabelled:
        return (
            Tone.WARN,
            f"{mislabelled[0].name.value} has the label {mislabelled[0].label or 'none'}, not its own.",
        )
    error = next((f for f in inst.findings if f.severity is Severity.ERROR), None)
    if error is not None:
        return Tone.BAD, error.what
    if broken:
        return (
            Tone.WARN,
            f"{words.slot_words(boots, inst.slot(boots))} boots next. {broken[0].name.value} is damaged.",
        )
    first = inst.slot(boots)
    second = passive if boots is SlotName.ACTIVE else active
    fallback = (
        f" {words.slot_words(second.name, second)} is sound."
        if second is not None and _sound(second)
        else " There is no second slot to fall back to."
    )
    return Tone.GOOD, f"{words.slot_words(boots, first)} boots next.{fallback}"


def _sound(slot: Slot | None) -> bool:
    return slot is not None and slot.state is SlotState.SOUND


def _sound_sentence(inst: Installation) -> str:
    names = [words.slot_words(s.name, s) for s in inst.slots if s.state is SlotState.SOUND]
    if not names:
        return "No slot is sound."
    return f"{words.joined(names)} {'is' if len(names) == 1 else 'are'} sound."


def _mark(tone: Tone) -> str:
    return {Tone.GOOD: "✓", Tone.BAD: "✗", Tone.WARN: "!"}.get(tone, "●")


def _mode(machine: Machine) -> str:
    return {
        "livecd": "LiveCD",
        "active": "on active",
        "passive": "on passive",
        "recovery": "on recovery",
    }.get(machine.booted_from.value, "")


def _nothing(machine: Machine, head: tuple[str, ...], right: str) -> Page:
    rows = tuple(
        (
            Span(d.name),
            Span(d.model or "-"),
            Span(words.size(d.size_bytes)),
            Span(words.serial_tail(d) or "-"),
            Span(f"{len(d.partitions)} partitions"),
        )
        for d in machine.disks[:10]
    )
    blocks: list[Block] = [
        Lines((line("No partition labelled COS_STATE or COS_RECOVERY is on the disks below."),)),
        Gap(),
    ]
    if rows:
        blocks.append(Table(("Disk", "Model", "Size", "Serial", "Holds"), rows))
    else:
        blocks.append(Lines((line("No disk was found."),)))
    for finding in machine.findings[:3]:
        blocks += [Gap(), Lines((line((f"! {finding.what}", Tone.WARN), f" {finding.now}"),))]
    return Page(
        name="home",
        head=head,
        right=right,
        mark=Tone.WARN,
        verdict="No cOS installation was found. Plug in the disk; it shows up by itself.",
        blocks=tuple(blocks),
        choices=(Choice("rescan", "Look again", undo="reads only", key="r"),),
        prompt="What to do",
        keys=(words.ENTER, Key("r", "look again"), words.SHELL, words.LEAVE, words.HELP),
        help=HELP,
    )


def slot_table(inst: Installation) -> Table:
    rows: list[tuple[Span, ...]] = []
    for name in SlotName:
        slot = inst.slot(name)
        if slot is None:
            continue
        gone = slot.state is SlotState.MISSING
        label = name.value + (" (running)" if slot.running else "")
        rows.append(
            (
                Span(label, Tone.STRONG),
                Span(words.version(slot) or "-"),
                Span(words.day(slot.created) if not gone else "-"),
                Span(words.size(slot.size_bytes) if not gone else "-"),
                words.state_span(slot),
                Span(boots_word(inst, name), Tone.ACCENT if name is inst.boot.next else Tone.QUIET),
            )
        )
    if not rows:
        rows.append((Span("no slots that this console knows", Tone.QUIET),))
    return Table(("Slot", "Version", "Built", "Size", "State", "Boots"), tuple(rows), boxed=True)


def boots_word(inst: Installation, name: SlotName) -> str:
    boot = inst.boot
    if name is boot.next:
        return "once, next" if boot.after is not None and boot.after is not boot.next else "next"
    if name is boot.after:
        return "after that"
    if name in boot.if_fails:
        return "if that fails"
    return "by hand"


def boots_line(inst: Installation) -> Line:
    """Next boot:  active 0.5.3 ─ if it fails ─▶ passive 0.5.2"""
    boot = inst.boot
    if boot.next is None:
        return line(("Next boot:  ", Tone.QUIET), ("nothing that can boot", Tone.BAD), f"   {boot.explained}")
    spans: list[Span] = [
        Span("Next boot:  ", Tone.QUIET),
        Span(words.slot_words(boot.next, inst.slot(boot.next))),
    ]
    if boot.after is not None and boot.after is not boot.next:
        spans += [
            Span(" ─ the one after ─▶ ", Tone.QUIET),
            Span(words.slot_words(boot.after, inst.slot(boot.after))),
        ]
    elif boot.if_fails:
        for name in boot.if_fails[:2]:
            spans += [Span(" ─ if it fails ─▶ ", Tone.QUIET), Span(words.slot_words(name, inst.slot(name)))]
    return tuple(spans)


def _troubles(inst: Installation, verdict: str) -> list[tuple[str, Line]]:
    out: list[tuple[str, Line]] = []
    out += [("Left over", line((x.meaning, Tone.WARN), f" {x.way_out}")) for x in inst.leftovers]
    for finding in inst.findings:
        if finding.severity is not Severity.INFO and finding.what != verdict:
            tone = Tone.BAD if finding.severity is Severity.ERROR else Tone.WARN
            out.append(("Note", line((finding.what, tone), f" {finding.now}")))
    return out


def home_choices(inst: Installation) -> tuple[Choice, ...]:
    """What can be done, the least dangerous way out first."""
    look = Choice("look", "Look closer", undo="reads only", key="l")
    history = Choice("history", "History", undo="reads only", key="h")
    if not inst.layout.handled:
        return (look, history)
    active, passive = inst.slot(SlotName.ACTIVE), inst.slot(SlotName.PASSIVE)
    recovery = inst.slot(SlotName.RECOVERY)
    out: list[Choice] = []
    repairs = {x.repair for x in inst.leftovers}
    if "finish" in repairs:
        out.append(
            Choice("finish", "Finish what was interrupted", "", "as its record says", "plan first", "f")
        )
    if "undo" in repairs:
        out.append(Choice("undo", "Undo what was interrupted", "", "left-overs only", "plan first", "u"))
    out.extend(
        Choice(
            f"relabel-{s.name.value}",
            f"Give {s.name.value} its own label",
            "1 s",
            "the label only",
            "plan first",
        )
        for s in inst.slots
        if s.state is SlotState.MISLABELLED
    )
    upgrade = Choice(
        "upgrade", "Upgrade", "minutes", upgrade_cost(inst), "plan first", "u" if not repairs else ""
    )
    ways = Choice("rollback", "Roll back", "1 s up", "by choice", "plan first", "b")
    restore = Choice("restore", "Restore active from passive", "~40 s", "replaces active", "typed consent")
    default = Choice("default-passive", "Make passive the default", "1 s", "nothing", "can be undone", "d")
    if not _sound(active) and _sound(passive):
        if inst.boot.next is not SlotName.PASSIVE or SlotName.PASSIVE not in {inst.boot.after, None}:
            out.append(default)
        out += [restore, upgrade, ways]
    elif not _sound(active) and not _sound(passive) and _sound(recovery):
        out += [
            Choice(
                "restore-recovery",
                "Restore active from recovery",
                "~40 s",
                "replaces active",
                "typed consent",
            ),
            upgrade,
        ]
    else:
        out += [upgrade]
        if passive is not None or recovery is not None:
            out.append(ways)
    return (*out, look, history)


def upgrade_cost(inst: Installation) -> str:
    active, passive = inst.slot(SlotName.ACTIVE), inst.slot(SlotName.PASSIVE)
    if _sound(active) and _sound(passive) and passive is not None:
        return f"replaces passive {words.version(passive)}".strip()
    if not _sound(active):
        return "replaces broken active"
    return "nothing"

"""Before something is done: which image, the plan, the typed consent."""

from cos_console.model.image import short_digest
from cos_console.model.machine import Installation, Machine
from cos_console.model.plan import Action, Plan
from cos_console.views import words
from cos_console.views.page import Choice, Facts, Gap, Key, Lines, Page, Span, Table, Tone, line

CONSENT_WORD = "replace"
_BACK = (Key("Esc", "back"), Key("?", "help"))
_OVERWRITES = {Action.RESTORE, Action.RESTORE_FROM_RECOVERY}


def needs_consent(plan: Plan) -> bool:
    """What can't be undone is typed, not just chosen."""
    return plan.request.action in _OVERWRITES


def source_page(machine: Machine, inst: Installation, typed: str, busy: bool, now: str) -> Page:
    """Where the new system comes from; `typed` is the name so far."""
    return Page(
        name="source",
        head=(*words.machine_head(machine), "Upgrade"),
        right=now,
        mark=Tone.ACCENT if busy else Tone.QUIET,
        verdict="Reading the image's description." if busy else "Which image should become active?",
        blocks=(
            Facts((("Image", line((f"{typed}_", Tone.ACCENT))),)),
            Gap(),
            Lines(
                (
                    line("quay.io/acme/os:2.0        a registry"),
                    line("oci:/mnt/stick/image:2.0   an OCI layout on a disk, no network"),
                    line("oci-archive:FILE           the same in one file"),
                    line("docker-daemon:NAME:TAG     a Docker Engine on this machine"),
                    line("dir:PATH                   a directory"),
                )
            ),
            Gap(),
            Facts(
                (
                    ("Signature", line((words.NOT_CHECKED, Tone.WARN))),
                    ("Disk", line(words.disk_long(inst.disk))),
                )
            ),
        ),
        keys=(Key("Enter", "read it"), *_BACK),
        help=(
            "Type the name of the image and press Enter. Its description is read and a plan is shown; nothing is written yet.",
            "A tag is resolved to a digest now, and exactly that image is used.",
        ),
    )


def plan_page(machine: Machine, plan: Plan, now: str) -> Page:
    """Everything that will happen, and the button whose default is no."""
    rows = tuple(
        (Span(c.slot.value, Tone.STRONG), Span(c.now), Span(c.after, Tone.GOOD), Span(c.note, Tone.QUIET))
        for c in plan.changes
    )
    before = plan.boots_before.next.value if plan.boots_before.next else "nothing"
    after = plan.boots_after.next.value if plan.boots_after.next else "nothing"
    if plan.boots_after.after is not plan.boots_after.next and plan.boots_after.after is not None:
        after += f" once, then {plan.boots_after.after.value}"
    boots = (Span("boots", Tone.STRONG), Span(before), Span(after, Tone.GOOD), Span(""))
    facts: list[tuple[str, tuple[Span, ...]]] = []
    for phase in plan.space:
        about = "~" if phase.estimated else ""
        text = f"needs {about}{words.size(phase.needed_bytes)}, there are {words.size(phase.available_bytes)}"
        facts.append(("Space", line(text)))
    if plan.estimate_s is not None:
        facts.append(("Time", line(f"~{words.duration(plan.estimate_s)}")))
    if plan.image is not None:
        digest = short_digest(plan.image.digest) if plan.image.digest else "a directory has none"
        facts.append(("Image", line(str(plan.image.reference))))
        facts.append(("Digest", line(digest)))
        facts.append(("Signature", line((words.NOT_CHECKED, Tone.WARN))))
    facts += [("Passive", line(plan.passive_fate)), ("Undo", line(plan.undo))]
    facts += [("Note", line((w.what, Tone.WARN))) for w in plan.warnings if w.code != "COS-UNSIGNED"]
    steps = "   ".join(f"{n} {s.title}" for n, s in enumerate(plan.steps, 1))
    return Page(
        name="plan",
        head=(*words.machine_head(machine), "Plan"),
        right=now,
        mark=Tone.QUIET,
        verdict="Ready. Nothing has been changed yet.",
        blocks=(
            Lines((line((plan.title + ".", Tone.STRONG)),)),
            Gap(),
            Table(head=("", "now", "after", ""), rows=(*rows, boots)),
            Gap(),
            Lines((line(steps),)),
            Gap(),
            Facts(tuple(facts)),
        ),
        choices=(
            Choice("no", "Not now"),
            Choice("yes", plan.title, dangerous=needs_consent(plan)),
        ),
        keys=(Key("↑↓", "choose"), Key("Enter", "press"), *_BACK),
        help=(
            "This is all that will happen. Until the switch it can be stopped and nothing of the slots is changed.",
            "What is estimated has a ~ before it.",
        ),
    )


def consent_page(machine: Machine, plan: Plan, typed: str, now: str) -> Page:
    """The typed consent to what can't be undone."""
    return Page(
        name="consent",
        head=(*words.machine_head(machine), "Consent"),
        right=now,
        mark=Tone.WARN,
        verdict="This can't be undone.",
        blocks=(
            Lines((line((plan.title + ".", Tone.STRONG)), line(plan.undo.capitalize() + "."))),
            Gap(),
            Lines(
                (
                    line(
                        "Type ",
                        (CONSENT_WORD, Tone.STRONG),
                        " and press Enter to go on:  ",
                        (f"{typed}_", Tone.ACCENT),
                    ),
                )
            ),
        ),
        keys=(Key("Enter", "go on"), *_BACK),
        help=("What overwrites a system for good is typed, so that no key pressed by chance does it.",),
    )

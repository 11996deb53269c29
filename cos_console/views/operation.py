"""While something is done, and after: progress, result, problem, history."""

from cos_console.model.event import OperationState, Result, StepStatus
from cos_console.model.problem import ProblemReport
from cos_console.views import words
from cos_console.views.page import Bar, Block, Choice, Facts, Gap, Key, Lines, Page, Span, Table, Tone, line

_MARK = {
    StepStatus.WAITING: ("○", Tone.QUIET),
    StepStatus.RUNNING: ("●", Tone.ACCENT),
    StepStatus.DONE: ("✓", Tone.GOOD),
    StepStatus.FAILED: ("✗", Tone.BAD),
}


def progress_page(state: OperationState, head: tuple[str, ...], now: str) -> Page:
    """The operation under way: what is safe now, how far it is, what happened last."""
    plan = state.plan
    safe = state.cancellable
    blocks: list[Block] = []
    p = state.progress
    if p is not None and p.bytes_total:
        fraction = min(1.0, p.bytes_done / p.bytes_total)
        left = (p.bytes_total - p.bytes_done) / p.rate_bps if p.rate_bps > 0 else None
        text = f"{words.size(p.bytes_done)} of {words.size(p.bytes_total)}"
        if p.rate_bps:
            text += f"   {words.size(round(p.rate_bps))}/s"
        if left is not None:
            text += f"   ~{words.duration(left)} left"
        if p.waiting_s >= 3:
            text += f"   last byte {p.waiting_s:.0f} s ago"
        blocks += [
            Bar(fraction, f"{fraction:4.0%}"),
            Lines((line(text), line((p.detail, Tone.QUIET)))),
            Gap(),
        ]
    rows = []
    for step in state.steps:
        mark, tone = _MARK[step.status]
        rows.append((Span(mark, tone), Span(step.title), Span(step.note, Tone.QUIET)))
    blocks += [Table(head=(), rows=tuple(rows)), Gap()]
    blocks.append(
        Lines(
            tuple(line((words.clock(t, seconds=True), Tone.QUIET), "  ", text) for t, text in state.log[-6:])
        )
    )
    verdict = (
        "At work. The slots are untouched; stopping now is safe."
        if safe
        else "Switching. This can't be stopped and takes a moment."
    )
    return Page(
        name="progress",
        head=(*head, plan.title if plan else ""),
        right=now,
        mark=Tone.ACCENT,
        verdict=verdict,
        blocks=tuple(blocks),
        keys=(Key("c", "stop"), Key("Esc", "home (work goes on)"), Key("?", "help")),
        help=(
            "The work is done by a process of its own: this console may be left, unplugged or started again.",
            "Stopping is safe until the switch begins; after that it is refused.",
        ),
    )


def result_page(state: OperationState, head: tuple[str, ...], now: str) -> Page:
    """How it ended. A failure says what happened, what is unchanged, what to do now."""
    end = state.finished
    if end is None:
        return progress_page(state, head, now)
    if end.problem is not None and end.result is not Result.DONE:
        return problem_page(end.problem, head, now)
    f = end.facts
    rows: list[tuple[str, tuple[Span, ...]]] = [("Took", line(words.duration(end.elapsed_s)))]
    if end.bytes_moved:
        rows.append(("Moved", line(words.size(end.bytes_moved))))
    if f.get("signature"):
        rows.append(("Signature", line((words.NOT_CHECKED, Tone.WARN))))
    rows.append(("Undo", line(state.plan.undo if state.plan else "")))
    last = f"COS-RESULT rc={end.exit_code} action={f.get('action', '')} from={f.get('from', '')} to={f.get('to', '')}"
    return Page(
        name="result",
        head=(*head, "Done"),
        right=now,
        mark=Tone.GOOD if end.result is Result.DONE else Tone.BAD,
        verdict=end.text,
        blocks=(
            Facts(tuple(rows)),
            Gap(),
            Table(
                head=(),
                rows=tuple(
                    (Span(*_MARK[s.status]), Span(s.title), Span(s.note, Tone.QUIET)) for s in state.steps
                ),
            ),
            Gap(),
            Lines((line((last, Tone.QUIET)),)),
        ),
        prompt="",
        choices=(Choice("home", "Back to the overview"),),
        keys=(Key("Enter", "overview"), Key("?", "help")),
        help=("The last line is for the ticket; the history of this installation keeps it too.",),
    )


def problem_page(report: ProblemReport, head: tuple[str, ...], now: str) -> Page:
    """Three sentences and a code to search for."""
    return Page(
        name="problem",
        head=(*head, "It did not work"),
        right=now,
        mark=Tone.BAD,
        verdict=report.what,
        blocks=(
            Facts(
                (
                    ("What happened", line(report.what)),
                    ("Unchanged", line(report.unchanged)),
                    ("What to do now", line((report.now, Tone.STRONG))),
                    ("Code", line((report.code, Tone.QUIET))),
                )
            ),
        ),
        choices=(Choice("home", "Back to the overview"),),
        keys=(Key("Enter", "overview"), Key("?", "help")),
        help=("The code stays the same from release to release: search for it.",),
    )


def history_page(entries: tuple[tuple[str, str, str, str], ...], head: tuple[str, ...], now: str) -> Page:
    """`entries` are (time, action, result, text), oldest first."""
    rows = tuple(
        (Span(t[:16].replace("T", " ")), Span(a), Span(r, Tone.GOOD if r == "done" else Tone.BAD), Span(x))
        for t, a, r, x in reversed(entries)
    )
    empty = Lines((line("Nothing was done to this installation yet."),))
    return Page(
        name="history",
        head=(*head, "History"),
        right=now,
        mark=Tone.QUIET,
        verdict=f"{len(entries)} operations are on record, newest first.",
        blocks=(Table(head=("When", "What", "Result", ""), rows=rows) if rows else empty,),
        keys=(Key("Esc", "back"), Key("?", "help")),
        help=("Kept on the state partition of the installation, at most 100.",),
    )

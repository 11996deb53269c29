"""A page as plain text: the same words, numbered choices, no colour, no cursor movement."""

from cos_console.views.layout import lay_out
from cos_console.views.page import Line, Page, Tone

_VERDICT_WORDS = {Tone.BAD: "PROBLEM: ", Tone.WARN: "NOTE: ", Tone.GOOD: "OK: "}


def plain(text_line: Line) -> str:
    return "".join(s.text for s in text_line).rstrip()


def page_text(page: Page, width: int = 78) -> str:
    """The whole page, ending with a line feed."""
    out = [
        "   ".join((*page.head, page.right)).rstrip(),
        _VERDICT_WORDS.get(page.mark, "") + page.verdict,
        "",
    ]
    out += [plain(each) for each in lay_out(page.blocks, width)]
    if page.choices:
        out += ["", page.prompt or "What to do", ""]
        for number, c in enumerate(page.choices, 1):
            more = ", ".join(p for p in (c.time, c.overwrites, c.undo) if p)
            out.append(f"  {number}. {c.label}." + (f" {more}." if more else ""))
            if c.refusal:
                out.append(f"     {c.refusal}")
    if page.after:
        out += ["", *(plain(each) for each in lay_out(page.after, width))]
    if page.message:
        out += ["", page.message]
    return "\n".join(out) + "\n"

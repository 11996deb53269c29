"""The shape of a page: every screen is one of these values, whatever draws it."""

from dataclasses import dataclass
from enum import StrEnum


class Tone(StrEnum):
    """What a piece of text means; the theme gives it a colour, and a mark or word always says it too."""

    PLAIN = "plain"
    STRONG = "strong"
    QUIET = "quiet"
    GOOD = "good"
    WARN = "warn"
    BAD = "bad"
    ACCENT = "accent"


MARKS = {Tone.GOOD: "✓", Tone.BAD: "✗", Tone.WARN: "!", Tone.ACCENT: "●", Tone.QUIET: "○"}


@dataclass(frozen=True)
class Span:
    text: str
    tone: Tone = Tone.PLAIN


Line = tuple[Span, ...]


def line(*parts: str | Span | tuple[str, Tone]) -> Line:
    """A line from strings, spans and (text, tone) pairs."""
    spans = []
    for part in parts:
        if isinstance(part, Span):
            spans.append(part)
        elif isinstance(part, str):
            spans.append(Span(part))
        else:
            spans.append(Span(*part))
    return tuple(spans)


@dataclass(frozen=True)
class Lines:
    """Running text; long lines are wrapped."""

    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Facts:
    """`label  value` pairs; values are wrapped under themselves."""

    rows: tuple[tuple[str, Line], ...]


@dataclass(frozen=True)
class Table:
    """Columns as wide as their widest cell; the last one takes the rest."""

    head: tuple[str, ...]
    rows: tuple[tuple[Span, ...], ...]
    title: Line = ()
    boxed: bool = False


@dataclass(frozen=True)
class Bar:
    """How much is done: 0 to 1, or None where the end is not known."""

    fraction: float | None
    label: str


@dataclass(frozen=True)
class Gap:
    """One empty line."""


Block = Lines | Facts | Table | Bar | Gap


@dataclass(frozen=True)
class Choice:
    """One thing to do: how long it takes, what it overwrites, whether it can be undone."""

    id: str
    label: str
    time: str = ""
    overwrites: str = ""
    undo: str = ""
    key: str = ""
    refusal: str = ""
    """Why it can't be chosen now, one sentence; empty when it can."""
    dangerous: bool = False


@dataclass(frozen=True)
class Key:
    key: str
    word: str


@dataclass(frozen=True)
class Page:
    """One screen. `head` is line 1 (machine, then what this is about), `verdict` line 2."""

    name: str
    """Stable name of the screen: home, plan, ..."""
    head: tuple[str, ...]
    right: str
    mark: Tone
    verdict: str
    blocks: tuple[Block, ...] = ()
    prompt: str = ""
    """Above the choices."""
    choices: tuple[Choice, ...] = ()
    buttons: bool = False
    """The choices stand side by side, the first one is 'no'."""
    after: tuple[Block, ...] = ()
    """Below the choices."""
    keys: tuple[Key, ...] = ()
    help: tuple[str, ...] = ()
    message: str = ""

"""Blocks of a page as lines of toned text for a given width: the one place that counts columns."""

from cos_console.views.page import Bar, Block, Choice, Facts, Gap, Line, Lines, Span, Table, Tone


def width_of(text_line: Line) -> int:
    return sum(len(s.text) for s in text_line)


def cut(text: str, width: int) -> str:
    """`text` in at most `width` columns, `…` where something is left out."""
    if len(text) <= width:
        return text
    return text[: max(0, width - 1)] + "…" if width > 0 else ""


def cut_line(text_line: Line, width: int) -> Line:
    out: list[Span] = []
    left = width
    for span in text_line:
        if left <= 0:
            break
        out.append(Span(cut(span.text, left), span.tone))
        left -= len(span.text)
    return tuple(out)


def wrap(text_line: Line, width: int, indent: int = 0) -> list[Line]:
    """Break at blanks; following lines are indented. A word longer than the line is broken hard."""
    width = max(width, 8)
    if width_of(text_line) <= width:
        return [text_line]
    out: list[Line] = []
    now: list[Span] = []
    used = 0
    for span in text_line:
        for piece in _pieces(span.text):
            rest = piece
            while rest:
                if used + len(rest.rstrip()) <= width:
                    now.append(Span(rest, span.tone))
                    used += len(rest)
                    break
                if used <= indent and len(rest) > width - used:
                    room = width - used
                    now.append(Span(rest[:room], span.tone))
                    rest = rest[room:]
                out.append(tuple(now))
                now, used = ([Span(" " * indent)] if indent else []), indent
    if now:
        out.append(tuple(now))
    return out


def _pieces(text: str) -> list[str]:
    """Words with the blanks after them."""
    pieces: list[str] = []
    word = ""
    for i, char in enumerate(text):
        word += char
        if char == " " and i + 1 < len(text) and text[i + 1] != " ":
            pieces.append(word)
            word = ""
    if word:
        pieces.append(word)
    return pieces


def lay_out(blocks: tuple[Block, ...], width: int) -> list[Line]:
    """All blocks, one under the other."""
    out: list[Line] = []
    for block in blocks:
        match block:
            case Gap():
                out.append(())
            case Lines():
                for each in block.lines:
                    out.extend(wrap(each, width))
            case Facts():
                out.extend(_facts(block, width))
            case Table():
                out.extend(_table(block, width))
            case Bar():
                out.append(bar(block, width))
    return out


def _facts(block: Facts, width: int) -> list[Line]:
    label = max((len(name) for name, _ in block.rows), default=0) + 3
    out: list[Line] = []
    for name, value in block.rows:
        for n, part in enumerate(wrap(value, width - label)):
            head = Span(name.ljust(label) if n == 0 else " " * label, Tone.QUIET)
            out.append((head, *part))
    return out


def _table(block: Table, width: int) -> list[Line]:
    inner = width - 4 if block.boxed else width
    count = max([len(block.head), *(len(r) for r in block.rows)])
    widths = [0] * count
    for row in [tuple(Span(h) for h in block.head), *block.rows]:
        for i, cell in enumerate(row):
            widths[i] = max(widths[i], len(cell.text))
    gap = 3 if sum(widths) + 3 * (count - 1) <= inner else 2
    body: list[Line] = []
    if block.head:
        body.append(_row(tuple(Span(h, Tone.ACCENT) for h in block.head), widths, gap, inner))
    body.extend(_row(row, widths, gap, inner) for row in block.rows)
    if not block.boxed:
        return [block.title, *body] if block.title else body
    title = cut_line(block.title, inner - 2)
    edge = Tone.ACCENT
    if title:
        fill = "─" * (width - 5 - width_of(title))
        top: Line = (Span("┌─ ", edge), *title, Span(f" {fill}┐", edge))
    else:
        top = (Span(f"┌{'─' * (width - 2)}┐", edge),)
    sides = [(Span("│ ", edge), *r, Span(" " * (inner - width_of(r))), Span(" │", edge)) for r in body]
    return [top, *sides, (Span(f"└{'─' * (width - 2)}┘", edge),)]


def _row(row: tuple[Span, ...], widths: list[int], gap: int, width: int) -> Line:
    out: list[Span] = []
    for i, cell in enumerate(row):
        last = i == len(row) - 1
        out.append(cell if last else Span(cell.text.ljust(widths[i] + gap), cell.tone))
    return cut_line(tuple(out), width)


def bar(block: Bar, width: int) -> Line:
    room = max(8, width - len(block.label) - 2)
    if block.fraction is None:
        return (Span("─" * room, Tone.QUIET), Span(f"  {block.label}"))
    done = min(room, max(0, int(room * block.fraction)))
    return (
        Span("━" * done, Tone.GOOD),
        Span("─" * (room - done), Tone.QUIET),
        Span(f"  {block.label}", Tone.STRONG),
    )


def choice_lines(choices: tuple[Choice, ...], width: int) -> list[Line]:
    """Each choice on one line, without the pointer: label, time, what it overwrites, undo."""
    label = max((len(c.label) for c in choices), default=0)
    time = max((len(c.time) for c in choices), default=0)
    over = max((len(c.overwrites) for c in choices), default=0)
    undo = max((len(c.undo) for c in choices), default=0)
    gap = "   " if label + time + over + undo + 9 <= width else "  "
    out: list[Line] = []
    for c in choices:
        quiet = Tone.QUIET if c.refusal else Tone.PLAIN
        spans = [Span(c.label.ljust(label), Tone.QUIET if c.refusal else Tone.STRONG)]
        if time:
            spans.append(Span(gap + c.time.ljust(time), quiet))
        if over:
            spans.append(Span(gap + c.overwrites.ljust(over), quiet))
        if c.undo:
            spans.append(Span(gap + c.undo, Tone.QUIET))
        out.append(cut_line(tuple(spans), width))
    return out

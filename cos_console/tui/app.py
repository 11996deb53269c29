"""The full-screen console: draws the pages of views/ and moves between them. Read-only pages so far."""

import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from cos_console.model.machine import Machine
from cos_console.views.details import details_page
from cos_console.views.home import home_page, scanning_page
from cos_console.views.layout import choice_lines, lay_out
from cos_console.views.page import MARKS, Line, Lines, Page, Span, Tone

STYLES = {
    Tone.PLAIN: "", Tone.STRONG: "bold", Tone.QUIET: "", Tone.GOOD: "ansi_green",
    Tone.WARN: "ansi_yellow", Tone.BAD: "ansi_red", Tone.ACCENT: "ansi_cyan",
}  # fmt: skip


def content(lines: list[Line]) -> Content:
    return Content("\n").join(Content.assemble(*((s.text, STYLES[s.tone]) for s in each)) for each in lines)


class Console(App[int]):
    """`look` is called off the event loop and gives the machine; it never writes."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: ansi_default; color: ansi_default; }
    #head { background: ansi_blue; color: ansi_white; height: 1; }
    #verdict { height: 1; margin-bottom: 1; }
    #body { height: 1fr; scrollbar-size: 0 0; }
    #keys { height: 1; }
    Static { padding: 0 1; }
    """
    BINDINGS: ClassVar[list[Binding | tuple[str, str] | tuple[str, str, str]]] = [
        Binding("up", "move(-1)"), Binding("down", "move(1)"), Binding("right,tab", "other(1)"),
        Binding("left", "other(-1)"), Binding("enter", "choose"), Binding("l", "details"),
        Binding("escape", "back"), Binding("question_mark,f1", "explain"), Binding("r", "look"),
        Binding("q,ctrl+q", "leave"), Binding("ctrl+l", "refresh"),
    ]  # fmt: skip

    def __init__(self, look: Callable[[], Machine]) -> None:
        super().__init__(ansi_color=True)
        self._look = look
        self.machine: Machine | None = None
        self.place, self.at, self.index = "home", 0, 0
        self.problem = ""

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="verdict")
        yield VerticalScroll(Static(id="text"), id="body")
        yield Static(id="keys")

    def on_mount(self) -> None:
        self.draw()
        self.action_look()

    def on_resize(self) -> None:
        if self.is_running:
            self.draw()

    def page(self) -> Page:
        now = datetime.now(UTC).strftime("%H:%M UTC")
        if self.machine is None:
            return scanning_page(now)
        if self.place == "details" and self.machine.installations:
            count = len(self.machine.installations)
            return details_page(self.machine, self.machine.installations[self.index % count], now)
        return home_page(self.machine, self.index, now)

    def draw(self) -> None:
        width, height = self.size
        if width < 60 or height < 15:
            for name in ("head", "verdict", "keys"):
                self.query_one(f"#{name}", Static).update("")
            self.query_one("#text", Static).update("This terminal is too small: 60x15 is needed. q leaves.")
            return
        page, room = self.page(), width - 3
        head = "   ".join(page.head)[: room - len(page.right)]
        self.query_one("#head", Static).update(head.ljust(room - len(page.right)) + page.right)
        self.query_one("#verdict", Static).update(
            content([((_span(f"{MARKS.get(page.mark, ' ')} {self.problem or page.verdict}", page.mark)),)])
        )
        lines = lay_out(page.blocks, room)
        if self.place == "help":
            lines = [line for text in page.help for line in (*lay_out((_lines(text),), room), ())]
        elif page.choices:
            lines += [(), (_span(page.prompt, Tone.STRONG),)]
            for n, each in enumerate(choice_lines(page.choices, room - 2)):
                lines.append((_span("▶ " if n == self.at else "  ", Tone.ACCENT), *each))
            lines += lay_out(page.after, room)
        self.query_one("#text", Static).update(content(lines))
        self.query_one("#keys", Static).update(
            "  ".join(f"{k.key} {k.word}" for k in page.keys if k.key not in {"h", "F2"})
        )

    def action_look(self) -> None:
        threading.Thread(target=self._scan, daemon=True).start()

    def _scan(self) -> None:
        from cos_console.model.problem import Problem

        try:
            found, said = self._look(), ""
        except Problem as problem:
            found, said = None, f"{problem.report.what} {problem.report.now}"
        except Exception as error:  # noqa: BLE001 - nothing may reach the screen as a traceback
            found, said = None, f"The look at the disks failed ({type(error).__name__}). Nothing was changed."
        self.call_from_thread(self._found, found, said)

    def _found(self, machine: Machine | None, said: str) -> None:
        self.machine, self.problem = machine or self.machine, said
        self.draw()

    def action_move(self, by: int) -> None:
        if self.place == "home":
            self.at = max(0, min(len(self.page().choices) - 1, self.at + by))
            self.draw()
        else:
            self.query_one("#body", VerticalScroll).scroll_relative(y=by, animate=False)

    def action_other(self, by: int) -> None:
        self.index, self.at = self.index + by, 0
        self.draw()

    def action_choose(self) -> None:
        choices = self.page().choices
        if self.place == "home" and choices and choices[self.at].id == "look":
            self.action_details()
        elif self.place == "home" and choices:
            self.problem = "This can't be started from the screen yet. Nothing was changed."
            self.draw()
            self.problem = ""

    def _go(self, place: str) -> None:
        self.place = place
        self.query_one("#body", VerticalScroll).scroll_home(animate=False)
        self.draw()

    def action_details(self) -> None:
        self._go("details")

    def action_explain(self) -> None:
        self._go("help")

    async def action_back(self) -> None:
        self._go("home")

    def action_leave(self) -> None:
        self.exit(0)


def _span(text: str, tone: Tone) -> Span:
    return Span(text, tone)


def _lines(text: str) -> Lines:
    return Lines(((Span(text),),))


def run(
    machine_file: Path | None = None,
    dry_run: bool = False,  # noqa: ARG001 - no page changes anything yet
    target: Path | None = None,
    run_dir: Path | None = None,  # noqa: ARG001 - no operation is followed yet
) -> int:
    """Run the console till it is left; the exit code."""

    def look() -> Machine:
        if machine_file is not None:
            import msgspec

            return msgspec.json.decode(machine_file.read_bytes(), type=Machine)
        import importlib

        found: Machine = importlib.import_module("cos_console.host.scan").scan(target)
        return found

    return Console(look).run() or 0

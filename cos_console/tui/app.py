"""The full-screen console: draws the pages of views/ and moves between them.

What changes a disk is planned, shown and confirmed here and done by the engine's own process; this one may die.
"""

import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from cos_console.model.event import OperationState
from cos_console.model.machine import Installation, Machine
from cos_console.model.plan import Plan, Request
from cos_console.model.problem import ExitCode, Problem, ProblemReport
from cos_console.tui.services import Services
from cos_console.views import words
from cos_console.views.details import details_page
from cos_console.views.home import home_page, scanning_page
from cos_console.views.layout import choice_lines, lay_out
from cos_console.views.operation import history_page, problem_page, progress_page, result_page
from cos_console.views.page import MARKS, Line, Lines, Page, Span, Tone
from cos_console.views.plan import CONSENT_WORD, consent_page, needs_consent, plan_page, source_page
from cos_console.views.rollback import rollback_page, rollback_request

STYLES = {
    Tone.PLAIN: "", Tone.STRONG: "bold", Tone.QUIET: "", Tone.GOOD: "ansi_green",
    Tone.WARN: "ansi_yellow", Tone.BAD: "ansi_red", Tone.ACCENT: "ansi_cyan",
}  # fmt: skip


def content(lines: list[Line]) -> Content:
    return Content("\n").join(Content.assemble(*((s.text, STYLES[s.tone]) for s in each)) for each in lines)


class Console(App[int]):
    """`services` looks, plans and acts; whatever takes time is called off the event loop."""

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
        Binding("c", "stop"), Binding("h", "history"), Binding("f2", "shell"),
        Binding("q,ctrl+q", "leave"), Binding("ctrl+l", "refresh"),
    ]  # fmt: skip

    def __init__(self, services: Services) -> None:
        super().__init__(ansi_color=True)
        self._services = services
        self.machine: Machine | None = None
        self.place, self.at, self.index = "home", 0, 0
        self.problem = ""
        self.typed, self.busy = "", False
        self.plan: Plan | None = None
        self.state = OperationState()
        self.report: ProblemReport | None = None
        self.before_help = "home"
        self.settled: tuple[tuple[str, str, str, str], ...] = ()

    def compose(self) -> ComposeResult:
        yield Static(id="head")
        yield Static(id="verdict")
        body = VerticalScroll(Static(id="text"), id="body")
        body.can_focus = False  # arrows move the pointer, not the page
        yield body
        yield Static(id="keys")

    def on_mount(self) -> None:
        self.draw()
        self.action_look()
        if self._services.at_work():
            self._follow()

    def on_resize(self) -> None:
        if self.is_running:
            self.call_after_refresh(self.draw)  # the new size is not in force before

    def page(self) -> Page:
        now = datetime.now(UTC).strftime("%H:%M UTC")
        head = words.machine_head(self.machine) if self.machine else ("cOS recovery",)
        match self.place:
            case "progress" if self.state.plan is not None:
                return (
                    result_page(self.state, head, now)
                    if self.state.finished
                    else progress_page(self.state, head, now)
                )
            case "problem" if self.report is not None:
                return problem_page(self.report, head, now)
            case "history":
                return history_page(self.settled, head, now)
        if self.machine is None:
            return scanning_page(now)
        inst = self.installation
        if inst is None:
            return home_page(self.machine, self.index, now)
        match self.place:
            case "details":
                return details_page(self.machine, inst, now)
            case "rollback":
                page = rollback_page(self.machine, inst, now)
                chosen = page.choices[min(self.at, len(page.choices) - 1)].id if page.choices else "once"
                return rollback_page(self.machine, inst, now, chosen)
            case "source":
                return source_page(self.machine, inst, self.typed, self.busy, now)
            case "plan" if self.plan is not None:
                return plan_page(self.machine, self.plan, now)
            case "consent" if self.plan is not None:
                return consent_page(self.machine, self.plan, self.typed, now)
        return home_page(self.machine, self.index, now)

    @property
    def installation(self) -> Installation | None:
        """The one on screen."""
        if self.machine is None or not self.machine.installations:
            return None
        return self.machine.installations[self.index % len(self.machine.installations)]

    def draw(self) -> None:
        width, height = self.size
        if width < 60 or height < 15:
            for name in ("head", "verdict", "keys"):
                self.query_one(f"#{name}", Static).update("")
            self.query_one("#text", Static).update("This terminal is too small: 60x15 is needed. q leaves.")
            return
        page, room = self.page(), width - 3
        head = "   ".join(page.head)[: room - len(page.right) - 3]
        self.query_one("#head", Static).update(head.ljust(room - len(page.right)) + page.right)
        self.query_one("#verdict", Static).update(
            content([((_span(f"{MARKS.get(page.mark, ' ')} {self.problem or page.verdict}", page.mark)),)])
        )
        lines = lay_out(page.blocks, room)
        if self.place == "help":
            place, self.place = self.place, self.before_help
            page = self.page()
            self.place = place
            lines = [line for text in page.help for line in (*lay_out((_lines(text),), room), ())]
        elif page.choices:
            lines += [(), (_span(page.prompt, Tone.STRONG),)]
            for n, each in enumerate(choice_lines(page.choices, room - 2)):
                lines.append((_span("▶ " if n == self.at else "  ", Tone.ACCENT), *each))
            lines += lay_out(page.after, room)
        self.query_one("#text", Static).update(content(lines))
        if page.choices and self.place not in {"home", "help"}:
            self.call_after_refresh(self.query_one("#body", VerticalScroll).scroll_end, animate=False)
        self.query_one("#keys", Static).update(
            "  ".join(f"{k.key} {k.word}" for k in page.keys if k.key not in {"h", "F2"})
        )

    def _handle_exception(self, error: Exception) -> None:
        """Instead of Textual's traceback on the screen: one sentence, and the details in a file."""
        with tempfile.NamedTemporaryFile("w", prefix="cos-console-report-", suffix=".txt", delete=False) as f:
            f.write("".join(traceback.format_exception(error)))
        self.exit(
            int(ExitCode.INTERNAL),
            return_code=int(ExitCode.INTERNAL),
            message="The console made an error of its own and ended. An operation at work is not harmed by it.\n"
            f"Start it again, and send {f.name} to the makers.  (COS-INTERNAL)",
        )

    # --- off the event loop ----------------------------------------------------------------------------------

    def _off(self, work: Callable[[], Callable[[], None]]) -> None:
        """Do `work` in a thread; what it returns is called on the event loop. A Problem becomes its page."""

        def body() -> None:
            try:
                then = work()
            except Problem as problem:
                report = problem.report

                def then() -> None:
                    self._fail(report)

            except Exception as error:  # noqa: BLE001 - nothing may reach the screen as a traceback
                report = ProblemReport(
                    code="COS-INTERNAL",
                    what=f"The console made an error of its own ({type(error).__name__}).",
                    unchanged="An operation at work is not harmed by it.",
                    now="Try again, or use the command line: cos-console status.",
                    exit_code=int(ExitCode.INTERNAL),
                )

                def then() -> None:
                    self._fail(report)

            if self.is_running:
                self.call_from_thread(then)

        threading.Thread(target=body, daemon=True).start()

    def _fail(self, report: ProblemReport) -> None:
        self.busy = False
        self.report = report
        self._go("problem")

    def action_look(self) -> None:
        if self._typing:
            return

        def work() -> Callable[[], None]:
            found = self._services.look()
            return lambda: self._found(found)

        self._off(work)

    def _found(self, machine: Machine) -> None:
        self.machine = machine
        self.draw()

    def _make_plan(self, request: Request, reference: str = "") -> None:
        machine = self.machine
        if machine is None:
            return
        self.busy = True
        self.draw()

        def work() -> Callable[[], None]:
            plan = self._services.plan(machine, request, reference)

            def then() -> None:
                self.busy, self.plan = False, plan
                self._go("plan")

            return then

        self._off(work)

    def _start(self) -> None:
        plan = self.plan
        if plan is None:
            return

        def work() -> Callable[[], None]:
            self._services.start(plan)
            return self._follow

        self._off(work)

    def _follow(self) -> None:
        """Show the operation at work from its first event on."""
        self.state = OperationState()
        self._go("progress")

        def work() -> Callable[[], None]:
            for state in self._services.follow():
                if not self.is_running:
                    break
                self.call_from_thread(self._now, state)
            return self.action_look

        self._off(work)

    def _now(self, state: OperationState) -> None:
        self.state = state
        if state.finished is not None and self.place == "progress":
            self.at = 0
            self.bell()
        if self.place == "progress":
            self.draw()

    # --- keys ------------------------------------------------------------------------------------------------

    @property
    def _typing(self) -> bool:
        return self.place in {"source", "consent"} and not self.busy

    def on_key(self, event: events.Key) -> None:
        if not self._typing:
            page = self.page()
            if self.place in {"home", "rollback"} and event.character and event.character.isdigit():
                number = int(event.character) - 1
                if 0 <= number < len(page.choices):
                    self.at = number
                    self.draw()
            return
        if event.key == "backspace":
            self.typed = self.typed[:-1]
        elif event.character and event.character.isprintable():
            self.typed += event.character
        else:
            return
        event.stop()
        event.prevent_default()
        self.draw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Letters are text while something is typed."""
        del parameters
        letters = {"details", "explain", "look", "leave", "stop", "history"}
        return not (self._typing and action in letters)

    def on_paste(self, event: events.Paste) -> None:
        if self._typing:
            self.typed += "".join(c for c in event.text if c.isprintable())
            self.draw()

    def action_move(self, by: int) -> None:
        count = len(self.page().choices)
        if count:
            self.at = max(0, min(count - 1, self.at + by))
            self.draw()
        else:
            self.query_one("#body", VerticalScroll).scroll_relative(y=by, animate=False)

    def action_other(self, by: int) -> None:
        if self.place == "plan":
            self.action_move(by)
        elif self.place in {"home", "details"}:
            self.index, self.at = self.index + by, 0
            self.draw()

    def action_choose(self) -> None:
        if self.place == "source":
            inst = self.installation
            if self.typed.strip() and inst is not None and not self.busy:
                from cos_console.model.plan import Action

                self._make_plan(Request(action=Action.UPGRADE, installation=inst.id), self.typed.strip())
            return
        if self.place == "consent":
            if self.typed == CONSENT_WORD:
                self._start()
            return
        choices = self.page().choices
        if not choices:
            return
        self._chosen(choices[min(self.at, len(choices) - 1)].id)

    def _chosen(self, choice: str) -> None:
        inst = self.installation
        match choice:
            case "home":
                self._go("home")
                self.action_look()
            case "look":
                self._go("details")
            case "history":
                self.action_history()
            case "upgrade":
                self.typed = ""
                self._go("source")
            case "rollback":
                self._go("rollback")
            case "no":
                self._go("home")
            case "yes":
                if self.plan is not None and needs_consent(self.plan):
                    self.typed = ""
                    self._go("consent")
                else:
                    self._start()
            case _ if inst is not None:
                self._make_plan(rollback_request(inst, choice))

    def _go(self, place: str) -> None:
        self.place, self.at = place, 0
        self.query_one("#body", VerticalScroll).scroll_home(animate=False)
        self.draw()

    def action_details(self) -> None:
        if self.place == "home" and self.machine is not None:
            self._go("details")

    def action_history(self) -> None:
        inst = self.installation
        if inst is None or self.place not in {"home", "details"}:
            return

        def work() -> Callable[[], None]:
            found = self._services.history(inst)

            def then() -> None:
                self.settled = found
                self._go("history")

            return then

        self._off(work)

    def action_stop(self) -> None:
        if self.place != "progress" or self.state.finished is not None:
            return

        def work() -> Callable[[], None]:
            said = self._services.stop()

            def then() -> None:
                self.problem = said
                self.draw()
                self.problem = ""

            return then

        self._off(work)

    def action_explain(self) -> None:
        if self.place != "help":
            self.before_help = self.place
            self._go("help")

    def action_shell(self) -> None:
        import os
        import subprocess

        with self.suspend():
            print("The console waits: leave this shell with exit.")
            subprocess.run([os.environ.get("SHELL", "/bin/sh")], check=False)
        self.refresh()

    async def action_back(self) -> None:
        if self.place == "help":
            self._go(self.before_help)
        elif self.place == "plan" and self.plan is not None and self.plan.image is not None:
            self._go("source")
        else:
            self._go("home")

    def action_leave(self) -> None:
        self.exit(0)


def _span(text: str, tone: Tone) -> Span:
    return Span(text, tone)


def _lines(text: str) -> Lines:
    return Lines(((Span(text),),))


def run(
    machine_file: Path | None = None,
    dry_run: bool = False,
    target: Path | None = None,
    run_dir: Path | None = None,
) -> int:
    """Run the console till it is left; the exit code. A recorded machine or `dry_run` can't change anything."""
    import os

    from cos_console.tui.services import RealServices, RecordedServices

    if run_dir is not None:
        os.environ["COS_CONSOLE_RUN_DIR"] = str(run_dir)
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
    services: Services = (
        RecordedServices(machine_file) if machine_file else RealServices(target, dry_run=dry_run)
    )
    return Console(services).run() or 0

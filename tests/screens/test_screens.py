"""Every page of the console, drawn by Textual at two sizes from recorded machines and folded events."""

from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Static

from cos_console.host.recorded import load_machine
from cos_console.model.event import (
    Finished,
    OperationState,
    Progress,
    Result,
    Started,
    StepBegun,
    StepDone,
    fold,
)
from cos_console.model.plan import Action, Plan, Request
from cos_console.model.problem import ProblemReport
from cos_console.planner import make_plan
from cos_console.tui.app import Console
from cos_console.tui.services import RecordedServices
from cos_console.views.text import page_text

MACHINES = Path(__file__).parents[1] / "machines"
SIZES = [(80, 24), (120, 40)]
T = "2026-01-02T03:04:05.000Z"


def shown(app: Console) -> str:
    """What stands on the screen, cell by cell."""
    return "\n".join("".join(s.text for s in strip) for strip in app.screen._compositor.render_strips())


async def ready(pilot: Pilot[int]) -> None:
    app = pilot.app
    assert isinstance(app, Console)
    for _ in range(100):
        await pilot.pause(0.02)
        if app.machine is not None:
            return
    raise AssertionError("no machine came")


def console(name: str) -> Console:
    return Console(RecordedServices(MACHINES / f"{name}.json"))


def restore_plan() -> Plan:
    machine = load_machine(MACHINES / "healthy.json")
    return make_plan(machine, Request(action=Action.RESTORE, installation=machine.installations[0].id))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("machine", sorted(p.stem for p in MACHINES.glob("*.json")))
async def test_home_details_help_and_back(machine: str, size: tuple[int, int]) -> None:
    app = console(machine)
    async with app.run_test(size=size) as pilot:
        await ready(pilot)
        home = shown(app)
        assert home.splitlines()[0].strip().startswith("cOS recovery")
        assert len(home.splitlines()[1].strip()) > 10
        await pilot.press("question_mark")
        assert app.place == "help"
        await pilot.press("escape")
        if app.machine is not None and app.machine.installations:
            await pilot.press("l")
            assert app.place == "details"
            assert app.machine.installations[0].disk.name in shown(app)
        await pilot.press("escape", "q")
    assert app.return_value == 0


@pytest.mark.parametrize("size", SIZES)
async def test_roll_back_plan_and_consent(size: tuple[int, int]) -> None:
    app = console("healthy")
    async with app.run_test(size=size) as pilot:
        await ready(pilot)
        app._go("rollback")
        await pilot.pause()
        text = shown(app)
        assert "Boot passive once" in text
        assert "Restore active" in text
        app.plan = restore_plan()
        app._go("plan")
        await pilot.pause()
        assert "Nothing has been changed yet." in shown(app)
        assert app.at == 0
        assert app.page().choices[0].label == "Not now"
        await pilot.press("down", "enter")
        assert app.place == "consent"
        await pilot.press("q", "x")
        assert app.typed == "qx"
        await pilot.press("enter")
        assert app.place == "consent"
        await pilot.press("backspace", "backspace", *"replace", "enter")
        for _ in range(100):
            await pilot.pause(0.02)
            if app.place == "problem":
                break
        assert "only shows plans" in shown(app)


def under_way() -> OperationState:
    plan = restore_plan()
    state = OperationState()
    for event in (
        Started(time=T, plan=plan, pid=1, boot_id="b"),
        StepBegun(time=T, index=0, kind=plan.steps[0].kind),
        StepDone(time=T, index=0, kind=plan.steps[0].kind, note="facts as planned"),
        StepBegun(time=T, index=2, kind=plan.steps[2].kind),
        Progress(
            time=T, index=2, bytes_done=50_000_000, bytes_total=100_000_000, rate_bps=10e6, waiting_s=4.0
        ),
    ):
        state = fold(state, event)
    return state


@pytest.mark.parametrize("size", SIZES)
async def test_progress_result_and_problem(size: tuple[int, int]) -> None:
    app = console("healthy")
    async with app.run_test(size=size) as pilot:
        await ready(pilot)
        app.state = under_way()
        app._go("progress")
        await pilot.pause()
        text = shown(app)
        assert "stopping now is safe" in text
        assert "50%" in text
        assert "last byte 4 s ago" in text
        done = Finished(
            time=T,
            result=Result.DONE,
            text="active is 0.5.2 again.",
            exit_code=0,
            facts={"action": "restore"},
        )
        app._now(fold(under_way(), done))
        await pilot.pause()
        assert "active is 0.5.2 again." in shown(app)
        assert "COS-RESULT rc=0 action=restore" in shown(app)
        report = ProblemReport(
            code="COS-X",
            what="It broke.",
            unchanged="The slots are as they were.",
            now="Do this.",
            exit_code=7,
        )
        app._fail(report)
        await pilot.pause()
        assert all(w in shown(app) for w in ("It broke.", "The slots are as they were.", "Do this.", "COS-X"))
        await pilot.press("enter")
        assert app.place == "home"


async def test_a_terminal_that_is_too_small_says_so_and_recovers() -> None:
    app = console("healthy")
    async with app.run_test(size=(50, 10)) as pilot:
        await ready(pilot)
        assert "too small" in shown(app)
        await pilot.resize_terminal(80, 24)
        for _ in range(50):
            await pilot.pause(0.05)
            if "What to do" in shown(app):
                break
        assert "What to do" in shown(app)


def test_an_error_of_the_console_ends_it_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = console("healthy")
    monkeypatch.setattr(app, "page", lambda: 1 / 0)
    assert app.run(headless=True) == 1
    said = "".join(capsys.readouterr())
    assert "The console made an error of its own and ended." in said
    assert "Traceback" not in said


async def test_a_file_that_is_no_machine_is_a_problem_page(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    app = Console(RecordedServices(tmp_path / "x.json"))
    async with app.run_test(size=(80, 24)) as pilot:
        for _ in range(100):
            await pilot.pause(0.02)
            if "COS-MACHINE-FILE" in shown(app):
                break
        assert "COS-MACHINE-FILE" in shown(app)
        assert isinstance(app.query_one("#verdict"), Static)


def test_each_page_reads_as_plain_text_too() -> None:
    app = console("healthy")
    app.machine = load_machine(MACHINES / "broken-active.json")
    for place in ("home", "details", "rollback", "source", "history"):
        app.place = place
        text = page_text(app.page())
        assert text.strip()
        assert max(map(len, text.splitlines())) <= 100

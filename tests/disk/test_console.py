"""The console on a real pty: every action driven by keys, on a real disk, and seen through a terminal emulator."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pyte
import pytest

from tests.disk.conftest import Run
from tests.disk.test_main_job import slots
from tests.sandbox.disk import SandboxDisk
from tests.sandbox.image import MadeImage

pytestmark = pytest.mark.disk


class Terminal:
    """An 80x24 terminal with the console in it."""

    def __init__(self, disk: SandboxDisk, run_dir: Path) -> None:
        self.screen = pyte.Screen(80, 24)
        self._stream = pyte.ByteStream(self.screen)
        environment = {**os.environ, "COS_CONSOLE_RUN_DIR": str(run_dir), "TERM": "xterm-256color"}
        self.process = pexpect.spawn(
            sys.executable,
            ["-m", "cos_console.cli.main", "--target", str(disk.path)],
            env=environment,
            dimensions=(24, 80),
            timeout=10,
        )

    def text(self) -> str:
        return "\n".join(self.screen.display)

    def _read(self) -> None:
        try:
            self._stream.feed(self.process.read_nonblocking(65536, timeout=0.1))
        except (pexpect.TIMEOUT, pexpect.EOF):
            pass

    def see(self, words: str, *, seconds: float = 20) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._read()
            if words in self.text():
                return self.text()
        raise AssertionError(f"{words!r} did not come:\n{self.text()}")

    def press(self, keys: str) -> None:
        self.process.send(keys)

    def choose(self, label: str) -> None:
        """Move the pointer to a choice, up or down as it lies, then press Enter."""
        end = time.monotonic() + 15
        while time.monotonic() < end:
            self._read()
            rows = self.screen.display
            pointer = [n for n, row in enumerate(rows) if row.lstrip().startswith("▶")]
            wanted = [n for n, row in enumerate(rows) if row.lstrip(" ▶").startswith(label)]
            if pointer and wanted and pointer[0] in wanted:
                self.press("\r")
                return
            if pointer and wanted:
                self.press("\x1b[B" if wanted[-1] > pointer[0] else "\x1b[A")
                time.sleep(0.2)
        raise AssertionError(f"no choice {label!r}:\n{self.text()}")


@pytest.fixture
def terminal(disk: SandboxDisk, tmp_path: Path) -> Iterator[Terminal]:
    t = Terminal(disk, tmp_path / "run")
    yield t
    t.process.close(force=True)


def test_upgrade_and_roll_back_by_keys(
    terminal: Terminal, console: Run, disk: SandboxDisk, image_two: MadeImage
) -> None:
    terminal.see("What to do")
    terminal.see("active     1.0")
    terminal.see("✓ sound")
    terminal.choose("Upgrade")
    terminal.see("Which image")
    terminal.press(image_two.reference + "\r")
    terminal.see("Nothing has been changed yet")
    terminal.see("not checked: this release has no signature check yet")
    terminal.see("Upgrade disk.img from 1.0 to 2.0")
    terminal.choose("Upgrade disk.img")
    terminal.see("active is 2.0, proven on disk", seconds=60)
    terminal.see("COS-RESULT rc=0")
    terminal.see("Back to the overview")
    terminal.press("\r")
    terminal.see("What to do")
    assert slots(console, disk)["active"] == "2.0 COS_ACTIVE sound"

    terminal.choose("Roll back")
    terminal.see("Boot passive once")
    terminal.choose("Boot passive once")
    terminal.see("Nothing has been changed yet")
    terminal.choose("Boot passive")
    terminal.see("passive boots next, once")
    terminal.see("Back to the overview")
    assert slots(console, disk)["next"] == "passive"
    terminal.press("\r")
    terminal.see("What to do")
    terminal.choose("Roll back")
    terminal.see("Restore active")
    terminal.choose("Restore active")
    terminal.see("Nothing has been changed yet")
    terminal.choose("Restore active of")
    terminal.see("This can't be undone")
    terminal.press("nonsense\r")
    terminal.see("nonsense_")
    terminal.press("\x7f" * 8 + "replace\r")
    terminal.see("active is 1.0 again", seconds=60)
    assert slots(console, disk)["active"] == "1.0 COS_ACTIVE sound"
    terminal.press("q")
    terminal.process.expect(pexpect.EOF)
    terminal.process.close()
    assert terminal.process.exitstatus == 0


def test_not_now_changes_nothing_and_a_wrong_name_is_a_sentence(
    terminal: Terminal, disk: SandboxDisk, image_two: MadeImage
) -> None:
    before = disk.path.read_bytes()
    terminal.see("What to do")
    terminal.choose("Upgrade")
    terminal.see("Which image")
    terminal.press("oci:/nowhere\r")
    assert "Traceback" not in terminal.see("COS-IMAGE-UNKNOWN")
    terminal.see("Back to the overview")
    terminal.press("\r")
    terminal.see("What to do")
    terminal.choose("Upgrade")
    terminal.see("Which image")
    terminal.press(image_two.reference + "\r")
    terminal.see("Nothing has been changed yet")
    terminal.press("\r")
    terminal.see("What to do")
    terminal.press("?")
    time.sleep(0.5)
    terminal.press("\x1b")
    terminal.see("What to do")
    assert disk.path.read_bytes() == before

"""Left-overs without a record: the windows of the original cos-upgrade, named on the page and mended by one command."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.disk.conftest import Run
from tests.sandbox.disk import Recipe, SandboxDisk, make_disk, make_slot_image
from tests.sandbox.disk import run as tool
from tests.sandbox.tree import Derivative

pytestmark = pytest.mark.disk
LABELS = {"active": "COS_ACTIVE", "passive": "COS_PASSIVE", "new": "COS_ACTIVE"}


class Cut:
    """A disk on which some other program was cut off."""

    def __init__(self, disk: SandboxDisk, work: Path, console: Run) -> None:
        self.disk, self.work, self.console = disk, work, console

    def change(self, label: str, *script: str) -> None:
        """Shell commands in cOS/ of that partition; $NEW is an image of version 2.0 without a label."""
        p = self.disk.partition(label)
        at = self.work / "mnt"
        at.mkdir(exist_ok=True)
        new = self.work / "new.img"
        if not new.exists():
            make_slot_image(new, Derivative("2.0"), "", size_mib=24, work=self.work)
        loop = (
            tool(
                ["losetup", "-f", "--show", "-o", p.start_bytes, "--sizelimit", p.size_bytes, self.disk.path]
            )
            .decode()
            .strip()
        )
        try:
            tool(["mount", loop, at])
            try:
                subprocess.run(
                    ["bash", "-ec", "; ".join(script)],
                    cwd=at / "cOS",
                    env={**os.environ, "NEW": str(new)},
                    check=True,
                    capture_output=True,
                )
            finally:
                tool(["umount", at])
        finally:
            tool(["losetup", "-d", loop])

    def look(self) -> dict[str, object]:
        done = self.console("status", "--json", "--target", self.disk.path)
        inst = json.loads(done.stdout)["installations"][0]
        found = {
            s["name"]: s["state"]
            if not s["os_release"]
            else f"{s['os_release']['version']} {s['label']} {s['state']}"
            for s in inst["slots"]
        }
        for left in inst["leftovers"]:
            assert left["meaning"].endswith(".")
            assert left["way_out"].endswith(".")
        return {
            **found,
            "next": inst["boot"]["next"],
            "left": {x["kind"]: x["repair"] for x in inst["leftovers"]},
        }

    def repair(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.console("repair", *words, "--target", self.disk.path, "--yes")

    def names(self) -> list[str]:
        part = self.disk.read_partition("COS_STATE", self.work / "part")
        tool(["e2fsck", "-fn", part])
        listed = tool(["grub-fstest", part, "ls", "--", "(loop0)/cOS/"]).decode().split()
        return sorted(n for n in listed if n.endswith(".img"))


@pytest.fixture
def cut(disk: SandboxDisk, tmp_path: Path, console: Run) -> Cut:
    return Cut(disk, tmp_path, console)


W1 = ('cp --sparse=always "$NEW" transition.img', "mv active.img passive.img")
W2 = (*W1, "tune2fs -L COS_PASSIVE passive.img")
W3 = (*W2, "mv transition.img active.img")
NEW, OLD = "2.0 COS_ACTIVE sound", "1.0 COS_PASSIVE sound"


@pytest.mark.parametrize(
    ("script", "kinds", "way", "active", "passive"),
    [
        (W1, {"missing-active", "transition-image"}, "finish", NEW, OLD),
        (W1, {"missing-active", "transition-image"}, "undo", "1.0 COS_ACTIVE sound", "missing"),
        (W2, {"missing-active", "transition-image"}, "finish", NEW, OLD),
        (W2, {"missing-active", "transition-image"}, "undo", "missing", OLD),
        (W3, {"wrong-label"}, "finish", NEW, OLD),
        (W3, {"wrong-label"}, "undo", NEW, OLD),
        (("mv active.img passive.img",), {"missing-active"}, "finish", "missing", OLD),
        (("mv active.img passive.img",), {"missing-active"}, "undo", "1.0 COS_ACTIVE sound", "missing"),
        (
            ("tune2fs -L COS_PASSIVE active.img", "tune2fs -L COS_ACTIVE passive.img"),
            {"swapped-labels"},
            "finish",
            "1.0 COS_ACTIVE sound",
            "0.9 COS_PASSIVE sound",
        ),
        (
            ("tune2fs -L COS_ACTIVE passive.img",),
            {"two-active-labels"},
            "finish",
            "1.0 COS_ACTIVE sound",
            "0.9 COS_PASSIVE sound",
        ),
        (
            ('cp "$NEW" retired.img', 'cp "$NEW" transition.img'),
            {"retired-image", "transition-image"},
            "undo",
            "1.0 COS_ACTIVE sound",
            "0.9 COS_PASSIVE sound",
        ),
        (
            ("ln active.img retired.img", "ln passive.img transition.img"),
            {"retired-image", "transition-image"},
            "undo",
            "1.0 COS_ACTIVE sound",
            "0.9 COS_PASSIVE sound",
        ),
        (
            ("mv active.img retired.img", "ln passive.img active.img"),
            {"retired-image"},
            "undo",
            "1.0 COS_ACTIVE sound",
            "0.9 COS_PASSIVE sound",
        ),
        (
            ("mv active.img retired.img", "ln passive.img active.img"),
            {"retired-image"},
            "finish",
            "0.9 COS_ACTIVE sound",
            "1.0 COS_PASSIVE sound",
        ),
        (
            ("mv active.img retired.img", "truncate -s 0 active.img"),
            {"retired-image"},
            "undo",
            "1.0 COS_ACTIVE sound",
            "0.9 COS_PASSIVE sound",
        ),
        (
            ("rm passive.img", "mv active.img retired.img", 'cp "$NEW" active.img', "tune2fs -L COS_ACTIVE active.img"),
            {"retired-image", "missing-passive"},
            "undo",
            NEW,
            OLD,
        ),
    ],
    ids=[
        "W1-finish", "W1-undo", "W2-finish", "W2-undo", "W3-finish", "W3-undo", "W1-no-image-finish",
        "W1-no-image-undo", "swapped-labels", "two-active-labels", "left-over-images", "left-over-links",
        "half-a-swap-undo", "half-a-swap-finish", "active-torn", "passive-gone",
    ],
)  # fmt: skip
def test_each_window_is_named_and_mended(
    cut: Cut, script: tuple[str, ...], kinds: set[str], way: str, active: str, passive: str
) -> None:
    cut.change("COS_STATE", *script)
    left = cut.look()["left"]
    assert isinstance(left, dict)
    assert kinds <= set(left)
    done = cut.repair(way)
    assert done.returncode == 0, done.stdout + done.stderr
    found = cut.look()
    assert (found["active"], found["passive"]) == (active, passive)
    boots = "passive" if active == "missing" else "active"
    assert found["next"] == boots
    assert cut.names() == sorted(f"{n}.img" for n in ("active", "passive") if found[n] != "missing")
    assert set(found["left"]) <= {"missing-active", "missing-passive"}  # type: ignore[call-overload]
    again = cut.repair(way)
    assert (again.returncode, "COS-NOTHING" in again.stderr) == (3, True), again.stdout


def test_a_new_image_that_is_not_whole_is_not_named_active(cut: Cut) -> None:
    cut.change("COS_STATE", *W1, "truncate -s 3M transition.img")
    done = cut.repair("finish")
    assert done.returncode == 3
    assert "COS-UNRECOGNISED" in done.stdout + done.stderr
    assert cut.repair("undo").returncode == 0
    assert cut.look()["active"] == "1.0 COS_ACTIVE sound"


def test_a_recovery_without_its_label_gets_it_back(cut: Cut) -> None:
    cut.change("COS_RECOVERY", "tune2fs -L '' recovery.img")
    assert cut.look()["left"] == {"wrong-label": "relabel"}
    assert cut.repair("relabel", "--slot", "recovery").returncode == 0
    assert cut.look()["recovery"] == "0.9 COS_SYSTEM sound"
    cut.change("COS_RECOVERY", "tune2fs -L '' recovery.img")
    assert cut.repair("finish").returncode == 0
    assert cut.look()["recovery"] == "0.9 COS_SYSTEM sound"


def test_nothing_whole_is_left_alone(cut: Cut) -> None:
    cut.change(
        "COS_STATE",
        "truncate -s 0 active.img",
        "truncate -s 0 passive.img",
        "echo not an image > retired.img",
    )
    done = cut.repair("undo")
    assert (done.returncode, "COS-UNRECOGNISED" in done.stdout + done.stderr) == (3, True), done.stdout
    assert cut.names() == ["active.img", "passive.img", "retired.img"]


def test_other_layouts_need_no_labels(console: Run, tmp_path: Path) -> None:
    cut = Cut(make_disk(tmp_path / "d.img", Recipe(layout="elemental-v1")), tmp_path, console)
    cut.change("COS_STATE", *W1)
    assert cut.repair("finish").returncode == 0
    found = cut.look()
    assert str(found["active"]).startswith("2.0 ")
    assert str(found["passive"]).startswith("1.0 ")
    assert found["left"] == {}

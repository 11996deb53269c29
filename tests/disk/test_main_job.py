"""The main job from the command line, end to end, judged by e2fsck, the kernel and GRUB's own code."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.disk.conftest import Run
from tests.sandbox.disk import Recipe, SandboxDisk, make_disk, run
from tests.sandbox.image import MadeImage, make_derivative_image
from tests.sandbox.tree import Derivative

pytestmark = pytest.mark.disk


def slots(console: Run, disk: SandboxDisk) -> dict[str, str]:
    done = console("status", "--json", "--target", disk.path)
    inst = json.loads(done.stdout)["installations"][0]
    found = {s["name"]: f"{s['os_release']['version']} {s['label']} {s['state']}" for s in inst["slots"]}
    return {**found, "next": inst["boot"]["next"], "after": inst["boot"]["after"]}


def image_hash(disk: SandboxDisk, work: Path, name: str) -> str:
    part = disk.read_partition("COS_STATE", work / "state.part")
    return hashlib.sha256(run(["grub-fstest", part, "cat", "--", f"(loop0)/cOS/{name}.img"])).hexdigest()


def test_find_plan_upgrade_and_roll_back(
    console: Run, disk: SandboxDisk, image_two: MadeImage, tmp_path: Path
) -> None:
    target = ("--target", disk.path)
    assert console("plan", image_two.reference, *target).stdout.startswith(
        "Upgrade disk.img from 1.0 to 2.0."
    )
    old_active = image_hash(disk, tmp_path, "active")
    done = console("upgrade", image_two.reference, *target, "--yes")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last == f"COS-RESULT rc=0 action=upgrade from=1.0 to=2.0 digest={image_two.manifest_digest}"
    assert "signature: not checked" in done.stdout
    after = {
        "active": "2.0 COS_ACTIVE sound",
        "passive": "1.0 COS_PASSIVE sound",
        "recovery": "0.9 COS_SYSTEM sound",
    }
    assert slots(console, disk) == {**after, "next": "active", "after": "active"}
    part = disk.read_partition("COS_STATE", tmp_path / "part")
    run(["e2fsck", "-fn", part])
    passive = run(["grub-fstest", part, "cat", "--", "(loop0)/cOS/passive.img"])
    relabelled = bytearray(passive)
    relabelled[1144:1160] = b"COS_ACTIVE".ljust(16, b"\0")
    assert hashlib.sha256(bytes(relabelled)).hexdigest() == old_active
    active = tmp_path / "active.img"
    active.write_bytes(run(["grub-fstest", part, "cat", "--", "(loop0)/cOS/active.img"]))
    run(["e2fsck", "-fn", active])
    assert run(["grub-fstest", active, "cat", "--", "(loop0)/boot/vmlinuz"]).startswith(b"KERNEL 2.0\n")

    assert console("rollback", "once", *target, "--yes").returncode == 0
    assert (slots(console, disk)["next"], slots(console, disk)["after"]) == ("passive", "active")
    assert console("rollback", "once", "--slot", "active", *target, "--yes").returncode == 0
    assert slots(console, disk)["next"] == "active"
    assert console("rollback", "default", *target, "--yes").returncode == 0
    assert (slots(console, disk)["next"], slots(console, disk)["after"]) == ("passive", "passive")
    assert console("rollback", "default", *target, "--yes").returncode == 0
    assert slots(console, disk)["after"] == "active"
    assert console("rollback", "swap", *target, "--yes").returncode == 0
    assert slots(console, disk)["active"] == "1.0 COS_ACTIVE sound"
    assert slots(console, disk)["passive"] == "2.0 COS_PASSIVE sound"
    assert console("rollback", "restore", *target, "--yes").returncode == 0
    assert slots(console, disk)["active"] == "2.0 COS_ACTIVE sound"
    assert console("rollback", "restore-from-recovery", *target, "--yes").returncode == 0
    assert slots(console, disk)["active"] == "0.9 COS_ACTIVE sound"
    history = json.loads(console("history", "--json", *target).stdout)
    assert [h["action"] for h in history] == [
        "upgrade",
        "once",
        "once",
        "default",
        "default",
        "swap",
        "restore",
        "restore-from-recovery",
    ]


def test_a_trial_keeps_passive_the_default_until_it_is_confirmed(
    console: Run, disk: SandboxDisk, image_two: MadeImage
) -> None:
    target = ("--target", disk.path)
    assert console("upgrade", image_two.reference, *target, "--try-once", "--yes").returncode == 0
    assert (slots(console, disk)["next"], slots(console, disk)["after"]) == ("active", "passive")
    assert console("confirm", *target, "--yes").returncode == 0
    assert slots(console, disk)["after"] == "active"


def test_a_broken_active_is_replaced_and_the_sound_passive_kept(
    console: Run, tmp_path: Path, image_two: MadeImage
) -> None:
    disk = make_disk(tmp_path / "d.img", Recipe(active=Derivative("1.0", kernel=False)))
    assert console("status", "--target", disk.path).returncode == 11
    assert console("upgrade", image_two.reference, "--target", disk.path, "--yes").returncode == 0
    found = slots(console, disk)
    assert (found["active"], found["passive"]) == ("2.0 COS_ACTIVE sound", "0.9 COS_PASSIVE sound")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(table="mbr", recovery_squashfs=True),
        Recipe(layout="elemental-v1"),
        Recipe(layout="harvester"),
        Recipe(state_fs="ext2"),
        Recipe(state_block_size=1024),
        Recipe(image_fs="ext4"),
        Recipe(grubenv={"saved_entry": "fallback", "next_entry": "recovery", "extra_cmdline": "a=b c"}),
        Recipe(grubenv=None),
    ],
    ids=[
        "mbr",
        "elemental",
        "harvester",
        "ext2",
        "1k-blocks",
        "ext4-images",
        "odd-environment",
        "no-grubenv",
    ],
)
def test_other_layouts_upgrade_too(
    console: Run, tmp_path: Path, image_two: MadeImage, recipe: Recipe
) -> None:
    disk = make_disk(tmp_path / "d.img", recipe)
    done = console("upgrade", image_two.reference, "--target", disk.path, "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    found = slots(console, disk)
    assert found["active"].startswith("2.0 ")
    assert found["active"].endswith(" sound")
    assert (found["next"], found["after"]) == ("active", "active")
    if recipe.grubenv and "extra_cmdline" in recipe.grubenv:
        oem = disk.read_partition("COS_OEM", tmp_path / "oem")
        assert b"extra_cmdline=a=b c\n" in run(["grub-fstest", oem, "cat", "--", "(loop0)/grubenv"])


def whole(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_refusals_change_not_one_byte(
    console: Run, disk: SandboxDisk, image_two: MadeImage, tmp_path: Path
) -> None:
    before = whole(disk.path)
    target = ("--target", disk.path)
    expected = [
        (("upgrade", image_two.reference, *target), 3, "Nobody is there to ask"),
        (("upgrade", image_two.reference, *target, "--yes", "--size", "4000"), 3, "COS-SPACE-STATE"),
        (("upgrade", "oci:/nowhere", *target, "--yes"), 5, "COS-IMAGE-UNKNOWN"),
        (("upgrade", "NOT//valid", *target, "--yes"), 2, "COS-REFERENCE"),
        (("upgrade", *target, "--yes"), 2, "COS-USAGE"),
        (("rollback", "sideways", *target), 2, "invalid choice"),
        (("repair", "finish", *target, "--yes"), 3, "COS-NOTHING"),
        (("upgrade", image_two.reference, *target, "--dry-run"), 0, ""),
        (("status", "--target", tmp_path / "none"), 4, ""),
    ]
    for words, code, text in expected:
        done = console(*words)
        assert (done.returncode, text in done.stderr) == (code, True), (words, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
    assert whole(disk.path) == before


def test_an_image_that_cannot_boot_is_refused_and_the_slots_stay(
    console: Run, disk: SandboxDisk, tmp_path: Path
) -> None:
    old = [image_hash(disk, tmp_path, n) for n in ("active", "passive")]
    headless = make_derivative_image(tmp_path / "headless", Derivative("3.0", kernel=False))
    done = console("upgrade", headless.reference, "--target", disk.path, "--yes")
    assert done.returncode == 3
    assert "COS-CANT-BOOT" in done.stdout
    assert [image_hash(disk, tmp_path, n) for n in ("active", "passive")] == old
    part = disk.read_partition("COS_STATE", tmp_path / "part")
    assert b"transition" not in run(["grub-fstest", part, "ls", "--", "(loop0)/cOS/"])


def test_a_wrong_digest_is_refused_and_the_slots_stay(
    console: Run, disk: SandboxDisk, tmp_path: Path
) -> None:
    old = [image_hash(disk, tmp_path, n) for n in ("active", "passive")]
    bad = make_derivative_image(tmp_path / "bad", Derivative("3.0"))
    blob = bad.directory / "blobs/sha256" / bad.layer_digests[1].removeprefix("sha256:")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(bytes(data))
    done = console("upgrade", bad.reference, "--target", disk.path, "--yes")
    assert done.returncode == 6, done.stdout
    assert [image_hash(disk, tmp_path, n) for n in ("active", "passive")] == old


def test_two_disks_need_a_target(disk: SandboxDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    from cos_console.cli import commands
    from cos_console.host.scan import scan
    from cos_console.model.machine import Machine
    from cos_console.model.problem import Problem

    one = scan(disk.path)
    twice = Machine(
        **{f: getattr(one, f) for f in one.__struct_fields__ if f != "installations"},
        installations=(*one.installations, *one.installations),
    )
    monkeypatch.setattr(commands, "_scan", lambda _: twice)
    with pytest.raises(Problem, match="There are 2 installations") as caught:
        commands.rollback(Namespace(way="once", slot=None, yes=True))
    assert caught.value.report.exit_code == 3


class Slow:
    """An upgrade held up in the middle: its registry stops after half a layer until `release` is set."""

    def __init__(self, tmp_path: Path, disk: SandboxDisk, image: MadeImage) -> None:
        self.release = threading.Event()
        self.halfway = threading.Event()
        held = image.layer_digests[1]
        index = json.loads((image.directory / "index.json").read_text())["manifests"][0]
        slow = self

        class Registry(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.rpartition("/")[2]
                digest = index["digest"] if "/manifests/" in self.path else name
                if not digest.startswith("sha256:"):
                    self.send_response(200)
                    self.end_headers()
                    return
                data = (image.directory / "blobs/sha256" / digest.removeprefix("sha256:")).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if digest == held:
                    self.wfile.write(data[: len(data) // 2])
                    self.wfile.flush()
                    slow.halfway.set()
                    slow.release.wait(60)
                    data = data[len(data) // 2 :]
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cos_console.cli.main", "upgrade"]
            + [f"127.0.0.1:{self.server.server_address[1]}/os/slow:4.0", "--target", str(disk.path), "--yes"],
            env={**os.environ, "COS_CONSOLE_RUN_DIR": str(tmp_path / "run")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.halfway.wait(30)

    def end(self) -> None:
        self.release.set()
        self.server.shutdown()


def test_attach_cancel_and_the_death_of_the_console(console: Run, disk: SandboxDisk, tmp_path: Path) -> None:
    old = [image_hash(disk, tmp_path, n) for n in ("active", "passive")]
    image = make_derivative_image(tmp_path / "slow", Derivative("4.0"))
    slow = Slow(tmp_path, disk, image)
    os.killpg(slow.process.pid, signal.SIGKILL)
    slow.process.wait()
    again = console("rollback", "once", "--target", disk.path, "--yes")
    assert again.returncode == 9, again.stdout + again.stderr
    done = console("cancel")
    assert done.returncode == 0, done.stderr
    seen = console("attach")
    assert seen.returncode == 10
    assert "COS-RESULT rc=10 action=upgrade" in seen.stdout
    slow.end()
    assert [image_hash(disk, tmp_path, n) for n in ("active", "passive")] == old
    assert console("rollback", "once", "--target", disk.path, "--yes").returncode == 0


def test_a_hang_up_does_not_stop_the_upgrade(console: Run, disk: SandboxDisk, tmp_path: Path) -> None:
    slow = Slow(tmp_path, disk, make_derivative_image(tmp_path / "slow", Derivative("4.0")))
    os.killpg(slow.process.pid, signal.SIGHUP)
    slow.process.wait()
    slow.release.set()
    seen = console("attach")
    slow.end()
    assert seen.returncode == 0, seen.stdout
    assert slots(console, disk)["active"] == "4.0 COS_ACTIVE sound"


def test_a_killed_engine_leaves_a_sound_disk_and_undo_cleans_it(
    console: Run, disk: SandboxDisk, tmp_path: Path, image_two: MadeImage
) -> None:
    image = make_derivative_image(tmp_path / "slow", Derivative("4.0"))
    slow = Slow(tmp_path, disk, image)
    pid = int(next((tmp_path / "run").glob("*/pid")).read_text())
    os.kill(pid, signal.SIGKILL)
    assert slow.process.wait(timeout=60) == 8
    slow.end()
    status = console("status", "--target", disk.path)
    assert status.returncode == 8, status.stdout
    refused = console("upgrade", image_two.reference, "--target", disk.path, "--yes")
    assert refused.returncode == 8
    assert console("repair", "undo", "--target", disk.path, "--yes").returncode == 0
    again = console("upgrade", image_two.reference, "--target", disk.path, "--yes")
    assert again.returncode == 0, again.stdout
    assert slots(console, disk)["passive"] == "1.0 COS_PASSIVE sound"

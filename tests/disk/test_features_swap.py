"""Swapping through a copy, and giving up passive where three images have no room; on sandbox disks."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.disk.conftest import Run
from tests.sandbox.disk import Recipe, SandboxDisk, make_disk, run
from tests.sandbox.image import MadeImage, make_derivative_image
from tests.sandbox.tree import Derivative

pytestmark = pytest.mark.disk


def slots(console: Run, disk: SandboxDisk) -> dict[str, str]:
    """Version, label and state of active and passive; what boots next and after that."""
    inst = json.loads(console("status", "--json", "--target", disk.path).stdout)["installations"][0]
    found = {
        s["name"]: f"{s['os_release']['version']} {s['label']} {s['state']}"
        for s in inst["slots"]
        if s["name"] != "recovery"
    }
    return {**found, "next": inst["boot"]["next"], "after": inst["boot"]["after"]}


def clean(disk: SandboxDisk, work: Path) -> None:
    """COS_STATE is whole and no left-over lies in it, as GRUB sees it."""
    part = disk.read_partition("COS_STATE", work / "clean.part")
    run(["e2fsck", "-fn", part])
    names = run(["grub-fstest", part, "ls", "--", "(loop0)/cOS/"]).decode().split()
    assert sorted(n for n in names if n.endswith(".img")) == ["active.img", "passive.img"]
    for name in ("active", "passive"):
        image = work / f"{name}.img"
        image.write_bytes(run(["grub-fstest", part, "cat", "--", f"(loop0)/cOS/{name}.img"]))
        run(["e2fsck", "-fn", image])


@pytest.mark.parametrize("recovery", [Derivative("0.9"), Derivative("0.9", kernel=False), None])
def test_a_swap_through_a_copy_needs_no_recovery(
    console: Run, tmp_path: Path, recovery: Derivative | None
) -> None:
    disk = make_disk(tmp_path / "d.img", Recipe(recovery=recovery))
    target = ("--target", disk.path, "--yes")
    words = ("--by-copy",) if recovery and recovery.kernel else ()
    for active, passive in (("0.9", "1.0"), ("1.0", "0.9")):
        done = console("rollback", "swap", *words, *target)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Copy passive" in done.stdout
        found = slots(console, disk)
        assert (found["active"], found["passive"]) == (
            f"{active} COS_ACTIVE sound",
            f"{passive} COS_PASSIVE sound",
        )
        assert (found["next"], found["after"]) == ("active", "active")
        clean(disk, tmp_path)


def test_passive_is_given_up_only_with_consent_and_comes_back(
    console: Run, tmp_path: Path, image_two: MadeImage
) -> None:
    disk = make_disk(tmp_path / "d.img", Recipe(state_mib=72, grubenv={"saved_entry": "fallback"}))
    target = ("--target", disk.path)
    # saved_entry names passive, so passive would be kept: make active the default first
    assert console("rollback", "default", "--slot", "active", *target, "--yes").returncode == 0
    inst = json.loads(console("status", "--json", *target).stdout)["installations"][0]
    passive = next(s["allocated_bytes"] for s in inst["slots"] if s["name"] == "passive")
    size = (inst["state_free_bytes"] + passive // 2) >> 20  # too much beside passive, enough without it
    refused = console("upgrade", image_two.reference, *target, "--yes", "--size", size)
    assert refused.returncode == 3
    assert "--remove-passive-first" in refused.stderr
    assert slots(console, disk)["passive"] == "0.9 COS_PASSIVE sound"
    words = ("upgrade", image_two.reference, *target, "--size", size, "--remove-passive-first")
    shown = console(*words, "--dry-run")
    assert "until this is done there is no fallback" in shown.stdout
    done = console(*words, "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    found = slots(console, disk)
    assert (found["active"], found["passive"]) == ("2.0 COS_ACTIVE sound", "1.0 COS_PASSIVE sound")
    assert found["next"] == "active"
    clean(disk, tmp_path)


def test_a_failure_after_passive_was_given_up_says_so_and_active_boots(console: Run, tmp_path: Path) -> None:
    disk = make_disk(tmp_path / "d.img", Recipe(state_mib=72))
    bad = make_derivative_image(tmp_path / "bad", Derivative("3.0"))
    blob = bad.directory / "blobs/sha256" / bad.layer_digests[1].removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    words = (
        "upgrade",
        bad.reference,
        "--target",
        disk.path,
        "--size",
        "48",
        "--remove-passive-first",
        "--yes",
    )
    done: subprocess.CompletedProcess[str] = console(*words)
    assert done.returncode == 6
    assert "passive was removed first, as consented" in done.stdout + done.stderr
    status = json.loads(console("status", "--json", "--target", disk.path).stdout)["installations"][0]
    assert status["boot"]["next"] == "active"
    assert {x["kind"] for x in status["leftovers"]} == {"missing-passive"}

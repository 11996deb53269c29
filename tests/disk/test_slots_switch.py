"""The switch on real file systems: after each move GRUB's own driver and Linux see the same names."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cos_console.slots import checkpoint, record, restore
from cos_console.slots.label import read_label
from cos_console.slots.port import ExtentKind, MountedVolume, Place, RealPort, Volume
from cos_console.slots.switch import (
    ACTIVE,
    PASSIVE,
    RETIRED,
    TRANSITION,
    Move,
    Rename,
    Situation,
    run,
    upgrade,
)
from tests.sandbox.disk import run as tool

pytestmark = pytest.mark.disk
MIB = 1 << 20
ENV = Place(Volume.STATE, "grubenv")


class Mounted:
    def __init__(self, image: Path, root: Path, fd: int, fs: str) -> None:
        self.image, self.root, self.fd, self.fs = image, root, fd, fs
        self.port = RealPort({Volume.STATE: MountedVolume(fd)})

    def grub(self, command: str, *argv: str) -> bytes:
        """GRUB's view of what is on the medium, journal not replayed."""
        with self.image.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return subprocess.run(
            ["grub-fstest", self.image, command, *argv], capture_output=True, check=False
        ).stdout


@pytest.fixture(params=[("ext4", 4096, "none"), ("ext4", 1024, "metadata_csum"), ("ext2", 1024, "none")])
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mounted]:
    fs, block, image_features = request.param
    image, root = tmp_path / "state", tmp_path / "root"
    root.mkdir()
    with image.open("wb") as f:
        f.truncate(64 * MIB)
    tool(["mke2fs", "-q", "-F", "-t", fs, "-b", str(block), "-L", "COS_STATE", image])
    loop = tool(["losetup", "-f", "--show", image]).decode().strip()
    try:
        tool(["mount", loop, root])
        try:
            (root / "cOS").mkdir()
            for place, label in (
                (ACTIVE, "COS_ACTIVE"),
                (PASSIVE, "COS_PASSIVE"),
                (TRANSITION, "COS_ACTIVE"),
            ):
                slot = root / place.path
                slot.write_bytes(bytes(4 * MIB))
                options = ["-O", image_features] if image_features != "none" else []
                kind = "ext4" if options else "ext2"
                tool(["mke2fs", "-q", "-F", "-t", kind, *options, "-E", "nodiscard", "-L", label, slot])
            os.sync()
            fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
            try:
                yield Mounted(image, root, fd, fs)
            finally:
                os.close(fd)
        finally:
            tool(["umount", root])
    finally:
        tool(["losetup", "-d", loop])


def test_after_each_rename_grub_reads_the_names_that_linux_reads(mounted: Mounted) -> None:
    seen: list[Move] = []

    def look(_index: int, move: Move) -> None:
        seen.append(move)
        if isinstance(move, Rename):
            for place in (ACTIVE, PASSIVE):
                superblock = mounted.port.read(place, 1024, 1024)
                assert mounted.grub("cat", f"/{place.path}")[1024:2048] == superblock, place

    new = mounted.port.stat(TRANSITION)
    old = mounted.port.stat(ACTIVE)
    assert new is not None
    assert old is not None
    run(mounted.port, upgrade(Situation(), keep_active=True), (ENV,), done=look)
    assert sum(isinstance(m, Rename) for m in seen) == 2
    assert mounted.port.stat(ACTIVE).inode == new.inode  # type: ignore[union-attr]
    assert mounted.port.stat(PASSIVE).inode == old.inode  # type: ignore[union-attr]
    assert mounted.port.stat(RETIRED) is None
    assert read_label(mounted.port, ACTIVE) == "COS_ACTIVE"
    assert read_label(mounted.port, PASSIVE) == "COS_PASSIVE"
    assert b"saved_entry=cos\n" in mounted.grub("cat", "/grubenv")
    for place in (ACTIVE, PASSIVE):
        tool(["e2fsck", "-fn", mounted.root / place.path])


class NoCheckpoint(RealPort):
    def checkpoint(self, volume: Volume) -> str:
        return "left out"


def test_without_the_checkpoint_grub_reads_the_old_image(mounted: Mounted) -> None:
    if mounted.fs != "ext4":
        pytest.skip("only a journal hides a rename from GRUB")
    port = NoCheckpoint({Volume.STATE: MountedVolume(mounted.fd)})
    mounted.port.checkpoint(Volume.STATE)
    run(port, (Rename(TRANSITION, ACTIVE),), ())
    superblock = mounted.port.read(ACTIVE, 1024, 1024)
    assert mounted.grub("cat", f"/{ACTIVE.path}")[1024:2048] != superblock


def test_an_operation_record_survives_and_a_torn_one_is_never_named(mounted: Mounted) -> None:
    half = record.RECORD.beside(".cos-console.json.new")
    mounted.port.create(half)
    mounted.port.write_at(half, 0, b'{"half')
    assert record.read(mounted.port) is None
    record.drop(mounted.port)
    assert mounted.port.stat(half) is None


def test_reserved_blocks_are_reported_until_they_are_written_or_dug_out(mounted: Mounted) -> None:
    place = Place(Volume.STATE, "cOS/reserved.img")
    mounted.port.create(place)
    if mounted.fs == "ext2":  # mapped by blocks: this kernel's driver can't reserve there, and says so
        with pytest.raises(OSError):
            mounted.port.reserve(place, MIB)
        return
    mounted.port.reserve(place, MIB)
    assert {e.kind for e in mounted.port.extents(place)} == {ExtentKind.UNWRITTEN}
    mounted.port.punch(place, 0, MIB)
    assert mounted.port.extents(place) == ()


def test_a_freezer_that_is_killed_does_not_leave_the_file_system_frozen(mounted: Mounted) -> None:
    fd = os.open(mounted.root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert checkpoint.freeze_and_thaw(fd) == "frozen and thawed"
        freezer = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", checkpoint.FREEZER, str(fd), "60"],
            pass_fds=(fd,),
            stdout=subprocess.PIPE,
        )
        assert freezer.stdout is not None
        assert freezer.stdout.readline() == b"frozen\n"
        freezer.kill()
        freezer.wait(10)
        freezer.stdout.close()
        started = time.monotonic()
        (mounted.root / "written").write_text("not frozen")
        os.sync()
        assert time.monotonic() - started < 10
    finally:
        os.close(fd)


def test_a_copy_is_equal_has_no_unwritten_block_and_reads_the_same_in_grub(mounted: Mounted) -> None:
    place = Place(Volume.STATE, "cOS/copied.img")
    assert restore.copy(mounted.port, ACTIVE, place)
    mounted.port.checkpoint(Volume.STATE)
    assert restore.prove_equal(mounted.port, ACTIVE, place) == 4 * MIB
    assert {e.kind for e in mounted.port.extents(place)} == {ExtentKind.WRITTEN}
    assert mounted.grub("cat", f"/{place.path}") == (mounted.root / ACTIVE.path).read_bytes()
    mounted.port.write_at(place, 2 * MIB + 5, b"x")
    with pytest.raises(restore.NotEqual):
        restore.prove_equal(mounted.port, ACTIVE, place)


def test_a_copy_that_does_not_fit_is_refused_before_it_is_filled(mounted: Mounted) -> None:
    place = Place(Volume.STATE, "cOS/copied.img")
    filler = Place(Volume.STATE, "filler")
    mounted.port.create(filler)
    room = mounted.port.free_bytes(Volume.STATE)
    restore.reserve(mounted.port, filler, room - 3 * MIB)
    reported: list[int] = []
    with pytest.raises(OSError, match="o space"):
        restore.copy(mounted.port, ACTIVE, place, report=lambda done, _total: reported.append(done))
    assert reported == []

"""Looking at real sandbox disks: what is found, and that looking writes nothing."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cos_console.formats.readat import ReadAt
from cos_console.host.scan import damaged, inspect, scan
from cos_console.model.machine import (
    Finding,
    Installation,
    Layout,
    Severity,
    Slot,
    SlotName,
    SlotState,
    TableKind,
)
from cos_console.model.problem import Problem
from tests.sandbox.disk import Recipe, SandboxDisk, make_disk, run
from tests.sandbox.grub import environment_block
from tests.sandbox.tree import Derivative

pytestmark = pytest.mark.disk
SMALL = Derivative("1.0", payload_mib=0)
OLD = Derivative("0.9", payload_mib=0)
BASE = Recipe(active=SMALL, passive=OLD, recovery=OLD, image_mib=8, state_mib=48, recovery_mib=24)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> SandboxDisk:
    """Read only by the tests that use it."""
    return make_disk(tmp_path_factory.mktemp("healthy") / "disk.img", BASE)


@pytest.fixture
def disk(tmp_path) -> Callable[..., SandboxDisk]:
    def make(**changes) -> SandboxDisk:
        return make_disk(tmp_path / f"{len(list(tmp_path.iterdir()))}.img", replace(BASE, **changes))

    return make


@pytest.fixture
def attach() -> Iterator[Callable[..., str]]:
    """Attach a disk image to a loop device with its partitions; taken away at the end."""
    loops: list[str] = []
    mounts: list[Path] = []

    def go(path: Path, *, mount: tuple[int, Path, str] | None = None, sector: int = 512) -> str:
        for attempt in range(
            5
        ):  # "find a free one" and "take it" are two steps: another process may be faster
            try:
                loop = run(["losetup", "-f", "--show", "-b", sector, path]).decode().strip()
                break
            except RuntimeError:
                if attempt == 4:
                    raise
                time.sleep(0.2)
        loops.append(loop)
        run(["partx", "-u", loop])
        if mount is not None:
            number, at, options = mount
            at.mkdir()
            node = f"{loop}p{number}"
            _node(node)
            run(["mount", "-o", options, node, at])
            mounts.append(at)
        return loop

    yield go
    for at in mounts:
        run(["umount", at])
    for loop in loops:
        subprocess.run(["partx", "-d", loop], check=False, capture_output=True)
        run(["losetup", "-d", loop])


def _node(path: str) -> None:
    for _ in range(100):
        if Path(path).exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def only(path: Path) -> Installation:
    machine = scan(path)
    assert len(machine.installations) == 1
    return machine.installations[0]


def slot(installation: Installation, name: SlotName) -> Slot:
    found = installation.slot(name)
    assert found is not None
    return found


def codes(findings: tuple[Finding, ...]) -> set[str]:
    return {f.code for f in findings}


def kinds(installation: Installation) -> dict[str, str]:
    return {left.kind: left.repair for left in installation.leftovers}


def patch_slot(disk: SandboxDisk, tmp: Path, commands: list[str], label: str = "COS_STATE") -> None:
    """Run debugfs commands, which write, on one partition."""
    part = disk.read_partition(label, tmp / "part")
    (tmp / "commands").write_text("\n".join(commands) + "\n")
    run(["debugfs", "-w", "-f", tmp / "commands", part])
    target = disk.partition(label)
    with part.open("rb") as src, disk.path.open("r+b") as dst:
        dst.seek(target.start_bytes)
        dst.write(src.read())
    part.unlink()


# --- what is found ---------------------------------------------------------------------------------------------------


def test_a_healthy_disk_is_one_installation_with_three_sound_slots(healthy):
    found = only(healthy.path)
    assert found.layout is Layout.COS
    assert [(s.name, s.state, s.version) for s in found.slots] == [
        (SlotName.ACTIVE, SlotState.SOUND, "1.0"),
        (SlotName.PASSIVE, SlotState.SOUND, "0.9"),
        (SlotName.RECOVERY, SlotState.SOUND, "0.9"),
    ]
    active = slot(found, SlotName.ACTIVE)
    assert (active.label, active.expected_label, active.fs_type) == ("COS_ACTIVE", "COS_ACTIVE", "ext2")
    assert active.size_bytes == 8 << 20
    assert 0 < active.allocated_bytes <= active.size_bytes
    assert active.created.startswith("20")
    assert (active.kernel, active.initrd) == ("/boot/vmlinuz", "/boot/initrd")
    assert found.id == next(p.part_uuid for p in found.disk.partitions if p.fs_label == "COS_STATE")
    assert found.boot.next is SlotName.ACTIVE
    assert found.boot.if_fails == (SlotName.PASSIVE, SlotName.RECOVERY)
    assert found.findings == ()
    assert found.leftovers == ()
    assert not damaged(scan(healthy.path))


def test_the_free_space_is_what_the_superblock_says(healthy, tmp_path):
    part = healthy.read_partition("COS_STATE", tmp_path / "state")
    lines = run(["dumpe2fs", "-h", part]).decode().splitlines()
    free = next(int(line.split()[-1]) for line in lines if line.startswith("Free blocks:"))
    assert only(healthy.path).state_free_bytes == free * 4096


def test_partitions_are_those_that_sfdisk_shows(healthy):
    import json

    table = json.loads(run(["sfdisk", "-J", healthy.path]))["partitiontable"]
    found = only(healthy.path).disk
    assert found.disk_id == table["id"].lower()
    assert [(p.start_bytes // 512, p.size_bytes // 512, p.part_uuid, p.name) for p in found.partitions] == [
        (p["start"], p["size"], p["uuid"].lower(), p["name"]) for p in table["partitions"]
    ]
    assert found.partitions[0].flags == ("esp",)


def test_an_mbr_disk_is_found_too(disk):
    made = disk(table="mbr", recovery=None)
    found = only(made.path)
    assert found.disk.table is TableKind.MBR
    assert found.id == f"{found.disk.disk_id}-02"
    assert slot(found, SlotName.RECOVERY).state is SlotState.MISSING
    assert "boot" in found.disk.partitions[1].flags


def test_a_disk_of_4096_byte_sectors_is_found_as_a_file_and_as_a_device(disk, attach):
    made = disk(sector_bytes=4096, recovery=None)
    found = only(made.path)
    assert found.disk.sector_bytes == 4096
    assert slot(found, SlotName.ACTIVE).state is SlotState.SOUND
    loop = attach(made.path, sector=4096)
    again = only(Path(loop))
    assert again.id == found.id
    assert again.disk.sector_bytes == 4096


def test_two_disks_with_equal_labels_are_two_installations(disk, attach):
    loops = [attach(disk(recovery=None).path), attach(disk(recovery=None, active=OLD).path)]
    machine = scan()
    found = [i for i in machine.installations if i.disk.path in loops]
    assert len({i.id for i in found}) == 2
    assert {i.disk.path: slot(i, SlotName.ACTIVE).version for i in found} == dict(
        zip(loops, ("1.0", "0.9"), strict=True)
    )


def test_a_copied_disk_gets_its_own_id_and_is_named_as_a_copy(healthy, attach, tmp_path):
    copy = tmp_path / "copy.img"
    run(["cp", "--sparse=always", healthy.path, copy])
    loops = [attach(healthy.path), attach(copy)]
    machine = scan()
    found = [i for i in machine.installations if i.disk.path in loops]
    assert len({i.id for i in found}) == 2
    assert "COS-DISK-CLONE" in codes(machine.findings)
    again = inspect(found[0])
    assert again is not None
    assert again.disk.path == found[0].disk.path


def test_two_state_partitions_on_one_disk_are_said_and_the_one_with_images_is_used(disk, tmp_path):
    made = disk(recovery=None)
    target = made.partition("COS_PERSISTENT")
    with made.path.open("r+b") as f:
        f.seek(target.start_bytes + 1024 + 120)
        f.write(b"COS_STATE".ljust(16, b"\0"))
    found = only(made.path)
    assert "COS-DUPLICATE-LABEL" in codes(found.findings)
    assert found.state_partition == made.partition("COS_STATE").number


def test_a_squashfs_recovery_is_looked_into(disk):
    found = only(disk(recovery_squashfs=True).path)
    recovery = slot(found, SlotName.RECOVERY)
    assert (recovery.file, recovery.fs_type) == ("cOS/recovery.squashfs", "squashfs")
    assert (recovery.version, recovery.label, recovery.state) == ("0.9", "", SlotState.SOUND)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("kairos", Layout.KAIROS), ("elemental-v1", Layout.ELEMENTAL_V1), ("harvester", Layout.HARVESTER)],
)
def test_the_heirs_are_told_apart(disk, layout, expected):
    system = Derivative("1.0", layout=layout, payload_mib=0)
    found = only(disk(layout=layout, active=system, passive=system, recovery=None).path)
    assert found.layout is expected
    assert slot(found, SlotName.ACTIVE).state is SlotState.SOUND
    by_label = expected is Layout.KAIROS
    assert bool(slot(found, SlotName.ACTIVE).expected_label) is by_label


def test_a_label_does_not_matter_where_the_root_is_found_by_file_name(disk):
    system = Derivative("1.0", layout="elemental-v1", payload_mib=0)
    found = only(disk(layout="elemental-v1", active=system, passive=system, labels={"active": "OTHER"}).path)
    assert slot(found, SlotName.ACTIVE).state is SlotState.SOUND


def test_a_snapshotter_is_recognised_and_left_alone(disk):
    found = only(disk(active=None, passive=None, state_files={".snapshots/1/snapshot.img": b"x"}).path)
    assert found.layout is Layout.ELEMENTAL_V2
    assert not found.layout.handled
    assert "COS-LAYOUT-NOT-HANDLED" in codes(found.findings)


def test_btrfs_on_cos_state_is_the_btrfs_snapshotter(disk, tmp_path):
    made = disk(state_mib=128, recovery=None)
    btrfs = tmp_path / "btrfs"
    with btrfs.open("wb") as f:
        f.truncate(made.partition("COS_STATE").size_bytes)
    run(["mkfs.btrfs", "-q", "-f", "-L", "COS_STATE", btrfs])
    with btrfs.open("rb") as src, made.path.open("r+b") as dst:
        dst.seek(made.partition("COS_STATE").start_bytes)
        dst.write(src.read())
    found = only(made.path)
    assert found.layout is Layout.ELEMENTAL_V2


@pytest.mark.parametrize(("mib", "bits", "sectors"), [(8, 12, 8), (32, 16, 4), (64, 32, 1)])
def test_unified_kernel_images_are_recognised_and_left_alone(tmp_path, mib, bits, sectors):
    esp, path = tmp_path / "esp", tmp_path / "uki.img"
    with esp.open("wb") as f:
        f.truncate(mib << 20)
    run(["mkfs.vfat", "-F", bits, "-s", sectors, "-n", "COS_GRUB", esp])
    (tmp_path / "x").write_bytes(b"MZ" * 5000)
    for directory in ("EFI", "EFI/kairos", "loader", "loader/entries"):
        run(["mmd", "-i", esp, f"::{directory}"])
    for name in (
        "EFI/kairos/active.efi",
        "EFI/kairos/a-rather-long-name-of-an-image.efi",
        "loader/entries/active.conf",
    ):
        run(["mcopy", "-i", esp, tmp_path / "x", f"::{name}"])
    with path.open("wb") as f:
        f.truncate((mib + 4) << 20)
    run(["sfdisk", "-q", path], stdin=f"label: gpt\nstart=2048, size={mib}M, type=uefi\n".encode())
    with path.open("r+b") as f:
        f.seek(1 << 20)
        f.write(esp.read_bytes())
    found = only(path)
    assert found.layout is Layout.KAIROS_UKI
    assert "COS-LAYOUT-NOT-HANDLED" in codes(found.findings)
    assert found.id == found.disk.partitions[0].part_uuid


def test_a_disk_with_only_a_recovery_partition_is_vanilla(disk):
    made = disk()
    with made.path.open("r+b") as f:
        f.seek(made.partition("COS_STATE").start_bytes)
        f.write(bytes(1 << 20))
    assert only(made.path).layout is Layout.VANILLA


def test_a_blank_file_and_a_missing_one(tmp_path):
    (tmp_path / "blank").write_bytes(bytes(4 << 20))
    assert scan(tmp_path / "blank").installations == ()
    with pytest.raises(Problem) as caught:
        scan(tmp_path / "none")
    assert caught.value.report.code == "COS-TARGET-MISSING"
    with pytest.raises(Problem):
        scan(tmp_path)


# --- the boot environment --------------------------------------------------------------------------------------------


def test_the_environment_decides_what_boots(disk):
    found = only(disk(grubenv={"saved_entry": "fallback", "next_entry": "cos"}).path)
    assert (found.boot.next, found.boot.after) == (SlotName.ACTIVE, SlotName.PASSIVE)
    assert found.boot_files[0].variables["saved_entry"] == "fallback"


def test_cos_0_5_3_reads_no_environment(disk):
    found = only(disk(layout="cos-0.5.3", grubenv={"saved_entry": "fallback"}).path)
    assert found.boot.next is SlotName.ACTIVE
    assert not found.boot.reads_environment


def test_the_later_file_wins_and_titles_come_from_the_environment(disk):
    env = {"saved_entry": "fallback", "default_menu_entry": "Mine"}
    found = only(disk(grub_oem_env=env, grubenv={"saved_entry": "cos"}).path)
    assert [b.path for b in sorted(found.boot_files, key=lambda b: b.rank)] == ["grub_oem_env", "grubenv"]
    assert found.boot.next is SlotName.ACTIVE
    assert found.title == "Mine"


def test_a_second_grubenv_is_named(disk):
    block = environment_block({"saved_entry": "fallback"})
    found = only(disk(state_files={"grubenv": block}).path)
    assert "COS-GRUBENV-AMBIGUOUS" in codes(found.findings)
    assert found.boot.next is SlotName.ACTIVE  # COS_OEM comes first on the disk
    assert max(found.boot_files, key=lambda b: b.rank).partition == found.oem_partition


def test_a_broken_environment_is_a_finding_and_is_not_used(disk):
    found = only(disk(grubenv=None, oem_files={"grubenv": b"saved_entry=fallback\n" + b"#" * 1003}).path)
    assert "COS-GRUBENV-DAMAGED" in codes(found.findings)
    assert found.boot.next is SlotName.ACTIVE


# --- damage ----------------------------------------------------------------------------------------------------------


def test_an_active_without_kernel_is_damaged_and_grub_falls_back(disk):
    made = disk(active=replace(SMALL, kernel=False))
    found = only(made.path)
    active = slot(found, SlotName.ACTIVE)
    assert active.state is SlotState.DAMAGED
    assert "COS-SLOT-NO-KERNEL" in codes(active.findings)
    assert (found.boot.chosen, found.boot.next) == (SlotName.ACTIVE, SlotName.PASSIVE)
    assert damaged(scan(made.path))


def test_an_image_without_os_release_is_damaged(disk):
    active = slot(only(disk(active=replace(SMALL, os_release=False)).path), SlotName.ACTIVE)
    assert active.state is SlotState.DAMAGED
    assert "COS-SLOT-NO-OSRELEASE" in codes(active.findings)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "COS-SLOT-EMPTY"),
        (b"\0" * 8192, "COS-SLOT-NO-FILESYSTEM"),
        (b"hsqs" + b"\xff" * 4000, "COS-SLOT-UNREADABLE"),
    ],
)
def test_damaged_images_are_shown_and_never_crash(disk, content, code):
    found = only(disk(active=None, state_files={"cOS/active.img": content}).path)
    active = slot(found, SlotName.ACTIVE)
    assert active.state is SlotState.DAMAGED
    assert code in codes(active.findings)
    assert found.boot.next is SlotName.PASSIVE


def test_an_image_that_was_cut_off_is_damaged(disk, tmp_path):
    whole = make_disk(tmp_path / "whole.img", BASE)
    part = whole.read_partition("COS_STATE", tmp_path / "p")
    run(["debugfs", "-R", f"dump cOS/active.img {tmp_path}/img", part])
    half = (tmp_path / "img").read_bytes()[: 4 << 20]
    active = slot(only(disk(active=None, state_files={"cOS/active.img": half}).path), SlotName.ACTIVE)
    assert active.state is SlotState.DAMAGED
    assert "COS-SLOT-TRUNCATED" in codes(active.findings)


def test_a_directory_in_place_of_an_image_is_damaged(disk):
    active = slot(only(disk(active=None, state_files={"cOS/active.img/x": b""}).path), SlotName.ACTIVE)
    assert active.state is SlotState.DAMAGED


def test_a_state_partition_full_of_noise_never_crashes_the_scan(disk):
    import random

    made = disk(recovery=None)
    rng = random.Random(7)
    start = made.partition("COS_STATE").start_bytes
    with made.path.open("r+b") as f:
        for _ in range(40):
            at = rng.randrange(4096, 2 << 20)
            f.seek(start + at)
            f.write(rng.randbytes(512))
            f.flush()
            scan(made.path)


def test_a_damaged_partition_table_is_a_finding(disk):
    made = disk(recovery=None)
    before = only(made.path).id
    with made.path.open("r+b") as f:
        f.seek(512 + 40)
        f.write(b"\xff" * 20)  # the primary header's checksum is wrong now; libparted takes the backup
    machine = scan(made.path)
    assert machine.disks[0].findings
    assert [i.id for i in machine.installations] == [before]
    with made.path.open("r+b") as f:
        f.seek(-512, os.SEEK_END)
        f.write(b"EFI PART" + b"\xff" * 504)
    machine = scan(made.path)
    assert "COS-DISK-TABLE-DAMAGED" in codes(machine.disks[0].findings)


def test_garbage_in_a_table_never_takes_the_scan_down(healthy, tmp_path):
    """libparted itself aborts on some of these."""
    import random

    from cos_console.formats.readat import BytesReadAt
    from cos_console.host.tables import read_table

    good = healthy.path.read_bytes()[: 1 << 20]
    rng = random.Random(11)
    lost = []
    for _ in range(150):
        bad = bytearray(good + bytes(1 << 20))
        for _ in range(rng.randrange(1, 4)):
            at = rng.choice([446, 450, 454, 512, 520, 528, 552, 584, 1024, rng.randrange(440, 17000)])
            bad[at : at + 8] = rng.randbytes(8)
        table = read_table(BytesReadAt(bytes(bad)), 512)
        if bad[512:520] == b"EFI PART" and table.kind is TableKind.NONE:
            lost.append(table)
    assert lost
    assert all("COS-DISK-TABLE-DAMAGED" in codes(t.findings) for t in lost)


def test_a_table_on_which_libparted_aborts_is_a_finding(healthy, monkeypatch):
    from cos_console.host import tables

    monkeypatch.setattr(tables, "_ask_libparted", lambda *_: os.abort())
    assert codes(scan(healthy.path).disks[0].findings) == {"COS-DISK-TABLE-DAMAGED"}


def test_a_disk_that_answers_with_errors_is_shown_and_not_crashed_on(healthy):
    class Dying:
        def __init__(self, source: ReadAt, good_bytes: int) -> None:
            self._source, self._good = source, good_bytes

        @property
        def size_bytes(self) -> int:
            return self._source.size_bytes

        def read_at(self, offset: int, length: int) -> bytes:
            if self._good <= offset < self.size_bytes - (1 << 20):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return self._source.read_at(offset, length)

    machine = scan(healthy.path, wrap=lambda s: Dying(s, 0))
    assert codes(machine.disks[0].findings) == {"COS-DISK-UNREADABLE"}
    state = healthy.partition("COS_STATE")
    machine = scan(healthy.path, wrap=lambda s: Dying(s, state.start_bytes))
    assert "COS-PARTITION-UNREADABLE" in codes(machine.disks[0].findings)
    for extra in (70_000, 300_000, 1 << 20, 3 << 20, 9 << 20, 20 << 20):
        scan(healthy.path, wrap=lambda s, n=extra: Dying(s, state.start_bytes + n))


# --- left-overs: the windows of an interrupted upgrade ---------------------------------------------------------------


def test_w0_a_transition_image_is_left_over(disk):
    found = only(disk(state_files={"cOS/transition.img": b"x" * 5000}).path)
    assert kinds(found) == {"transition-image": "undo"}
    assert found.leftovers[0].size_bytes == 5000
    assert found.boot.next is SlotName.ACTIVE


def test_w1_no_active_and_passive_with_actives_label(disk):
    found = only(disk(active=None, labels={"passive": "COS_ACTIVE"}, recovery=None).path)
    assert kinds(found)["missing-active"] == "undo"
    assert slot(found, SlotName.PASSIVE).state is SlotState.MISLABELLED
    assert found.boot.next is None


def test_w2_no_active_and_a_right_passive(disk):
    found = only(disk(active=None).path)
    assert kinds(found) == {"missing-active": "restore"}
    assert found.boot.next is SlotName.PASSIVE


def test_w3_active_without_label(disk):
    found = only(disk(labels={"active": ""}).path)
    assert kinds(found) == {"wrong-label": "relabel"}
    assert slot(found, SlotName.ACTIVE).state is SlotState.MISLABELLED
    assert found.boot.next is None


def test_swapped_labels_are_named(disk):
    found = only(disk(labels={"active": "COS_PASSIVE", "passive": "COS_ACTIVE"}).path)
    assert kinds(found) == {"swapped-labels": "relabel"}


def test_an_operation_record_and_its_images_are_shown(disk):
    files = {"cOS/.cos-console.json": b"{}", "cOS/retired.img": b"x", "cOS/transition.img": b"x"}
    found = only(disk(state_files=files).path)
    assert kinds(found) == {
        "operation-record": "finish",
        "retired-image": "finish",
        "transition-image": "finish",
    }
    assert all(left.meaning and left.way_out for left in found.leftovers)


# --- GRUB and Linux --------------------------------------------------------------------------------------------------


def _dirty(made: SandboxDisk, tmp: Path, change: Callable[[Path], None]) -> Path:
    """The disk as after a power cut right behind a committed, not yet checkpointed change."""
    loop = run(["losetup", "-f", "--show", made.path]).decode().strip()
    copy = tmp / "cut.img"
    at = tmp / "mnt"
    at.mkdir()
    try:
        run(["partx", "-a", loop])
        _node(f"{loop}p3")
        run(["mount", "-o", "commit=300", f"{loop}p3", at])
        try:
            change(at)
            fd = os.open(at / "cOS", os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
            run(["cp", "--sparse=always", made.path, copy])
        finally:
            run(["umount", at])
    finally:
        subprocess.run(["partx", "-d", loop], check=False, capture_output=True)
        run(["losetup", "-d", loop])
    return copy


def test_after_a_power_cut_grub_and_linux_see_two_disks_and_that_is_said(disk, tmp_path):
    made = disk(recovery=None, state_files={"cOS/transition.img": b"new"})

    def rename(at: Path) -> None:
        os.rename(at / "cOS/transition.img", at / "cOS/active.img")

    cut = _dirty(made, tmp_path, rename)
    before = _digest(cut)
    found = only(cut)
    assert "COS-LOOKS-DISAGREE" in codes(found.findings)
    what = next(f.what for f in found.findings if f.code == "COS-LOOKS-DISAGREE")
    assert "GRUB" in what
    assert "Linux" in what
    assert "cOS/transition.img" in what
    assert _digest(cut) == before


def test_reserved_and_never_written_blocks_are_named(disk, tmp_path):
    made = disk(recovery=None)

    def reserve(at: Path) -> None:
        fd = os.open(at / "cOS/active.img", os.O_RDWR)
        os.posix_fallocate(fd, 0, 8 << 20)
        os.fsync(fd)
        os.close(fd)

    _dirty(made, tmp_path, reserve)
    active = slot(only(made.path), SlotName.ACTIVE)
    assert "COS-SLOT-UNWRITTEN" in codes(active.findings)


def test_a_hole_in_the_first_block_is_named_where_grub_cannot_read_the_file(disk):
    found = only(disk(state_block_size=1024, recovery=None).path)
    active = slot(found, SlotName.ACTIVE)
    assert active.state is SlotState.DAMAGED
    assert "COS-SLOT-FIRST-BLOCK-HOLE" in codes(active.findings)


# --- mounted here ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["ro,noload", "rw"])
def test_a_mounted_state_partition_is_looked_at_through_its_mount(disk, attach, tmp_path, options):
    made = disk()
    loop = attach(made.path, mount=(3, tmp_path / "state", options))
    for target in (Path(loop), made.path):
        found = only(target)
        assert found.state_mounted_at == str(tmp_path / "state")
        assert slot(found, SlotName.ACTIVE).state is SlotState.SOUND
        assert codes(found.findings) == set()
        numbers = os.statvfs(tmp_path / "state")
        assert found.state_free_bytes == numbers.f_bfree * numbers.f_frsize


def test_looking_through_a_mount_moves_no_time_stamp(disk, attach, tmp_path):
    made = disk()
    at = tmp_path / "state"
    loop = attach(made.path, mount=(3, at, "rw,strictatime"))
    paths = [
        at,
        at / "cOS",
        at / "cOS/active.img",
        at / "cOS/passive.img",
        at / "grub2",
        at / "grub2/grub.cfg",
    ]
    before = [(s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, paths)]
    scan(Path(loop))
    assert [(s.st_atime_ns, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, paths)] == before


def test_the_running_slot_is_told_by_the_inode_of_the_loop_device(disk, attach, tmp_path, monkeypatch):
    """A real loop device over the image on the mounted state partition; only "it is our root" is pretended."""
    from cos_console.host import mounts

    made = disk()
    at = tmp_path / "state"
    loop = attach(made.path, mount=(3, at, "rw"))
    inner = run(["losetup", "-f", "--show", "-r", at / "cOS/active.img"]).decode().strip()
    try:
        # Renamed under it, as an upgrade does: the label still says active, the inode is passive now.
        os.rename(at / "cOS/active.img", at / "cOS/passive.img")
        devno = os.stat(inner).st_rdev
        real = mounts.read_mounts()
        root = mounts.Mount(devno, "/", "/", "ext2", read_only=True)
        monkeypatch.setattr(mounts, "read_mounts", lambda: (*real, root))
        machine = scan(Path(loop))
    finally:
        run(["losetup", "-d", inner])
    found = machine.installations[0]
    assert found.running is SlotName.PASSIVE
    assert machine.booted_from == "passive"


# --- nothing is written ----------------------------------------------------------------------------------------------


def _digest(path: Path) -> tuple[str, tuple[int, int, int]]:
    s = os.stat(path)
    return hashlib.sha256(path.read_bytes()).hexdigest(), (s.st_mtime_ns, s.st_ctime_ns, s.st_size)


def test_looking_changes_not_one_byte(healthy):
    before = _digest(healthy.path)
    scan(healthy.path)
    assert _digest(healthy.path) == before


def test_a_scan_and_an_idle_watcher_close_no_device_that_was_open_for_writing(healthy, attach):
    """inotify's close-after-write is what udev itself listens to."""
    import ctypes

    from cos_console.host.watch import Watcher

    close_write, modify, attributes = 0x8, 0x2, 0x4
    libc = ctypes.CDLL(None, use_errno=True)
    loop = attach(healthy.path)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for path in (loop, *(f"{loop}p{n}" for n in range(1, 6)), str(healthy.path)):
            _node(path)
            assert libc.inotify_add_watch(watch, path.encode(), close_write | modify | attributes) >= 0
        watcher = Watcher(lambda: None)
        try:
            for _ in range(3):
                scan()
                scan(Path(loop))
                scan(healthy.path)
            time.sleep(0.5)
        finally:
            watcher.stop()
        with pytest.raises(BlockingIOError):
            os.read(watch, 4096)
        os.close(os.open(loop, os.O_RDWR))  # the control: a device opened for writing is seen
        assert os.read(watch, 4096)
    finally:
        os.close(watch)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_looking_opens_no_disk_for_writing(healthy, attach, tmp_path):
    loop = attach(healthy.path)
    log = tmp_path / "strace"
    code = f"from pathlib import Path; from cos_console.host.scan import scan; scan(); m = scan(Path({loop!r})); assert m.installations"
    run(
        [
            "strace",
            "-f",
            "-o",
            log,
            "-e",
            "trace=open,openat,openat2,creat,mount,rename,unlink",
            sys.executable,
            "-c",
            code,
        ]
    )
    writable = ("O_WRONLY", "O_RDWR", "O_CREAT", "mount(", "rename", "unlink")
    lines = [line for line in log.read_text().splitlines() if any(w in line for w in writable)]
    foreign = [
        line
        for line in lines
        if "/proc/self/fd/" not in line and "__pycache__" not in line and "/dev/null" not in line
    ]
    assert foreign == []
    assert loop in log.read_text()


def test_a_scan_takes_less_than_a_third_of_a_second(healthy):
    scan(healthy.path)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        scan(healthy.path)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.3


def test_an_installation_can_be_looked_at_again(disk):
    made = disk(recovery=None)
    found = only(made.path)
    assert inspect(found) == found
    with made.path.open("r+b") as f:
        f.seek(made.partition("COS_STATE").start_bytes)
        f.write(bytes(4096))
    assert inspect(found) is None


def test_findings_say_what_and_are_coded(disk):
    made = disk(active=replace(SMALL, kernel=False), labels={"passive": "X"})
    found = only(made.path)
    seen = [f for s in found.slots for f in s.findings]
    assert seen
    assert all(f.code.startswith("COS-") and f.what.endswith(".") for f in seen)
    assert all(f.now for f in seen if f.severity is Severity.ERROR)

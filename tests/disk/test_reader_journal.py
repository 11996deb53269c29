"""Dirty journals of a real kernel: 'replay' is what Linux mounts, 'ignore' is what debugfs -c and GRUB read."""

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cos_console.formats.ext4.journal import _DESCRIPTOR, _MAGIC
from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.readat import BytesReadAt, FileReadAt, FormatError
from tests.sandbox.disk import run

pytestmark = pytest.mark.disk


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "mnt"
    mount.mkdir()
    yield mount
    subprocess.run(["umount", "-q", mount], check=False, capture_output=True)


def dirty(tmp_path: Path, mnt: Path, mkfs: list[str], options: str = "loop") -> Path:
    """As `cut_off`, made again when the kernel happened to write the changes home before the copy was taken."""
    for _ in range(5):
        cut = cut_off(tmp_path, mnt, mkfs, options)
        fd = os.open(cut, os.O_RDONLY)
        try:
            if "renamed-1" not in Ext4.open(FileReadAt(fd)).listdir():
                return cut
        finally:
            os.close(fd)
    raise AssertionError("the kernel always wrote the journal home before the copy was taken")


def cut_off(tmp_path: Path, mnt: Path, mkfs: list[str], options: str) -> Path:
    """A file system as a power cut leaves it: many renames, deletions and new files only in the journal."""
    image, cut = tmp_path / "image", tmp_path / "cut"
    with image.open("wb") as f:
        f.truncate(48 << 20)
    run(["mke2fs", "-q", "-F", *mkfs, image])
    run(["mount", "-o", options, image, mnt])
    for n in range(60):
        (mnt / f"old-{n}").write_bytes(b"o" * 3000)
    run(["sync", "-f", mnt])
    run(["umount", mnt])
    run(["mount", "-o", options, image, mnt])
    for n in range(60):
        if n % 3 == 0:
            (mnt / f"old-{n}").unlink()
        elif n % 3 == 1:
            (mnt / f"old-{n}").rename(mnt / f"renamed-{n}")
        (mnt / f"dir-{n}").mkdir()
        # a data block that begins with jbd2's magic is escaped in a data=journal log
        (mnt / f"dir-{n}" / "new").write_bytes(_MAGIC.to_bytes(4, "big") + b"%d" % n * 900)
        if n % 10 == 9:
            fd = os.open(mnt / f"dir-{n}" / "new", os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)
    for n in range(0, 60, 2):  # freed directory blocks become data: revoke records
        shutil.rmtree(mnt / f"dir-{n}")
        (mnt / f"filler-{n}").write_bytes(b"f" * 5000)
    fd = os.open(mnt, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    shutil.copyfile(image, cut)
    run(["umount", mnt])
    return cut


def contents_by_kernel(image: Path, mnt: Path, tmp_path: Path) -> dict[str, bytes | None]:
    """Through a real mount of a copy, which replays the journal."""
    copy = tmp_path / "mounted-copy"
    shutil.copyfile(image, copy)
    run(["mount", "-o", "loop", copy, mnt])
    try:
        found: dict[str, bytes | None] = {}
        for path in mnt.rglob("*"):
            found["/" + str(path.relative_to(mnt))] = path.read_bytes() if path.is_file() else None
        return found
    finally:
        run(["umount", mnt])
        copy.unlink()


def contents(fs: Ext4) -> dict[str, bytes | None]:
    return {p: fs.read_file(p) if s.is_file else None for p, s in fs.walk()}


@pytest.mark.parametrize(("mkfs", "options"), [
    (["-t", "ext4"], "loop"),
    (["-t", "ext4", "-O", "metadata_csum,64bit"], "loop"),
    (["-t", "ext4", "-O", "^metadata_csum,^64bit"], "loop"),
    (["-t", "ext4", "-O", "^metadata_csum,^64bit"], "loop,journal_checksum"),
    (["-t", "ext4", "-b", "1024"], "loop,data=journal"),
    (["-t", "ext4", "-b", "4096", "-O", "^64bit"], "loop,data=journal"),
    (["-t", "ext3"], "loop"),
    (["-t", "ext3"], "loop,data=journal"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else v)  # fmt: skip
def test_replay_in_memory_equals_a_kernel_mount(
    tmp_path: Path, mnt: Path, mkfs: list[str], options: str
) -> None:
    cut = dirty(tmp_path, mnt, mkfs, options)
    before = cut.read_bytes()
    fd = os.open(cut, os.O_RDONLY)
    try:
        raw, replayed = Ext4.open(FileReadAt(fd)), Ext4.open(FileReadAt(fd), journal="replay")
        assert raw.superblock.needs_recovery
        linux = contents(replayed)
        assert linux == contents_by_kernel(cut, mnt, tmp_path)
        assert "/renamed-1" in linux
        listing = run(["debugfs", "-c", "-R", "ls -p /", cut]).decode().splitlines()
        by_debugfs = sorted(
            f[5] for f in (line.split("/") for line in listing if line) if f[5] not in {".", ".."}
        )
        assert list(raw.listdir()) == by_debugfs
        assert "renamed-1" not in raw.listdir()
        assert raw.listdir() != replayed.listdir()
        for name in raw.listdir():  # what stands in a file: as GRUB's own code reads it
            if name.startswith("old-"):
                assert raw.read_file(name) == run(["grub-fstest", cut, "cat", "--", f"(loop0)/{name}"])
    finally:
        os.close(fd)
    assert cut.read_bytes() == before


def log_blocks(image: bytes) -> tuple[int, list[tuple[int, int, int]]]:
    """Block size, and (byte offset, kind, transaction) of each journal header block that replay would use."""
    fs = Ext4.open(BytesReadAt(image))
    size = fs.superblock.block_bytes
    found = []
    runs = fs._runs(fs._inode(fs.superblock.journal_inode))
    home = {r.logical + k: (r.physical + k) * size for r in runs for k in range(r.length)}
    _, sequence, start = struct.unpack_from(">3I", image, home[0] + 20)
    at = start
    while at in home:
        magic, kind, number = struct.unpack_from(">3I", image, home[at])
        if magic == _MAGIC and number >= sequence:
            found.append((home[at], kind, number))
        at += 1
    return size, found


@pytest.mark.parametrize("mkfs", [
    ["-t", "ext4", "-O", "metadata_csum,64bit"], ["-t", "ext4", "-O", "^metadata_csum,^64bit"]
], ids=["csum-v3", "no-csum"])  # fmt: skip
def test_a_torn_commit_block_ends_the_replay_there_as_in_linux(
    tmp_path: Path, mnt: Path, mkfs: list[str]
) -> None:
    cut = dirty(tmp_path, mnt, mkfs)
    image = bytearray(cut.read_bytes())
    _, headers = log_blocks(bytes(image))
    commits = [at for at, kind, _ in headers if kind == 2]
    assert len(commits) > 2
    whole = contents(Ext4.open(BytesReadAt(bytes(image)), journal="replay"))
    image[commits[-1] : commits[-1] + 512] = bytes(512)
    cut.write_bytes(image)
    shorter = contents(Ext4.open(BytesReadAt(bytes(image)), journal="replay"))
    assert shorter != whole
    assert shorter == contents_by_kernel(cut, mnt, tmp_path)


def test_a_commit_block_with_a_wrong_checksum_does_not_count(tmp_path: Path, mnt: Path) -> None:
    cut = dirty(tmp_path, mnt, ["-t", "ext4", "-O", "metadata_csum,64bit"])
    image = bytearray(cut.read_bytes())
    _, headers = log_blocks(bytes(image))
    last = [at for at, kind, _ in headers if kind == 2][-1]
    whole = contents(Ext4.open(BytesReadAt(bytes(image)), journal="replay"))
    image[last + 300] ^= 0xFF
    assert contents(Ext4.open(BytesReadAt(bytes(image)), journal="replay")) != whole


def test_a_committed_block_that_was_damaged_is_refused_as_linux_refuses(tmp_path: Path, mnt: Path) -> None:
    cut = dirty(tmp_path, mnt, ["-t", "ext4", "-O", "metadata_csum,64bit"])
    image = bytearray(cut.read_bytes())
    size, headers = log_blocks(bytes(image))
    descriptor = next(at for at, kind, _ in headers if kind == _DESCRIPTOR)
    image[descriptor + size + 100] ^= 0xFF
    cut.write_bytes(image)
    with pytest.raises(FormatError, match="checksum"):
        Ext4.open(BytesReadAt(bytes(image)), journal="replay")
    assert Ext4.open(BytesReadAt(bytes(image))).superblock.needs_recovery
    mounted = subprocess.run(["mount", "-o", "loop", cut, mnt], check=False, capture_output=True)
    assert mounted.returncode != 0

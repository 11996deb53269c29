"""The ext reader, held against mke2fs, the kernel and GRUB's own file system code."""

import hashlib
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.readat import BytesReadAt, FileReadAt, FormatError
from cos_console.formats.superblock import probe
from tests.sandbox.disk import make_filesystem, run


def tree(root: Path) -> None:
    (root / "etc/cos").mkdir(parents=True)
    (root / "etc/cos/bootargs.cfg").write_bytes(b"set kernel=/boot/vmlinuz\n")
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-1").write_bytes(random.Random(1).randbytes(3_000_000))
    (root / "boot/vmlinuz").symlink_to("vmlinuz-1")
    (root / "boot/loop").symlink_to("loop")
    (root / "absolute").symlink_to("/etc/cos")
    (root / ("long" * 20)).symlink_to("x/" * 60 + "end")
    with (root / "sparse").open("wb") as f:
        f.seek(5_000_000)
        f.write(b"end")
    many = root / "many"
    many.mkdir()
    for n in range(3000):
        (many / f"file-with-a-name-{n:05d}").write_bytes(b"%d" % n)


@pytest.mark.parametrize("fs", ["ext2", "ext3", "ext4"])
@pytest.mark.parametrize("block", [1024, 4096])
def test_every_file_reads_as_it_was_written(tmp_path: Path, fs: str, block: int) -> None:
    root = tmp_path / "root"
    root.mkdir()
    tree(root)
    image = tmp_path / "image"
    make_filesystem(image, 64 << 20, fs, "COS_TEST", root, block_size=block)
    before = hashlib.sha256(image.read_bytes()).hexdigest()
    fd = os.open(image, os.O_RDONLY)
    try:
        source = FileReadAt(fd)
        assert (probe(source).fs_type, probe(source).label) == (fs, "COS_TEST")
        ext = Ext4.open(source)
        assert ext.superblock.label == "COS_TEST"
        for path in ("boot/vmlinuz", "etc/cos/bootargs.cfg", "absolute/bootargs.cfg", "sparse"):
            wanted = (root / path.replace("absolute", "etc/cos")).read_bytes()
            assert ext.read_file(path, 10 << 20) == wanted, path
        assert len(ext.listdir("/many")) == 3000
        assert ext.read_file("many/file-with-a-name-02999") == b"2999"
        assert ext.readlink("long" * 20) == "x/" * 60 + "end"
        assert not ext.exists("boot/none")
        with pytest.raises(FormatError, match="symbolic links"):
            ext.stat("boot/loop")
        assert ext.stat("sparse").allocated_bytes < 100_000
    finally:
        os.close(fd)
    assert hashlib.sha256(image.read_bytes()).hexdigest() == before


@pytest.mark.disk
@pytest.mark.parametrize("features", ["metadata_csum,64bit", "^metadata_csum,^64bit"])
def test_after_a_power_cut_replay_is_linuxs_view_and_ignore_is_grubs(tmp_path: Path, features: str) -> None:
    image, cut = tmp_path / "image", tmp_path / "cut"
    with image.open("wb") as f:
        f.truncate(32 << 20)
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-O", features, image])
    mount = tmp_path / "mnt"
    mount.mkdir()
    run(["mount", "-o", "loop", image, mount])
    try:
        (mount / "active.img").write_bytes(b"old" * 5000)
        (mount / "transition.img").write_bytes(b"new" * 5000)
        run(["sync", "-f", mount])
        run(["umount", mount])
        run(["mount", "-o", "loop", image, mount])
        (mount / "transition.img").rename(mount / "active.img")
        directory = os.open(mount, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)
        shutil.copyfile(image, cut)
    finally:
        subprocess.run(["umount", mount], check=True)
    fd = os.open(cut, os.O_RDONLY)
    try:
        grub, linux = Ext4.open(FileReadAt(fd)), Ext4.open(FileReadAt(fd), journal="replay")
        assert grub.superblock.needs_recovery
        names = run(["grub-fstest", cut, "ls", "--", "(loop0)/"]).decode().split()
        assert "transition.img" in names
        assert "transition.img" in grub.listdir()
        assert grub.read_file("active.img") == b"old" * 5000
        assert "transition.img" not in linux.listdir()
        assert linux.read_file("active.img") == b"new" * 5000
    finally:
        os.close(fd)
    run(["mount", "-o", "loop", cut, mount])
    try:
        assert sorted(p.name for p in mount.iterdir()) == list(linux_names := ["active.img", "lost+found"])
        assert linux_names
    finally:
        run(["umount", mount])


@pytest.fixture(scope="module")
def small_image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    work = tmp_path_factory.mktemp("small")
    (work / "root/d").mkdir(parents=True)
    (work / "root/d/file").write_bytes(b"x" * 5000)
    make_filesystem(work / "image", 1 << 20, "ext4", "SMALL", work / "root", block_size=1024)
    return (work / "image").read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1024, 120_000), st.integers(0, 255)), min_size=1, max_size=30))
def test_damage_is_a_format_error_or_other_data_never_a_crash(
    small_image: bytes, faults: list[tuple[int, int]]
) -> None:
    damaged = bytearray(small_image)
    for at, value in faults:
        damaged[at] = value
    try:
        ext = Ext4.open(BytesReadAt(bytes(damaged)), journal="replay")
        for name in ext.listdir():
            if ext.lstat(name).is_dir:
                ext.listdir(name)
        ext.read_file("d/file")
    except (FormatError, FileNotFoundError, NotADirectoryError):
        pass

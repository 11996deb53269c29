"""Holes, unwritten extents, deep block maps, attributes, inline data and hostile maps."""

import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.readat import BytesReadAt, FileReadAt, FormatError
from tests.sandbox.disk import run


@pytest.fixture
def mnt(tmp_path: Path) -> Iterator[Path]:
    mount = tmp_path / "mnt"
    mount.mkdir()
    yield mount
    subprocess.run(["umount", "-q", mount], check=False, capture_output=True)


def blank(path: Path, mib: int, *mkfs: str, fill: bytes = b"") -> Path:
    with path.open("wb") as f:
        f.truncate(mib << 20)
        if fill:
            f.write(fill * ((mib << 20) // len(fill)))
    run(["mke2fs", "-q", "-F", *mkfs, path])
    return path


@pytest.mark.disk
def test_unwritten_extents_are_zeros_for_linux_and_old_bytes_for_grub(tmp_path: Path, mnt: Path) -> None:
    image = blank(
        tmp_path / "image", 32, "-t", "ext4", "-b", "4096", "-E", "nodiscard", fill=b"STALE..." * 512
    )
    run(["mount", "-o", "loop", image, mnt])
    with (mnt / "reserved").open("wb") as f:
        os.posix_fallocate(f.fileno(), 0, 1 << 20)
        f.write(b"kernel" * 1000)
    linux_by_kernel = (mnt / "reserved").read_bytes()
    run(["umount", mnt])
    data = BytesReadAt(image.read_bytes())
    linux, grub = Ext4.open(data), Ext4.open(data, unwritten="stale")
    assert linux.read_file("reserved", 2 << 20) == linux_by_kernel
    assert any(not r.written for r in linux.runs("reserved"))
    as_grub = run(["grub-fstest", image, "cat", "--", "(loop0)/reserved"])
    assert b"STALE..." in as_grub
    assert grub.read_file("reserved", 2 << 20) == as_grub


@pytest.mark.disk
@pytest.mark.parametrize("fs", ["ext2", "ext4"])
def test_a_file_of_a_thousand_pieces_reads_as_the_kernel_reads_it(tmp_path: Path, mnt: Path, fs: str) -> None:
    """Every second block: a triple indirect map on ext2, an extent tree of depth two on ext4."""
    image = blank(tmp_path / "image", 64, "-t", fs, "-b", "1024")
    run(["mount", "-o", "loop", image, mnt])
    with (mnt / "pieces").open("wb") as f:
        for n in range(3000):
            f.seek(n * 2048)
            f.write(b"%08d" % n * 128)
        f.seek(80 << 20)  # behind what two levels of 256 pointers can reach
        f.write(b"far away")
        f.flush()
        os.fsync(f.fileno())  # allocation is delayed until then
    wanted = (mnt / "pieces").read_bytes()
    blocks = (mnt / "pieces").stat().st_blocks
    run(["umount", mnt])
    fs_read = Ext4.open(BytesReadAt(image.read_bytes()))
    assert fs_read.read_file("pieces", 1 << 30) == wanted
    assert fs_read.stat("pieces").allocated_bytes == blocks * 512
    file, rng = fs_read.open_file("pieces"), random.Random(7)
    for _ in range(200):
        at, length = rng.randrange(len(wanted)), rng.randrange(1, 9000)
        assert file.read_at(at, length) == wanted[at : at + length]


@pytest.mark.disk
@pytest.mark.parametrize("inode", ["256", "128"])
def test_attributes_and_times_are_those_of_the_kernel(tmp_path: Path, mnt: Path, inode: str) -> None:
    image = blank(tmp_path / "image", 16, "-t", "ext4", "-I", inode)
    run(["mount", "-o", "loop", image, mnt])
    path = mnt / "ping"
    path.write_bytes(b"x")
    capability = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
    os.setxattr(path, "security.capability", capability)
    os.setxattr(path, "user.long", b"v" * 600)
    os.setxattr(path, "trusted.overlay", b"")
    acl = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *e) for e in [(1, 6, 2**32 - 1), (2, 4, 1000), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1)]
    )  # fmt: skip
    os.setxattr(path, "system.posix_acl_access", acl)
    os.utime(path, ns=(0, 3_000_000_000_123_456_789 if inode == "256" else 2_000_000_000_000_000_000))
    wanted = {n.encode(): os.getxattr(path, n) for n in os.listxattr(path)}
    mtime = path.stat().st_mtime_ns
    run(["umount", mnt])
    fs = Ext4.open(BytesReadAt(image.read_bytes()))
    assert fs.xattrs("ping") == wanted
    assert len(wanted) == 4
    assert fs.stat("ping").mtime_ns == mtime


@pytest.mark.disk
def test_inline_data_reads_as_the_kernel_reads_it(tmp_path: Path, mnt: Path) -> None:
    image = blank(tmp_path / "image", 16, "-t", "ext4", "-O", "inline_data", "-I", "256")
    run(["mount", "-o", "loop", image, mnt])
    for n in (1, 59, 60, 61, 100, 140):
        (mnt / f"file-{n}").write_bytes(b"d" * n)
    (mnt / "dir").mkdir()
    for n in range(5):
        (mnt / "dir" / f"name-{n}").touch()
    wanted = {p.name: p.read_bytes() for p in mnt.glob("file-*")}
    names = tuple(sorted(p.name for p in (mnt / "dir").iterdir()))
    run(["umount", mnt])
    fs = Ext4.open(BytesReadAt(image.read_bytes()))
    assert "inline_data" in fs.superblock.features
    assert {n: fs.read_file(n) for n in wanted} == wanted
    assert fs.listdir("dir") == names


def test_bigalloc_and_encryption_are_refused_by_name(tmp_path: Path) -> None:
    for feature in ("bigalloc", "encrypt"):
        image = blank(tmp_path / feature, 16, "-t", "ext4", "-O", feature)
        with pytest.raises(FormatError, match=feature):
            Ext4.open(BytesReadAt(image.read_bytes()))


def test_an_image_in_a_partition_in_a_file_opens_nested(tmp_path: Path) -> None:
    root = tmp_path / "inner"
    root.mkdir()
    (root / "kernel").write_bytes(b"K" * 100_000)
    outer = tmp_path / "outer"
    outer.mkdir()
    run(["mke2fs", "-q", "-F", "-t", "ext2", "-L", "COS_ACTIVE", "-d", root, outer / "active.img", "8M"])
    run(["mke2fs", "-q", "-F", "-t", "ext4", "-L", "COS_STATE", "-d", outer, tmp_path / "state", "32M"])
    fd = os.open(tmp_path / "state", os.O_RDONLY)
    try:
        inside = Ext4.open(Ext4.open(FileReadAt(fd)).open_file("active.img"))
        assert inside.superblock.label == "COS_ACTIVE"
        assert inside.read_file("kernel") == b"K" * 100_000
    finally:
        os.close(fd)


def test_a_block_map_that_goes_in_circles_is_refused_at_once(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "big").write_bytes(os.urandom(2 << 20))
    run(["mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024", "-d", root, tmp_path / "image", "8M"])
    image = bytearray((tmp_path / "image").read_bytes())
    fs = Ext4.open(BytesReadAt(bytes(image)))
    inode = fs._inode(fs.stat("big").inode)
    at = image.find(inode.raw)
    indirect = struct.unpack_from("<I", inode.raw, 40 + 13 * 4)[0]
    struct.pack_into("<256I", image, indirect * 1024, *[indirect] * 256)  # a block that points at itself
    struct.pack_into("<I", image, at + 40 + 14 * 4, indirect)
    struct.pack_into("<I", image, at + 4, 0xFFFFFFFF)  # size, low
    struct.pack_into("<I", image, at + 108, 0x7FFFFFFF)  # size, high
    started = time.monotonic()
    with pytest.raises(FormatError, match="circles"):
        Ext4.open(BytesReadAt(bytes(image))).read_file("big", 10)
    assert time.monotonic() - started < 2

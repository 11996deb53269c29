"""The image writer, held against e2fsck, the kernel's ext4 and GRUB's own file system code."""

import gzip
import hashlib
import os
import stat
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.readat import FileReadAt
from cos_console.model.image import Compression
from cos_console.model.problem import Problem
from cos_console.slots.build import ImageSpec, build_image, prove_image, unwritten_extents
from tests.disk.layers_in_memory import Blobs, D, layer
from tests.sandbox.disk import run

MIB = 1 << 20


CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *e)
    for e in [
        (1, 6, 0xFFFFFFFF),
        (2, 4, 1000),
        (4, 4, 0xFFFFFFFF),
        (0x10, 4, 0xFFFFFFFF),
        (0x20, 4, 0xFFFFFFFF),
    ]
)


def nasty() -> list[bytes]:
    big = os.urandom(3 * MIB) + bytes(2 * MIB) + os.urandom(5000)
    lower = layer(
        ("usr", D),
        ("usr/lib", D),
        ("lib", {"type": tarfile.SYMTYPE, "link": "usr/lib"}),
        ("abs", {"type": tarfile.SYMTYPE, "link": "/usr/lib"}),
        ("etc", D),
        ("etc/gone", {"data": b"x"}),
        ("etc/kept", {"data": b"kept"}),
        ("opq", D),
        ("opq/old", {"data": b"old"}),
        ("dir-to-file", D),
        ("dir-to-file/inner", {"data": b"x"}),
        ("file-to-dir", {"data": b"x"}),
        ("big", {"data": big, "owner": (70_000, 3_000_000_000)}),
        ("a", {"data": b"linked", "mode": 0o4755}),
        ("b", {"type": tarfile.LNKTYPE, "link": "a"}),
        ("null", {"type": tarfile.CHRTYPE, "device": (1, 3), "mode": 0o666}),
        ("disk", {"type": tarfile.BLKTYPE, "device": (259, 70_000)}),
        ("pipe", {"type": tarfile.FIFOTYPE}),
        ("cap", {"data": b"ping", "xattrs": {"security.capability": CAPABILITY}}),
        ("acl", {"data": b"acl", "xattrs": {"system.posix_acl_access": ACL}}),
        ("many", {"data": b"m", "xattrs": {f"user.key{n:02d}": b"v" * 90 for n in range(12)}}),
        ("old", {"data": b"o", "mtime": -86400.25}),
        ("late", {"data": b"l", "mtime": 5_000_000_000.5}),
        ("n" * 240, {"data": b"long"}),
        ("long-link", {"type": tarfile.SYMTYPE, "link": "x/" * 900 + "end"}),
    )
    upper = layer(
        ("lib/late-file", {"data": b"through the link"}),
        ("abs/late-too", {"data": b"through the absolute link"}),
        ("etc/.wh.gone", {"data": b""}),
        ("opq/new", {"data": b"new"}),
        ("opq/.wh..wh..opq", {"data": b""}),
        ("dir-to-file", {"data": b"now a file"}),
        ("file-to-dir", D),
        ("file-to-dir/in", {"data": b"in"}),
        ("implicit/parent/file", {"data": b"i"}),
        ("c", {"type": tarfile.LNKTYPE, "link": "a"}),
        *((f"crowd/{n:05d}", {"data": b"%d" % n}) for n in range(3000)),
    )
    return [lower, upper]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "mnt"
    where.mkdir()
    yield where
    subprocess.run(["umount", str(where)], check=False, capture_output=True)


def build(path: Path, content: Blobs, size: int = 64 * MIB, **spec: object) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        result = build_image(content, fd, ImageSpec(size, "COS_ACTIVE", **spec))  # type: ignore[arg-type]
        assert unwritten_extents(fd) == []
        proof = prove_image(fd, result)
        assert proof.bytes_read == result.written_bytes > 0
        return result.entries
    finally:
        os.close(fd)


@pytest.mark.disk
@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("sequential", [False, True])
def test_the_kernel_sees_the_tree_that_the_layers_say(
    tmp_path: Path, mounted: Path, compression: Compression, sequential: bool
) -> None:
    image = tmp_path / "image"
    build(image, Blobs(nasty(), compression=compression, sequential=sequential))
    run(["e2fsck", "-fn", image])
    run(["mount", "-o", "loop,ro", image, mounted])
    read = lambda name: (mounted / name).read_bytes()  # noqa: E731
    assert read("usr/lib/late-file") == b"through the link"
    assert read("usr/lib/late-too") == b"through the absolute link"
    assert (mounted / "lib").is_symlink()
    assert not (mounted / "etc/gone").exists()
    assert read("etc/kept") == b"kept"
    assert [p.name for p in (mounted / "opq").iterdir()] == ["new"]
    assert read("dir-to-file") == b"now a file"
    assert read("file-to-dir/in") == b"in"
    assert read("implicit/parent/file") == b"i"
    big = os.stat(mounted / "big")
    assert (big.st_uid, big.st_gid, big.st_size) == (70_000, 3_000_000_000, 5 * MIB + 5000)
    assert big.st_blocks * 512 < 4 * MIB
    assert read("big")[3 * MIB : 5 * MIB] == bytes(2 * MIB)
    a = os.stat(mounted / "a")
    assert (a.st_nlink, stat.S_IMODE(a.st_mode)) == (3, 0o4755)
    assert os.stat(mounted / "c").st_ino == a.st_ino
    assert os.stat(mounted / "null").st_rdev == os.makedev(1, 3)
    assert os.stat(mounted / "disk").st_rdev == os.makedev(259, 70_000)
    assert stat.S_ISFIFO(os.stat(mounted / "pipe").st_mode)
    assert os.getxattr(mounted / "cap", "security.capability") == CAPABILITY
    assert os.getxattr(mounted / "acl", "system.posix_acl_access") == ACL
    assert [os.getxattr(mounted / "many", f"user.key{n:02d}") for n in range(12)] == [b"v" * 90] * 12
    assert os.stat(mounted / "old").st_mtime_ns == -86_400_250_000_000
    assert os.stat(mounted / "late").st_mtime_ns == 5_000_000_000_500_000_000
    assert read("n" * 240) == b"long"
    assert os.readlink(mounted / "long-link") == "x/" * 900 + "end"
    assert len(list((mounted / "crowd").iterdir())) == 3000
    assert read("crowd/02999") == b"2999"
    assert all(
        (mounted / d).is_dir() for d in ("proc", "sys", "dev", "tmp", "usr/local", "oem", "lost+found")
    )


@pytest.mark.disk
def test_grub_reads_every_byte_that_linux_reads(tmp_path: Path) -> None:
    image = tmp_path / "image"
    build(image, Blobs(nasty()))
    listing = run(["grub-fstest", image, "cat", "--", "(loop0)/usr/lib/late-file"])
    assert listing == b"through the link"
    linux = hashlib.sha256(run(["debugfs", "-R", "cat /big", image])).hexdigest()
    assert hashlib.sha256(run(["grub-fstest", image, "cat", "--", "(loop0)/big"])).hexdigest() == linux


@pytest.mark.disk
def test_a_large_image_has_clean_groups_and_our_reader_agrees(tmp_path: Path) -> None:
    image = tmp_path / "image"
    build(image, Blobs(nasty()), size=3240 * MIB, created_s=1_700_000_000, uuid=b"0123456789abcdef")
    run(["e2fsck", "-fn", image])
    assert image.stat().st_blocks * 512 < 80 * MIB
    fd = os.open(image, os.O_RDONLY)
    try:
        ext = Ext4.open(FileReadAt(fd))
        assert (ext.superblock.label, ext.superblock.mkfs_time) == ("COS_ACTIVE", 1_700_000_000)
        assert ext.read_file("lib/late-file") == b"through the link"
    finally:
        os.close(fd)


@pytest.mark.disk
def test_a_changed_byte_fails_the_proof(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    try:
        result = build_image(Blobs(nasty()), fd, ImageSpec(64 * MIB, "X"))
        piece = result.pieces[len(result.pieces) // 2]
        byte = os.pread(fd, 1, piece.offset + 5)
        os.pwrite(fd, bytes([byte[0] ^ 1]), piece.offset + 5)
        with pytest.raises(Problem, match="did not read back"):
            prove_image(fd, result)
    finally:
        os.close(fd)


def refused(tmp_path: Path, content: Blobs, size: int = 32 * MIB) -> str:
    with pytest.raises(Problem) as caught:
        build(tmp_path / "image", content, size)
    return caught.value.report.code + " " + caught.value.report.what


@pytest.mark.disk
def test_damaged_and_hostile_layers_are_refused_in_one_sentence(tmp_path: Path) -> None:
    good = layer(("etc", D), ("etc/file", {"data": os.urandom(200_000)}))
    wrong = Blobs([good])
    wrong.blobs[0] = gzip.compress(layer(("etc/other", {"data": b"x"})))
    assert refused(tmp_path, wrong).startswith("COS-DIGEST")
    short = Blobs([good])
    short.blobs[0] = short.blobs[0][:-2000]
    assert "ends" in refused(tmp_path, short)
    flipped = Blobs([good])
    flipped.blobs[0] = flipped.blobs[0][:5000] + b"\0" * 100 + flipped.blobs[0][5100:]
    assert refused(tmp_path, flipped).split()[0] in {"COS-LAYER", "COS-DIGEST"}
    assert "above the image's root" in refused(tmp_path, Blobs([layer(("a/../../b", {"data": b"x"}))]))
    assert "absolute" in refused(tmp_path, Blobs([layer(("/etc/passwd", {"data": b"x"}))]))
    loop = [("l", {"type": tarfile.SYMTYPE, "link": "l"}), ("l/x", {"data": b"x"})]
    assert "symbolic links" in refused(tmp_path, Blobs([layer(*loop)]))
    assert refused(tmp_path, Blobs([layer(("bomb", {"data": os.urandom(40 * MIB)}))])).startswith(
        "COS-IMAGE-TOO-BIG"
    )


@pytest.mark.disk
def test_a_full_file_system_is_refused_before_anything_is_fetched(tmp_path: Path, mounted: Path) -> None:
    small = tmp_path / "small"
    with small.open("wb") as f:
        f.truncate(24 * MIB)
    run(["mke2fs", "-q", "-F", "-t", "ext4", small])
    run(["mount", "-o", "loop", small, mounted])
    content = Blobs(nasty())
    content.open_layer = lambda index: pytest.fail("fetched")  # type: ignore[method-assign]
    assert refused(mounted, content, 64 * MIB).startswith("COS-SPACE-STATE")


@pytest.mark.disk
def test_cancel_ends_the_workers(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(Problem, match="stopped on request"):
            build_image(Blobs(nasty()), fd, ImageSpec(64 * MIB, "X"), cancelled=lambda: True)
    finally:
        os.close(fd)

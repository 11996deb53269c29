"""The squashfs reader against images of the real mksquashfs, and against damaged ones."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cos_console.formats.readat import BytesReadAt, FormatError
from cos_console.formats.squashfs import Squashfs

BIG = b"".join(n.to_bytes(4, "little") for n in range(100_000)) + bytes(600_000) + b"end of the big file"


def tree(root: Path) -> Path:
    (root / "etc").mkdir(parents=True)
    (root / "etc/os-release").write_text('NAME="cOS"\nVERSION="1.0"\n')
    (root / "boot").mkdir()
    (root / "boot/vmlinuz-6.1").write_bytes(BIG)
    (root / "boot/vmlinuz").symlink_to("/boot/vmlinuz-6.1")
    (root / "lib64").symlink_to("usr/lib/../lib64")
    (root / "usr/lib64").mkdir(parents=True)
    (root / "usr/lib").mkdir()
    (root / "usr/lib64/libc").write_bytes(b"c")
    (root / "loop").symlink_to("loop")
    (root / "empty").write_bytes(b"")
    os.mkfifo(root / "fifo")
    many = root / "many"
    many.mkdir()
    for n in range(400):
        (many / f"a file with a longer name {n:05}").write_bytes(b"%d" % n)
    os.chmod(root / "etc/os-release", 0o640)
    os.chown(root / "etc/os-release", 1234, 70000)
    os.utime(root / "etc/os-release", (1_600_000_000, 1_600_000_000))
    os.link(root / "empty", root / "twin")
    return root


def squash(root: Path, out: Path, *options: str) -> bytes:
    subprocess.run(
        ["mksquashfs", root, out, "-noappend", "-quiet", "-no-progress", "-processors", "1", *options],
        check=True, capture_output=True,
    )  # fmt: skip
    return out.read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("squash") / "root")


@pytest.mark.parametrize("options", [
    ["-comp", "gzip"], ["-comp", "xz"], ["-comp", "zstd"], ["-comp", "xz", "-Xbcj", "x86", "-b", "1M"],
    ["-comp", "gzip", "-b", "4096"], ["-comp", "zstd", "-no-fragments"], ["-comp", "gzip", "-always-use-fragments"],
    ["-comp", "gzip", "-noI", "-noD", "-noF", "-noX"],
], ids=" ".join)  # fmt: skip
def test_every_file_reads_as_it_was_packed(made: Path, tmp_path: Path, options: list[str]) -> None:
    fs = Squashfs.open(BytesReadAt(squash(made, tmp_path / "image", *options)))
    seen = 0
    for folder, folders, files in os.walk(made):
        inside = "/" + os.path.relpath(folder, made)
        assert fs.listdir(inside) == tuple(sorted(os.listdir(folder)))
        for name in folders + files:
            real, path = Path(folder) / name, f"{inside}/{name}"
            want, got = real.lstat(), fs.lstat(path)
            assert (got.mode, got.uid, got.gid, got.mtime) == (
                want.st_mode, want.st_uid, want.st_gid, int(want.st_mtime)
            ), path  # fmt: skip
            if real.is_symlink():
                assert fs.readlink(path) == os.readlink(real)
            elif real.is_file():
                assert got.size_bytes == want.st_size
                assert fs.read_file(path, 1 << 24) == real.read_bytes()
                assert got.links == want.st_nlink
            seen += 1
    assert seen > 400


def test_a_walk_tells_devices_attributes_and_hard_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_bytes(b"x")
    os.link(root / "file", root / "twin")
    os.mknod(root / "device", 0o20640, os.makedev(300, 70_000))
    for name in ("file", "device", "."):
        os.setxattr(root / name, "trusted.same", b"\0\xff" * 300)
    os.setxattr(
        root / "file", "security.capability", bytes.fromhex("0100000202000000000000000000000000000000")
    )
    fs = Squashfs.open(BytesReadAt(squash(root, tmp_path / "image")))
    found = {e.path: e for e in fs.walk()}
    assert set(found) == {"", "file", "twin", "device"}
    assert found["device"].device == (300, 70_000)
    for name in ("file", "device", ""):
        real = {k: os.getxattr(root / name, k) for k in os.listxattr(root / name)}
        assert found[name].xattrs == real
        assert "trusted.same" in real
    assert found["file"].stat.inode == found["twin"].stat.inode
    assert found["file"].stat.links == 2


def test_links_are_followed_inside_the_root_and_a_loop_is_refused(made: Path, tmp_path: Path) -> None:
    fs = Squashfs.open(BytesReadAt(squash(made, tmp_path / "image")))
    assert fs.read_file("/boot/vmlinuz", 8) == BIG[:8]
    assert fs.read_file("/lib64/libc") == b"c"
    assert fs.read_file("/../../etc/os-release").startswith(b"NAME")
    assert not fs.exists("/etc/nothing")
    assert not fs.exists("/etc/os-release/below")
    with pytest.raises(FormatError, match="40"):
        fs.exists("/loop")
    with pytest.raises(FormatError):
        fs.open_file("/fifo")
    with pytest.raises(NotADirectoryError):
        fs.listdir("/empty")


def test_a_piece_from_the_middle_is_that_piece(made: Path, tmp_path: Path) -> None:
    fs = Squashfs.open(BytesReadAt(squash(made, tmp_path / "image", "-comp", "zstd")))
    file = fs.open_file("/boot/vmlinuz")
    for at, length in [(0, 1), (131071, 2), (399_990, 50), (999_990, 500), (len(BIG) - 3, 99), (len(BIG), 1)]:
        assert file.read_at(at, length) == BIG[at : at + length]


@pytest.mark.parametrize("name", ["lz4", "lzo"])
def test_another_compressor_is_refused_by_name(made: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=name):
        Squashfs.open(BytesReadAt(squash(made / "etc", tmp_path / "image", "-comp", name)))


def test_an_image_cut_short_is_named(made: Path, tmp_path: Path) -> None:
    data = squash(made, tmp_path / "image")
    with pytest.raises(FormatError, match="cut short"):
        Squashfs.open(BytesReadAt(data[: len(data) // 2]))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("small")
    (root / "etc").mkdir()
    (root / "etc/os-release").write_text("NAME=x\n")
    (root / "boot").mkdir()
    (root / "boot/vmlinuz").write_bytes(BIG[:20_000])
    (root / "link").symlink_to("etc")
    os.setxattr(root / "etc", "user.one", b"1" * 200)
    os.setxattr(root / "boot", "user.one", b"1" * 200)
    return squash(root, root.parent / "small.squashfs", "-comp", "gzip", "-b", "4096", "-noI")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_a_format_error_and_quick(small: bytes, data: st.DataObject) -> None:
    image = bytearray(small)
    for _ in range(data.draw(st.integers(1, 8))):
        # half of the faults in the superblock and the tables, where they hurt
        low = data.draw(st.sampled_from([0, max(0, len(image) - 5000)]))
        high = 96 if low == 0 else len(image) - 1
        image[data.draw(st.integers(low, high))] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    started = time.monotonic()
    try:
        fs = Squashfs.open(BytesReadAt(bytes(image)))
        for path in ("/", "/etc", "/boot", "/link"):
            try:
                fs.listdir(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
        for path in ("/etc/os-release", "/boot/vmlinuz"):
            try:
                fs.stat(path)
                fs.read_file(path)
            except FileNotFoundError:
                pass
        for entry in fs.walk():
            if entry.content is not None:
                entry.content.read_at(0, 1 << 20)
    except FormatError:
        pass
    assert time.monotonic() - started < 2

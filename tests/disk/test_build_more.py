"""Building an image where things are odd, large, slow, cut off, hostile or full."""

import gzip
import hashlib
import io
import itertools
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from cos_console.model.image import Compression, LayerStream
from cos_console.model.problem import ExitCode, Problem
from cos_console.slots import build_pieces
from cos_console.slots.build import (
    BuildProgress,
    BuildResult,
    Contexts,
    ImageSpec,
    ImageTree,
    build_image,
    dig_unwritten,
    prove_image,
    unwritten_extents,
)
from tests.disk.layers_in_memory import Blobs, D, layer
from tests.sandbox.disk import run

pytestmark = pytest.mark.disk
MIB = 1 << 20
SPEC = ImageSpec(64 * MIB, "COS_ACTIVE", created_s=1_700_000_000)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT, 0o600)
    yield fd
    os.close(fd)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "mnt"
    where.mkdir()
    yield where
    subprocess.run(["umount", str(where)], check=False, capture_output=True)


def path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def mount(fd: int, where: Path) -> None:
    run(["e2fsck", "-fn", path_of(fd)])
    run(["mount", "-o", "loop,ro", path_of(fd), where])


def digest(fd: int) -> str:
    with open(path_of(fd), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def refused(content: Blobs, fd: int, spec: ImageSpec = SPEC) -> Problem:
    with pytest.raises(Problem) as caught:
        build_image(content, fd, spec)
    assert children() == []
    return caught.value


def children() -> list[int]:
    text = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text()
    return [int(pid) for pid in text.split()]


def code(problem: Problem) -> str:
    assert problem.report.unchanged
    assert problem.report.now
    return problem.report.code


# --- what is on the disk afterwards ----------------------------------------------------------------------------


def three_layers() -> list[bytes]:
    lower = [(f"d{n % 7}/f{n}", {"data": os.urandom(n * 37)}) for n in range(1, 400)]
    hide = [(f"d{n % 7}/.wh.f{n}", {"data": b""}) for n in range(1, 400, 5)]
    return [
        layer(*lower, ("large", {"data": os.urandom(6 * MIB)})),
        layer(*hide, ("large", {"data": b"small now"})),
        layer(("x", D), ("x/y", {"data": os.urandom(100_000)})),
    ]


def test_the_same_layers_give_the_same_bytes(image: int) -> None:
    content = Blobs(three_layers())
    found = set()
    for workers in (2, 2, 1, 3):
        build_image(content, image, ImageSpec(64 * MIB, "X", created_s=1_700_000_000, workers=workers))
        found.add(digest(image))
    assert len(found) == 1


def test_nothing_of_a_hidden_file_is_left_on_the_disk(image: int) -> None:
    secret = b"hidden from everybody"
    lower = [
        *((f"old/{n}", {"data": secret * 40 + os.urandom(3000 * n)}) for n in range(60)),
        *((f"kept/{n}", {"data": b"kept" * 200 * n}) for n in range(60)),
        ("big", {"data": secret * 400_000}),
    ]
    upper = [*((f"old/.wh.{n}", {"data": b""}) for n in range(0, 60, 2)), ("big", {"data": b"new"})]
    keep = [(f"old/{n}", {"data": b"replaced"}) for n in range(1, 60, 2)]
    result = build_image(Blobs([layer(*lower), layer(*upper, *keep)]), image, SPEC)
    run(["e2fsck", "-fn", path_of(image)])
    assert secret not in Path(path_of(image)).read_bytes()
    assert prove_image(image, result).bytes_read == result.written_bytes
    assert os.fstat(image).st_blocks * 512 < 12 * MIB


def test_room_stays_reserved_for_whoever_writes_next_until_it_is_dug(image: int) -> None:
    content = Blobs(three_layers())
    build_image(content, image, ImageSpec(64 * MIB, "X", created_s=1, keep_reserved=True))
    assert os.fstat(image).st_blocks * 512 >= 64 * MIB
    before = digest(image)
    assert unwritten_extents(image)
    assert dig_unwritten(image) > 40 * MIB
    assert unwritten_extents(image) == []
    assert digest(image) == before
    assert os.fstat(image).st_blocks * 512 < 24 * MIB
    run(["e2fsck", "-fn", path_of(image)])


@pytest.mark.parametrize("kind", ["ext4", "ext2"])
@pytest.mark.parametrize("block", [1024, 4096])
def test_grub_reads_the_whole_image_as_linux_does(
    tmp_path: Path, mounted: Path, kind: str, block: int
) -> None:
    """The disk was full of other data before: what is reserved and not written would show it to GRUB."""
    disk = tmp_path / "disk"
    with disk.open("wb") as f:
        for _ in range(100):
            f.write(os.urandom(MIB))
    run(["mke2fs", "-q", "-F", "-t", kind, "-b", block, "-E", "nodiscard,lazy_itable_init=0", disk])
    run(["mount", "-o", "loop", disk, mounted])
    fd = os.open(mounted / "active.img", os.O_RDWR | os.O_CREAT)
    try:
        result = build_image(Blobs(three_layers()), fd, SPEC)
        prove_image(fd, result)
        linux = hashlib.sha256((mounted / "active.img").read_bytes()).digest()
    finally:
        os.close(fd)
    run(["umount", mounted])
    grub = subprocess.Popen(["grub-fstest", disk, "cat", "--", "(loop0)/active.img"], stdout=subprocess.PIPE)
    assert grub.stdout is not None
    seen = hashlib.file_digest(grub.stdout, "sha256").digest()  # type: ignore[arg-type]
    assert grub.wait() == 0
    assert seen == linux


def test_a_full_ext2_is_refused_at_once_though_it_can_not_reserve(tmp_path: Path, mounted: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as f:
        f.truncate(40 * MIB)
    run(["mke2fs", "-q", "-F", "-t", "ext2", disk])
    run(["mount", "-o", "loop", disk, mounted])
    content = Blobs(three_layers())
    content.open_layer = lambda index: pytest.fail("fetched")  # type: ignore[method-assign]
    fd = os.open(mounted / "image", os.O_RDWR | os.O_CREAT)
    try:
        assert code(refused(content, fd)) == "COS-SPACE-STATE"
    finally:
        os.close(fd)


def test_an_image_too_small_for_its_files_is_refused_and_a_full_one_is_right(
    image: int, mounted: Path
) -> None:
    data = [os.urandom(2 * MIB) for _ in range(12)]
    content = Blobs([layer((f"f{n}", {"data": d})) for n, d in enumerate(data)])
    assert code(refused(content, image, ImageSpec(24 * MIB, "X"))) == "COS-IMAGE-TOO-BIG"
    # One layer is far larger than its share of the transfer: it takes the room of the others.
    zeros = b"".join(b"%04d" % (n % 9973) for n in range(2_500_000))
    content = Blobs(
        [layer((f"f{n}", {"data": d})) for n, d in enumerate(data[:3])] + [layer(("z", {"data": zeros}))]
    )
    result = build_image(content, image, ImageSpec(18 * MIB, "X"))
    prove_image(image, result)
    mount(image, mounted)
    assert (mounted / "z").read_bytes() == zeros
    assert [(mounted / f"f{n}").read_bytes() for n in range(3)] == data[:3]


# --- layers that are odd ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_that_stands_in_the_image_twice(image: int, mounted: Path, sequential: bool) -> None:
    twice = layer(("a", {"data": os.urandom(70_000)}), ("b", {"data": b"b"}), ("s", {"data": b"s" * 9000}))
    between = layer(("link", {"type": tarfile.LNKTYPE, "link": "a"}), ("b", {"data": b"other"}))
    content = Blobs([twice, between, twice], sequential=sequential)
    result = build_image(content, image, SPEC)
    prove_image(image, result)
    mount(image, mounted)
    assert (mounted / "link").read_bytes() == (mounted / "a").read_bytes()
    assert (mounted / "link").stat().st_ino != (mounted / "a").stat().st_ino
    assert (mounted / "b").read_bytes() == b"b"


def test_compressed_data_in_several_parts_and_with_a_wrong_name(image: int, mounted: Path) -> None:
    data = os.urandom(3 * MIB)
    plain = layer(("f", {"data": data}))
    cuts = [0, 1, 2, 100, 70_000, MIB, len(plain)]
    parts = [plain[a:b] for a, b in itertools.pairwise(cuts)]
    members = b"".join(gzip.compress(p, 1) for p in parts) + bytes(600)
    skip = b"\x50\x2a\x4d\x18" + struct.pack("<I", 5) + b"table"
    frames = skip + b"".join(zstandard.ZstdCompressor().compress(p) for p in parts) + skip
    for blob, said in ((members, Compression.GZIP), (frames, Compression.ZSTD), (frames, Compression.GZIP)):
        content = Blobs([plain], compression=said, blobs=[blob])
        build_image(content, image, SPEC)
        mount(image, mounted)
        assert (mounted / "f").read_bytes() == data
        run(["umount", mounted])


def test_sparse_members_of_gnu_tar_keep_their_holes(tmp_path: Path, image: int, mounted: Path) -> None:
    with (tmp_path / "holes").open("wb") as f:
        for n in range(30):
            f.seek(n * 300_001)
            f.write(os.urandom(10_000))
        f.truncate(300 * MIB)
    (tmp_path / "tail").write_bytes(bytes(MIB) + b"x")
    (tmp_path / "nothing").write_bytes(bytes(3 * MIB + 17))
    blob = run(["tar", "-C", tmp_path, "-cSf", "-", "--format=posix", "holes", "tail", "nothing"])
    build_image(Blobs([blob]), image, SPEC)
    mount(image, mounted)
    run(["cmp", tmp_path / "holes", mounted / "holes"])
    assert (mounted / "tail").read_bytes() == bytes(MIB) + b"x"
    assert (mounted / "nothing").read_bytes() == bytes(3 * MIB + 17)
    assert (mounted / "nothing").stat().st_blocks == 0
    assert (mounted / "holes").stat().st_blocks * 512 < MIB


@pytest.mark.parametrize("seed", range(6))
def test_sparse_parts_at_any_byte(image: int, mounted: Path, seed: int) -> None:
    """Parts that share blocks, begin and end inside them, and leave holes of every size."""
    rng = random.Random(seed)
    files = []
    for n in range(20):
        at, parts, content = 0, [], bytearray()
        for _ in range(rng.randrange(12)):
            at += rng.choice([0, 1, 100, 4096, 4095, 5000, 70_000, 200_000])
            data = rng.randbytes(rng.choice([1, 50, 4096, 4097, 9000, 65_536, 140_000]))
            if rng.random() < 0.2:
                data = bytes(len(data))
            parts.append((at, data))
            content += bytes(at - len(content)) + data
            at = len(content)
        content += bytes(rng.choice([0, 1, 5000, 70_000]))
        told = ",".join(f"{a},{len(data)}" for a, data in parts)
        info = tarfile.TarInfo(f"f{n}")
        info.pax_headers = {"GNU.sparse.size": str(len(content)), "GNU.sparse.map": told}
        info.size = sum(len(data) for _, data in parts)
        files.append((info, b"".join(data for _, data in parts), bytes(content)))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data, _ in files:
            tar.addfile(info, io.BytesIO(data))
    build_image(Blobs([out.getvalue()]), image, SPEC)
    mount(image, mounted)
    for info, _, content in files:
        assert (mounted / info.name).read_bytes() == content


def test_security_contexts_are_made_from_the_image_itself(image: int, mounted: Path) -> None:
    rules = b"/etc(/.*)?\tsystem_u:object_r:etc_t:s0\n"
    seen: list[tuple[bytes, int]] = []

    def contexts_from(tree: ImageTree) -> Contexts:
        assert tree.read_file("etc/rules", 1 << 20) == rules
        assert tree.read_file("link/rules", 10) == rules[:10]
        assert tree.read_file("etc", 10) is None
        assert tree.read_file("etc/none", 10) is None

        def context(path: bytes, mode: int) -> bytes | None:
            seen.append((path, mode))
            return b"system_u:object_r:etc_t:s0" if path.startswith(b"/etc") else None

        return context

    tar = layer(
        ("etc", D), ("etc/rules", {"data": rules}), ("link", {"type": tarfile.SYMTYPE, "link": "/etc"}),
        ("other", {"data": b"", "xattrs": {"security.selinux": b"from_the_layer:s0\0"}}),
    )  # fmt: skip
    build_image(Blobs([tar]), image, ImageSpec(64 * MIB, "X", contexts_from=contexts_from))
    assert {p for p, _ in seen} >= {b"/", b"/etc", b"/etc/rules", b"/link", b"/proc"}
    mount(image, mounted)
    assert os.getxattr(mounted / "etc/rules", "security.selinux") == b"system_u:object_r:etc_t:s0\0"
    assert os.getxattr(mounted / "other", "security.selinux") == b"from_the_layer:s0\0"


def test_the_root_is_open_to_all_and_the_mount_points_are_there(image: int, mounted: Path) -> None:
    build_image(Blobs([layer(("./", {**D, "mode": 0o700}), ("oem", {"data": b"in the way"}))]), image, SPEC)
    mount(image, mounted)
    assert stat.S_IMODE(mounted.stat().st_mode) == 0o755
    assert (mounted / "oem").read_bytes() == b"in the way"
    for name in ("proc", "boot", "dev", "sys", "run", "tmp", "mnt", "host", "usr/local"):
        assert (mounted / name).is_dir()


@pytest.mark.slow
def test_a_hundred_thousand_files_in_one_directory_under_200_megabytes_of_memory(
    image: int, mounted: Path
) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for n in range(100_000):
            info = tarfile.TarInfo(f"crowd/some-longer-name-{n}-\u00fcml")
            info.size = 5
            tar.addfile(info, io.BytesIO(b"%05d" % n))
    blob = gzip.compress(out.getvalue(), 1)
    del out
    script = Path(__file__).with_name("build_alone.py")
    done = subprocess.run(
        [sys.executable, script, path_of(image), str(768 * MIB)], input=blob, capture_output=True, check=True
    )
    most = int(done.stdout.split()[-1])
    assert most < 200 << 20, f"{most >> 20} MiB"
    mount(image, mounted)
    crowd = mounted / "crowd"
    assert sum(1 for _ in os.scandir(crowd)) == 100_000
    for n in (0, 49_999, 99_999, 77_777):
        assert (crowd / f"some-longer-name-{n}-\u00fcml").read_bytes() == b"%05d" % n
    assert not (crowd / "not there").exists()


# --- what is refused -------------------------------------------------------------------------------------------


def test_bombs_are_refused_in_one_sentence(image: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo("zeros")
        info.size = 3 << 30
        tar.addfile(info, _Zeros(info.size))  # type: ignore[arg-type]
        blob = zstandard.ZstdCompressor().compress(out.getvalue())
    del out
    started = time.monotonic()
    problem = refused(Blobs([layer()], blobs=[blob]), image, ImageSpec(64 * MIB, "X"))
    assert "inflate to more than 1280 MiB" in problem.report.what
    assert time.monotonic() - started < 20
    many = layer(*((f"f{n}", {"data": b""}) for n in range(30)))
    problem = refused(Blobs([many, many + bytes(512)]), image, ImageSpec(64 * MIB, "X", entry_limit=50))
    assert "more than 50 entries" in problem.report.what


class _Zeros:
    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int) -> bytes:
        size = min(size, self._left)
        self._left -= size
        return bytes(size)


def test_a_compression_window_that_wants_too_much_memory_is_refused(image: int) -> None:
    parameters = zstandard.ZstdCompressionParameters(
        window_log=27, compression_level=1, write_content_size=False
    )
    tar = layer(("f", {"data": os.urandom(1000)}))
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    blob = compressor.compress(tar) + compressor.flush()
    problem = refused(Blobs([tar], blobs=[blob]), image)
    assert code(problem) == "COS-LAYER"
    assert "window of more than 32 MiB" in problem.report.what
    build_image(Blobs([tar], blobs=[blob]), image, ImageSpec(64 * MIB, "X", window_limit_bytes=128 * MIB))


@pytest.mark.parametrize("compression", list(Compression))
@pytest.mark.parametrize("layers", [1, 3])
def test_cut_off_and_changed_layers_are_told_by_their_digest(
    image: int, compression: Compression, layers: int
) -> None:
    tars = [layer((f"f{n}", {"data": os.urandom(900_000)})) for n in range(layers)]
    for change in ("cut", "flipped", "longer", "other"):
        content = Blobs(tars, compression=compression)
        blob = bytearray(content.blobs[-1])
        if change == "cut":
            del blob[-5000:]
        elif change == "flipped":
            blob[len(blob) // 2] ^= 0x10
        elif change == "longer":
            blob += bytes(700)
        else:
            blob = bytearray(Blobs([layer(("g", {"data": b""}))], compression=compression).blobs[0])
        content.blobs[-1] = bytes(blob)
        problem = refused(content, image)
        assert (code(problem), problem.report.exit_code) == ("COS-DIGEST", ExitCode.VERIFICATION), change


def test_a_diff_id_that_is_wrong_is_told_where_it_is_looked_at(image: int) -> None:
    tars = three_layers()
    content = Blobs(tars, sequential=True)
    content._left[0] = layer(("something", {"data": b"else"}))
    assert code(refused(content, image)) == "COS-DIGEST"
    content = Blobs(tars, sequential=True)
    content._left.pop()
    assert "layer 1 of 3 is missing" in refused(content, image).report.what
    lying = Blobs(tars, blobs=[gzip.compress(t) for t in [*tars[:2], layer(("other", {"data": b""}))]])
    build_image(lying, image, SPEC)
    assert code(refused(lying, image, ImageSpec(64 * MIB, "X", check_diff_ids=True))) == "COS-DIGEST"


def test_damage_inside_a_layer_with_the_right_digest_names_the_fault(image: int) -> None:
    tar = layer(("f", {"data": os.urandom(100_000)}))
    packed = gzip.compress(tar)
    for blob, words in (
        (packed[:-3000], "compressed data is damaged"),
        (packed[:50_000] + b"\xff" * 50 + packed[50_050:], "compressed data is damaged"),
        (packed + b"garbage", "something else follows"),
        (gzip.compress(tar[:60_000]), "f: the tar stream ends inside this file"),
        (gzip.compress(b"no tar at all" * 100), "checksum"),
    ):
        problem = refused(Blobs([tar], blobs=[blob]), image)
        assert code(problem) == "COS-LAYER"
        assert words in problem.report.what


# --- while it runs ---------------------------------------------------------------------------------------------


class _Slow:
    """Gives half of a layer and then nothing for a while; `forever` never comes back."""

    def __init__(self, data: bytes, pause_s: float) -> None:
        self._parts = [data[: len(data) // 2], data[len(data) // 2 :]]
        self._pause_s = pause_s

    def readinto(self, buffer: memoryview) -> int:
        if not self._parts:
            return 0
        if len(self._parts) == 1:
            time.sleep(self._pause_s)
            self._pause_s = 0
        part = self._parts[0][: len(buffer)]
        buffer[: len(part)] = part
        self._parts[0] = self._parts[0][len(part) :]
        if not self._parts[0]:
            self._parts.pop(0)
        return len(part)

    def close(self) -> None:
        pass


class SlowBlobs(Blobs):
    pause_s = 1.5

    def open_layer(self, index: int) -> LayerStream:
        return _Slow(self.blobs[index], self.pause_s)


def test_progress_says_what_came_and_how_long_nothing_did(image: int) -> None:
    content = SlowBlobs([layer((f"f{n}", {"data": os.urandom(300_000)})) for n in range(2)])
    told: list[tuple[float, BuildProgress]] = []
    result = build_image(content, image, SPEC, report=lambda p: told.append((time.monotonic(), p)))
    assert (
        told[-1][1].bytes_done
        == told[-1][1].bytes_total
        == result.transfer_bytes
        == sum(map(len, content.blobs))
    )
    assert max(p.waiting_s for _, p in told) > 1.0
    assert told[-1][1].waiting_s == 0.0
    assert all(a.bytes_done <= b.bytes_done for (_, a), (_, b) in itertools.pairwise(told))
    assert all(b - a > 0.15 for (a, _), (b, _) in itertools.pairwise(told[:-1]))
    assert told[-1][1].detail == "layer 2 of 2"


def test_cancel_does_not_wait_for_a_silent_source(image: int) -> None:
    content = SlowBlobs(three_layers())
    content.pause_s = 3600
    begun = time.monotonic()
    with pytest.raises(Problem) as caught:
        build_image(content, image, SPEC, cancelled=lambda: time.monotonic() - begun > 0.5)
    assert code(caught.value) == "COS-CANCELLED"
    assert time.monotonic() - begun < 2
    assert children() == []


def test_a_worker_that_dies_is_told_and_none_is_left(image: int) -> None:
    content = SlowBlobs(three_layers())
    content.pause_s = 3600

    def kill(_: BuildProgress) -> None:
        for pid in children():
            assert os.getsid(pid) == pid, "a terminal's signals must pass a worker by"
        os.kill(children()[0], signal.SIGKILL)

    with pytest.raises(Problem) as caught:
        build_image(content, image, SPEC, report=kill)
    assert code(caught.value) == "COS-WORKER"
    assert "signal 9" in caught.value.report.what
    assert children() == []


def test_a_problem_of_the_source_comes_through_as_it_is(image: int) -> None:
    content = Blobs(three_layers())

    def gone(index: int) -> LayerStream:
        raise Problem("COS-NET-RESET", "It went away.", now="Try again.", exit_code=ExitCode.SOURCE)

    content.open_layer = gone  # type: ignore[method-assign]
    problem = refused(content, image)
    assert (code(problem), problem.report.what, problem.report.exit_code) == (
        "COS-NET-RESET", "It went away.", ExitCode.SOURCE,
    )  # fmt: skip


def test_a_fault_that_nobody_foresaw_is_a_problem_too(image: int) -> None:
    content = Blobs(three_layers())
    content.open_layer = lambda index: 1 // 0  # type: ignore[method-assign,assignment,return-value]
    problem = refused(content, image)
    assert code(problem) == "COS-INTERNAL"
    assert "ZeroDivisionError" in problem.report.detail


# --- the proof -------------------------------------------------------------------------------------------------


@pytest.fixture
def built(image: int) -> tuple[int, BuildResult]:
    return image, build_image(Blobs(three_layers()), image, SPEC)


def test_a_proof_takes_what_was_read_back_while_writing_and_counts_it_all(
    built: tuple[int, BuildResult],
) -> None:
    fd, result = built
    proof = prove_image(fd, result)
    assert (proof.bytes_read, proof.files, proof.method) == (result.written_bytes, result.files, "direct")
    assert proof.bytes_read_while_writing > 0
    os.utime(fd)
    again = prove_image(fd, result)
    assert (again.bytes_read, again.bytes_read_while_writing) == (result.written_bytes, 0)


@pytest.mark.parametrize("where", ["first block", "content", "last piece", "hole", "size"])
def test_whatever_changes_after_the_build_fails_the_proof(built: tuple[int, BuildResult], where: str) -> None:
    fd, result = built
    if where == "size":
        os.ftruncate(fd, result.size_bytes + 4096)
    elif where == "hole":
        hole = os.lseek(fd, 0, os.SEEK_HOLE)
        os.pwrite(fd, b"x", hole + 4096)
    else:
        piece = result.pieces[{"first block": 0, "content": len(result.pieces) // 2, "last piece": -1}[where]]
        at = piece.offset + piece.length - 1
        os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1]), at)
    with pytest.raises(Problem) as caught:
        prove_image(fd, result)
    assert code(caught.value) == "COS-PROOF"


def test_a_disk_that_returns_other_bytes_while_writing_ends_the_build(
    image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = build_pieces.Reader.read

    def lying(self: build_pieces.Reader, offset: int, length: int) -> memoryview:
        view = honest(self, offset, length)
        view[len(view) // 2] ^= 1
        return view

    monkeypatch.setattr(build_pieces.Reader, "read", lying)
    assert code(refused(Blobs(three_layers()), image)) == "COS-PROOF"


def test_a_disk_that_refuses_direct_writes_is_proven_behind_a_dropped_cache(
    image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build_pieces, "open_direct", lambda fd, flags: (os.open(path_of(fd), flags), False))
    result = build_image(Blobs(three_layers()), image, SPEC)
    proof = prove_image(image, result)
    assert (proof.method, proof.bytes_read, proof.bytes_read_while_writing) == (
        "dropped",
        result.written_bytes,
        0,
    )
    run(["e2fsck", "-fn", path_of(image)])


def test_a_write_error_is_told_as_one(tmp_path: Path, mounted: Path) -> None:
    """A file system that can't reserve, filled by somebody else while the image comes."""
    disk = tmp_path / "disk"
    with disk.open("wb") as f:
        f.truncate(100 * MIB)
    run(["mke2fs", "-q", "-F", "-t", "ext2", "-m", "0", disk])
    run(["mount", "-o", "loop", disk, mounted])
    fd = os.open(mounted / "image", os.O_RDWR | os.O_CREAT)
    content = SlowBlobs([layer(("f", {"data": os.urandom(20 * MIB)}))], compression=Compression.NONE)
    content.pause_s = 1.0
    filled = []

    def fill(_: BuildProgress) -> None:
        if not filled:
            free = os.statvfs(mounted).f_bavail * os.statvfs(mounted).f_frsize
            filled.append(free)
            with (mounted / "other").open("wb") as f:
                try:
                    f.write(os.urandom(free + MIB))
                except OSError:
                    pass

    try:
        with pytest.raises(Problem) as caught:
            build_image(content, fd, SPEC, report=fill)
        assert code(caught.value) == "COS-DISK-WRITE"
        assert "No space left" in caught.value.report.what
    finally:
        os.close(fd)

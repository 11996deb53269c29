"""Active restored from a squashfs recovery: every entry as unsquashfs unpacks it."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

from tests.disk.conftest import Run
from tests.disk.test_features_repair import Cut
from tests.sandbox.disk import Recipe, make_disk, run
from tests.sandbox.tree import Derivative

pytestmark = pytest.mark.disk


def odd_tree(root: Path) -> None:
    """A small derivative, and what squashfs stores in ways of its own."""
    root.mkdir()
    Derivative("0.8", payload_mib=1).write(root)
    (root / "odd").mkdir(mode=0o2751)
    odd = root / "odd"
    (odd / "empty").write_bytes(b"")
    (odd / "tail").write_bytes(os.urandom(300_001))
    (odd / "exact").write_bytes(b"x" * (1 << 20))
    with (odd / "sparse").open("wb") as f:
        f.write(b"head")
        f.seek(3 << 20)
        f.write(b"tail")
    os.link(odd / "tail", odd / "tail.link")
    os.link(odd / "tail", root / "tail.far")
    os.symlink("/absolute/" + "long" * 40, odd / "symlink")
    os.mknod(odd / "device", stat.S_IFCHR | 0o640, os.makedev(300, 70_000))
    os.mknod(odd / "block", stat.S_IFBLK | 0o600, os.makedev(8, 1))
    os.mkfifo(odd / "fifo")
    (odd / "caps").write_bytes(b"binary")
    os.setxattr(
        odd / "caps", "security.capability", bytes.fromhex("0100000202000000000000000000000000000000")
    )
    os.setxattr(odd / "caps", "user.long", b"\x00\xff" * 900)
    os.setxattr(odd / "exact", "user.long", b"\x00\xff" * 900)  # the same value: stored once, elsewhere
    os.setxattr(odd, "trusted.directory", b"yes")
    os.setxattr(odd / "symlink", "trusted.link", b"yes", follow_symlinks=False)
    os.chown(odd / "exact", 70_000, 12)
    os.chmod(odd / "exact", 0o4755)
    os.utime(odd / "exact", (1_000_000_000, 1_000_000_000))
    (odd / os.fsdecode(b"name \xe9\xff")).write_bytes(b"latin")
    many = odd / "many"
    many.mkdir()
    for n in range(700):
        (many / f"file-{n:04d}-{'y' * (n % 50)}").write_bytes(b"%d" % n * (n % 90))


def shape(root: Path) -> dict[bytes, tuple[object, ...]]:
    found: dict[bytes, tuple[object, ...]] = {}
    first: dict[int, bytes] = {}
    for base, directories, files in os.walk(os.fsencode(root)):
        for name in sorted([*directories, *files]):
            path = os.path.join(base, name)
            relative = os.path.relpath(path, os.fsencode(root))
            if relative == b"lost+found":
                continue
            info = os.lstat(path)
            kind = stat.S_IFMT(info.st_mode)
            body: object = ""
            if kind == stat.S_IFREG:
                body = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).hexdigest()
            elif kind == stat.S_IFLNK:
                body = os.readlink(path)
            attributes = {
                key: os.getxattr(path, key, follow_symlinks=False)
                for key in os.listxattr(path, follow_symlinks=False)
            }
            found[relative] = (
                info.st_mode, info.st_uid, info.st_gid, int(info.st_mtime), info.st_rdev, body, attributes,
            )  # fmt: skip
            if kind == stat.S_IFREG and info.st_nlink > 1:
                first.setdefault(info.st_ino, relative)
    return found


@pytest.mark.parametrize("compressor", ["gzip", "xz", "zstd"])
def test_active_is_what_the_squashfs_holds(console: Run, tmp_path: Path, compressor: str) -> None:
    cut = Cut(make_disk(tmp_path / "d.img", Recipe(recovery_squashfs=True)), tmp_path, console)
    tree, squash, unpacked = tmp_path / "tree", tmp_path / "recovery.squashfs", tmp_path / "unpacked"
    odd_tree(tree)
    run(["mksquashfs", tree, squash, "-quiet", "-no-progress", "-comp", compressor, "-b", "131072"])
    cut.change("COS_RECOVERY", f"cp {squash} recovery.squashfs")
    done = console("rollback", "restore-from-recovery", "--target", cut.disk.path, "--yes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "needs ~" in done.stdout
    assert "read back and equal" in done.stdout
    found = cut.look()
    assert (found["active"], found["passive"]) == ("0.8 COS_ACTIVE sound", "0.9 COS_PASSIVE sound")
    assert found["left"] == {}
    part = cut.disk.read_partition("COS_STATE", tmp_path / "part")
    image, mounted = tmp_path / "active.img", tmp_path / "image"
    image.write_bytes(run(["grub-fstest", part, "cat", "--", "(loop0)/cOS/active.img"]))
    run(["e2fsck", "-fn", image])
    run(["unsquashfs", "-no-progress", "-quiet", "-d", unpacked, squash])
    mounted.mkdir()
    run(["mount", "-o", "loop,ro", image, mounted])
    try:
        ours, theirs = shape(mounted), shape(unpacked)
        same = (mounted / "odd/tail").stat().st_ino == (mounted / "tail.far").stat().st_ino
    finally:
        run(["umount", mounted])
    added = {b"mnt", b"host"}  # the mount points that a slot wants
    assert set(ours) - set(theirs) <= added
    assert {n: (ours.get(n), theirs[n]) for n in theirs if ours.get(n) != theirs[n]} == {}
    assert same
    assert len(theirs) > 750


def test_a_damaged_squashfs_is_refused_and_the_slots_stay(console: Run, tmp_path: Path) -> None:
    """Where the bytes are packed damage shows; a block stored as it is has no checksum in squashfs."""
    packed = Derivative("0.9", extra={"aaa/first": os.urandom(3 << 20).hex().encode()})
    cut = Cut(
        make_disk(tmp_path / "d.img", Recipe(recovery=packed, recovery_squashfs=True)), tmp_path, console
    )
    cut.change(
        "COS_RECOVERY",
        "printf 'damage damage damage' | dd of=recovery.squashfs bs=1 seek=1500000 conv=notrunc status=none",
    )
    before = cut.look()
    done = console("rollback", "restore-from-recovery", "--target", cut.disk.path, "--yes")
    assert done.returncode in {3, 6}, done.stdout
    assert "COS-RECOVERY-DAMAGED" in done.stdout + done.stderr
    assert cut.look() == before
    assert cut.names() == ["active.img", "passive.img"]

"""Random layers: what the kernel sees in our image is what umoci unpacks."""

import hashlib
import io
import os
import random
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cos_console.slots.build import ImageSpec, build_image, prove_image
from tests.disk.layers_in_memory import Blobs
from tests.sandbox.disk import run
from tests.sandbox.image import write_layout

pytestmark = pytest.mark.disk
MIB = 1 << 20


class Layers:
    """Layers with changes of every kind over a world that is followed only as far as names go."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._dirs = [""]
        self._files: list[str] = []

    def layer(self) -> bytes:
        rng = self._rng
        out = io.BytesIO()
        own: set[str] = set()
        with tarfile.open(
            fileobj=out, mode="w", format=rng.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
        ) as tar:
            for _ in range(rng.randrange(5, 40)):
                self._entry(tar, own)
        return out.getvalue()

    def _entry(self, tar: tarfile.TarFile, own: set[str]) -> None:
        rng = self._rng
        parent = rng.choice(self._dirs)
        name = rng.choice(["a", "b", "c", "d", "ü", "x" * 200, f"n{rng.randrange(50)}"])
        path = f"{parent}/{name}" if parent else name
        what = rng.choices(
            ["file", "dir", "link", "hard", "gone", "opaque", "fifo", "char"], [10, 8, 3, 3, 4, 1, 1, 1]
        )[0]
        # Whiteouts and directories that only half exist in one layer are told apart by the unit tests; here a
        # path is touched once in a layer, so that umoci's order of work can't matter.
        if path in own or any(
            o.startswith(path + "/") or path.startswith(o + "/") for o in own if o not in self._dirs
        ):
            return
        info = tarfile.TarInfo(path)
        info.mode = rng.choice([0o644, 0o755, 0o4711, 0o600, 0o1777])
        info.uid, info.gid = rng.choice([0, 1000, 70_000]), rng.choice([0, 50, 100_000])
        info.mtime = rng.randrange(0, 2_000_000_000)
        data = b""
        if what == "file":
            data = rng.randbytes(rng.choice([0, 1, 100, 4096, 50_000, 200_000]))
            if rng.random() < 0.2:
                data = data[:10] + bytes(len(data))
            if tar.format == tarfile.PAX_FORMAT and rng.random() < 0.3:
                info.pax_headers = {
                    f"SCHILY.xattr.user.k{n}": "v" * rng.choice([1, 30, 300]) for n in range(rng.randrange(5))
                }
            self._files.append(path)
        elif what == "dir":
            info.type = tarfile.DIRTYPE
            self._dirs.append(path)
        elif what == "link":
            info.type, info.linkname = (
                tarfile.SYMTYPE,
                rng.choice([".", "/a", "../b", "nowhere/at/all", "t" * 100]),
            )
        elif what == "hard":
            if not self._files:
                return
            target = rng.choice(self._files)
            if target == path:
                return
            info.type, info.linkname = tarfile.LNKTYPE, target
        elif what == "gone":
            info.name = f"{parent}/.wh.{name}" if parent else f".wh.{name}"
            path = ""
        elif what == "opaque":
            info.name = f"{parent}/.wh..wh..opq" if parent else ".wh..wh..opq"
            path = ""
        else:
            info.type = tarfile.FIFOTYPE if what == "fifo" else tarfile.CHRTYPE
            info.devmajor, info.devminor = (1, 3) if what == "char" else (0, 0)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        own.add(path or f"\0{info.name}")


def tree(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that can be seen of every entry; inodes are numbered by their first name."""
    first: dict[int, str] = {}
    found: dict[str, tuple[object, ...]] = {}
    for directory, names, files in os.walk(root):
        names.sort()
        for name in sorted([*names, *files]):
            path = Path(directory, name)
            relative = str(path.relative_to(root))
            if relative == "lost+found":
                continue
            info = path.lstat()
            regular = stat.S_ISREG(info.st_mode)
            link = first.setdefault(info.st_ino, relative) if not stat.S_ISDIR(info.st_mode) else ""
            xattrs = {
                k: os.getxattr(path, k, follow_symlinks=False)
                for k in os.listxattr(path, follow_symlinks=False)
            }
            found[relative] = (
                oct(info.st_mode), info.st_uid, info.st_gid, info.st_rdev, link,
                info.st_nlink, info.st_size if regular else 0,
                int(info.st_mtime) if regular else 0,
                hashlib.sha256(path.read_bytes()).hexdigest() if regular else "",
                os.readlink(path) if path.is_symlink() else "", xattrs,
            )  # fmt: skip
    return found


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    where = tmp_path / "mnt"
    where.mkdir()
    yield where
    subprocess.run(["umount", str(where)], check=False, capture_output=True)


@pytest.mark.parametrize("seed", range(12))
def test_our_image_is_what_umoci_unpacks(tmp_path: Path, mounted: Path, seed: int) -> None:
    makes = Layers(seed)
    layers = [makes.layer() for _ in range(1 + seed % 4)]
    write_layout(tmp_path / "layout", layers)
    done = subprocess.run(
        ["umoci", "unpack", "--image", tmp_path / "layout:latest", tmp_path / "bundle"],
        check=False,
        capture_output=True,
    )
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    try:
        if done.returncode != 0:
            with pytest.raises(Exception, match="can't be unpacked"):
                build_image(Blobs(layers), fd, ImageSpec(64 * MIB, "X", directories=()))
            return
        prove_image(fd, build_image(Blobs(layers), fd, ImageSpec(64 * MIB, "X", directories=())))
    finally:
        os.close(fd)
    run(["e2fsck", "-fn", tmp_path / "image"])
    run(["mount", "-o", "loop,ro", tmp_path / "image", mounted])
    assert tree(mounted) == tree(tmp_path / "bundle/rootfs")

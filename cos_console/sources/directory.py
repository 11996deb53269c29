"""A local tree as an image of one layer: a tar stream made while it is read.

One file system only; the content of /proc, /sys, /dev, /tmp, /run, /mnt and /host at the tree's top stays out,
the directories themselves stay in. Hard links, owners, times, devices and extended attributes are kept.
"""

import os
import stat as stat_module
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from cos_console.formats import osrelease
from cos_console.model.image import Compression, ImageReference, Layer, LayerStream, ResolvedImage
from cos_console.model.problem import ExitCode, Problem

EMPTIED = frozenset({"proc", "sys", "dev", "tmp", "run", "mnt", "host"})


class DirectoryContent:
    """Sequential, one layer; identity is what is read (a directory has no digest)."""

    parallel = True

    def __init__(self, reference: ImageReference) -> None:
        self._root = Path(reference.location)
        if not self._root.is_dir():
            raise Problem(
                "COS-IMAGE-UNKNOWN",
                f"{self._root} is not a directory.",
                now="Check the path.",
                exit_code=ExitCode.NOT_FOUND,
            )
        size = sum(info.st_size for _, info in _walk(self._root) if stat_module.S_ISREG(info.st_mode))
        self.image = ResolvedImage(
            reference=reference,
            digest=None,
            config_digest=None,
            platform=None,
            layers=(Layer(digest=None, diff_id=None, size_bytes=size, compression=Compression.NONE),),
            version=_version(self._root),
            created="",
            transfer_bytes=size,
            unpacked_bytes=size,
        )

    def open_layer(self, index: int) -> LayerStream:
        del index
        return _TarStream(self._root)

    def next_layer(self) -> LayerStream | None:
        return None

    def close(self) -> None:
        pass


class _TarStream:
    """A thread writes the tar into a pipe; a failure there comes out of `readinto`."""

    def __init__(self, root: Path) -> None:
        self._read, write = os.pipe()
        self._failure: BaseException | None = None
        self._root = root
        self._thread = threading.Thread(target=self._produce, args=(write,), daemon=True)
        self._thread.start()

    def readinto(self, buffer: memoryview) -> int:
        count = os.readv(self._read, [buffer])
        if count == 0:
            self._thread.join()
            if self._failure is not None:
                raise Problem(
                    "COS-DIRECTORY",
                    f"{self._root} could not be read to its end: {self._failure}.",
                    unchanged="active and passive are exactly as before.",
                    now="Make sure that nothing changes the directory meanwhile.",
                    exit_code=ExitCode.SOURCE,
                )
        return count

    def close(self) -> None:
        if self._read >= 0:
            os.close(self._read)
            self._read = -1

    def _produce(self, write: int) -> None:
        try:
            with (
                os.fdopen(write, "wb", buffering=1 << 20) as out,
                tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar,
            ):
                tar.encoding, tar.errors = "utf-8", "surrogateescape"
                for name, _ in _walk(self._root):
                    self._add(tar, name)
        except BrokenPipeError:
            pass
        except (OSError, tarfile.TarError) as e:
            self._failure = e

    def _add(self, tar: tarfile.TarFile, name: str) -> None:
        path = self._root / name if name else self._root
        info = cast("tarfile.TarInfo | None", tar.gettarinfo(path, arcname=name or "./"))
        if info is None:
            return  # a socket: container runtimes leave it out too
        info.uname = info.gname = ""
        if not info.islnk():
            mtime = os.lstat(path).st_mtime_ns
            seconds, ns = divmod(mtime, 10**9)
            info.mtime = seconds
            info.pax_headers = {"mtime": f"{seconds}.{ns:09d}"} if ns and seconds >= 0 else {}
            for key in os.listxattr(path, follow_symlinks=False):
                value = os.getxattr(path, key, follow_symlinks=False)
                info.pax_headers[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
        if info.isreg():
            with path.open("rb") as f:
                tar.addfile(info, f)
        else:
            tar.addfile(info)


def _walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(name relative to the root, lstat), parents first; the root is the empty name."""
    top = os.lstat(root)
    yield "", top
    stack = [""]
    while stack:
        base = stack.pop()
        if base in EMPTIED:
            continue
        with os.scandir(root / base) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            path = f"{base}/{name}" if base else name
            info = os.lstat(root / path)
            yield path, info
            if stat_module.S_ISDIR(info.st_mode) and info.st_dev == top.st_dev:
                stack.append(path)


def _version(root: Path) -> str:
    for name in ("etc/os-release", "usr/lib/os-release"):
        path = root / name
        if path.is_file() and not path.is_symlink():
            return osrelease.version(osrelease.parse(path.read_bytes()))
    return ""

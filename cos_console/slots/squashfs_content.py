"""A squashfs as an image of one layer, for a slot that is filled from it: a tar stream made while it is read.

Nothing is mounted. Owners, times, links, devices and attributes are those of the squashfs (it has no ACLs).
"""

import os
import stat as stat_module
import tarfile
import threading

from cos_console.formats.readat import FileReadAt, FormatError, ReadAt
from cos_console.formats.squashfs import Entry, Squashfs
from cos_console.model.image import Compression, ImageReference, Layer, LayerStream, ResolvedImage, Transport
from cos_console.model.problem import ExitCode, Problem

_TYPES = {
    stat_module.S_IFDIR: tarfile.DIRTYPE,
    stat_module.S_IFREG: tarfile.REGTYPE,
    stat_module.S_IFLNK: tarfile.SYMTYPE,
    stat_module.S_IFCHR: tarfile.CHRTYPE,
    stat_module.S_IFBLK: tarfile.BLKTYPE,
    stat_module.S_IFIFO: tarfile.FIFOTYPE,
}


class SquashfsContent:
    """The tree of the squashfs behind `fd`, which stays open while the content is read (also in a child)."""

    parallel = True

    def __init__(self, fd: int, version: str) -> None:
        self._fd = fd
        size = Squashfs.open(FileReadAt(fd)).superblock.used_bytes
        self.image = ResolvedImage(
            reference=ImageReference(Transport.SLOT, "recovery"),
            digest=None,
            config_digest=None,
            platform=None,
            layers=(Layer(digest=None, diff_id=None, size_bytes=0, compression=Compression.NONE),),
            version=version,
            created="",
            transfer_bytes=0,
            unpacked_bytes=None,
        )
        self.packed_bytes = size

    def open_layer(self, index: int) -> LayerStream:
        del index
        return _TarStream(self._fd)

    def next_layer(self) -> LayerStream | None:
        return None

    def close(self) -> None:
        pass


class _TarStream:
    """A thread writes the tar into a pipe; a failure there comes out of `readinto`."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._read, write = os.pipe()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._produce, args=(write,), daemon=True)
        self._thread.start()

    def readinto(self, buffer: memoryview) -> int:
        count = os.readv(self._read, [buffer])
        if count == 0:
            self._thread.join()
            if self._failure is not None:
                raise Problem(
                    "COS-RECOVERY-DAMAGED",
                    f"The recovery image could not be read to its end: {self._failure}.",
                    unchanged="active and passive are exactly as before.",
                    now="Upgrade active from an image instead.",
                    exit_code=ExitCode.VERIFICATION,
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
                first: dict[int, str] = {}
                for entry in Squashfs.open(FileReadAt(self._fd)).walk():
                    _add(tar, entry, first)
        except BrokenPipeError:
            pass
        except (OSError, tarfile.TarError, FormatError) as e:
            self._failure = e


def _add(tar: tarfile.TarFile, entry: Entry, first: dict[int, str]) -> None:
    """`first`: inode number to the first name of what has several."""
    found = entry.stat
    kind = _TYPES.get(stat_module.S_IFMT(found.mode))
    if kind is None:
        return  # a socket: archives leave it out
    info = tarfile.TarInfo(entry.path or "./")
    info.type, info.mode = kind, found.mode & 0o7777
    info.uid, info.gid, info.mtime = found.uid, found.gid, found.mtime
    info.linkname = entry.target
    info.devmajor, info.devminor = entry.device
    info.pax_headers = {
        f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in entry.xattrs.items()
    }
    if found.links > 1 and kind != tarfile.DIRTYPE:
        if found.inode in first:
            info.type, info.linkname, info.pax_headers = tarfile.LNKTYPE, first[found.inode], {}
            tar.addfile(info)
            return
        first[found.inode] = entry.path
    if entry.content is None:
        tar.addfile(info)
        return
    info.size = entry.content.size_bytes
    tar.addfile(info, _Reader(entry.content))  # type: ignore[arg-type]


class _Reader:
    """A file of the squashfs as tarfile wants to read it."""

    def __init__(self, source: ReadAt) -> None:
        self._source, self._at = source, 0

    def read(self, size: int) -> bytes:
        data = self._source.read_at(self._at, size)
        self._at += len(data)
        return data

"""An image built from layers, straight into its file: fetch, check, inflate, lay out, prove.

Two worker processes take layers, the biggest first. Each hashes and inflates its stream and writes file
content at freshly allocated blocks with O_DIRECT from a writer thread; what comes back is a list of entries.
The parent merges them (formats/layers.py), writes the rest of the file system (formats/ext4/writer.py), makes
holes of everything that was reserved and not written (GRUB reads unwritten extents as stale data), and can
prove the result by reading all of it back past the page cache. No second copy exists anywhere.
"""

import ctypes
import os
import secrets
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait

from cos_console.formats.ext4 import layout
from cos_console.formats.ext4.writer import Ext4Writer
from cos_console.formats.layers import Tree
from cos_console.formats.readat import FormatError
from cos_console.formats.tar import TarEntry
from cos_console.model.image import Content
from cos_console.model.problem import ExitCode, Problem, from_report
from cos_console.slots.build_pieces import Piece, PieceWriter, punch, read_back, unwritten_extents
from cos_console.slots.build_worker import LayerDone, Progressed, Space, WorkerFailed, work

__all__ = [
    "BuildProgress",
    "BuildResult",
    "ImageSpec",
    "ProofResult",
    "build_image",
    "prove_image",
    "unwritten_extents",
]

_REPORT_S = 0.2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)
COS_DIRECTORIES = ("proc", "boot", "dev", "sys", "run", "tmp", "usr/local", "oem")
"""Mount points that cos-upgrade makes in a new image."""


@dataclass(frozen=True)
class ImageSpec:
    """What file system to make."""

    size_bytes: int
    label: str
    uuid: bytes | None = None
    """16 bytes; None: random."""
    created_s: int | None = None
    """Seconds since 1970; None: now."""
    directories: tuple[str, ...] = COS_DIRECTORIES
    contexts: Callable[[bytes, int], bytes | None] | None = None
    """SELinux context for (path, mode), without the final NUL; None: no label."""


@dataclass(frozen=True)
class BuildProgress:
    """Bytes as transferred. `waiting_s` is the time since the last byte came."""

    bytes_done: int
    bytes_total: int
    rate_bps: float = 0.0
    waiting_s: float = 0.0
    detail: str = ""
    refetch_bytes: int = 0


@dataclass(frozen=True)
class BuildResult:
    """What was written. `pieces` is what a proof compares against."""

    entries: int
    transfer_bytes: int
    written_bytes: int
    used_bytes: int
    """Blocks in use inside the image."""
    size_bytes: int
    uuid: str
    pieces: tuple[Piece, ...] = field(repr=False)


@dataclass(frozen=True)
class ProofResult:
    """`method` is direct (O_DIRECT) or dropped (page cache dropped first)."""

    bytes_read: int
    pieces: int
    method: str


def build_image(
    content: Content,
    fd: int,
    spec: ImageSpec,
    *,
    report: Callable[[BuildProgress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> BuildResult:
    """Build the image of `content` in the file behind `fd` (read-write, on a file system with fallocate).

    The file's former content is lost. Raises Problem: no room (before anything is fetched), a blob that is
    not what its digest says, a damaged or hostile layer, a source that went away, COS-CANCELLED.
    """
    try:
        geo = layout.geometry(spec.size_bytes)
        groups, free = layout.place(geo)
    except ValueError as e:
        raise Problem(
            "COS-IMAGE-SIZE",
            f"An image of {spec.size_bytes} bytes can't be made: {e}.",
            now="Choose another image size with --size.",
            exit_code=ExitCode.REFUSED,
        ) from None
    _reserve(fd, spec.size_bytes)
    space = Space(free)
    layers, transferred, pieces = _fetch(content, fd, space, report, cancelled)
    uuid = spec.uuid or _random_uuid()
    created = int(time.time()) if spec.created_s is None else spec.created_s
    writer = PieceWriter(fd, layout.BLOCK)
    try:
        tree = Tree()
        for entries in layers:
            tree.apply(entries)
        for path in spec.directories:
            tree.ensure_directory(path)
        if spec.contexts is not None:
            _label_tree(tree, spec.contexts)
        made = Ext4Writer(geo, groups, space.take, writer.write_blocks).write_tree(
            tree, label=spec.label, uuid=uuid, created_s=created
        )
    except FormatError as e:
        raise _hostile(str(e)) from None
    except _NoBlocks:
        raise _too_big(spec.size_bytes) from None
    finally:
        pieces += writer.finish()
    pieces.sort(key=lambda p: p.offset)
    _dig_holes(fd, spec.size_bytes, pieces)
    os.fsync(fd)
    return BuildResult(
        entries=made.inodes,
        transfer_bytes=transferred,
        written_bytes=sum(p.length for p in pieces),
        used_bytes=made.blocks * layout.BLOCK,
        size_bytes=spec.size_bytes,
        uuid="-".join(
            (uuid.hex()[:8], uuid.hex()[8:12], uuid.hex()[12:16], uuid.hex()[16:20], uuid.hex()[20:])
        ),
        pieces=tuple(pieces),
    )


def prove_image(
    fd: int,
    result: BuildResult,
    *,
    report: Callable[[BuildProgress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> ProofResult:
    """Read every written piece back from the medium and compare; all else must be a hole.

    Raises Problem COS-PROOF when a byte differs or a range is there that was never written.
    """
    stray = unwritten_extents(fd)
    if stray:
        raise _unproven(f"{len(stray)} ranges were reserved and never written")
    done = 0
    last = 0.0

    def progress(length: int) -> bool:
        nonlocal done, last
        done += length
        if time.monotonic() - last >= _REPORT_S:
            last = time.monotonic()
            report(BuildProgress(done, result.written_bytes, detail="reading back"))
        return cancelled()

    outcome = read_back(fd, result.pieces, progress)
    if outcome.cancelled:
        raise _cancelled()
    if outcome.bad is not None:
        raise _unproven(f"the bytes at {outcome.bad} are not those that were written")
    return ProofResult(outcome.bytes_read, len(result.pieces), outcome.method)


class _NoBlocks(Exception):  # noqa: N818 - never leaves this room
    pass


# --- fetching ------------------------------------------------------------------------------------------------


def _fetch(
    content: Content,
    fd: int,
    space: Space,
    report: Callable[[BuildProgress], None],
    cancelled: Callable[[], bool],
) -> tuple[list[list[TarEntry]], int, list[Piece]]:
    """Entries of each layer, lowest first; bytes transferred; pieces written."""
    image = content.image
    count = len(image.layers)
    space.no_room = _NoBlocks
    order = sorted(range(count), key=lambda i: -image.layers[i].size_bytes)
    workers = _start(content, fd, space, order)
    total = image.transfer_bytes or sum(layer.size_bytes for layer in image.layers)
    got: dict[int, list[TarEntry]] = {}
    pieces: list[Piece] = []
    per_worker: dict[int, int] = {}
    last_byte = last_report = time.monotonic()
    window: list[tuple[float, int]] = [(last_byte, 0)]
    try:
        open_ends: list[Connection] = [c for _, c in workers]
        while open_ends:
            for end in wait(open_ends, timeout=_REPORT_S):
                assert isinstance(end, Connection)  # noqa: S101 - for the type checker
                try:
                    message = end.recv()
                except EOFError:
                    open_ends.remove(end)
                    continue
                if isinstance(message, Progressed):
                    if message.bytes_done > per_worker.get(message.pid, 0):
                        last_byte = time.monotonic()
                    per_worker[message.pid] = message.bytes_done
                elif isinstance(message, LayerDone):
                    got[message.layer] = message.entries
                    pieces += message.pieces
                elif isinstance(message, WorkerFailed):
                    if message.problem is None:
                        raise _too_big(os.fstat(fd).st_size)
                    raise from_report(message.problem)
                else:
                    pieces += message
            if cancelled():
                raise _cancelled()
            now = time.monotonic()
            if now - last_report >= _REPORT_S:
                last_report = now
                done = sum(per_worker.values())
                window = [w for w in window if now - w[0] < 5.0] or window[-1:]
                rate = (done - window[0][1]) / max(0.001, now - window[0][0])
                window.append((now, done))
                detail = f"layer {min(len(got) + 1, count)} of {count}"
                report(BuildProgress(done, total, rate, now - last_byte, detail))
        missing = [n for n in range(count) if n not in got]
        if missing:
            raise _hostile(f"layer {missing[0] + 1} of {count} is missing from the source")
    finally:
        _end(workers)
    done = sum(per_worker.values())
    report(BuildProgress(done, total or done, detail=f"layer {count} of {count}"))
    return [got[n] for n in range(count)], done, pieces


def _start(content: Content, fd: int, space: Space, order: list[int]) -> list[tuple[int, Connection]]:
    """Fork the workers; layers are handed out through a pipe that they share."""
    queue_read, queue_write = os.pipe()
    number = 2 if content.parallel and len(order) > 1 else 1
    os.write(queue_write, b"".join(struct.pack("<H", i) for i in order))
    os.close(queue_write)
    workers: list[tuple[int, Connection]] = []
    for _ in range(number):
        ours, theirs = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed engine leaves no worker behind
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                ours.close()
                for _, other in workers:
                    other.close()
                work(content, fd, space, queue_read, theirs)
                code = 0
            finally:
                os._exit(code)
        theirs.close()
        workers.append((pid, ours))
    os.close(queue_read)
    return workers


def _end(workers: list[tuple[int, Connection]]) -> None:
    for pid, end in workers:
        end.close()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(pid, 0)


# --- the file ------------------------------------------------------------------------------------------------


def _reserve(fd: int, size_bytes: int) -> None:
    """Real blocks for the whole image, before anything is fetched. Sparse files fail too late, and silently."""
    try:
        os.ftruncate(fd, 0)
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as e:
        os.ftruncate(fd, 0)
        raise Problem(
            "COS-SPACE-STATE",
            f"There is no room for an image of {size_bytes / 1e6:.0f} MB: {os.strerror(e.errno or 0)}.",
            unchanged="The slots are as they were.",
            now="Remove left-overs, choose a smaller --size, or give up passive first.",
            exit_code=ExitCode.REFUSED,
        ) from None


def _dig_holes(fd: int, size_bytes: int, pieces: list[Piece]) -> None:
    """Free what was reserved and not written. `pieces` are sorted; the first block is always one of them."""
    at = 0
    for piece in pieces:
        if piece.offset > at:
            punch(fd, at, piece.offset - at)
        at = max(at, piece.offset + piece.length)
    if at < size_bytes:
        punch(fd, at, size_bytes - at)


def _label_tree(tree: Tree, contexts: Callable[[bytes, int], bytes | None]) -> None:
    for path, node in tree.walk():
        context = contexts(path, node.mode)
        if context is not None:
            node.xattrs = {**(node.xattrs or {}), b"security.selinux": context + b"\0"}


def _random_uuid() -> bytes:
    raw = bytearray(secrets.token_bytes(16))
    raw[6] = raw[6] & 0x0F | 0x40
    raw[8] = raw[8] & 0x3F | 0x80
    return bytes(raw)


# --- problems ------------------------------------------------------------------------------------------------

_UNTOUCHED = "active and passive are exactly as before."


def _hostile(why: str) -> Problem:
    return Problem(
        "COS-LAYER",
        f"A layer of the image can't be unpacked: {why}.",
        unchanged=_UNTOUCHED,
        now="Choose another image, or tell its maker.",
        exit_code=ExitCode.VERIFICATION,
    )


def _too_big(size_bytes: int) -> Problem:
    return Problem(
        "COS-IMAGE-TOO-BIG",
        f"The image's files don't fit into {size_bytes / 1e6:.0f} MB.",
        unchanged=_UNTOUCHED,
        now="Choose a larger image with --size.",
        exit_code=ExitCode.REFUSED,
    )


def _cancelled() -> Problem:
    return Problem(
        "COS-CANCELLED",
        "The operation was stopped on request.",
        unchanged=_UNTOUCHED,
        now="Start it again whenever you like.",
        exit_code=ExitCode.CANCELLED,
    )


def _unproven(why: str) -> Problem:
    return Problem(
        "COS-PROOF",
        f"The new image did not read back as it was written: {why}.",
        unchanged=_UNTOUCHED,
        now="Check the disk (SMART, kernel messages); don't trust it with an upgrade.",
        exit_code=ExitCode.VERIFICATION,
    )

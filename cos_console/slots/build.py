"""An image built from layers, straight into its file: fetch, check, inflate, lay out, prove.

Two worker processes take layers, the biggest first. Each hashes and inflates its stream and writes file
content at freshly allocated blocks past the page cache; what comes back is a list of entries. The parent merges
them (formats/layers.py), writes the rest of the file system (formats/ext4/writer.py), makes holes of everything
that was reserved and not written (GRUB reads unwritten extents as stale data), and can prove the result by
reading all of it back past the page cache; what the workers wrote is read back while later layers still come.
No second copy exists anywhere. The same image and spec give the same bytes, unless a layer is so much larger
than its share that it needs another one's room.
"""

import gc
import hashlib
import os
import signal
import stat
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from cos_console.formats.ext4 import layout
from cos_console.formats.ext4.writer import Ext4Writer, NoRoom, Written, claimed
from cos_console.formats.layers import Node, Tree
from cos_console.formats.readat import FormatError
from cos_console.formats.tar import TarEntry
from cos_console.model.image import Content
from cos_console.model.problem import ExitCode, Problem, from_report
from cos_console.slots import build_worker
from cos_console.slots.build_pieces import Mismatch, Piece, PieceWriter, Reader, without
from cos_console.slots.build_problems import (
    UNTOUCHED,
    cancelled_on_request,
    contradiction,
    disk_failed,
    hostile_layer,
    too_big,
    unproven,
)
from cos_console.slots.build_proof import prove_image
from cos_console.slots.build_room import dig_unwritten, punch, reserve, unwritten_extents
from cos_console.slots.build_space import Space
from cos_console.slots.build_values import (
    BuildProgress,
    BuildResult,
    Contexts,
    ImageSpec,
    ImageTree,
    ProofResult,
)
from cos_console.slots.build_worker import (
    Counters,
    Entries,
    LayerDone,
    Limits,
    Worker,
    WorkerDone,
    WorkerFailed,
)

__all__ = [
    "BuildProgress",
    "BuildResult",
    "Contexts",
    "ImageSpec",
    "ImageTree",
    "ProofResult",
    "build_image",
    "dig_unwritten",
    "prove_image",
    "unwritten_extents",
]

_REPORT_S = 0.2
_POLL_S = 0.1
_ZERO_MOST = 64 << 10
"""Ranges up to this size are filled with zeros; larger ones become holes."""


def build_image(
    content: Content,
    fd: int,
    spec: ImageSpec,
    *,
    report: Callable[[BuildProgress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> BuildResult:
    """Build the image of `content` in the file behind `fd` (read-write). The file's former content is lost.

    Raises Problem: no room (before anything is fetched), a blob that is not what its digest says, a damaged or
    hostile layer, a source that went away, a disk that fails, COS-CANCELLED. The workers are gone by then.
    """
    begun = time.monotonic()
    try:
        geo = layout.geometry(spec.size_bytes)
        if len(spec.label.encode()) > layout.MAX_LABEL:
            raise ValueError(f"the label {spec.label} is longer than {layout.MAX_LABEL} bytes")
    except ValueError as e:
        raise Problem(
            "COS-IMAGE-SIZE",
            f"An image of {spec.size_bytes} bytes can't be made: {e}.",
            now="Choose another image size with --size.",
            exit_code=ExitCode.REFUSED,
        ) from None
    reserve(fd, spec.size_bytes)
    collecting = gc.isenabled()
    gc.disable()  # a hundred thousand nodes and no cycles: collections would only cost
    try:
        built = _Build(content, fd, spec, geo, report, cancelled)
        fetched = built.fetch()
        return built.finish(fetched, begun)
    except FormatError as e:
        raise hostile_layer(str(e)) from None
    except (NoRoom, _Full):
        raise too_big(spec.size_bytes) from None
    except Mismatch as e:
        raise unproven(f"the bytes at {e.offset} are not those that were written") from None
    except OSError as e:
        raise disk_failed(os.strerror(e.errno or 0), repr(e)) from None
    finally:
        if collecting:
            gc.enable()


class _Full(Exception):  # noqa: N818 - never leaves this room
    """File content does not fit."""


@dataclass
class _Fetched:
    tree: Tree
    pieces: list[Piece]
    transferred: int
    inflated: int
    doubled: bool
    """A blob stands in the image twice: two files may share blocks now."""


class _Build:
    """One image in the making."""

    def __init__(
        self,
        content: Content,
        fd: int,
        spec: ImageSpec,
        geo: layout.Geometry,
        report: Callable[[BuildProgress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._content = content
        self._fd = fd
        self._spec = spec
        self._geo = geo
        self._report = report
        self._cancelled = cancelled
        self._created = int(time.time()) if spec.created_s is None else spec.created_s

    # --- layers ----------------------------------------------------------------------------------------------

    def fetch(self) -> _Fetched:
        """Every layer on the disk and merged. Raises Problem, FormatError, OSError."""
        image = self._content.image
        count = len(image.layers)
        if not count:
            return _Fetched(Tree(self._created * 10**9), [], 0, 0, doubled=False)
        places: dict[object, list[int]] = {}
        for n, layer in enumerate(image.layers):
            places.setdefault(layer.digest if self._content.parallel and layer.digest else n, []).append(n)
        jobs = [tuple(p) for p in places.values()]
        sizes = [image.layers[job[0]].size_bytes for job in jobs]
        weights = [max(size, 1 << 16) for size in sizes] if self._content.parallel else [1]
        alone = not self._content.parallel or len(jobs) < 2 or self._spec.workers < 2
        number = 1 if alone else min(self._spec.workers, len(jobs))
        limits = Limits(
            entries=self._spec.entry_limit,
            inflated_bytes=self._spec.inflated_limit_bytes or 4 * self._spec.size_bytes + (1 << 30),
            window_bytes=self._spec.window_limit_bytes,
        )
        space = Space(self._geo.free, weights)
        counters = Counters(number)
        order = sorted(range(len(jobs)), key=lambda n: (-sizes[n], n))
        workers = self._fork(number, space, counters, limits, order, jobs, alone=alone)
        try:
            return self._collect(workers, counters, count)
        finally:
            _end(workers)
            space.close()
            counters.close()

    def _fork(
        self,
        number: int,
        space: Space,
        counters: Counters,
        limits: Limits,
        order: Sequence[int],
        jobs: Sequence[tuple[int, ...]],
        *,
        alone: bool,
    ) -> "dict[Connection, int]":
        """Start the workers; jobs are handed out through a pipe that they share."""
        queue, fill = os.pipe()
        os.write(fill, b"".join(struct.pack("<H", n) for n in order))
        os.close(fill)
        workers: dict[Connection, int] = {}
        for n in range(number):
            ours, theirs = Pipe(duplex=False)
            pid = os.fork()
            if pid == 0:
                try:
                    build_worker.settle()
                    ours.close()
                    for other in workers:
                        other.close()
                    Worker(
                        self._content,
                        self._fd,
                        space,
                        counters,
                        limits,
                        theirs,
                        number=n,
                        alone=alone,
                        prove=self._spec.prove_while_writing,
                        check_diff_ids=self._spec.check_diff_ids,
                    ).run(queue, jobs)
                finally:
                    os._exit(0)
            theirs.close()
            workers[ours] = pid
        os.close(queue)
        return workers

    def _collect(self, workers: "dict[Connection, int]", counters: Counters, count: int) -> _Fetched:
        """Hear the workers out; merge each layer as soon as all below it are there."""
        tree = Tree(self._created * 10**9)
        waiting: dict[int, list[bytes]] = {}
        complete: dict[int, int] = {}
        """Layer to the key of its entries in `waiting`."""
        uses: dict[int, int] = {}
        merged = 0
        doubled = False
        pieces: list[Piece] = []
        open_ends = list(workers)
        progress = _Progress(self._report, self._content, counters, count)
        while open_ends:
            for end in wait(open_ends, timeout=_POLL_S):
                assert isinstance(end, Connection)  # noqa: S101 - for the type checker
                try:
                    message = end.recv()
                except (EOFError, ConnectionResetError):
                    raise _died(workers, end) from None
                match message:
                    case Entries():
                        waiting.setdefault(message.layers[0], []).append(message.packed)
                    case LayerDone():
                        key, *_ = message.layers
                        real = [n for n in message.layers if n >= 0 and n not in complete]
                        doubled |= len(real) > 1
                        complete.update(dict.fromkeys(real, key))
                        uses[key] = len(real)
                        waiting.setdefault(key, [])
                        while merged in complete:
                            source = complete[merged]
                            tree.apply(_entries(waiting[source]))
                            uses[source] -= 1
                            if not uses[source]:
                                waiting.pop(source)
                            merged += 1
                    case WorkerDone():
                        pieces += build_worker.unpack_pieces(message.pieces)
                        open_ends.remove(end)
                    case WorkerFailed():
                        raise _failed(message)
            if self._cancelled():
                raise cancelled_on_request()
            progress.tell(merged, finished=not open_ends)
        if merged < count:
            raise FormatError(f"layer {merged + 1} of {count} is missing from the source")
        pieces.sort()
        transferred, inflated, _, _ = counters.sums()
        return _Fetched(tree, pieces, transferred, inflated, doubled)

    # --- the rest of the file system -------------------------------------------------------------------------

    def finish(self, fetched: _Fetched, begun: float) -> BuildResult:
        """Directories, attributes, tables; holes; synced. Raises Problem, FormatError, NoRoom, OSError."""
        tree, spec = fetched.tree, self._spec
        tree.root.mode = stat.S_IFDIR | 0o755
        for path in spec.directories:
            tree.ensure_directory(path)
        contexts = spec.contexts
        if spec.contexts_from is not None:
            contexts = spec.contexts_from(ImageTree(tree, self._fd))
        if contexts is not None:
            _label_tree(tree, contexts, self._created)
        if fetched.doubled:
            fetched.pieces = sorted(fetched.pieces + self._separate(tree, fetched.pieces))
        try:
            used = claimed(self._geo, tree)
        except ValueError as e:
            raise contradiction(str(e)) from None
        pieces = self._blank_hidden(used, fetched.pieces)
        free = layout.gaps(used, self._geo.blocks)
        # Never written room first, the long runs before the short ones: tables want one piece.
        free.sort(key=lambda run: (run[1] < 2048, run[0]))
        writer = PieceWriter(self._fd, prove=spec.prove_while_writing)
        uuid = spec.uuid or self._uuid()
        try:
            made = Ext4Writer(self._geo, tree, used, free, writer.write_blocks).write_tree(
                label=spec.label, uuid=uuid, created_s=self._created
            )
        finally:
            pieces += writer.finish()
        pieces.sort()
        if self._cancelled():
            raise cancelled_on_request()
        if not spec.keep_reserved:
            self._dig(pieces)
        os.fsync(self._fd)
        return self._result(fetched, made, pieces, uuid, begun)

    def _result(
        self, fetched: _Fetched, made: Written, pieces: list[Piece], uuid: bytes, begun: float
    ) -> BuildResult:
        stamp = self._created * 10**9 + 1  # a time that no write would give
        os.utime(self._fd, ns=(stamp, stamp))
        os.fsync(self._fd)
        text = uuid.hex()
        return BuildResult(
            entries=made.inodes,
            files=made.files,
            directories=made.directories,
            transfer_bytes=fetched.transferred,
            inflated_bytes=fetched.inflated,
            written_bytes=sum(p.length for p in pieces),
            used_bytes=made.blocks * layout.BLOCK,
            size_bytes=self._spec.size_bytes,
            uuid="-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:])),
            label=self._spec.label,
            warnings=tuple(f"{d} is an attribute that ext4 can't have" for d in made.dropped),
            elapsed_s=time.monotonic() - begun,
            stamp_ns=os.fstat(self._fd).st_mtime_ns,
            pieces=tuple(pieces),
        )

    def _blank_hidden(self, used: list[tuple[int, int]], pieces: list[Piece]) -> list[Piece]:
        """What upper layers hide was written and is free now: it becomes zeros. The pieces that are left."""
        block = layout.BLOCK
        written = layout.joined([(p.offset // block, p.length // block) for p in pieces])
        dead = layout.common(layout.gaps(used, self._geo.blocks), written)
        if not dead:
            return pieces
        reader = Reader(self._fd)
        try:
            left = without(reader, pieces, [(first * block, (first + n) * block) for first, n in dead])
        finally:
            reader.close()
        for first, count in dead:
            if count * block > _ZERO_MOST and not self._spec.keep_reserved:
                try:
                    punch(self._fd, first * block, count * block)
                    continue
                except OSError:  # a file system without holes
                    pass
            for at in range(first, first + count, 256):
                os.pwrite(self._fd, bytes(min(256, first + count - at) * block), at * block)
        return left

    def _separate(self, tree: Tree, pieces: list[Piece]) -> list[Piece]:
        """Files that share blocks, because their layer stands in the image twice, get their own."""
        taken: set[int] = set()
        shared: list[Node] = []
        seen: set[int] = set()
        for _, node in tree.walk():
            if node.runs and id(node) not in seen:
                seen.add(id(node))
                if node.runs[0][1] in taken:
                    shared.append(node)
                taken.add(node.runs[0][1])
        if not shared:
            return []
        block = layout.BLOCK
        written = layout.joined([*self._geo.fixed, *((p.offset // block, p.length // block) for p in pieces)])
        space = Space(layout.gaps(written, self._geo.blocks), [1])
        writer = PieceWriter(self._fd, prove=False)
        try:
            for node in shared:
                runs: list[tuple[int, int, int]] = []
                for logical, first, count in node.runs:
                    done = 0
                    while done < count:
                        to, n = space.take(min(count - done, 256))
                        writer.write_blocks(to, os.pread(self._fd, n * block, (first + done) * block))
                        runs.append((logical + done, to, n))
                        done += n
                node.runs = tuple(runs)
        finally:
            space.close()
            new = writer.finish()
        return new

    def _dig(self, pieces: list[Piece]) -> None:
        """Holes where nothing was written. `pieces` are sorted; the first block is always one of them."""
        at = 0
        for piece in pieces:
            if piece.offset > at:
                self._hole(at, piece.offset)
            at = piece.offset + piece.length
        if at < self._spec.size_bytes:
            self._hole(at, self._spec.size_bytes)

    def _hole(self, start: int, end: int) -> None:
        if end - start <= _ZERO_MOST:
            os.pwrite(self._fd, bytes(end - start), start)
            return
        try:
            punch(self._fd, start, end - start)
        except OSError:
            if unwritten_extents(self._fd):  # else it is sparse as it is
                raise

    def _uuid(self) -> bytes:
        image = self._content.image
        told = [str(image.digest), self._spec.label, str(self._spec.size_bytes), str(self._created)]
        told += [f"{layer.digest} {layer.diff_id}" for layer in image.layers]
        raw = bytearray(hashlib.sha256("\n".join(told).encode()).digest()[:16])
        raw[6] = raw[6] & 0x0F | 0x80  # version 8 of RFC 9562: made of whatever one likes
        raw[8] = raw[8] & 0x3F | 0x80
        return bytes(raw)


class _Progress:
    """At most five reports a second, of what the counters say."""

    def __init__(
        self, report: Callable[[BuildProgress], None], content: Content, counters: Counters, count: int
    ) -> None:
        image = content.image
        self._report = report
        self._total = image.transfer_bytes or sum(layer.size_bytes for layer in image.layers)
        self._counters = counters
        self._count = count
        self._begun = self._last = time.monotonic()
        self._window: list[tuple[float, int]] = [(self._begun, 0)]

    def tell(self, merged: int, *, finished: bool) -> None:
        now = time.monotonic()
        if now - self._last < _REPORT_S and not finished:
            return
        self._last = now
        done, _, _, when = self._counters.sums()
        self._window = [w for w in self._window if now - w[0] < 5.0] or self._window[-1:]
        since, before = self._window[0]
        self._window.append((now, done))
        self._report(
            BuildProgress(
                bytes_done=done,
                bytes_total=max(self._total, done) if self._total or finished else 0,
                rate_bps=(done - before) / max(0.001, now - since),
                waiting_s=0.0 if finished else max(0.0, now - (when or self._begun)),
                detail=f"layer {min(merged + 1, self._count)} of {self._count}",
                refetch_bytes=0 if finished else done,
            )
        )


def _entries(batches: Sequence[bytes]) -> "list[TarEntry]":
    return [entry for packed in batches for entry in build_worker.unpack_entries(packed)]


def _end(workers: "dict[Connection, int]") -> None:
    """At once: they hold nothing but the file that is given up, or they are through already."""
    for end, pid in workers.items():
        end.close()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    for pid in workers.values():
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass


def _label_tree(tree: Tree, contexts: Contexts, created_s: int) -> None:
    if tree.root.children is not None:  # the file system's own directory gets its context too
        lost = Node(stat.S_IFDIR | 0o700, created_s * 10**9, {})
        tree.root.children.setdefault(b"lost+found", lost)
    for path, node in tree.walk():
        context = contexts(path, node.mode)
        if context is not None:
            node.xattrs = {**(node.xattrs or {}), b"security.selinux": context + b"\0"}


def _failed(message: WorkerFailed) -> Exception:
    match message.kind:
        case "layer":
            return FormatError(message.what)
        case "full":
            return _Full()
        case "proof":
            return unproven(message.what)
        case "disk":
            return disk_failed(message.what.partition("] ")[2], message.what)
        case _:
            assert message.problem is not None  # noqa: S101 - that is what the other kinds carry
            return from_report(message.problem)


def _died(workers: "dict[Connection, int]", end: Connection) -> Problem:
    _, status = os.waitpid(workers.pop(end), 0)
    how = (
        f"signal {os.WTERMSIG(status)}"
        if os.WIFSIGNALED(status)
        else f"status {os.waitstatus_to_exitcode(status)}"
    )
    return Problem(
        "COS-WORKER",
        f"A process that unpacks layers was ended from outside ({how}).",
        unchanged=UNTOUCHED,
        now="See whether memory ran out (dmesg), and start again.",
    )

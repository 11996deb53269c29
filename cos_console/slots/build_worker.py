"""What a worker process does with one layer after the other: check, inflate, lay file content out.

A layer with a digest is checked over its compressed bytes; one without (a docker engine's) by its diff_id over
the inflated ones, which also tells its place. Entries go to the parent in batches as they come, so that a
worker's memory does not grow with the image. Workers stand in a session of their own, so that a terminal's
signals pass them by, and die with their parent.
"""

import ctypes
import gc
import marshal
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal, NamedTuple

from cos_console.formats.readat import FormatError
from cos_console.formats.tar import ByteStream, Parts, Runs, TarEntry, read_tar
from cos_console.model.image import Content, Layer, LayerStream
from cos_console.model.problem import ExitCode, Problem, ProblemReport
from cos_console.slots.build_inflate import Ahead, LayerReader, wrong_digest
from cos_console.slots.build_pieces import Mismatch, Piece, PieceWriter
from cos_console.slots.build_space import NoBlocks, Space

BLOCK = 4096
_HOLE = 64 << 10
_ZEROS = bytes(_HOLE)
_BATCH = 500
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a layer may cost before it is refused."""

    entries: int
    inflated_bytes: int
    """Of all layers together."""
    window_bytes: int


class Entries(NamedTuple):
    """Some entries of one layer, in order, as `marshal` writes them (they stay packed until they are merged)."""

    layers: tuple[int, ...]
    packed: bytes


class LayerDone(NamedTuple):
    layers: tuple[int, ...]
    """Usually one; more where a layer stands in the image twice."""


class WorkerDone(NamedTuple):
    pieces: bytes
    """Marshalled: a list of Piece's fields."""


class WorkerFailed(NamedTuple):
    kind: Literal["problem", "layer", "full", "disk", "proof", "internal"]
    problem: ProblemReport | None = None
    what: str = ""


class Counters:
    """Bytes transferred and inflated, entries and the time of the last byte, for each worker; shared memory."""

    _FORMAT = struct.Struct("<QQQd")

    def __init__(self, workers: int) -> None:
        self._map = mmap.mmap(-1, self._FORMAT.size * workers)
        self._workers = workers

    def tell(self, worker: int, transferred: int, inflated: int, entries: int, when: float) -> None:
        self._FORMAT.pack_into(self._map, worker * self._FORMAT.size, transferred, inflated, entries, when)

    def sums(self) -> tuple[int, int, int, float]:
        """(Transferred, inflated, entries, time of the last byte by the monotonic clock or 0.0)."""
        each = [self._FORMAT.unpack_from(self._map, n * self._FORMAT.size) for n in range(self._workers)]
        return (
            sum(e[0] for e in each),
            sum(e[1] for e in each),
            sum(e[2] for e in each),
            max(e[3] for e in each),
        )

    def close(self) -> None:
        self._map.close()


def settle() -> None:
    """Make the forked process a worker: no terminal's signals, gone when the parent is."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    gc.disable()  # what is made here lives shortly and has no cycles
    sys.setswitchinterval(0.001)  # the writing thread must not wait for the parsing one


class Worker:
    """Takes layers until there are none; all that happens goes to `out`."""

    def __init__(
        self,
        content: Content,
        fd: int,
        space: Space,
        counters: Counters,
        limits: Limits,
        out: Connection,
        *,
        number: int,
        alone: bool,
        prove: bool,
        check_diff_ids: bool,
    ) -> None:
        self._content = content
        self._space = space
        self._counters = counters
        self._limits = limits
        self._out = out
        self._number = number
        self._alone = alone
        self._check_diff_ids = check_diff_ids
        self._writer = PieceWriter(fd, prove=prove)
        self._transferred = self._inflated = self._entries = 0
        self._when = 0.0

    def run(self, queue: int, places: Sequence[tuple[int, ...]]) -> None:
        """`queue` gives indices into `places`: layers of the image that are the same blob."""
        try:
            if self._content.parallel:
                while word := os.read(queue, 2):
                    (index,) = struct.unpack("<H", word)
                    self._space.enter(index)
                    self._known(places[index])
                    self._space.leave()
            else:
                self._in_order()
            pieces = self._writer.finish()
            self._out.send(WorkerDone(marshal.dumps([tuple(p) for p in pieces])))
        except BaseException as e:  # noqa: BLE001 - this is the end of the process; the parent tells
            self._out.send(_failure(e))
        self._out.close()

    def _known(self, layers: tuple[int, ...]) -> None:
        layer = self._content.image.layers[layers[0]]
        computed = layer.digest is None or self._check_diff_ids
        diff_id = self._layer(
            self._content.open_layer(layers[0]),
            layer,
            layers,
            hash_plain=computed and layer.diff_id is not None,
        )
        if diff_id and diff_id != layer.diff_id:
            raise wrong_digest(
                f"A layer inflates to {diff_id[:19]}…, the image's configuration says otherwise."
            )

    def _in_order(self) -> None:
        """A source that gives its layers in its own order: which one it was is told by its diff_id."""
        places: dict[str, list[int]] = {}
        for n, layer in enumerate(self._content.image.layers):
            places.setdefault(layer.diff_id or "", []).append(n)
        number = 0
        unknown = Layer(
            digest=None, diff_id=None, size_bytes=0, compression=self._content.image.layers[0].compression
        )
        while (stream := self._content.next_layer()) is not None:
            number -= 1  # its place is known at its end; until then it has a number of its own
            diff_id = self._layer(stream, unknown, (number,), hash_plain=True)
            if diff_id not in places:
                raise wrong_digest(f"The source gave a layer {diff_id[:19]}… that is not in the image.")
            self._out.send(LayerDone((number, *places[diff_id])))

    def _layer(self, stream: LayerStream, layer: Layer, layers: tuple[int, ...], *, hash_plain: bool) -> str:
        """One layer to the disk, its entries to the parent; the diff_id where it was computed."""
        reader = LayerReader(
            stream,
            layer,
            window_limit=self._limits.window_bytes,
            hash_plain=hash_plain,
            came=self._came,
            grew=self._grew,
        )
        batch: list[tuple[object, ...]] = []
        try:
            tar = ByteStream(Ahead(reader.read).read if self._alone else reader.read)
            try:
                for entry in read_tar(tar, self._store, max_entries=self._limits.entries):
                    batch.append(tuple(entry))
                    if len(batch) >= _BATCH:
                        self._send(layers, batch)
                tar.drain()
            except FormatError:
                tar.drain()  # bytes that are not the digest's explain any damage, and that is the better word
                raise
        finally:
            reader.close()
        self._send(layers, batch)
        if layers[0] >= 0:
            self._out.send(LayerDone(layers))
        return reader.diff_id

    def _send(self, layers: tuple[int, ...], batch: list[tuple[object, ...]]) -> None:
        self._entries += len(batch)
        self._out.send(Entries(layers, marshal.dumps(batch)))
        batch.clear()
        self._tell()
        if self._counters.sums()[2] > self._limits.entries:
            raise FormatError(f"more than {self._limits.entries} entries in the image")

    # --- counting --------------------------------------------------------------------------------------------

    def _came(self, count: int) -> None:
        self._transferred += count
        self._when = time.monotonic()
        self._tell()

    def _grew(self, count: int) -> None:
        self._inflated += count
        self._tell()
        if self._counters.sums()[1] > self._limits.inflated_bytes:
            raise FormatError(
                f"the layers inflate to more than {self._limits.inflated_bytes >> 20} MiB,"
                " far more than the image can hold"
            )

    def _tell(self) -> None:
        self._counters.tell(self._number, self._transferred, self._inflated, self._entries, self._when)

    # --- content ---------------------------------------------------------------------------------------------

    def _store(self, stream: ByteStream, size: int, parts: Parts | None) -> Runs:
        """Content goes to the next free blocks; 64 KiB of zeros in a larger file become a hole."""
        if parts is None and size <= _HOLE:
            if not stream.ensure(size):
                raise FormatError("the tar stream ends inside this file")
            blocks = (size + BLOCK - 1) // BLOCK
            first, count = self._space.take(blocks)
            if count == blocks:
                writer = self._writer
                writer.seek(first * BLOCK)
                at = stream.at
                stream.at = at + size
                writer.put(memoryview(stream.data)[at : at + size])
                if size % BLOCK:
                    writer.zeros(-size % BLOCK)
                return ((0, first, blocks),)
            layout = _Layout(self._space, self._writer, (first, count))
        else:
            layout = _Layout(self._space, self._writer)
        for offset, length in ((0, size),) if parts is None else parts:
            layout.skip_to(offset)
            left = length
            while left:
                unit = min(left, _HOLE)
                if not stream.ensure(unit):
                    raise FormatError("the tar stream ends inside this file")
                data, at = stream.data, stream.at
                if layout.aligned and size > _HOLE and data.startswith(_ZEROS[:unit], at):
                    layout.skip_to(layout.at + unit)
                else:
                    layout.put(memoryview(data)[at : at + unit])
                stream.at = at + unit
                left -= unit
        return layout.end()


class _Layout:
    """One file's content on the disk: where its bytes go, and the runs that say so."""

    def __init__(self, space: Space, writer: PieceWriter, in_hand: tuple[int, int] = (0, 0)) -> None:
        self._space = space
        self._writer = writer
        self._first, self._left = in_hand
        self._runs: list[tuple[int, int, int]] = []
        self.at = 0
        """Bytes of the file that are laid out, holes included."""
        self._begun = False
        """The block at `at` is partly written and still in the writer's hand."""

    @property
    def aligned(self) -> bool:
        return self.at % BLOCK == 0

    def put(self, data: memoryview) -> None:
        inside = self.at % BLOCK
        if inside and self._begun:
            head = min(BLOCK - inside, len(data))
            self._bytes(data[:head])
            data = data[head:]
        elif inside:
            self.at -= inside
            data = memoryview(bytes(inside) + data)
        while data:
            if not self._left:
                self._first, self._left = self._space.take(-(-len(data) // BLOCK))
            part = data[: self._left * BLOCK]
            blocks = -(-len(part) // BLOCK)
            self._writer.seek(self._first * BLOCK)
            self._note(self._first, blocks)
            self._first += blocks
            self._left -= blocks
            self._bytes(part)
            data = data[len(part) :]

    def skip_to(self, offset: int) -> None:
        """Zeros up to `offset`: whole blocks of them are holes."""
        if self._begun and offset > self.at:
            count = min(offset - self.at, -self.at % BLOCK)
            self._writer.zeros(count)
            self.at += count
            self._begun = self.at % BLOCK != 0
        self.at = max(self.at, offset)

    def end(self) -> Runs:
        """Fill the last block up; a hole at the end needs nothing."""
        if self._begun:
            self._writer.zeros(-self.at % BLOCK)
        return tuple(self._runs)

    def _bytes(self, data: memoryview) -> None:
        self._writer.put(data)
        self.at += len(data)
        self._begun = self.at % BLOCK != 0

    def _note(self, first: int, blocks: int) -> None:
        logical = self.at // BLOCK
        if self._runs:
            at, start, count = self._runs[-1]
            if at + count == logical and start + count == first:
                self._runs[-1] = (at, start, count + blocks)
                return
        self._runs.append((logical, first, blocks))


def unpack_entries(packed: bytes) -> list[TarEntry]:
    return [TarEntry._make(fields) for fields in marshal.loads(packed)]  # noqa: S302 - from our own child


def unpack_pieces(packed: bytes) -> list[Piece]:
    return [Piece._make(fields) for fields in marshal.loads(packed)]  # noqa: S302 - from our own child


def _failure(e: BaseException) -> WorkerFailed:
    match e:
        case Problem():
            return WorkerFailed("problem", e.report)
        case FormatError():
            return WorkerFailed("layer", what=str(e))
        case NoBlocks():
            return WorkerFailed("full")
        case Mismatch():
            return WorkerFailed("proof", what=f"the bytes at {e.offset} are not those that were written")
        case OSError():
            return WorkerFailed("disk", what=f"[Errno {e.errno}] {os.strerror(e.errno or 0)}")
        case _:
            return WorkerFailed(
                "problem",
                Problem(
                    "COS-INTERNAL",
                    "A worker of the image builder stopped for a reason that nobody foresaw.",
                    unchanged="active and passive are exactly as before.",
                    now="Report this, with the log.",
                    exit_code=ExitCode.INTERNAL,
                    detail=f"{type(e).__name__}: {e}",
                ).report,
            )

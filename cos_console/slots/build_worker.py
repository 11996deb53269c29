"""What a worker process does with one layer after the other: check, inflate, lay file content out.

A layer with a digest is checked over its compressed bytes; one without (a docker engine's) by its diff_id over
the inflated ones. Limits stand before memory is taken: the zstd window, the size of the image, entries.
"""

import hashlib
import mmap
import os
import struct
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple, cast

import zstandard
from isal import isal_zlib

from cos_console.formats.ext4 import layout
from cos_console.formats.readat import FormatError
from cos_console.formats.tar import ByteStream, Runs, TarEntry, read_tar
from cos_console.model.image import Compression, Content, Layer, LayerStream
from cos_console.model.problem import ExitCode, Problem, ProblemReport
from cos_console.slots.build_pieces import Piece, PieceWriter

BLOCK = layout.BLOCK
_CHUNK_BLOCKS = (8 << 20) // BLOCK
_READ = 256 << 10
_HOLE = 64 << 10
_ZEROS = bytes(_HOLE)
_ZSTD_WINDOW = 128 << 20
_GZIP_ERROR = cast("type[Exception]", isal_zlib.IsalError)  # its type stub calls it an instance


class Progressed(NamedTuple):
    pid: int
    bytes_done: int


class LayerDone(NamedTuple):
    layer: int
    entries: list[TarEntry]
    pieces: list[Piece]


class WorkerFailed(NamedTuple):
    problem: ProblemReport | None
    """None: no blocks are left in the image."""


class Space:
    """Free blocks, handed out in chunks to several processes: one shared counter under a one-byte lock."""

    def __init__(self, free: tuple[tuple[int, int], ...]) -> None:
        self._chunks = [
            (at, min(at + _CHUNK_BLOCKS, end))
            for first, end in free
            for at in range(first, end, _CHUNK_BLOCKS)
        ]
        self._next = mmap.mmap(-1, 8)
        self._lock_read, self._lock_write = os.pipe()
        os.write(self._lock_write, b"x")
        self._current = (0, 0)
        self.no_room: type[Exception] = MemoryError

    def __del__(self) -> None:
        os.close(self._lock_read)
        os.close(self._lock_write)

    def take(self, count: int) -> list[tuple[int, int]]:
        """`count` blocks as (first, blocks) runs. Raises `no_room`."""
        runs = []
        while count:
            first, end = self._current
            if first == end:
                first, end = self._chunk()
            part = min(count, end - first)
            runs.append((first, part))
            self._current = (first + part, end)
            count -= part
        return runs

    def _chunk(self) -> tuple[int, int]:
        os.read(self._lock_read, 1)
        try:
            (number,) = struct.unpack("<Q", self._next[:8])
            if number >= len(self._chunks):
                raise self.no_room
            self._next[:8] = struct.pack("<Q", number + 1)
        finally:
            os.write(self._lock_write, b"x")
        return self._chunks[int(number)]


def work(content: Content, fd: int, space: Space, queue: int, out: Connection) -> None:
    """Take layers from `queue` until it is empty; everything that happens goes to `out`."""
    writer = PieceWriter(fd, BLOCK)
    progress = _Progress(out)
    try:
        if content.parallel:
            while word := os.read(queue, 2):
                (index,) = struct.unpack("<H", word)
                stream = content.open_layer(index)
                entries, _ = _layer(stream, content.image.layers[index], space, writer, progress)
                out.send(LayerDone(index, entries, []))
        else:
            _in_order(content, space, writer, progress, out)
        out.send(writer.finish())
        progress.tell()
    except Problem as e:
        out.send(WorkerFailed(e.report))
    except FormatError as e:
        out.send(WorkerFailed(_refused(str(e))))
    except space.no_room:
        out.send(WorkerFailed(None))
    except OSError as e:
        out.send(WorkerFailed(_disk(e)))
    out.close()


def _in_order(
    content: Content, space: Space, writer: PieceWriter, progress: "_Progress", out: Connection
) -> None:
    """A source that gives its layers in its own order: which one it was is told by its diff_id."""
    open_places: dict[str, list[int]] = {}
    for n, layer in enumerate(content.image.layers):
        open_places.setdefault(layer.diff_id or "", []).append(n)
    while (stream := content.next_layer()) is not None:
        unknown = Layer(digest=None, diff_id=None, size_bytes=0, compression=Compression.NONE)
        entries, diff_id = _layer(stream, unknown, space, writer, progress)
        if diff_id not in open_places:
            raise FormatError(f"a layer with diff_id {diff_id} that is not in the image's configuration")
        for index in open_places.pop(diff_id):
            out.send(LayerDone(index, entries, []))


class _Progress:
    def __init__(self, out: Connection) -> None:
        self._out = out
        self._done = 0
        self._last = 0.0
        self._pid = os.getpid()

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._last >= 0.2:
            self._last = now
            self.tell()

    def tell(self) -> None:
        self._out.send(Progressed(self._pid, self._done))


def _layer(
    stream: LayerStream, layer: Layer, space: Space, writer: PieceWriter, progress: _Progress
) -> tuple[list[TarEntry], str]:
    """Entries of one layer, and the diff_id when it had to be computed."""
    compressed = hashlib.new(layer.digest.partition(":")[0]) if layer.digest else None
    plain = None if layer.digest else hashlib.sha256()
    inflate = _Inflate(layer.compression)
    buffer = memoryview(bytearray(_READ))
    ended = False

    def next_chunk() -> bytes:
        nonlocal ended
        while not ended:
            count = stream.readinto(buffer)
            if count == 0:
                ended = True
                data = inflate.finish()
            else:
                piece = buffer[:count]
                if compressed is not None:
                    compressed.update(piece)
                progress.add(count)
                data = inflate.feed(piece)
            if data:
                if plain is not None:
                    plain.update(data)
                return data
        return b""

    try:
        tar = ByteStream(next_chunk)
        entries = list(read_tar(tar, _store(space, writer)))
        tar.drain()
    except (_GZIP_ERROR, zstandard.ZstdError, EOFError) as e:
        raise FormatError(f"its compressed data is damaged ({e})") from None
    finally:
        stream.close()
    if compressed is not None and layer.digest is not None:
        found = f"{layer.digest.partition(':')[0]}:{compressed.hexdigest()}"
        if found != layer.digest:
            raise Problem(
                "COS-DIGEST",
                f"A layer is not what its digest says: {layer.digest[:19]}… was wanted, {found[:19]}… came.",
                unchanged="active and passive are exactly as before.",
                now="Try again; if it stays, the registry or something on the way to it changes data.",
                exit_code=ExitCode.VERIFICATION,
            )
    return entries, f"sha256:{plain.hexdigest()}" if plain is not None else ""


def _store(space: Space, writer: PieceWriter) -> Callable[[ByteStream, int], Runs]:
    """Content goes to the next free blocks; whole 64 KiB of zeros in a larger file become a hole."""

    def store(stream: ByteStream, size: int) -> Runs:
        runs: list[tuple[int, int, int]] = []
        logical, left = 0, size
        while left:
            data = stream.take(min(left, _HOLE))
            if len(data) < min(left, _HOLE):
                raise FormatError("the tar stream ends inside a file")
            left -= len(data)
            blocks = -(-len(data) // BLOCK)
            if size > _HOLE and data == _ZEROS[: len(data)]:
                logical += blocks
                continue
            at = 0
            for first, count in space.take(blocks):
                writer.seek(first * BLOCK)
                writer.put(memoryview(data)[at : at + count * BLOCK])
                writer.pad()
                at += count * BLOCK
                last = runs[-1] if runs else (0, 0, 0)
                if runs and last[0] + last[2] == logical and last[1] + last[2] == first:
                    runs[-1] = (last[0], last[1], last[2] + count)
                else:
                    runs.append((logical, first, count))
                logical += count
        return tuple(runs)

    return store


class _Inflate:
    """gzip (several members too), zstd (several frames) or plain."""

    def __init__(self, compression: Compression) -> None:
        self._kind = compression
        self._object = self._new()
        self._begun = False

    def _new(self) -> "isal_zlib.Decompress | zstandard.ZstdDecompressionObj | None":
        if self._kind is Compression.GZIP:
            return isal_zlib.decompressobj(31)
        if self._kind is Compression.ZSTD:
            return zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
        return None

    def feed(self, data: memoryview) -> bytes:
        if self._object is None:
            return bytes(data)
        out = []
        rest: bytes | memoryview = data
        while len(rest):
            if self._object.eof:
                if not any(rest):
                    break  # padding behind the last member
                self._object = self._new()
                assert self._object is not None  # noqa: S101 - for the type checker
            out.append(self._object.decompress(rest))
            self._begun = True
            rest = self._object.unused_data if self._object.eof else b""
        return out[0] if len(out) == 1 else b"".join(out)

    def finish(self) -> bytes:
        if self._object is not None and not self._object.eof:
            raise EOFError("it ends too early")
        return b""


def _refused(why: str) -> ProblemReport:
    return Problem(
        "COS-LAYER",
        f"A layer of the image can't be unpacked: {why}.",
        unchanged="active and passive are exactly as before.",
        now="Choose another image, or tell its maker.",
        exit_code=ExitCode.VERIFICATION,
    ).report


def _disk(e: OSError) -> ProblemReport:
    return Problem(
        "COS-DISK-WRITE",
        f"The new image could not be written: {os.strerror(e.errno or 0)}.",
        unchanged="active and passive are exactly as before.",
        now="Check the disk (SMART, kernel messages) and its free space.",
        detail=repr(e),
    ).report

"""The journal of ext3/ext4 applied in memory: what Linux would see after a mount.

Source: Linux Documentation/filesystems/ext4/journal.rst and fs/jbd2/recovery.c. Fields are big endian. Replay
stops at the first block that is not of the next transaction. Journal checksums are not verified: a transaction
whose commit block arrived before its data reads as committed here, where Linux would stop. Nothing is written.
"""

import struct
from collections.abc import Mapping

from cos_console.formats.readat import FormatError, ReadAt

_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _SUPER_V1, _SUPER_V2, _REVOKE = 1, 2, 3, 4, 5
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_INCOMPAT_REVOKE, _INCOMPAT_64BIT, _INCOMPAT_ASYNC, _INCOMPAT_CSUM_V2, _INCOMPAT_CSUM_V3 = 1, 2, 4, 8, 16


class Overlay:
    """A source with some blocks replaced."""

    def __init__(self, source: ReadAt, block_bytes: int, blocks: Mapping[int, bytes]) -> None:
        self._source = source
        self._block = block_bytes
        self._blocks = blocks

    @property
    def size_bytes(self) -> int:
        return self._source.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        data = self._source.read_at(offset, length)
        if not data:
            return data
        first, last = offset // self._block, (offset + len(data) - 1) // self._block
        if last - first < len(self._blocks):
            hit = [n for n in range(first, last + 1) if n in self._blocks]
        else:
            hit = [n for n in self._blocks if first <= n <= last]
        if not hit:
            return data
        patched = bytearray(data)
        for n in hit:
            start = n * self._block - offset
            block = self._blocks[n]
            cut = max(0, -start)
            piece = block[cut : max(cut, len(data) - start)]
            patched[start + cut : start + cut + len(piece)] = piece
        return bytes(patched)


def replayed_blocks(log: ReadAt) -> dict[int, bytes]:
    """Block number to content, after every committed transaction of the journal file `log`.

    Raises FormatError when the journal's own superblock can't be understood.
    """
    head = log.read_at(0, 1024)
    if len(head) < 1024:
        raise FormatError("the journal is too short")
    magic, kind, _ = struct.unpack_from(">3I", head, 0)
    if magic != _MAGIC or kind not in {_SUPER_V1, _SUPER_V2}:
        raise FormatError("the journal has no superblock")
    size, length, first, sequence, start = struct.unpack_from(">5I", head, 12)
    incompat = struct.unpack_from(">I", head, 40)[0] if kind == _SUPER_V2 else 0
    if start == 0:
        return {}
    if not 1024 <= size <= 65536 or length * size > log.size_bytes or not first <= start < length:
        raise FormatError("the journal's geometry is impossible")
    reader = _Log(log, size, first, length, incompat)
    transactions = reader.transactions(start, sequence)
    revoked: dict[int, int] = {}
    for number, _, revokes in transactions:
        for block in revokes:
            revoked[block] = number
    blocks: dict[int, bytes] = {}
    for number, writes, _ in transactions:
        blocks.update((block, data) for block, data in writes if revoked.get(block, -1) < number)
    return blocks


_Transaction = tuple[int, list[tuple[int, bytes]], list[int]]


class _Log:
    def __init__(self, log: ReadAt, size: int, first: int, length: int, incompat: int) -> None:
        self._log = log
        self._size = size
        self._first = first
        self._length = length
        self._incompat = incompat
        self._tail = 4 if incompat & (_INCOMPAT_CSUM_V2 | _INCOMPAT_CSUM_V3) else 0

    def transactions(self, start: int, sequence: int) -> list[_Transaction]:
        """Committed transactions, oldest first."""
        found: list[_Transaction] = []
        writes: list[tuple[int, bytes]] = []
        revokes: list[int] = []
        at = start
        for _ in range(self._length):
            block = self._read(at)
            magic, kind, number = struct.unpack_from(">3I", block, 0)
            if magic != _MAGIC or number != sequence & 0xFFFFFFFF:
                break
            at = self._next(at)
            if kind == _DESCRIPTOR:
                for target, flags in self._tags(block):
                    data = self._read(at)
                    if flags & _ESCAPED:
                        data = _MAGIC.to_bytes(4, "big") + data[4:]
                    writes.append((target, data))
                    at = self._next(at)
            elif kind == _REVOKE:
                revokes += self._revoked(block)
            elif kind == _COMMIT:
                found.append((sequence, writes, revokes))
                writes, revokes = [], []
                sequence += 1
            else:
                break
        return found

    def _tags(self, block: bytes) -> list[tuple[int, int]]:
        tags = []
        at = 12
        v3 = bool(self._incompat & _INCOMPAT_CSUM_V3)
        wide = bool(self._incompat & _INCOMPAT_64BIT)
        size = 16 if v3 else 8 + (2 if self._incompat & _INCOMPAT_CSUM_V2 else 0) + (4 if wide else 0)
        if not v3 and not self._incompat & _INCOMPAT_CSUM_V2:
            size = 12 if wide else 8
        while at + size <= self._size - self._tail:
            if v3:
                low, flags, high = struct.unpack_from(">3I", block, at)
            else:
                low, _, flags = struct.unpack_from(">IHH", block, at)
                high = struct.unpack_from(">I", block, at + 8)[0] if wide else 0
            tags.append(((high << 32 if wide else 0) | low, flags))
            at += size + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST:
                break
        return tags

    def _revoked(self, block: bytes) -> list[int]:
        (used,) = struct.unpack_from(">I", block, 12)
        width = 8 if self._incompat & _INCOMPAT_64BIT else 4
        end = min(used, self._size - self._tail)
        return [int.from_bytes(block[p : p + width], "big") for p in range(16, end - width + 1, width)]

    def _read(self, number: int) -> bytes:
        block = self._log.read_at(number * self._size, self._size)
        if len(block) != self._size:
            raise FormatError("the journal ends before its own length")
        return block

    def _next(self, at: int) -> int:
        return at + 1 if at + 1 < self._length else self._first

"""The journal of ext3/ext4 applied in memory: what Linux would see after a mount.

Source: Linux Documentation/filesystems/ext4/journal.rst and fs/jbd2/recovery.c. Fields are big endian. Replay
ends at the first block that is not of the next transaction, and before a transaction whose descriptor, revoke
or commit block does not match its checksum (versions 1, 2 and 3). A *data* block of a committed transaction
that does not match is a FormatError: Linux would refuse to mount. What Linux does after the replay (deleting
the files on the orphan list) is not done. Nothing is written; replayed blocks stay in the log until read.
"""

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from cos_console.formats.crc32c import crc32c
from cos_console.formats.readat import FormatError, ReadAt

_MAGIC = 0xC03B3998
_DESCRIPTOR, _COMMIT, _SUPER_V1, _SUPER_V2, _REVOKE = 1, 2, 3, 4, 5
_ESCAPED, _SAME_UUID, _LAST = 1, 2, 8
_COMPAT_CHECKSUM = 1
_64BIT, _CSUM_V2, _CSUM_V3, _FAST_COMMIT = 2, 8, 16, 32
_KNOWN_INCOMPAT = 1 | _64BIT | 4 | _CSUM_V2 | _CSUM_V3 | _FAST_COMMIT
_FAST_HEAD = 9
_REVERSED = bytes(int(f"{n:08b}"[::-1], 2) for n in range(256))


@dataclass(frozen=True)
class Replay:
    """What the log would write home: block of the file system to (block of the log, was escaped)."""

    block_bytes: int
    places: Mapping[int, tuple[int, bool]]
    transactions: int


class Overlay:
    """A source with the replayed blocks in place of its own."""

    def __init__(self, source: ReadAt, log: ReadAt, replay: Replay) -> None:
        self._source = source
        self._log = log
        self._block = replay.block_bytes
        self._places = replay.places

    @property
    def size_bytes(self) -> int:
        return self._source.size_bytes

    def read_at(self, offset: int, length: int) -> bytes:
        data = self._source.read_at(offset, length)
        if not data:
            return data
        first, last = offset // self._block, (offset + len(data) - 1) // self._block
        if last - first < len(self._places):
            hit = [n for n in range(first, last + 1) if n in self._places]
        else:
            hit = [n for n in self._places if first <= n <= last]
        if not hit:
            return data
        patched = bytearray(data)
        for n in hit:
            start = n * self._block - offset
            cut = max(0, -start)
            piece = self._replayed(n)[cut : max(cut, len(data) - start)]
            patched[start + cut : start + cut + len(piece)] = piece
        return bytes(patched)

    def _replayed(self, number: int) -> bytes:
        at, escaped = self._places[number]
        data = self._log.read_at(at * self._block, self._block)
        return _MAGIC.to_bytes(4, "big") + data[4:] if escaped else data


def replay(log: ReadAt) -> Replay:
    """Every committed transaction of the journal file `log`. Raises FormatError (see the module)."""
    head = log.read_at(0, 1024)
    if len(head) < 1024:
        raise FormatError("the journal is too short")
    magic, kind, _ = struct.unpack_from(">3I", head, 0)
    if magic != _MAGIC or kind not in {_SUPER_V1, _SUPER_V2}:
        raise FormatError("the journal has no superblock")
    size, length, first, sequence, start = struct.unpack_from(">5I", head, 12)
    compat, incompat = struct.unpack_from(">2I", head, 36) if kind == _SUPER_V2 else (0, 0)
    if start == 0:
        return Replay(max(size, 1024), {}, 0)
    if incompat & ~_KNOWN_INCOMPAT:
        raise FormatError(f"a journal with unknown features {incompat & ~_KNOWN_INCOMPAT:#x}")
    fast_blocks = (int(struct.unpack_from(">I", head, 84)[0]) or 256) if incompat & _FAST_COMMIT else 0
    end = length - fast_blocks
    if (
        not 1024 <= size <= 65536
        or size & size - 1
        or length * size > log.size_bytes
        or not 0 < first <= start < end
    ):
        raise FormatError("the journal's geometry is impossible")
    reader = _Log(log, size, first, end, compat, incompat, crc32c(head[48:64]))
    transactions = reader.transactions(start, sequence)
    if fast_blocks:
        _refuse_fast_commits(log.read_at(end * size, 16), sequence + len(transactions))
    revoked: dict[int, int] = {}
    for t in transactions:
        revoked.update(dict.fromkeys(t.revokes, t.number))
    places: dict[int, tuple[int, bool]] = {}
    for t in transactions:
        for w in t.writes:
            if revoked.get(w.target, -1) < t.number:
                reader.check_data(t.number, w)
                places[w.target] = w.at, w.escaped
    return Replay(size, places, len(transactions))


def _refuse_fast_commits(head: bytes, sequence: int) -> None:
    tag, length, _, tid = struct.unpack_from("<HHII", head.ljust(12, b"\0"), 0)
    if tag == _FAST_HEAD and length == 8 and tid == sequence & 0xFFFFFFFF:
        raise FormatError("the journal holds fast commits, which are not replayed here")


@dataclass(frozen=True)
class _Write:
    target: int
    at: int
    """Block of the log."""
    escaped: bool
    checksum: int


@dataclass
class _Transaction:
    number: int
    writes: list[_Write] = field(default_factory=list)
    revokes: list[int] = field(default_factory=list)
    sum_v1: int = 0
    """Running CRC of descriptors and data, in zlib's convention over bit-reversed bytes."""


class _Log:
    def __init__(
        self, log: ReadAt, size: int, first: int, end: int, compat: int, incompat: int, seed: int
    ) -> None:
        self._log = log
        self._size = size
        self._first = first
        self._end = end
        self._v1 = bool(compat & _COMPAT_CHECKSUM)
        self._v3 = bool(incompat & _CSUM_V3)
        self._v2 = bool(incompat & _CSUM_V2) and not self._v3
        self._wide = bool(incompat & _64BIT)
        self._seed = seed
        self._checked = self._v2 or self._v3
        self._tail = 4 if self._checked else 0

    def transactions(self, start: int, sequence: int) -> list[_Transaction]:
        """Committed transactions, oldest first."""
        found: list[_Transaction] = []
        now = _Transaction(sequence)
        at, left = start, self._end
        while left > 0:
            block = self._read(at)
            magic, kind, number = struct.unpack_from(">3I", block, 0)
            if magic != _MAGIC or number != now.number & 0xFFFFFFFF:
                break
            at, left = self._next(at), left - 1
            if kind == _DESCRIPTOR and self._tail_matches(block):
                self._add_v1(now, block)
                for target, flags, checksum in self._tags(block):
                    now.writes.append(_Write(target, at, bool(flags & _ESCAPED), checksum))
                    if self._v1:
                        self._add_v1(now, self._read(at))
                    at, left = self._next(at), left - 1
            elif kind == _REVOKE and self._tail_matches(block):
                now.revokes += self._revoked(block)
            elif kind == _COMMIT and left >= 0 and self._commit_matches(block, now):
                found.append(now)
                now = _Transaction(now.number + 1)
            else:
                break
        return found

    def check_data(self, number: int, write: _Write) -> None:
        """Raises FormatError when the block in the log is not what its tag says."""
        if not self._checked:
            return
        seed = crc32c((number & 0xFFFFFFFF).to_bytes(4, "big"), self._seed)
        found = crc32c(self._read(write.at), seed)
        if (found if self._v3 else found & 0xFFFF) != write.checksum:
            raise FormatError(
                f"block {write.target} in the journal does not match its checksum: Linux would refuse to mount"
            )

    def _tail_matches(self, block: bytes) -> bool:
        return not self._checked or crc32c(block[:-4] + bytes(4), self._seed) == int.from_bytes(
            block[-4:], "big"
        )

    def _commit_matches(self, block: bytes, now: _Transaction) -> bool:
        stored = int.from_bytes(block[16:20], "big")
        if self._checked:
            return crc32c(block[:16] + bytes(4) + block[20:], self._seed) == stored
        if self._v1:
            kind, width = block[12], block[13]
            if (kind, width, stored) == (0, 0, 0):
                return True  # written without checksum (recovery.c: such a commit counts)
            folded = int(f"{now.sum_v1 ^ 0xFFFFFFFF:032b}"[::-1], 2)
            return (kind, width) == (1, 4) and folded == stored
        return True

    def _add_v1(self, now: _Transaction, block: bytes) -> None:
        """crc32_be over everything, as the reflected CRC of bit-reversed bytes."""
        if self._v1:
            now.sum_v1 = zlib.crc32(block.translate(_REVERSED), now.sum_v1)

    def _tags(self, block: bytes) -> list[tuple[int, int, int]]:
        """(block of the file system, flags, checksum) of each block that follows."""
        tags = []
        at = 12
        size = 16 if self._v3 else 8 + (2 if self._v2 else 0) + (4 if self._wide else 0)
        while at + size <= self._size - self._tail:
            if self._v3:
                low, flags, high, checksum = struct.unpack_from(">4I", block, at)
            else:
                low, checksum, flags = struct.unpack_from(">IHH", block, at)
                high = struct.unpack_from(">I", block, at + 8)[0] if self._wide else 0
            tags.append(((high << 32 if self._wide else 0) | low, flags, checksum))
            at += size + (0 if flags & _SAME_UUID else 16)
            if flags & _LAST:
                break
        return tags

    def _revoked(self, block: bytes) -> list[int]:
        (used,) = struct.unpack_from(">I", block, 12)
        width = 8 if self._wide else 4
        end = min(used, self._size - self._tail)
        return [int.from_bytes(block[p : p + width], "big") for p in range(16, end - width + 1, width)]

    def _read(self, number: int) -> bytes:
        block = self._log.read_at(number * self._size, self._size)
        if len(block) != self._size:
            raise FormatError("the journal ends before its own length")
        return block

    def _next(self, at: int) -> int:
        return at + 1 if at + 1 < self._end else self._first

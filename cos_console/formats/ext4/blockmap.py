"""Where a file's blocks lie: extent trees (ext4) and indirect block maps (ext2/3), and the file read through them.

Source: Linux Documentation/filesystems/ext4 (ifork.rst). Every tree is walked once: a block that turns up twice
in one file's tree, or a tree larger than any real one, is a FormatError.
"""

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cos_console.formats.readat import FormatError, ReadAt

_MAX_NODES = 1 << 16
_MAX_DEPTH = 5
_WRITTEN_MAX = 32768


@dataclass(frozen=True)
class Run:
    """`length` blocks of a file from its block `logical`, lying at `physical`."""

    logical: int
    length: int
    physical: int
    written: bool = True


class BlockMap:
    """Reads the map of one inode. `block_at` gives a metadata block by number, or raises FormatError."""

    def __init__(self, block_at: Callable[[int], bytes], block_bytes: int, blocks: int) -> None:
        self._block_at = block_at
        self._block_bytes = block_bytes
        self._blocks = blocks
        self._seen: set[int] = set()

    def extents(self, i_block: bytes) -> tuple[Run, ...]:
        return self._checked(self._extent_node(i_block, None))

    def mapped(self, i_block: bytes, size_bytes: int) -> tuple[Run, ...]:
        """12 direct blocks, then single, double and triple indirect."""
        return self._checked(self._joined(i_block, -(-size_bytes // self._block_bytes)))

    def _checked(self, runs: Iterator[Run]) -> tuple[Run, ...]:
        found: list[Run] = []
        end = 0
        for run in runs:
            if run.length == 0 or run.logical < end or not 0 < run.physical <= self._blocks - run.length:
                raise FormatError("a file has an impossible block map")
            end = run.logical + run.length
            found.append(run)
        return tuple(found)

    def _node(self, number: int) -> bytes:
        if number in self._seen or len(self._seen) >= _MAX_NODES:
            raise FormatError("a file's block map goes in circles or is larger than any real one")
        self._seen.add(number)
        return self._block_at(number)

    def _extent_node(self, node: bytes, expected_depth: int | None) -> Iterator[Run]:
        magic, entries, _, depth = struct.unpack_from("<4H", node, 0)
        if magic != 0xF30A or depth > _MAX_DEPTH or 12 + entries * 12 > len(node):
            raise FormatError("invalid extent tree")
        if expected_depth is not None and depth != expected_depth:
            raise FormatError("invalid extent tree")
        for n in range(entries):
            if depth == 0:
                logical, length, high, low = struct.unpack_from("<IHHI", node, 12 + n * 12)
                written = length <= _WRITTEN_MAX
                yield Run(logical, length if written else length - _WRITTEN_MAX, high << 32 | low, written)
            else:
                _, low, high = struct.unpack_from("<IIH", node, 12 + n * 12)
                yield from self._extent_node(self._node(high << 32 | low), depth - 1)

    def _joined(self, i_block: bytes, count: int) -> Iterator[Run]:
        current: Run | None = None
        for logical, physical in self._numbers(i_block, count):
            if physical == 0:
                continue
            if (
                current
                and current.logical + current.length == logical
                and current.physical + current.length == physical
            ):
                current = Run(current.logical, current.length + 1, current.physical)
                continue
            if current:
                yield current
            current = Run(logical, 1, physical)
        if current:
            yield current

    def _numbers(self, i_block: bytes, count: int) -> Iterator[tuple[int, int]]:
        numbers = struct.unpack("<15I", i_block)
        per_block = self._block_bytes // 4
        yield from ((n, numbers[n]) for n in range(min(12, count)))
        at = 12
        for level in (1, 2, 3):
            if at >= count:
                return
            yield from self._indirect(numbers[11 + level], level, at, count)
            at += per_block**level

    def _indirect(self, block: int, level: int, at: int, count: int) -> Iterator[tuple[int, int]]:
        if block == 0:
            return
        per_block = self._block_bytes // 4
        for n, number in enumerate(struct.unpack(f"<{per_block}I", self._node(block))):
            logical = at + n * per_block ** (level - 1)
            if logical >= count:
                return
            if level == 1:
                yield logical, number
            else:
                yield from self._indirect(number, level - 1, logical, count)


class MappedFile:
    """A file's bytes. Holes read as zeros; unwritten extents too (Linux), or as what the disk has (GRUB)."""

    def __init__(
        self, source: ReadAt, size_bytes: int, block_bytes: int, runs: tuple[Run, ...], *, stale: bool = False
    ) -> None:
        self._source = source
        self._size = size_bytes
        self._block = block_bytes
        self._runs = runs
        self._stale = stale
        self._starts = [r.logical * block_bytes for r in runs]

    @property
    def size_bytes(self) -> int:
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        if offset >= self._size or length <= 0:
            return b""
        end = min(self._size, offset + length)
        parts: list[bytes] = []
        index = max(0, bisect_right(self._starts, offset) - 1)
        while offset < end:
            while index < len(self._runs) and self._end_of(index) <= offset:
                index += 1
            start = self._starts[index] if index < len(self._runs) else end
            if start > offset:
                hole = min(start, end) - offset
                parts.append(bytes(hole))
                offset += hole
                continue
            run = self._runs[index]
            take = min(end, self._end_of(index)) - offset
            if run.written or self._stale:
                data = self._source.read_at(run.physical * self._block + offset - start, take)
                if len(data) < take:
                    raise FormatError("a file's blocks lie behind the end of its device")
                parts.append(data)
            else:
                parts.append(bytes(take))
            offset += take
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _end_of(self, index: int) -> int:
        return self._starts[index] + self._runs[index].length * self._block

"""Free blocks of an image in the making, shared out to layers and processes.

Each layer has an arena of its own, sized by its share of the transfer, so that where things land does not
depend on which worker was faster: the same image gives the same bytes. A layer that outgrows its arena takes
from the end of the emptiest other one, which is right too, only not repeatable.
"""

import bisect
import mmap
import os
import struct
from collections.abc import Sequence

STEP = (1 << 20) // 4096
"""Blocks taken from an arena at a time (1 MiB); a layer gives back what it did not need."""

Run = tuple[int, int]
"""(first block, blocks)."""


class NoBlocks(Exception):  # noqa: N818 - never leaves this room
    """The image is full."""


class Space:
    """Arenas over free runs. Made before the workers are forked; the counters are shared memory."""

    def __init__(self, free: Sequence[Run], weights: Sequence[int]) -> None:
        self._runs = [run for run in free if run[1]]
        self._starts: list[int] = []
        total = 0
        for _, count in self._runs:
            self._starts.append(total)
            total += count
        self._arenas = len(weights)
        self._shared = mmap.mmap(-1, max(1, self._arenas) * 16)
        self._lock_read, self._lock_write = os.pipe()
        os.write(self._lock_write, b"x")
        whole = sum(weights) or 1
        at = passed = 0
        for n, weight in enumerate(weights):
            passed += weight
            end = total * passed // whole if n + 1 < self._arenas else total
            self._set(n, at, end)
            at = end
        self._arena = 0
        self._range = (0, 0)
        """Blocks in hand, as indices into all free blocks."""
        self._spare: list[tuple[int, int]] = []

    def close(self) -> None:
        os.close(self._lock_read)
        os.close(self._lock_write)
        self._shared.close()

    def enter(self, arena: int) -> None:
        """What is taken from now on is for the layer of this number."""
        self._arena = arena

    def leave(self) -> None:
        """Give back what is in hand."""
        at, end = self._range
        self._range = (0, 0)
        if at == end:
            return
        with self:
            first, last = self._get(self._arena)
            if first == end:
                self._set(self._arena, at, last)
                return
        self._spare.append((at, end))  # it came from another arena

    def take(self, wanted: int) -> Run:
        """Up to `wanted` blocks in one run. Raises NoBlocks."""
        at, end = self._range
        if at == end:
            at, end = self._more()
        n = bisect.bisect_right(self._starts, at) - 1
        first, count = self._runs[n]
        offset = at - self._starts[n]
        taken = min(wanted, end - at, count - offset)
        self._range = (at + taken, end)
        return first + offset, taken

    def _more(self) -> tuple[int, int]:
        with self:
            first, last = self._get(self._arena)
            if first < last:
                end = min(first + STEP, last)
                self._set(self._arena, end, last)
                return first, end
            if self._spare:
                return self._spare.pop()
            left = [(b - a, n) for n, (a, b) in enumerate(map(self._get, range(self._arenas)))]
            room, richest = max(left)
            if room == 0:
                raise NoBlocks
            first, last = self._get(richest)
            start = max(first, last - 8 * STEP)
            self._set(richest, first, start)
            return start, last

    def _get(self, arena: int) -> tuple[int, int]:
        first, last = struct.unpack_from("<QQ", self._shared, arena * 16)
        return int(first), int(last)

    def _set(self, arena: int, first: int, last: int) -> None:
        struct.pack_into("<QQ", self._shared, arena * 16, first, last)

    def __enter__(self) -> None:
        os.read(self._lock_read, 1)

    def __exit__(self, *_: object) -> None:
        os.write(self._lock_write, b"x")

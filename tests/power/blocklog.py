"""Every write and flush that reaches the disk, in order: what a power cut can leave is computed from it.

`qemu-storage-daemon` exports a disk through FUSE with `blklogwrites` over it; loop devices and the kernel's
ext4 are real. The log is in the dm-log-writes format (Linux, Documentation/admin-guide/device-mapper/
log-writes.rst, drivers/md/dm-log-writes.c): a superblock (u64 magic, u64 version, u64 entries, u32 sector
size), then per entry a sector with u64 first sector, count, flags (1 flush, 2 FUA, 4 discard, 8 mark), data
length, followed by the data. It is read to its first empty header, so it can be read while it grows.

The model: what came before a completed flush is on the medium; of what came after it any subset, in any order
and with one write torn at a 512-byte boundary, may be.
"""

import contextlib
import os
import random
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.power.disks import OEM, STATE, NotOurs, mounted
from tests.power.judge import SECTOR, Changed

MAGIC, FLUSH, FUA, DISCARD = 0x6A736677736872, 1, 2, 4


@dataclass(frozen=True)
class Entry:
    sector: int
    data: bytes
    flags: int

    @property
    def flush(self) -> bool:
        return bool(self.flags & FLUSH)


def parse(path: Path) -> list[Entry]:
    """The entries so far. Raises ValueError when this is no such log."""
    entries = []
    with path.open("rb") as log:
        magic, version, _count, size = struct.unpack("<QQQI", log.read(28))
        if (magic, version) != (MAGIC, 1):
            raise ValueError("not a log of writes")
        at, end = size, path.stat().st_size
        while at + size <= end:
            log.seek(at)
            sector, count, flags, _length = struct.unpack("<QQQQ", log.read(32))
            if (sector, count, flags) == (0, 0, 0):
                break
            at += size
            data = b""
            if count and not flags & DISCARD:
                log.seek(at)
                data = log.read(count * size)
                at += count * size
            elif count:
                data = bytes(count * size)
            entries.append(Entry(sector * size // SECTOR, data, flags))
    return entries


class Logged:
    """A mounted, logged disk."""

    def __init__(self, log: Path, state: Path, oem: Path) -> None:
        self.log, self.state, self.oem = log, state, oem

    def so_far(self) -> list[Entry]:
        return parse(self.log)


@contextlib.contextmanager
def logged(base: Path, work: Path) -> Iterator[Logged]:
    """COS_STATE and COS_OEM of a copy of `base`, mounted with every write logged."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    disk, log, door = work / "disk", work / "log", work / "door"
    shutil.copyfile(base, disk)
    door.touch()
    with log.open("wb") as f:
        f.truncate(512 << 20)
    daemon = subprocess.Popen(
        [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=file,node-name=disk,filename={disk}",
            "--blockdev",
            f"driver=file,node-name=log,filename={log}",
            "--blockdev",
            "driver=blklogwrites,node-name=rec,file=disk,log=log,log-sector-size=512",
            "--export",
            f"type=fuse,id=door,node-name=rec,mountpoint={door},writable=on",
        ],
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 20
        while not os.path.ismount(door):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"qemu-storage-daemon: {daemon.poll()}")
            time.sleep(0.01)
        with mounted(door, STATE, work / "state") as state, mounted(door, OEM, work / "oem") as oem:
            if not (state / "cOS").is_dir() or not (oem / "grubenv").is_file():
                raise NotOurs("another disk is mounted here than the one just made")
            yield Logged(log, state, oem)
    finally:
        daemon.terminate()
        daemon.communicate(timeout=20)


def apply(entry: Entry, state: Changed, start: int = 0, end: int | None = None) -> None:
    """Put sectors [start, end) of that write into `state`."""
    count = len(entry.data) // SECTOR
    for n in range(start, count if end is None else end):
        state[entry.sector + n] = entry.data[n * SECTOR : (n + 1) * SECTOR]


def replay(entries: list[Entry]) -> Changed:
    state: Changed = {}
    for entry in entries:
        apply(entry, state)
    return state


def durable(entries: list[Entry]) -> int:
    """How many entries, from the first, are surely on the medium: up to the last flush."""
    return max((n + 1 for n, e in enumerate(entries) if e.flush), default=0)


def subset(base: Changed, loose: list[Entry], rng: random.Random) -> Changed:
    """`base` and a random part of `loose` in a random order, one of them torn half of the time."""
    state = dict(base)
    share = rng.choice((0.2, 0.5, 0.8))
    chosen = [e for e in loose if e.data and (e.flags & FUA or rng.random() < share)]
    rng.shuffle(chosen)
    torn = rng.choice(chosen) if chosen and rng.random() < 0.5 else None
    for entry in chosen:
        count = len(entry.data) // SECTOR
        if entry is torn and count > 1:
            cut = rng.randrange(1, count)
            apply(entry, state, *((0, cut) if rng.random() < 0.5 else (cut, count)))
        else:
            apply(entry, state)
    return state


def points(entries: list[Entry], subsets: int, rng: random.Random) -> Iterator[tuple[str, Changed]]:
    """Every flush boundary, each epoch's every prefix, and `subsets` random states in all, fairly spread."""
    epochs: list[tuple[Changed, list[Entry]]] = []
    done: Changed = {}
    loose: list[Entry] = []
    yield "start", {}
    for index, entry in enumerate(entries):
        if entry.flush:
            if loose:
                epochs.append((dict(done), loose))
            for e in loose:
                apply(e, done)
            apply(entry, done)
            loose = []
            yield f"flush {index}", dict(done)
        else:
            loose.append(entry)
    if loose:
        epochs.append((dict(done), loose))
    for number, (before, writes) in enumerate(epochs):
        state = dict(before)
        for n, entry in enumerate(writes):
            apply(entry, state)
            yield f"epoch {number} write {n}", dict(state)
    for n in range(subsets if epochs else 0):
        number = n % len(epochs)
        yield f"epoch {number} subset {n}", subset(*epochs[number], rng)

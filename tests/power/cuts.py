"""Operations to be cut, and the ways to cut them.

Two harnesses over the same logged disk (`blocklog`). *Steps*: the operation is run anew for each number of port
calls and stopped there; `dropped` is what was durable by then, `issued` what the disk had been sent, `kept` what
it has after the kernel wrote everything back (a sync, no more), `torn` random parts of the difference. *Blocks*:
one whole run, every flush boundary, every prefix and random subsets of what lies between flushes.

A state counts as unbootable when the judge says so, and also when recovery comes up although neither the
operator's own environment (unchanged) nor a swap's label flip asked for it.

One kind of state is counted apart and printed, `torn superblock`: ext4's own 1024-byte superblock, written by the
kernel whenever it likes, torn between its two 512-byte sectors. With metadata_csum Linux refuses to mount that
(e2fsck mends it from a backup), and no order of our writes bears on it: `test_a_mount_alone_...` shows the same
without any operation. Every other 512-byte tear counts in full.
"""

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cos_console.slots import checkpoint, recover, restore, switch
from cos_console.slots.port import MountedVolume, Place, RealPort, Volume
from cos_console.slots.switch import PASSIVE, TRANSITION, Guard, Move, Situation
from tests.power import blocklog, disks
from tests.power.disks import OEM, STATE, Slots
from tests.power.judge import SECTOR, Changed, Judge, Verdict
from tests.power.recorder import PowerCut, Recorder

ENV = Place(Volume.OEM, "grubenv")
SUPERBLOCK = (STATE.offset + 1024) // SECTOR
Operation = Callable[[Recorder], None]


@dataclass(frozen=True)
class Case:
    """An operation, the disk it starts from, and the record that its start has written."""

    name: str
    operation: Operation
    slots: Slots = field(default_factory=Slots)
    kind: str = "upgrade-keep-active"
    saved: str | None = None
    once: str | None = None
    block: int = 4096
    without: frozenset[str] = frozenset()
    situation: Situation = field(default_factory=Situation)


@dataclass
class Tally:
    tried: int = 0
    unbootable: int = 0
    torn_superblock: int = 0
    recovery: int = 0
    distinct: int = 0
    calls: int = 0
    repaired: int = 0
    unrepaired: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    why: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def count(self, case: Case, where: str, verdict: Verdict, *, torn: bool = False) -> bool:
        self.tried += 1
        if torn and "state does not mount" in verdict.why:
            self.torn_superblock += 1
            return False
        unasked = verdict.boots and verdict.entry == "recovery" and not _asked(case, verdict)
        if verdict.boots and verdict.entry == "recovery":
            self.recovery += 1
        if verdict.boots and not unasked:
            self.seen[f"{verdict.entry} {verdict.version}"] += 1
            return True
        self.unbootable += 1
        why = verdict.why or f"recovery boots unasked: {verdict}"
        self.why[why] += 1
        if len(self.examples) < 5:
            self.examples.append(f"{where}: {why}; saved={verdict.saved} next={verdict.once}")
        return False

    def __str__(self) -> str:
        return (
            f"{self.tried} points ({self.distinct} different disks), {self.unbootable} unbootable, {self.torn_superblock} torn superblock, "
            f"{self.recovery} by recovery; repaired {self.repaired}, not {self.unrepaired}; "
            f"boots {dict(self.seen)}; why {dict(self.why)} {self.examples}"
        )


def _asked(case: Case, verdict: Verdict) -> bool:
    as_before = (verdict.saved, verdict.once) == (case.saved or "", case.once or "")
    return as_before or (case.kind == "swap" and verdict.saved == "recovery" and not verdict.once)


def moves(*row: Move) -> Operation:
    return lambda port: switch.run(port, row, (ENV,))


def restore_active(port: Recorder) -> None:
    """Active from passive: reserve, copy, prove, label, then the switch that keeps passive."""
    restore.copy(port, PASSIVE, TRANSITION)
    restore.prove_equal(port, PASSIVE, TRANSITION)
    switch.label.set_label(port, TRANSITION, "COS_ACTIVE")
    port.checkpoint(Volume.STATE)
    switch.run(port, switch.upgrade(Situation(), keep_active=False), (ENV,))


def _port(mounted: blocklog.Logged | dict[str, Path]) -> tuple[RealPort, list[int]]:
    roots = {"state": mounted.state, "oem": mounted.oem} if isinstance(mounted, blocklog.Logged) else mounted
    fds = [os.open(roots[n], os.O_RDONLY | os.O_DIRECTORY) for n in ("state", "oem")]
    return RealPort({Volume.STATE: MountedVolume(fds[0]), Volume.OEM: MountedVolume(fds[1])}), fds


class Bench:
    """One case's base disk and judge."""

    def __init__(self, case: Case, work: Path) -> None:
        self.case, self.work = case, work
        self.base = work / "base"
        self.inodes = disks.make_disk(
            self.base, work / "make", slots=case.slots, block=case.block, saved=case.saved, once=case.once
        )
        self.judge = Judge(self.base, work / "judge")
        self.tally = Tally()
        self.rng = random.Random(case.name)
        self._repaired: set[bytes] = set()
        self._superblocks = {self._superblock({})}

    def run(self, cut: int | None) -> tuple[Recorder, list[blocklog.Entry], list[blocklog.Entry]]:
        for _ in range(3):
            try:
                return self._run(cut)
            except disks.NotOurs as error:  # raised before the operation begins, so nothing is passed over
                print(f"set up again: {error}")
        raise RuntimeError("another program keeps taking the loop devices")

    def _run(self, cut: int | None) -> tuple[Recorder, list[blocklog.Entry], list[blocklog.Entry]]:
        """The log at the cut, and after the kernel wrote back what it had."""
        with blocklog.logged(self.base, self.work / "log") as disk:
            port, fds = _port(disk)
            recorder = Recorder(port, cut=cut, without=self.case.without)
            try:
                try:
                    self.case.operation(recorder)
                except PowerCut:
                    pass
                at_cut = disk.so_far()
                for fd in fds:
                    os.fsync(fd)
                    checkpoint.syncfs(fd)
                after = disk.so_far()
                for entry in after:
                    alone: Changed = {}
                    blocklog.apply(entry, alone)
                    if SUPERBLOCK in alone and SUPERBLOCK + 1 in alone:
                        self._superblocks.add(self._superblock(alone))
                return recorder, at_cut, after
            finally:
                for fd in fds:
                    os.close(fd)

    def _superblock(self, state: Changed) -> bytes:
        """COS_STATE's superblock in that state."""
        return b"".join(
            state.get(n, self.judge.base[n * SECTOR : (n + 1) * SECTOR]) for n in (SUPERBLOCK, SUPERBLOCK + 1)
        )

    def look(self, where: str, state: Changed) -> None:
        torn = self._superblock(state) not in self._superblocks
        self.tally.count(self.case, where, self.judge.judge(state), torn=torn)
        self.tally.distinct = self.judge.distinct

    def steps(self, *, repair: bool = False) -> Tally:
        whole, _, _ = self.run(None)
        self.tally.calls = len(whole.calls)
        for cut in range(len(whole.calls) + 1):
            recorder, at_cut, after = self.run(cut)
            last = recorder.calls[-1] if recorder.calls else "nothing"
            sure = blocklog.durable(at_cut)
            dropped = blocklog.replay(at_cut[:sure])
            states = [
                ("dropped", dropped),
                ("issued", blocklog.replay(at_cut)),
                ("kept", blocklog.replay(after)),
                # what the kernel had only in memory at the cut may have been under way, in part
                ("torn", blocklog.subset(dropped, _first_epoch(after, sure), self.rng)),
                ("torn", blocklog.subset(dropped, _first_epoch(after, sure), self.rng)),
            ]
            for variant, state in states:
                where = f"{cut} calls, after {last}, {variant}"
                self.look(where, state)
                if repair and variant in ("dropped", "kept"):
                    for way in ("finish", "undo"):
                        self.repair(way, where, state)
        return self.tally

    def blocks(self, subsets: int) -> Tally:
        recorder, entries, _ = self.run(None)
        self.tally.calls = len(recorder.calls)
        for where, state in blocklog.points(entries, subsets, self.rng):
            self.look(where, state)
        return self.tally

    def repair(self, way: str, where: str, state: Changed) -> None:
        """What the next start does on the disk of a cut, then the judge again."""
        key = self.judge.key(state) + way.encode()
        if key in self._repaired:
            return
        self._repaired.add(key)
        case, disk = self.case, self.work / "repair"
        self.judge.write(state, disk)
        recorded = recover.Recorded(
            case.kind,
            self.inodes.get("active.img"),
            self.inodes.get("passive.img"),
            self.inodes.get("transition.img"),
            Guard(case.saved or "", case.once or ""),
        )
        with (
            disks.mounted(disk, STATE, self.work / "rs") as root,
            disks.mounted(disk, OEM, self.work / "ro") as oem,
        ):
            port, fds = _port({"state": root, "oem": oem})
            try:
                seen = recover.Observed(
                    *(
                        found.inode if (found := port.stat(Place(Volume.STATE, f"cOS/{n}.img"))) else None
                        for n in ("active", "passive", "retired", "transition")
                    )
                )
                decide = recover.finish if way == "finish" else recover.undo
                row = decide(seen, recorded, case.situation)
                if row is None:
                    return
                switch.run(port, row, (ENV,))
            finally:
                for fd in fds:
                    os.close(fd)
        verdict = self.judge.judge_file(disk)
        wanted = {"finish": "v0" if case.kind == "swap" else "v2", "undo": "v1"}[way]
        asked = case.saved in (None, "cos") and case.once in (None, "cos")
        if verdict.boots and (verdict.version == wanted or (way == "undo" and not asked)):
            self.tally.repaired += 1
        else:
            self.tally.unrepaired += 1
            self.tally.examples.append(f"{way} from {where}: {verdict}")


def _first_epoch(entries: list[blocklog.Entry], start: int) -> list[blocklog.Entry]:
    loose = []
    for entry in entries[start:]:
        if entry.flush:
            break
        loose.append(entry)
    return loose


__all__ = ["ENV", "Bench", "Case", "Tally", "moves", "restore_active"]

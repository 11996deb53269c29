"""Plain text for people: the status of a machine, and an operation line by line."""

import sys

import humanize
import msgspec

from cos_console import engine
from cos_console.model.event import (
    Finished,
    Note,
    OperationState,
    Progress,
    StepBegun,
    StepDone,
    Warned,
    fold,
)
from cos_console.model.machine import Installation, Machine


def status_text(machine: Machine) -> str:
    """Verdict-first text, one block an installation."""
    if not machine.installations:
        disks = ", ".join(d.path for d in machine.disks) or "none"
        return f"No cOS installation was found. Disks looked at: {disks}.\n" + _findings(machine)
    blocks = [_installation(n, len(machine.installations), i) for n, i in enumerate(machine.installations, 1)]
    return "\n".join(blocks) + _findings(machine)


def _installation(number: int, count: int, inst: Installation) -> str:
    disk = inst.disk
    facts = "  ".join(
        p
        for p in (
            disk.model,
            humanize.naturalsize(disk.size_bytes),
            f"SN {disk.serial}" if disk.serial else "",
        )
        if p
    )
    state = inst.partition(inst.state_partition)
    lines = [
        f"Installation {number} of {count}   {disk.path}   {facts}",
        f"  {inst.title or inst.layout.value}, layout {inst.layout.value}, COS_STATE {state.part_uuid if state else '-'}",
    ]
    for s in inst.slots:
        size = humanize.naturalsize(s.size_bytes) if s.size_bytes else "-"
        marks = " (running)" if s.running else ""
        lines.append(
            f"  {s.name.value:9} {s.version or '-':14} {s.state.value:12} {size:>9}  {s.created[:10]}{marks}"
        )
        lines += [f"            {f.what}" for f in s.findings]
    first = inst.boot.next.value if inst.boot.next else "nothing"
    line = f"  next boot: {first}"
    if inst.boot.after is not None and inst.boot.after is not inst.boot.next:
        line += f" (once), then {inst.boot.after.value}"
    if inst.boot.if_fails:
        line += "; if that fails: " + ", ".join(s.value for s in inst.boot.if_fails)
    lines.append(line)
    lines += [f"  left over: {x.path}: {x.meaning} {x.way_out}" for x in inst.leftovers]
    lines += [f"  {f.severity.value}: {f.what} {f.now}".rstrip() for f in inst.findings]
    return "\n".join(lines) + "\n"


def _findings(machine: Machine) -> str:
    return "".join(f"{f.severity.value}: {f.what} {f.now}".rstrip() + "\n" for f in machine.findings)


def follow_to_end(handle: engine.OperationHandle, *, as_json: bool) -> int:
    """Show an operation until it ends; its exit code. Ctrl-C leaves: the operation goes on."""
    state = OperationState()
    shown = -1
    bar = sys.stderr.isatty() and not as_json
    try:
        for event in engine.follow(handle):
            state = fold(state, event)
            if as_json:
                sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
                sys.stdout.flush()
                continue
            match event:
                case StepBegun():
                    shown = -1
                    _line(bar, f"{_title(state, event.index)} ...")
                case StepDone():
                    _line(
                        bar,
                        f"{_title(state, event.index)}: done" + (f" ({event.note})" if event.note else ""),
                    )
                case Progress():
                    shown = _progress(bar, event, shown)
                case Note(text=text) | Warned(text=text):
                    _line(bar, text)
                case _:
                    pass
    except KeyboardInterrupt:
        print(
            "\nThe operation goes on. Watch it with: cos-console attach. Stop it with: cos-console cancel",
            file=sys.stderr,
        )
        return 130
    finished = state.finished
    if finished is None:
        return 1
    if not as_json:
        _end(bar, finished)
    return finished.exit_code


def _end(bar: bool, finished: Finished) -> None:
    if finished.problem is not None:
        p = finished.problem
        _line(bar, p.what)
        print(f"{p.unchanged}\n{p.now}  ({p.code})")
    else:
        _line(bar, finished.text)
        if finished.facts.get("signature"):
            print(finished.facts["signature"])
    f = finished.facts
    print(
        f"COS-RESULT rc={finished.exit_code} action={f.get('action', '')} from={f.get('from', '')} to={f.get('to', '')}"
        f" digest={f.get('digest', '')}"
    )


def _title(state: OperationState, index: int) -> str:
    return state.steps[index].title if 0 <= index < len(state.steps) else "?"


def _progress(bar: bool, event: Progress, shown: int) -> int:
    percent = 100 * event.bytes_done // event.bytes_total if event.bytes_total else 0
    words = (
        f"  {percent:3} %  {humanize.naturalsize(event.bytes_done)} of {humanize.naturalsize(event.bytes_total)}"
        f"  {humanize.naturalsize(event.rate_bps)}/s  {event.detail}"
    )
    if event.waiting_s > 5:
        words += f"  last byte {event.waiting_s:.0f} s ago"
    if bar:
        sys.stderr.write(f"\r\033[K{words[:79]}")
        sys.stderr.flush()
    elif percent // 10 > shown:
        print(words)
    return percent // 10


def _line(bar: bool, text: str) -> None:
    if bar:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()
    print(text, flush=True)

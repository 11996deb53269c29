"""The events of an operation from the first to the last, for any reader, at any time."""

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cos_console.engine.control import OperationHandle
from cos_console.model.event import Event, Finished, NeedsAttention, Result
from cos_console.model.problem import ExitCode

_DECODER = msgspec.json.Decoder(Event)
_GRACE_S = 3.0


def follow(handle: OperationHandle | Path, *, poll_s: float = 0.1) -> Iterator[Event]:
    """All events, then new ones as they come; ends after `finished`.

    When the engine's process is gone without an end, a `needs-attention` and a `finished` are made here.
    """
    directory = handle.directory if isinstance(handle, OperationHandle) else handle
    path = directory / "events.jsonl"
    rest = b""
    offset = 0
    gone_since = 0.0
    while True:
        try:
            with path.open("rb") as f:
                f.seek(offset)
                data = f.read()
        except FileNotFoundError:
            data = b""
        offset += len(data)
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            try:
                event = _DECODER.decode(line)
            except msgspec.MsgspecError:
                continue  # a torn line, or an event of a newer release
            yield event
            if isinstance(event, Finished):
                return
        if data:
            continue
        if _alive(directory):
            gone_since = 0.0
        elif gone_since == 0.0:
            gone_since = time.monotonic()
        elif time.monotonic() - gone_since > _GRACE_S:
            now = stamp()
            text = "The engine is gone without an end: the operation was interrupted."
            yield NeedsAttention(time=now, text=text + " Look with: cos-console status")
            yield Finished(time=now, result=Result.FAILED, text=text, exit_code=int(ExitCode.ATTENTION))
            return
        time.sleep(poll_s)


def stamp() -> str:
    """RFC 3339 UTC with milliseconds."""
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"


def _alive(directory: Path) -> bool:
    """A killed engine that its starter has not reaped yet is a zombie, and gone."""
    try:
        pid = int((directory / "pid").read_text())
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return False
    return state not in {"Z", "X"}

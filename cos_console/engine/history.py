"""What was done to an installation: JSON lines on its own COS_STATE, at most 100, read without a mount."""

import msgspec

from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.readat import FormatError, Window
from cos_console.host.trees import Sources
from cos_console.model.machine import Installation

HISTORY_FILE = "cOS/.cos-console-history.jsonl"


class HistoryEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One operation that ended."""

    id: str
    time: str
    action: str
    result: str
    exit_code: int
    text: str
    from_version: str = ""
    to_version: str = ""
    digest: str = ""
    signature: str = ""


def history(installation: Installation) -> list[HistoryEntry]:
    """Oldest first; empty when there is none or it can't be read."""
    state = installation.partition(installation.state_partition)
    if state is None:
        return []
    sources = Sources()
    try:
        disk = sources.open(installation.disk.path)
        fs = Ext4.open(Window(disk, state.start_bytes, state.size_bytes), journal="replay")
        data = fs.read_file(HISTORY_FILE, 1 << 20)
    except (OSError, FormatError):
        return []
    finally:
        sources.close()
    found = []
    for line in data.splitlines():
        try:
            found.append(msgspec.json.decode(line, type=HistoryEntry))
        except msgspec.MsgspecError:
            continue
    return found

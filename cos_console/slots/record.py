"""The record of one operation, beside the images: `cOS/.cos-console.json`.

Written whole under a temporary name, fsynced, renamed and checkpointed, so a reader finds the old one or the
new one. It names each image by its inode and keeps the environment blocks as they were.
"""

import msgspec

from cos_console.model.plan import Plan
from cos_console.slots.port import Place, Port, Volume

RECORD = Place(Volume.STATE, "cOS/.cos-console.json")
_TEMPORARY = RECORD.beside(".cos-console.json.new")
_LIMIT = 4 << 20


class Record(msgspec.Struct, frozen=True, kw_only=True):
    version: int = 1
    operation: str
    kind: str
    """upgrade-keep-active, upgrade-keep-passive, swap (`recover.Recorded`)."""
    stage: str
    """filling, proven, switching."""
    plan: Plan
    active_inode: int | None
    passive_inode: int | None
    new_inode: int | None = None
    """Set with stage proven: from then on the operation can be finished."""
    new_digest: str = ""
    saved_entry: str = ""
    next_entry: str = ""
    """As GRUB would have had them before."""
    environment: dict[str, bytes] = {}
    """Each block as it was, by `str(Place)`."""


def write(port: Port, record: Record) -> None:
    """Replace the record. Raises OSError."""
    if port.stat(_TEMPORARY) is not None:
        port.unlink(_TEMPORARY)
    port.create(_TEMPORARY)
    port.write_at(_TEMPORARY, 0, msgspec.json.encode(record))
    port.fsync_file(_TEMPORARY)
    port.rename(_TEMPORARY, RECORD)
    port.fsync_dir(RECORD.directory)
    port.checkpoint(RECORD.volume)


def read(port: Port) -> Record | None:
    """None when there is none. Raises msgspec.MsgspecError when it is not one of ours."""
    found = port.stat(RECORD)
    if found is None:
        return None
    return msgspec.json.decode(port.read(RECORD, 0, min(found.size_bytes, _LIMIT)), type=Record)


def drop(port: Port) -> None:
    """Remove the record, and a half-written one. Raises OSError."""
    for place in (_TEMPORARY, RECORD):
        if port.stat(place) is not None:
            port.unlink(place)
    port.fsync_dir(RECORD.directory)
    port.checkpoint(RECORD.volume)

"""What a plan rests on, taken from a look."""

import hashlib
import json

from cos_console.model.machine import BootFile, Installation, SlotName
from cos_console.model.plan import Facts


def facts_of(inst: Installation) -> Facts:
    """What a plan for `inst` rests on; the engine compares them with a fresh look."""
    state = inst.partition(inst.state_partition)
    return Facts(
        disk_path=inst.disk.path,
        disk_id=inst.disk.disk_id,
        part_uuid=state.part_uuid if state else "",
        slots={n.value: (slot.identity if (slot := inst.slot(n)) else None) for n in SlotName},
        environment={f"{f.partition}:{f.path}": _environment_digest(f) for f in inst.boot_files},
        boots_next=inst.boot.next,
        running=inst.running,
        leftovers=tuple(sorted(x.path for x in inst.leftovers)),
    )


def _environment_digest(file: BootFile) -> str:
    return hashlib.sha256(json.dumps(sorted(file.variables.items())).encode()).hexdigest()

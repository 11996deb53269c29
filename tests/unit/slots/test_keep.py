"""Which slot an upgrade keeps."""

import pytest

from cos_console.model.machine import (
    BootOutlook,
    Disk,
    Installation,
    Layout,
    Slot,
    SlotName,
    SlotState,
    TableKind,
)
from cos_console.slots.keep import choose_keep

S, D = SlotState.SOUND, SlotState.DAMAGED
A, P = SlotName.ACTIVE, SlotName.PASSIVE


def installation(active: SlotState, passive: SlotState, running: SlotName | None, saved: str) -> Installation:
    slots = tuple(
        Slot(
            name=name, file=f"cOS/{name}.img", state=state, label="", expected_label="", fs_type="ext2",
            os_release=None, size_bytes=1, allocated_bytes=1, created="", identity=None, running=name is running,
        )
        for name, state in ((A, active), (P, passive))
    )  # fmt: skip
    disk = Disk(
        path="/dev/x", name="x", model="", serial="", size_bytes=1, sector_bytes=512, table=TableKind.GPT,
        disk_id="", partitions=(),
    )  # fmt: skip
    return Installation(
        id="x", disk=disk, layout=Layout.COS, state_partition=1, recovery_partition=None, oem_partition=None,
        persistent_partition=None, boot_partition=None, slots=slots,
        boot=BootOutlook(next=None, after=None, if_fails=(), saved_entry=saved), boot_files=(), leftovers=(),
        findings=(), state_free_bytes=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("active", "passive", "running", "saved", "kept"),
    [
        (S, S, A, "fallback", A),
        (S, S, P, "cos", P),
        (D, S, None, "cos", P),
        (S, D, None, "fallback", A),
        (S, S, None, "fallback", P),
        (S, S, None, "", A),
        (D, D, None, "", None),
    ],
)
def test_the_running_slot_is_kept_then_the_sound_one_then_the_default(
    active: SlotState, passive: SlotState, running: SlotName | None, saved: str, kept: SlotName | None
) -> None:
    assert choose_keep(installation(active, passive, running, saved)) is kept

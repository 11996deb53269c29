"""Machines, requests and images of every shape, for the planner's property tests."""

from hypothesis import strategies as st

from cos_console.model.image import ImageReference, ResolvedImage, Transport, parse_digest
from cos_console.model.machine import (
    BootedFrom,
    BootOutlook,
    Disk,
    Installation,
    Layout,
    Leftover,
    Machine,
    OsRelease,
    Slot,
    SlotName,
    SlotState,
    TableKind,
)
from cos_console.model.plan import Action, Request

MIB = 1 << 20
_LABELS = {SlotName.ACTIVE: "COS_ACTIVE", SlotName.PASSIVE: "COS_PASSIVE", SlotName.RECOVERY: "COS_SYSTEM"}
_sizes = st.integers(1, 4000).map(lambda n: n * MIB)


def slot(
    name: SlotName,
    state: SlotState = SlotState.SOUND,
    *,
    version: str = "1.0",
    size: int = 24 * MIB,
    fs: str = "ext2",
    running: bool = False,
    labels: bool = True,
) -> Slot:
    return Slot(
        name=name,
        file=f"cOS/{name.value}.img",
        state=state,
        label=_LABELS[name],
        expected_label=_LABELS[name] if labels else "",
        fs_type=fs,
        os_release=OsRelease(version=version) if version else None,
        size_bytes=size,
        allocated_bytes=size * 3 // 4,
        created="",
        identity=None,
        running=running,
    )


def installation(
    slots: tuple[Slot, ...],
    *,
    free: int = 200 * MIB,
    saved: str = "",
    reads: bool = True,
    leftovers: tuple[Leftover, ...] = (),
    layout: Layout = Layout.COS,
) -> Installation:
    disk = Disk(
        path="/dev/x", name="x", model="MODEL", serial="1", size_bytes=1, sector_bytes=512, table=TableKind.GPT,
        disk_id="", partitions=(),
    )  # fmt: skip
    boot = BootOutlook(
        next=SlotName.ACTIVE,
        after=SlotName.ACTIVE,
        if_fails=(),
        saved_entry=saved,
        reads_environment=reads,
    )
    return Installation(
        id="x", disk=disk, layout=layout, state_partition=1, recovery_partition=None, oem_partition=None,
        persistent_partition=None, boot_partition=None, slots=slots, boot=boot, boot_files=(),
        leftovers=leftovers, findings=(), state_free_bytes=free,
    )  # fmt: skip


def machine(inst: Installation) -> Machine:
    return Machine(
        scanned_at="", hostname="", product="", serial="", booted_from=BootedFrom.OTHER, firmware="efi",
        architecture="amd64", disks=(inst.disk,), installations=(inst,),
    )  # fmt: skip


def image(transfer: int = 10 * MIB, unpacked: int | None = None, version: str = "2.0") -> ResolvedImage:
    digest = parse_digest("sha256:" + "0" * 64)
    return ResolvedImage(
        reference=ImageReference(Transport.DOCKER, "registry.example/os:2.0"), digest=digest, config_digest=digest,
        platform=None, layers=(), version=version, created="", transfer_bytes=transfer, unpacked_bytes=unpacked,
    )  # fmt: skip


def leftover(kind: str, repair: str = "undo", size: int = 0) -> Leftover:
    return Leftover(kind=kind, path=f"cOS/{kind}", meaning="m", way_out="w", repair=repair, size_bytes=size)


@st.composite
def installations(draw: st.DrawFn) -> Installation:
    names = draw(st.sets(st.sampled_from(list(SlotName))))
    runs = draw(st.sampled_from([None, *SlotName]))
    labels = draw(st.booleans())
    slots = tuple(
        slot(
            name,
            draw(st.sampled_from([SlotState.SOUND, SlotState.SOUND, *SlotState])),
            version=draw(st.sampled_from(["", "1.0", "2.0"])),
            size=draw(_sizes),
            fs="squashfs" if name is SlotName.RECOVERY and draw(st.booleans()) else "ext2",
            running=name is runs,
            labels=labels,
        )
        for name in SlotName
        if name in names
    )
    kinds = draw(
        st.sets(st.sampled_from(["transition-image", "retired-image", "operation-record"]), max_size=2)
    )
    return installation(
        slots,
        free=draw(st.integers(0, 8000)) * MIB + draw(st.integers(0, MIB)),
        saved=draw(st.sampled_from(["", "cos", "fallback", "recovery", "odd"])),
        reads=draw(st.booleans()),
        leftovers=tuple(
            leftover(k, size=draw(_sizes) if k == "transition-image" else 0) for k in sorted(kinds)
        ),
        layout=draw(st.sampled_from([Layout.COS, Layout.COS, *Layout])),
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    return Request(
        action=draw(st.sampled_from(list(Action))),
        installation="x",
        target_slot=draw(st.sampled_from([None, *SlotName])),
        try_once=draw(st.booleans()),
        keep=draw(st.sampled_from([None, None, SlotName.ACTIVE, SlotName.PASSIVE])),
        image_size_bytes=draw(st.none() | st.integers(1, 5000 * MIB)),
        remove_passive_first=draw(st.booleans()),
        swap_by_copy=draw(st.booleans()),
    )


images = st.builds(image, st.integers(0, 3000 * MIB), st.none() | st.integers(0, 4000 * MIB))

"""What was found on a machine: disks, partitions, installations, slots. Values only; `host/` makes them.

`status --json` prints a `Machine`; its JSON Schema is generated from these types.
"""

from enum import StrEnum

import msgspec

SCHEMA_VERSION = "cos-console/v1"


class Severity(StrEnum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something the operator should know about a thing that was looked at, with the way out."""

    code: str
    """Stable: COS-SLOT-NO-KERNEL, COS-LEFTOVER-TRANSITION, COS-LOOKS-DISAGREE, ..."""
    severity: Severity
    what: str
    now: str = ""
    """The way out, one sentence; empty when there is nothing to do."""


class TableKind(StrEnum):
    GPT = "gpt"
    MBR = "mbr"
    NONE = "none"


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    number: int
    start_bytes: int
    size_bytes: int
    name: str
    """GPT partition name; empty on MBR."""
    part_uuid: str
    """As udev writes it: GPT GUID in lower case, or MBR `xxxxxxxx-nn`."""
    device: str
    """Device node such as /dev/sda3; empty inside an image file without a loop device."""
    fs_type: str
    """From the superblock, not from udev: ext2, ext3, ext4, vfat, squashfs, btrfs, xfs, luks, or empty."""
    fs_label: str
    fs_uuid: str
    flags: tuple[str, ...] = ()
    """esp, bios_grub, boot, ..."""


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    """/dev/sda, or the path of a whole-disk image file."""
    name: str
    """sda, loop3, or the image's file name."""
    model: str
    serial: str
    size_bytes: int
    sector_bytes: int
    table: TableKind
    disk_id: str
    """GPT disk GUID or MBR signature."""
    partitions: tuple[Partition, ...]
    is_image_file: bool = False
    removable: bool = False
    read_only: bool = False
    findings: tuple[Finding, ...] = ()


class Layout(StrEnum):
    COS = "cos"
    ELEMENTAL_V1 = "elemental-v1"
    KAIROS = "kairos"
    HARVESTER = "harvester"
    ELEMENTAL_V2 = "elemental-v2"
    """Snapshotter (btrfs or loopdevice): recognised, never changed."""
    KAIROS_UKI = "kairos-uki"
    """Recognised, never changed."""
    VANILLA = "vanilla"
    """Only a recovery partition, or a state partition without /cOS."""
    UNKNOWN = "unknown"

    @property
    def handled(self) -> bool:
        """Whether this tool changes installations of that layout."""
        return self in {Layout.COS, Layout.ELEMENTAL_V1, Layout.KAIROS, Layout.HARVESTER}


class SlotName(StrEnum):
    ACTIVE = "active"
    PASSIVE = "passive"
    RECOVERY = "recovery"


class SlotState(StrEnum):
    SOUND = "sound"
    """File, label and content agree; kernel, initrd and bootargs are there and readable."""
    MISLABELLED = "mislabelled"
    DAMAGED = "damaged"
    MISSING = "missing"
    UNKNOWN = "unknown"


class OsRelease(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of os-release(5) that we show; `fields` has them all."""

    name: str = ""
    version: str = ""
    """IMAGE_VERSION, else VERSION_ID, else VERSION (os-release(5)); cOS puts its own release in VERSION."""
    pretty_name: str = ""
    fields: dict[str, str] = {}


class FileIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Tells one image file from another whatever its name: what a plan's facts rest on."""

    inode: int
    size_bytes: int
    mtime_ns: int
    fs_uuid: str
    """UUID in the image's own superblock; empty for squashfs."""


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    name: SlotName
    file: str
    """Path inside its partition: cOS/active.img, cOS/recovery.squashfs."""
    state: SlotState
    label: str
    """As found in the image's superblock; empty for squashfs."""
    expected_label: str
    """COS_ACTIVE, ... or empty where this layout does not find the root by label."""
    fs_type: str
    os_release: OsRelease | None
    size_bytes: int
    """Length of the file."""
    allocated_bytes: int
    """Blocks it takes on its partition."""
    created: str
    """RFC 3339 UTC: when the image's file system was made (s_mkfs_time), or empty."""
    identity: FileIdentity | None
    running: bool = False
    """The root file system of this machine is on this image (told by the loop device's inode)."""
    kernel: str = ""
    initrd: str = ""
    """Paths inside the image that its bootargs.cfg names, when they exist."""
    findings: tuple[Finding, ...] = ()

    @property
    def version(self) -> str:
        return self.os_release.version if self.os_release else ""


class BootFile(msgspec.Struct, frozen=True, kw_only=True):
    """One GRUB environment block that the installed GRUB may load."""

    partition: int
    """Partition number on the installation's disk."""
    path: str
    """Inside that partition: grubenv, grub_oem_env."""
    variables: dict[str, str]
    valid: bool
    rank: int
    """Order of loading; a higher one overrides a lower one."""


class BootOutlook(msgspec.Struct, frozen=True, kw_only=True):
    """What GRUB will choose, by its own rules, from what is on the disk now."""

    next: SlotName | None
    """The slot of the next boot; None when nothing chosen can boot or the choice is not a slot."""
    after: SlotName | None
    """The slot of the boot after that one (differs while next_entry is set)."""
    if_fails: tuple[SlotName, ...]
    """GRUB-level fallback order after `next`."""
    next_entry: str = ""
    saved_entry: str = ""
    reads_environment: bool = True
    """False for cOS 0.5.3, whose grub.cfg loads no environment block."""
    explained: str = ""
    """One sentence: why this one."""
    chosen: SlotName | None = None
    """What GRUB tries first; differs from `next` when GRUB itself can't load that one and falls back."""


class Leftover(msgspec.Struct, frozen=True, kw_only=True):
    """What an interrupted operation left, its meaning and the way out."""

    kind: str
    """transition-image, retired-image, operation-record, missing-active, missing-passive, ..."""
    path: str
    meaning: str
    way_out: str
    repair: str
    """The action that mends it: finish, undo, relabel, restore; empty when none is offered."""
    size_bytes: int = 0


class Installation(msgspec.Struct, frozen=True, kw_only=True):
    """One installed system: the partitions of one disk that belong together."""

    id: str
    """Stable while the disk keeps its table: PARTUUID of COS_STATE, else disk path and partition number."""
    disk: Disk
    layout: Layout
    state_partition: int | None
    recovery_partition: int | None
    oem_partition: int | None
    persistent_partition: int | None
    boot_partition: int | None
    """COS_GRUB, EFI system or BIOS boot partition."""
    slots: tuple[Slot, ...]
    boot: BootOutlook
    boot_files: tuple[BootFile, ...]
    leftovers: tuple[Leftover, ...]
    findings: tuple[Finding, ...]
    """Including the disagreement between GRUB's and Linux's look."""
    state_free_bytes: int
    """Free on COS_STATE for root, now."""
    recovery_free_bytes: int = 0
    state_mounted_at: str = ""
    """Where COS_STATE is mounted on this machine, if it is."""
    title: str = ""
    """GRUB's title for the system (default_menu_entry), or the layout's name."""

    def slot(self, name: SlotName) -> Slot | None:
        return next((s for s in self.slots if s.name is name), None)

    def partition(self, number: int | None) -> Partition | None:
        return next((p for p in self.disk.partitions if p.number == number), None)

    @property
    def running(self) -> SlotName | None:
        """The slot this machine runs from, if it is one of these."""
        return next((s.name for s in self.slots if s.running), None)


class BootedFrom(StrEnum):
    ACTIVE = "active"
    PASSIVE = "passive"
    RECOVERY = "recovery"
    LIVECD = "livecd"
    OTHER = "other"


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one scan saw. A recorded one (JSON) runs the console without the hardware."""

    api_version: str = SCHEMA_VERSION
    scanned_at: str
    """RFC 3339 UTC."""
    hostname: str
    product: str
    """Vendor and model from DMI, or empty."""
    serial: str
    booted_from: BootedFrom
    firmware: str
    """efi or bios."""
    architecture: str
    """As OCI names it: amd64, arm64, ..."""
    disks: tuple[Disk, ...]
    installations: tuple[Installation, ...]
    findings: tuple[Finding, ...] = ()

    def installation(self, installation_id: str) -> Installation | None:
        return next((i for i in self.installations if i.id == installation_id), None)

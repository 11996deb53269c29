"""The superblock of ext2/3/4 as a value.

Source: Linux Documentation/filesystems/ext4/super.rst; names of the features as e2fsprogs writes them.
"""

import struct
import uuid
from dataclasses import dataclass

from cos_console.formats.readat import FormatError

INCOMPAT_NAMES = {
    0x0001: "compression",
    0x0002: "filetype",
    0x0004: "needs_recovery",
    0x0008: "journal_dev",
    0x0010: "meta_bg",
    0x0040: "extent",
    0x0080: "64bit",
    0x0100: "mmp",
    0x0200: "flex_bg",
    0x0400: "ea_inode",
    0x1000: "dirdata",
    0x2000: "metadata_csum_seed",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}
_COMPAT_NAMES = {
    0x0001: "dir_prealloc",
    0x0004: "has_journal",
    0x0008: "ext_attr",
    0x0010: "resize_inode",
    0x0020: "dir_index",
    0x0200: "sparse_super2",
    0x0400: "fast_commit",
    0x0800: "stable_inodes",
    0x1000: "orphan_file",
}
_RO_COMPAT_NAMES = {
    0x0001: "sparse_super",
    0x0002: "large_file",
    0x0008: "huge_file",
    0x0010: "uninit_bg",
    0x0020: "dir_nlink",
    0x0040: "extra_isize",
    0x0100: "quota",
    0x0200: "bigalloc",
    0x0400: "metadata_csum",
    0x1000: "read-only",
    0x2000: "project",
    0x8000: "verity",
    0x10000: "orphan_present",
}


@dataclass(frozen=True)
class Superblock:
    """The fields of the primary superblock that we use. Times are seconds since 1970, sizes in bytes."""

    label: str
    uuid: str
    block_bytes: int
    blocks: int
    free_blocks: int
    reserved_blocks: int
    inodes: int
    blocks_per_group: int
    inodes_per_group: int
    inode_bytes: int
    first_data_block: int
    descriptor_bytes: int
    clean: bool
    errors: bool
    needs_recovery: bool
    mkfs_time: int
    write_time: int
    compat: int
    incompat: int
    ro_compat: int
    first_meta_bg: int
    journal_inode: int

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def features(self) -> tuple[str, ...]:
        """Names as dumpe2fs writes them; a feature without a name as `incompat:0x...`."""
        names: list[str] = []
        for word, table, kind in (
            (self.compat, _COMPAT_NAMES, "compat"),
            (self.incompat, INCOMPAT_NAMES, "incompat"),
            (self.ro_compat, _RO_COMPAT_NAMES, "ro_compat"),
        ):
            bits = (1 << n for n in range(32) if word >> n & 1)
            names += [table.get(bit, f"{kind}:{bit:#x}") for bit in bits]
        return tuple(names)


def parse_superblock(raw: bytes) -> Superblock:
    """From the 1024 bytes at offset 1024. Raises FormatError."""
    if len(raw) < 1024 or raw[56:58] != b"\x53\xef":
        raise FormatError("no ext2/3/4 superblock")
    (inodes, blocks, reserved, free) = struct.unpack_from("<4I", raw, 0)
    first_data, log_block = struct.unpack_from("<II", raw, 20)
    (bpg,) = struct.unpack_from("<I", raw, 32)
    (ipg,) = struct.unpack_from("<I", raw, 40)
    (wtime,) = struct.unpack_from("<I", raw, 48)
    state, _ = struct.unpack_from("<HH", raw, 58)
    (revision,) = struct.unpack_from("<I", raw, 76)
    inode_bytes = struct.unpack_from("<H", raw, 88)[0] if revision else 128
    compat, incompat, ro_compat = struct.unpack_from("<3I", raw, 92)
    (journal_inode,) = struct.unpack_from("<I", raw, 224)
    descriptor = struct.unpack_from("<H", raw, 254)[0] if incompat & 0x80 else 32
    (first_meta,) = struct.unpack_from("<I", raw, 260)
    (mkfs_time,) = struct.unpack_from("<I", raw, 264)
    if incompat & 0x80:
        high = struct.unpack_from("<3I", raw, 336)
        blocks |= high[0] << 32
        reserved |= high[1] << 32
        free |= high[2] << 32
    if log_block > 6:
        raise FormatError(f"impossible block size 2^{10 + log_block}")
    block_bytes = 1024 << log_block
    if not (bpg and ipg) or inode_bytes < 128 or inode_bytes > block_bytes or inode_bytes & (inode_bytes - 1):
        raise FormatError("the superblock's geometry is impossible")
    if descriptor < 32 or descriptor > block_bytes or blocks <= first_data:
        raise FormatError("the superblock's geometry is impossible")
    return Superblock(
        label=raw[120:136].split(b"\0", 1)[0].decode("utf-8", "replace"),
        uuid=str(uuid.UUID(bytes=raw[104:120])),
        block_bytes=block_bytes,
        blocks=blocks,
        free_blocks=free,
        reserved_blocks=reserved,
        inodes=inodes,
        blocks_per_group=bpg,
        inodes_per_group=ipg,
        inode_bytes=inode_bytes,
        first_data_block=first_data,
        descriptor_bytes=descriptor,
        clean=bool(state & 1),
        errors=bool(state & 2),
        needs_recovery=bool(incompat & 4),
        mkfs_time=mkfs_time,
        write_time=wtime,
        compat=compat,
        incompat=incompat,
        ro_compat=ro_compat,
        first_meta_bg=first_meta,
        journal_inode=journal_inode,
    )

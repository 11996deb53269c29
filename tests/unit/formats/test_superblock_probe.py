"""Which file system is it: held against blkid on what the real mkfs tools make."""

import os
import shutil
import struct
import subprocess
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cos_console.formats.readat import BytesReadAt, FileReadAt
from cos_console.formats.superblock import Probe, probe

TOOLS = {
    "ext2": ["mke2fs", "-q", "-F", "-t", "ext2", "-L", "COS_ACTIVE"],
    "ext3": ["mke2fs", "-q", "-F", "-t", "ext3", "-L", "COS_STATE"],
    "ext4": ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "COS_STATE"],
    "ext4 of an old tool": ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^64bit,^metadata_csum", "-L", "x"],
    "vfat 16": ["mkfs.vfat", "-F", "16", "-n", "COS_GRUB"],
    "vfat 32": ["mkfs.vfat", "-F", "32", "-n", "COS_GRUB"],
    "vfat 32 without a name": ["mkfs.vfat", "-F", "32"],
    "vfat 4Kn": ["mkfs.vfat", "-F", "32", "-S", "4096", "-s", "1", "-n", "EFI"],
    "swap": ["mkswap", "-q", "-L", "swap"],
    "xfs": ["mkfs.xfs", "-q", "-L", "COS_STATE"],
    "btrfs": ["mkfs.btrfs", "-q", "-L", "COS_STATE"],
}


@pytest.mark.parametrize("argv", TOOLS.values(), ids=TOOLS)
def test_the_probe_says_what_blkid_says(tmp_path: Path, argv: list[str]) -> None:
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    image = tmp_path / "image"
    with image.open("wb") as f:
        f.truncate(320 << 20)
    subprocess.run([*argv, image], check=True, capture_output=True)
    said = subprocess.run(["blkid", "-p", "-o", "export", image], check=True, capture_output=True, text=True)
    wanted = dict(line.split("=", 1) for line in said.stdout.splitlines())
    fd = os.open(image, os.O_RDONLY)
    try:
        found = probe(FileReadAt(fd))
    finally:
        os.close(fd)
    assert (found.fs_type, found.label, found.uuid) == (
        wanted["TYPE"], wanted.get("LABEL", ""), wanted.get("UUID", "")
    )  # fmt: skip


@pytest.mark.skipif(shutil.which("xorriso") is None, reason="xorriso is not installed")
def test_squashfs_and_iso_are_told_apart(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("x")
    subprocess.run(
        ["mksquashfs", root, tmp_path / "s", "-quiet", "-no-progress"], check=True, capture_output=True
    )
    subprocess.run(
        ["xorriso", "-as", "mkisofs", "-V", "COS_LIVE", "-o", tmp_path / "i", root],
        check=True,
        capture_output=True,
    )
    assert probe(BytesReadAt((tmp_path / "s").read_bytes())).fs_type == "squashfs"
    assert probe(BytesReadAt((tmp_path / "i").read_bytes())) == Probe("iso9660", "COS_LIVE", "")


def ext4_bytes(tmp_path: Path) -> bytearray:
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-L", "COS_STATE", tmp_path / "e", "4M"], check=True)
    return bytearray((tmp_path / "e").read_bytes())


@pytest.mark.parametrize("version", ["1.0", "1.2", "0.90"])
def test_a_raid_member_is_no_file_system_of_its_own(tmp_path: Path, version: str) -> None:
    """Metadata at the end leaves the ext4 in front to be seen; taking it for a disk of its own would split the pair."""
    disk = ext4_bytes(tmp_path)
    at = {"1.0": (len(disk) // 512 - 16) * 512, "1.2": 4096, "0.90": (len(disk) & ~65535) - 65536}[version]
    ident = uuid.uuid4()
    if version == "0.90":
        disk[at : at + 8] = struct.pack("<II", 0xA92B4EFC, 0)
        disk[at + 20 : at + 24], disk[at + 52 : at + 64] = ident.bytes[:4], ident.bytes[4:]
    else:
        disk[at : at + 72] = struct.pack("<III4x16s32s8x", 0xA92B4EFC, 1, 0, ident.bytes, b"host:0")
    found = probe(BytesReadAt(bytes(disk)))
    assert (found.fs_type, found.uuid) == ("md", str(ident))
    assert found.label == ("" if version == "0.90" else "host:0")


def test_containers_are_told_before_what_is_left_in_them(tmp_path: Path) -> None:
    luks = ext4_bytes(tmp_path)
    luks[:8] = b"LUKS\xba\xbe\x00\x02"
    luks[24:72] = b"COS_PERSISTENT".ljust(48, b"\0")
    luks[168:208] = b"0d7d4d10-7b1c-4f8e-9f0c-2f7a2f4b1c11".ljust(40, b"\0")
    assert probe(BytesReadAt(bytes(luks))) == Probe(
        "luks", "COS_PERSISTENT", "0d7d4d10-7b1c-4f8e-9f0c-2f7a2f4b1c11"
    )
    lvm = ext4_bytes(tmp_path)
    lvm[512:1024] = (b"LABELONE" + struct.pack("<QII", 1, 0, 32) + b"LVM2 001" + b"a" * 32).ljust(512, b"\0")
    assert probe(BytesReadAt(bytes(lvm))) == Probe("lvm2", "", "aaaaaa-aaaa-aaaa-aaaa-aaaa-aaaa-aaaaaa")


def test_a_partition_table_is_no_file_system() -> None:
    mbr = bytearray(1 << 20)
    mbr[446:462] = bytes.fromhex("80000101830000000008000000f80700")
    mbr[510:512] = b"\x55\xaa"
    assert probe(BytesReadAt(bytes(mbr))) == Probe("")


@given(st.binary(max_size=3000))
def test_any_bytes_give_an_answer(data: bytes) -> None:
    assert isinstance(probe(BytesReadAt(data)).fs_type, str)
    for magic, at in (
        (b"\x53\xef", 1080),
        (b"hsqs", 0),
        (b"XFSB", 0),
        (b"\x55\xaa", 510),
        (b"LUKS\xba\xbe", 0),
    ):
        marked = bytearray(data.ljust(at, b"\0"))
        marked[at : at + len(magic)] = magic
        assert isinstance(probe(BytesReadAt(bytes(marked))).fs_type, str)

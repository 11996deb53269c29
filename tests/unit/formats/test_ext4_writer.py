"""The ext4 writer in memory, read again by our reader and judged by e2fsck."""

import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from cos_console.formats.ext4 import layout, writer, writer_dirs, writer_xattr
from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.layers import Node, Tree
from cos_console.formats.readat import BytesReadAt, FileReadAt, FormatError

MIB = 1 << 20


def file(data_runs: tuple[tuple[int, int, int], ...] = (), size: int = 0, mode: int = 0o644) -> Node:
    node = Node(stat.S_IFREG | mode)
    node.runs, node.size = data_runs, size
    return node


def tree_of(**children: Node) -> Tree:
    tree = Tree()
    assert tree.root.children is not None
    tree.root.children.update({name.encode(): node for name, node in children.items()})
    return tree


def directory(names: dict[bytes, Node]) -> Node:
    return Node(stat.S_IFDIR | 0o755, 0, names)


def write(path: Path, tree: Tree, size: int = 16 * MIB, label: str = "TEST") -> writer.Written:
    geo = layout.geometry(size)
    used = writer.claimed(geo, tree)
    with path.open("w+b") as f:
        f.truncate(size)

        def put(block: int, data: bytes) -> None:
            assert len(data) % layout.BLOCK == 0
            f.seek(block * layout.BLOCK)
            f.write(data)

        return writer.Ext4Writer(geo, tree, used, layout.gaps(used, geo.blocks), put).write_tree(
            label=label, uuid=bytes(range(16)), created_s=1_700_000_000
        )


def check(path: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", str(path)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "hole" not in done.stdout
    assert "ptimize" not in done.stdout


def debugfs(path: Path, command: str) -> str:
    return subprocess.run(
        ["debugfs", "-R", command, str(path)], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize(
    "size", [MIB, 5 * MIB, 128 * MIB, 129 * MIB, 128 * MIB + 4096 * 30, 3240 * MIB, 20 << 30]
)
def test_an_empty_file_system_of_any_size_is_clean(tmp_path: Path, size: int) -> None:
    made = write(tmp_path / "fs", Tree(), size)
    check(tmp_path / "fs")
    assert (made.directories, made.files) == (2, 0)


def test_only_features_that_old_readers_know_are_set(tmp_path: Path) -> None:
    write(tmp_path / "fs", Tree())
    shown = subprocess.run(
        ["dumpe2fs", "-h", str(tmp_path / "fs")], check=True, capture_output=True, text=True
    ).stdout
    features = next(line for line in shown.splitlines() if line.startswith("Filesystem features:"))
    assert set(features.split(":")[1].split()) == {
        "ext_attr", "dir_index", "filetype", "extent", "flex_bg", "sparse_super", "large_file", "dir_nlink",
        "extra_isize",
    }  # fmt: skip
    assert "Filesystem state:         clean" in shown


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, tree_of(a=file(), b=directory({b"c": file()})))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("pieces", [1, 4, 5, 340, 4 * 340, 4 * 340 + 1])
def test_extent_trees_of_every_depth(tmp_path: Path, pieces: int) -> None:
    start = 2000
    runs = tuple((n * 3, start + n * 2, 1) for n in range(pieces))
    write(tmp_path / "fs", tree_of(f=file(runs, pieces * 3 * 4096)), 64 * MIB)
    check(tmp_path / "fs")
    with (tmp_path / "fs").open("r+b") as f:
        for n in range(pieces):
            f.seek((start + n * 2) * 4096)
            f.write(struct.pack("<I", n) * 1024)
    data = subprocess.run(
        ["debugfs", "-R", "cat /f", str(tmp_path / "fs")], check=True, capture_output=True
    ).stdout
    assert data == b"".join(struct.pack("<I", n) * 1024 + bytes(8192) for n in range(pieces))


def test_a_file_larger_than_an_extent_and_one_of_holes_only(tmp_path: Path) -> None:
    tree = tree_of(big=file(((0, 40_000, 50_000),), 50_000 * 4096), holes=file((), 15 << 40))
    write(tmp_path / "fs", tree, 512 * MIB)
    check(tmp_path / "fs")
    assert "Size: 16492674416640" in debugfs(tmp_path / "fs", "stat holes")
    assert "(0-32767):40000-72767, (32768-49999):72768-89999" in debugfs(tmp_path / "fs", "stat big")


@pytest.mark.parametrize("count", [400, 3_000, 5_000, 60_000])
def test_directories_linear_and_indexed(tmp_path: Path, count: int) -> None:
    names = {b"%d-\xc3\xbcml\xff" % n: file() for n in range(count)}
    write(tmp_path / "fs", tree_of(many=directory(names)), 256 * MIB)
    check(tmp_path / "fs")
    fd = os.open(tmp_path / "fs", os.O_RDONLY)
    try:
        ext = Ext4.open(FileReadAt(fd))
        assert len(ext.listdir("many")) == count
    finally:
        os.close(fd)
    assert ("Flags: 0x81000" in debugfs(tmp_path / "fs", "stat many")) == (count >= 5_000)


def test_an_index_of_two_levels(tmp_path: Path) -> None:
    """Long names fill the leaves quickly: the root can't name them all."""
    one = file()
    one_name = {b"%07d" % n + b"x" * 240: one for n in range(12_000)}
    write(tmp_path / "fs", tree_of(many=directory(one_name)), 64 * MIB)
    check(tmp_path / "fs")
    assert "Indirect levels: 1" in debugfs(tmp_path / "fs", "htree_dump many")


def test_the_hash_is_that_of_e2fsprogs() -> None:
    for name in ("a", "hello", "x" * 200, "lib/with.dots-and_more"):
        shown = subprocess.run(
            ["debugfs", "-R", f"dx_hash -h legacy {name}"], check=True, capture_output=True, text=True
        ).stdout
        assert int(shown.split(" is ")[1].split()[0], 16) == writer_dirs.name_hash(name.encode())


def test_more_subdirectories_than_a_link_count_holds(tmp_path: Path) -> None:
    write(tmp_path / "fs", tree_of(d=directory({b"%d" % n: directory({}) for n in range(65_100)})), 640 * MIB)
    check(tmp_path / "fs")
    assert "Links: 1 " in debugfs(tmp_path / "fs", "stat d")


def test_a_file_with_too_many_names_is_refused_by_name(tmp_path: Path) -> None:
    one = file()
    with pytest.raises(FormatError, match=r"^/d/\d+: 65001 names"):
        write(tmp_path / "fs", tree_of(d=directory({b"%d" % n: one for n in range(65_001)})), 64 * MIB)


def test_inodes_are_made_for_what_the_tree_has(tmp_path: Path) -> None:
    """A gigabyte with 16 KiB for each inode would hold 65,536 files."""
    made = write(
        tmp_path / "fs", tree_of(d=directory({b"%d" % n: file() for n in range(100_000)})), 1024 * MIB
    )
    assert made.files == 100_000
    check(tmp_path / "fs")
    with pytest.raises(FormatError, match="files; an image of this size numbers 32768"):
        write(tmp_path / "no", tree_of(d=directory({b"%d" % n: file() for n in range(40_000)})), 100 * MIB)


def test_a_file_system_without_room_for_its_tables_says_so(tmp_path: Path) -> None:
    with pytest.raises(writer.NoRoom):
        write(tmp_path / "fs", tree_of(d=directory({b"%d" % n: file() for n in range(5_000)})), MIB)


def test_blocks_used_twice_are_noticed() -> None:
    with pytest.raises(ValueError, match="used twice"):
        writer.claimed(
            layout.geometry(16 * MIB), tree_of(a=file(((0, 100, 5),), 1), b=file(((0, 104, 1),), 1))
        )


def test_lost_and_found_of_an_image_is_taken_as_it_is_and_no_file_may_have_that_name(tmp_path: Path) -> None:
    tree = Tree()
    assert tree.root.children is not None
    tree.root.children[b"lost+found"] = directory({b"kept": file()})
    write(tmp_path / "fs", tree)
    check(tmp_path / "fs")
    assert "kept" in debugfs(tmp_path / "fs", "ls /lost+found")
    tree.root.children[b"lost+found"] = file()
    with pytest.raises(FormatError, match=r"lost\+found"):
        write(tmp_path / "fs", tree)


def test_attributes_in_the_inode_in_a_block_and_in_a_shared_block(tmp_path: Path) -> None:
    small = {b"security.capability": b"c" * 20}
    large = {
        b"user.big": b"v" * 3000,
        b"security.selinux": b"system_u:object_r:bin_t:s0\0",
        b"user.empty": b"",
    }
    nodes = {}
    for n in range(1500):
        node = file()
        node.xattrs = dict(large)
        nodes[b"l%d" % n] = node
    one = file()
    one.xattrs = dict(small)
    nodes[b"small"] = one
    made = write(tmp_path / "fs", tree_of(d=directory(nodes)), 64 * MIB)
    assert made.blocks < 2000, "equal blocks are shared"
    check(tmp_path / "fs")
    shown = debugfs(tmp_path / "fs", "ea_list /d/l1499")
    assert "user.big (3000)" in shown
    assert "security.selinux (27)" in shown
    assert "user.empty (0)" in shown
    assert "security.capability (20)" in debugfs(tmp_path / "fs", "ea_list /d/small")
    assert "File ACL: 0" in debugfs(tmp_path / "fs", "stat /d/small")


def acl(*entries: tuple[int, int, int]) -> bytes:
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *e) for e in entries)


def test_an_access_acl_decides_the_mode_as_setting_one_does() -> None:
    none = 0xFFFFFFFF
    name = b"system.posix_acl_access"
    full = writer_xattr.pack(
        {name: acl((1, 6, none), (2, 7, 5), (4, 7, none), (16, 4, none), (32, 0, none))}, 0o100777
    )
    assert full.mode == 0o100640
    assert full.inline[4:].startswith(struct.pack("<BB", 0, 2))
    plain = writer_xattr.pack({name: acl((1, 7, none), (4, 5, none), (32, 1, none))}, 0o104000)
    assert (plain.mode, plain.inline, plain.block) == (0o104751, b"", b"")
    for bad in (b"", b"\x02\0\0\0abc", acl((3, 1, 1)), acl((1, 9, 1))):
        with pytest.raises(FormatError):
            writer_xattr.pack({name: bad}, 0o100644)


def test_attributes_that_no_ext4_takes_are_left_out_and_told(tmp_path: Path) -> None:
    link = Node(stat.S_IFLNK | 0o777)
    link.link = b"target"
    link.xattrs = {b"user.x": b"y", b"security.selinux": b"c\0"}
    odd = file()
    odd.xattrs = {b"system.nfs4_acl": b"a", b"user.ok": b"1", b"user.": b""}
    made = write(tmp_path / "fs", tree_of(link=link, odd=odd))
    assert set(made.dropped) == {"/link: user.x", "/odd: system.nfs4_acl", "/odd: user."}
    check(tmp_path / "fs")


def test_attributes_that_are_too_many_are_refused_by_name(tmp_path: Path) -> None:
    node = file()
    node.xattrs = {b"user.a": b"x" * 4000, b"user.b": b"x" * 200}
    with pytest.raises(FormatError, match=r"^/big: .* bytes of extended attributes"):
        write(tmp_path / "fs", tree_of(big=node))


def test_a_label_of_seventeen_bytes_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "fs", Tree(), label="s" * 16)
    with pytest.raises(ValueError, match="at most 16"):
        write(tmp_path / "fs", Tree(), label="s" * 17)


@pytest.mark.parametrize("size", [0, MIB - 1, 16 << 40])
def test_sizes_that_can_not_be(size: int) -> None:
    with pytest.raises(ValueError, match="between 1 MiB and 16 TiB"):
        layout.geometry(size)


def test_our_own_reader_takes_it_from_memory(tmp_path: Path) -> None:
    link = Node(stat.S_IFLNK | 0o777)
    link.link = b"/etc/" + b"long/" * 20
    write(tmp_path / "fs", tree_of(etc=directory({}), link=link))
    ext = Ext4.open(BytesReadAt((tmp_path / "fs").read_bytes()))
    assert ext.superblock.label == "TEST"
    assert set(ext.listdir("")) >= {"etc", "link", "lost+found"} or set(ext.listdir("/")) >= {"etc", "link"}

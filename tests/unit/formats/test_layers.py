"""Layers merged by the image spec's rules, and what no layer may do."""

import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cos_console.formats import tar
from cos_console.formats.layers import Node, Tree, clean
from cos_console.formats.readat import FormatError
from cos_console.formats.tar import TarEntry


def entry(
    name: str, kind: bytes = tar.REGULAR, *, link: str = "", mode: int | None = None, size: int = 0
) -> TarEntry:
    default = 0o755 if kind == tar.DIRECTORY else 0o644
    return TarEntry(
        name.encode(), kind, default if mode is None else mode, 1, 2, 3, size, link.encode(), None, 0, 0, ()
    )


def d(name: str, mode: int = 0o755) -> TarEntry:
    return entry(name, tar.DIRECTORY, mode=mode)


def f(name: str, size: int = 0) -> TarEntry:
    """`size` tells one file from another."""
    return entry(name, size=size)


def sym(name: str, link: str) -> TarEntry:
    return entry(name, tar.SYMLINK, link=link)


def hard(name: str, link: str) -> TarEntry:
    return entry(name, tar.HARDLINK, link=link)


def merged(*layers: list[TarEntry]) -> Tree:
    tree = Tree()
    for layer in layers:
        tree.apply(layer)
    return tree


def listing(tree: Tree) -> dict[str, object]:
    """Path to size, link target or None for a directory; without the root."""
    return {
        path.decode()[1:]: None if node.is_dir else (node.link.decode() if node.is_symlink else node.size)
        for path, node in tree.walk()
        if path != b"/"
    }


def test_a_whiteout_hides_what_lies_below_wherever_it_stands_in_its_layer() -> None:
    lower = [d("a"), f("a/old", 1), f("a/both", 2)]
    for upper in (
        [entry("a/.wh.old"), entry("a/.wh.both"), f("a/both", 9)],
        [f("a/both", 9), entry("a/.wh.both"), entry("a/.wh.old")],
    ):
        assert listing(merged(lower, upper)) == {"a": None, "a/both": 9}


def test_an_opaque_directory_keeps_only_its_own_layers_files() -> None:
    lower = [d("a", 0o700), d("a/sub"), f("a/sub/x", 1), f("a/old", 1)]
    for upper in (
        [entry("a/.wh..wh..opq"), f("a/new", 2), f("a/sub/y", 3)],
        [f("a/new", 2), f("a/sub/y", 3), entry("a/.wh..wh..opq")],
    ):
        tree = merged(lower, upper)
        assert listing(tree) == {"a": None, "a/new": 2, "a/sub": None, "a/sub/y": 3}
        assert (tree.find("a") or Node(0)).mode == stat.S_IFDIR | 0o700


def test_a_whiteout_goes_through_links_of_the_layers_below() -> None:
    tree = merged([d("usr/lib"), sym("lib", "usr/lib"), f("usr/lib/x", 1)], [entry("lib/.wh.x")])
    assert listing(tree) == {"usr": None, "usr/lib": None, "lib": "usr/lib"}


def test_a_whiteout_of_nothing_is_nothing() -> None:
    assert listing(merged([f("a", 1)], [entry(".wh.b"), entry("c/d/.wh.e"), entry("a/.wh.x")])) == {"a": 1}


@pytest.mark.parametrize("name", [".wh.", "a/.wh..", "a/.wh..."])
def test_a_whiteout_that_names_its_own_directory_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        merged([d("a"), f("a/x")], [entry(name)])


def test_aufs_bookkeeping_is_left_out() -> None:
    assert listing(merged([d(".wh..wh.plnk"), f(".wh..wh.plnk/1.2", 1), f(".wh..wh.aufs"), f("x", 1)])) == {
        "x": 1
    }


def test_types_change_between_layers() -> None:
    tree = merged(
        [d("dir"), f("dir/in", 1), f("file", 1), sym("link", "file"), sym("link2", "dir")],
        [f("dir", 5), d("file"), f("file/in", 6), f("link", 7), d("link2"), f("link2/in", 8)],
    )
    assert listing(tree) == {
        "dir": 5, "file": None, "file/in": 6, "link": 7, "link2": None, "link2/in": 8,
    }  # fmt: skip


def test_a_link_has_no_permissions_of_its_own() -> None:
    tree = merged([entry("l", tar.SYMLINK, link="x", mode=0o4600)])
    assert (tree.root.children or {})[b"l"].mode == stat.S_IFLNK | 0o777


def test_a_directory_entry_keeps_the_content_and_takes_the_new_mode() -> None:
    tree = merged([d("a", 0o700), f("a/x", 1)], [d("a", 0o1777)])
    assert listing(tree) == {"a": None, "a/x": 1}
    assert (tree.find("a") or Node(0)).mode == stat.S_IFDIR | 0o1777


def test_the_last_of_two_equal_names_in_a_layer_wins() -> None:
    assert listing(merged([f("a", 1), f("a", 2), sym("b", "x"), f("b", 3)])) == {"a": 2, "b": 3}


def test_missing_parents_are_made_plain() -> None:
    tree = merged([f("a/b/c", 1)])
    made = tree.find("a/b")
    assert made is not None
    assert (made.mode, made.uid, made.gid) == (stat.S_IFDIR | 0o755, 0, 0)


@pytest.mark.parametrize("target", ["usr/lib", "/usr/lib", "./usr/../usr/lib/", "../../usr/lib"])
def test_a_usr_merged_link_is_followed_and_stays_a_link(target: str) -> None:
    tree = merged([d("usr/lib"), sym("lib", target)], [f("lib/x", 1), f("lib/y/z", 2)])
    assert listing(tree) == {
        "usr": None, "usr/lib": None, "lib": target, "usr/lib/x": 1, "usr/lib/y": None, "usr/lib/y/z": 2,
    }  # fmt: skip


def test_a_link_to_nowhere_gets_its_directory_made_where_it_points() -> None:
    assert listing(merged([sym("a", "b/c"), f("a/x", 1)])) == {"a": "b/c", "b": None, "b/c": None, "b/c/x": 1}


def test_a_replaced_link_is_not_followed_any_more() -> None:
    tree = merged([d("one"), sym("l", "one"), f("l/x", 1), d("l"), f("l/y", 2)])
    assert listing(tree) == {"one": None, "one/x": 1, "l": None, "l/y": 2}


def test_hard_links_share_one_node_across_layers_and_keep_it_when_the_first_name_goes() -> None:
    tree = merged([f("a", 1), hard("b", "a")], [hard("c", "/b"), f("a", 2)], [entry(".wh.b")])
    assert listing(tree) == {"a": 2, "c": 1}
    tree = merged([f("a", 1)], [hard("b", "a"), entry(".wh.a")])
    assert listing(tree) == {"b": 1}
    tree = merged([f("a", 1)], [entry(".wh.a"), hard("b", "a")])
    assert listing(tree) == {"b": 1}
    tree = merged([f("d/e/a", 1)], [hard("d/b", "d/e/a"), entry(".wh.d")])
    assert listing(tree) == {"d": None, "d/b": 1}


def test_a_hard_link_to_a_link_is_the_link() -> None:
    tree = merged(
        [
            sym("s", "t"),
            hard("h", "s"),
            d("usr/bin"),
            sym("bin", "usr/bin"),
            f("bin/x", 1),
            hard("y", "bin/x"),
        ]
    )
    assert (tree.root.children or {})[b"h"] is (tree.root.children or {})[b"s"]
    assert listing(tree)["y"] == 1


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ([f("../x")], r"^\.\./x: leads above"),
        ([f("a/../../x")], "a/../../x: leads above"),
        ([f("/etc/passwd")], "/etc/passwd: an absolute name"),
        ([sym("l", "l"), f("l/x")], "l/x: more than 40 symbolic links"),
        ([sym("l", "m"), sym("m", "l"), f("l/x")], "l/x: more than 40 symbolic links"),
        ([f("a"), f("a/b")], "a/b: its parent is not a directory"),
        ([f("a"), sym("l", "a/b"), f("l/c")], "l/c: its parent is not a directory"),
        ([hard("a", "b")], "a: a hard link to b, which is not there"),
        ([hard("a", "a")], "which is not there"),
        ([d("a"), hard("b", "a")], "b: a hard link to a directory"),
        ([hard("b", "../../a")], "b: leads above"),
        ([f("./")], "the root can only be a directory"),
        ([sym(".", "x")], "the root can only be a directory"),
        ([sym("a", "")], "a: a symbolic link to nothing"),
        ([f("n" * 256)], "longer than 255"),
        ([f("a/" * 1100 + "b")], "directories deep"),
    ],
)
def test_what_no_layer_may_do_is_refused_with_the_entry_named(layer: list[TarEntry], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        merged(layer)


def test_forty_links_in_a_row_are_still_followed() -> None:
    chain = [d("end"), *(sym(f"l{n}", f"l{n + 1}" if n < 39 else "end") for n in range(40))]
    assert listing(merged(chain, [f("l0/x", 1)]))["end/x"] == 1
    with pytest.raises(FormatError):
        merged(chain, [sym("l", "l0"), f("l/x", 1)])


def test_a_links_own_dots_stop_at_the_root_as_for_a_process_inside() -> None:
    tree = merged(
        [sym("a", "../../../b"), f("a/x", 1), d("c/d"), sym("c/e", "../../../../c/d"), f("c/e/y", 2)]
    )
    assert listing(tree)["b/x"] == 1
    assert listing(tree)["c/d/y"] == 2


def test_directories_are_ensured_through_links_and_nothing_is_overwritten() -> None:
    tree = merged([f("oem", 1), d("usr"), sym("usr/local", "/var/local"), d("proc", 0o555)])
    for path in ("oem", "usr/local", "proc", "mnt"):
        tree.ensure_directory(path)
    found = listing(tree)
    assert (found["oem"], found["usr/local"], found["var/local"], found["mnt"]) == (
        1,
        "/var/local",
        None,
        None,
    )
    assert (tree.find("proc") or Node(0)).mode == stat.S_IFDIR | 0o555


@pytest.mark.parametrize(
    ("name", "path"),
    [(b"./a/b/", b"a/b"), (b"a//b", b"a/b"), (b"a/./b", b"a/b"), (b"a/c/../b", b"a/b"), (b"./", b""), (b".", b""),
     (b"a/.hidden", b"a/.hidden"), (b"..a/b..", b"..a/b.."), (b"a/...", b"a/...")],
)  # fmt: skip
def test_names_are_cleaned_as_text(name: bytes, path: bytes) -> None:
    assert clean(name) == path


# --- against a model: plain paths, no links --------------------------------------------------------------------

_NAMES = st.sampled_from("abc")
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map("/".join)
_ENTRIES = st.one_of(
    st.tuples(st.just("file"), _PATHS),
    st.tuples(st.just("dir"), _PATHS),
    st.tuples(st.just("gone"), _PATHS),
    st.tuples(st.just("opaque"), _PATHS),
)


def model(layers: list[list[tuple[str, str]]]) -> dict[str, object] | None:
    """Path to content, over path strings instead of a tree; None where a parent is a file."""
    world: dict[str, object] = {}
    serial = 0
    for layer in layers:
        for what, path in layer:
            if what == "gone":
                world = {p: v for p, v in world.items() if p != path and not p.startswith(path + "/")}
            elif what == "opaque" and world.get(path, 0) is None:
                world = {p: v for p, v in world.items() if not p.startswith(path + "/")}
        for what, path in layer:
            if what not in {"file", "dir"}:
                continue
            serial += 1
            parts = path.split("/")
            for n in range(1, len(parts)):
                if world.setdefault("/".join(parts[:n]), None) is not None:
                    return None
            if what == "file" or world.get(path, 0) is not None:
                world = {p: v for p, v in world.items() if not p.startswith(path + "/")}
            world[path] = serial if what == "file" else None
    return world


@settings(max_examples=400, deadline=None)
@given(st.lists(st.lists(_ENTRIES, max_size=7), min_size=1, max_size=4))
def test_merging_is_what_the_model_says(layers: list[list[tuple[str, str]]]) -> None:
    made: list[list[TarEntry]] = []
    serial = 0
    for layer in layers:
        entries = []
        for what, path in layer:
            head, _, last = path.rpartition("/")
            base = head + "/" if head else ""
            if what in {"file", "dir"}:
                serial += 1
            entries.append(
                {
                    "file": lambda path=path, serial=serial: f(path, serial),
                    "dir": lambda path=path: d(path),
                    "gone": lambda base=base, last=last: entry(f"{base}.wh.{last}"),
                    "opaque": lambda path=path: entry(f"{path}/.wh..wh..opq"),
                }[what]()
            )
        made.append(entries)
    expected = model(layers)
    if expected is None:
        with pytest.raises(FormatError, match="not a directory"):
            merged(*made)
    else:
        assert listing(merged(*made)) == expected

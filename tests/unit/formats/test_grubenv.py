"""The environment block, held against the real grub-editenv."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cos_console.formats import grubenv
from cos_console.formats.readat import FormatError

names = st.text("abcxyz_019", min_size=1, max_size=12)
values = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=40)
blocks = st.dictionaries(names, values, max_size=6)


def editenv(path: Path, *words: str) -> str:
    done = subprocess.run(["grub-editenv", str(path), *words], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "surrogateescape")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=blocks, second=blocks)
def test_grub_editenv_reads_what_we_write(
    tmp_path: Path, first: dict[str, str], second: dict[str, str]
) -> None:
    block = grubenv.change(grubenv.empty_block(), dict(first))
    block = grubenv.change(block, dict(second))
    assert len(block) == 1024
    wanted = {**first, **second}
    assert grubenv.variables(block) == wanted
    path = tmp_path / "grubenv"
    path.write_bytes(block)
    listed = editenv(path, "list")
    assert listed == "".join(f"{k}={v}\n" for k, v in grubenv.variables(block).items())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=blocks, name=names, value=values)
def test_setting_as_grub_editenv_does(tmp_path: Path, first: dict[str, str], name: str, value: str) -> None:
    path = tmp_path / "grubenv"
    path.write_bytes(grubenv.change(grubenv.empty_block(), dict(first)))
    ours = grubenv.change(path.read_bytes(), {name: value})
    editenv(path, "set", f"{name}={value}")
    assert grubenv.variables(path.read_bytes()) == grubenv.variables(ours)


def test_other_keys_and_the_warning_line_stay(tmp_path: Path) -> None:
    path = tmp_path / "grubenv"
    editenv(path, "create")
    editenv(path, "set", "extra_cmdline=fips=1 selinux=0", "saved_entry=cos")
    before = path.read_bytes()
    after = grubenv.change(before, {"saved_entry": "fallback", "next_entry": None})
    assert grubenv.variables(after) == {"extra_cmdline": "fips=1 selinux=0", "saved_entry": "fallback"}
    assert after.count(b"# WARNING") == before.count(b"# WARNING")


def test_duplicates_end_with_the_last_and_are_removed_when_changed() -> None:
    block = (grubenv.SIGNATURE + b"a=1\nb=2\na=3\n").ljust(1024, b"#")
    assert grubenv.variables(block) == {"a": "3", "b": "2"}
    assert grubenv.variables(grubenv.change(block, {"a": "4"})) == {"a": "4", "b": "2"}
    assert grubenv.variables(grubenv.change(block, {"a": None})) == {"b": "2"}


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FormatError, match="1024"):
        grubenv.change(grubenv.empty_block(), {"a": "x" * 1000})


def test_a_block_filled_to_the_last_byte_is_legal() -> None:
    room = 1024 - len(grubenv.SIGNATURE) - len("a=\n")
    block = grubenv.change(grubenv.empty_block(), {"a": "x" * room})
    assert grubenv.variables(block) == {"a": "x" * room}


def test_nul_padding_becomes_hashes() -> None:
    block = (grubenv.SIGNATURE + b"a=1\n").ljust(1024, b"\0")
    assert grubenv.variables(block) == {"a": "1"}
    assert b"\0" not in grubenv.change(block, {"b": "2"})


@given(st.binary(max_size=1100))
def test_random_bytes_raise_only_a_format_error(data: bytes) -> None:
    for block in (data, grubenv.SIGNATURE + data):
        try:
            grubenv.variables(block)
            grubenv.change(block, {"a": "b"})
        except FormatError:
            pass


choices = st.sampled_from(["cos", "fallback", "recovery", "", None])
fillers = st.lists(st.tuples(names, st.text("xyz =#", max_size=150)), max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(before=fillers, after=fillers, flips=st.lists(st.tuples(choices, choices), min_size=1, max_size=6))
def test_flips_leave_all_else_and_grub_reads_them_the_same(
    tmp_path: Path,
    before: list[tuple[str, str]],
    after: list[tuple[str, str]],
    flips: list[tuple[str | None, str | None]],
) -> None:
    lines = [*before, ("saved_entry", "recovery"), ("next_entry", "fallback"), *after]
    body = grubenv.SIGNATURE + "".join(f"{k}={v}\n" for k, v in lines).encode()
    if len(body) > 1024:
        return
    block = body.ljust(1024, b"#")
    others = {k: v for k, v in grubenv.variables(block).items() if not k.endswith("_entry")}
    path = tmp_path / "grubenv"
    for saved, following in flips:
        wanted = others | {
            k: v for k, v in (("saved_entry", saved), ("next_entry", following)) if v is not None
        }
        try:
            block = grubenv.change(block, {"saved_entry": saved, "next_entry": following})
        except FormatError:
            assert len(body) > 980
            return
        assert grubenv.variables(block) == wanted
        path.write_bytes(block)
        listed = dict(line.split("=", 1) for line in editenv(path, "list").splitlines())
        assert listed == wanted
        editenv(path, "set", "next_entry=")  # what GRUB does at the boot
        assert grubenv.variables(path.read_bytes()) == wanted | {"next_entry": ""}


def test_flipping_to_a_shorter_name_and_back_touches_one_sector_of_a_full_block() -> None:
    body = grubenv.SIGNATURE + b"saved_entry=fallback\nnext_entry=recovery\n" + b"x=" + b"y" * 900 + b"\n"
    block = body.ljust(1024, b"#")
    flipped = grubenv.change(block, {"saved_entry": "cos", "next_entry": ""})
    assert grubenv.changed_sectors(block, flipped) == (0,)
    assert grubenv.variables(flipped) == {"saved_entry": "cos", "next_entry": "", "x": "y" * 900}
    back = grubenv.change(flipped, {"saved_entry": "fallback", "next_entry": "recovery"})
    assert grubenv.changed_sectors(flipped, back) == (0,)
    assert grubenv.variables(back) == grubenv.variables(block)


def test_a_line_without_equals_spoils_the_next_one_as_in_grub(tmp_path: Path) -> None:
    block = (grubenv.SIGNATURE + b"junk\nsaved_entry=cos\nb=2\n").ljust(1024, b"#")
    assert "saved_entry" not in grubenv.variables(block)
    assert any("without =" in f for f in grubenv.faults(block))
    mended = grubenv.change(block, {"saved_entry": "fallback"})
    assert grubenv.variables(mended) == {"saved_entry": "fallback", "b": "2"}
    assert grubenv.faults(mended) == ()


def test_every_fault_is_named() -> None:
    assert grubenv.faults(grubenv.empty_block()) == ()
    assert "signature" in grubenv.faults(bytes(1024))[0]
    assert "the last one counts" in grubenv.faults((grubenv.SIGNATURE + b"a=1\na=2\n").ljust(1024, b"#"))[0]
    assert "padded" in grubenv.faults((grubenv.SIGNATURE + b"a=1\n").ljust(1024, b"\0"))[0]
    assert "512 bytes" in grubenv.faults(grubenv.SIGNATURE.ljust(512, b"#"))[0]

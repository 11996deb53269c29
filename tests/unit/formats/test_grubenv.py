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


def test_flipping_the_choice_touches_one_sector() -> None:
    block = grubenv.change(grubenv.empty_block(), {"saved_entry": "cos", "next_entry": "", "x": "y" * 600})
    flipped = grubenv.change(block, {"saved_entry": "cos", "next_entry": ""})
    assert grubenv.changed_sectors(block, flipped) == ()

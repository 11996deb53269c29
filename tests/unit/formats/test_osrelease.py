"""os-release(5), held against the shell that the format is made for."""

import subprocess
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cos_console.formats import osrelease


def test_quotes_escapes_and_comments() -> None:
    text = """
# a comment
NAME="cOS"
VERSION='0.7.3-4 "plain"'
ID=cos
PRETTY_NAME="cost \\"\\$5\\" \\`x\\` \\\\ end"
not an assignment
=nothing
EMPTY=
  SPACED=yes
"""
    assert osrelease.parse(text.encode()) == {
        "NAME": "cOS", "VERSION": '0.7.3-4 "plain"', "ID": "cos", "PRETTY_NAME": 'cost "$5" `x` \\ end',
        "EMPTY": "", "SPACED": "yes",
    }  # fmt: skip


def test_the_version_is_the_image_s_own_before_the_distribution_s() -> None:
    assert osrelease.version({"VERSION": "0.7.3", "VERSION_ID": "15.3"}) == "0.7.3"
    assert osrelease.version({"IMAGE_VERSION": "7", "VERSION": "0.7.3"}) == "7"
    assert osrelease.version({"VERSION_ID": "15.3"}) == "15.3"
    assert osrelease.version({}) == ""


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_characters="\x7f\x85"), max_size=30)
)
def test_a_quoted_value_is_what_a_shell_makes_of_it(tmp_path: Path, value: str) -> None:
    quoted = '"' + "".join("\\" + c if c in '\\"$`' else c for c in value) + '"'
    file = tmp_path / "os-release"
    file.write_text(f"VALUE={quoted}\n")
    by_shell = subprocess.run(
        ["sh", "-c", '. "$1"; printf %s "$VALUE"', "sh", file], check=True, capture_output=True
    )
    assert osrelease.parse(file.read_bytes())["VALUE"] == by_shell.stdout.decode()


@given(st.binary(max_size=500))
def test_any_bytes_give_a_dictionary(data: bytes) -> None:
    assert isinstance(osrelease.parse(data), dict)

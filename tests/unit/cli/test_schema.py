"""What the README and the assets promise is what the types and the command line say."""

from pathlib import Path

import msgspec

from cos_console.cli.main import _CODE_WORDS, parser
from cos_console.model.machine import Machine
from cos_console.model.problem import ExitCode

ROOT = Path(__file__).parents[3]


def test_the_status_schema_is_the_one_of_the_types() -> None:
    made = (
        msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Machine), order="deterministic")) + b"\n"
    )
    stored = ROOT / "assets/status.schema.json"
    assert stored.read_bytes() == made, "write it anew: python -m tests.unit.cli.test_schema"


def test_every_exit_code_is_in_the_help_and_in_the_readme() -> None:
    text = parser().format_help()
    readme = (ROOT / "README.md").read_text()
    for code in ExitCode:
        assert f"{code.value:2}  {_CODE_WORDS[code]}" in text
        assert f"| {code.value} |" in readme


if __name__ == "__main__":
    made = (
        msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Machine), order="deterministic")) + b"\n"
    )
    (ROOT / "assets/status.schema.json").write_bytes(made)

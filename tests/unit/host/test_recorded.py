"""Machines as files."""

from pathlib import Path

import pytest

from cos_console.host.recorded import load_machine, record
from cos_console.model.machine import Layout, SlotName, SlotState
from cos_console.model.problem import Problem

MACHINES = Path(__file__).parents[2] / "machines"


def test_a_recorded_machine_comes_back_as_it_was(tmp_path):
    machine = load_machine(MACHINES / "two-disks.json")
    record(machine, tmp_path / "again.json")
    assert load_machine(tmp_path / "again.json") == machine


def test_the_recorded_machines_show_what_their_names_say():
    broken = load_machine(MACHINES / "broken-active.json").installations[0]
    active = broken.slot(SlotName.ACTIVE)
    assert active is not None
    assert active.state is SlotState.DAMAGED
    assert broken.boot.next is SlotName.PASSIVE
    assert len(load_machine(MACHINES / "two-disks.json").installations) == 2
    assert load_machine(MACHINES / "no-installation.json").installations == ()
    assert load_machine(MACHINES / "harvester.json").installations[0].layout is Layout.HARVESTER
    assert not load_machine(MACHINES / "unhandled-v2.json").installations[0].layout.handled
    kinds = {left.kind for left in load_machine(MACHINES / "interrupted.json").installations[0].leftovers}
    assert {"transition-image", "missing-active"} <= kinds


def test_a_file_that_is_no_machine_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(Problem) as caught:
        load_machine(tmp_path / "x.json")
    assert "not a recorded machine" in caught.value.report.what
    with pytest.raises(Problem):
        load_machine(tmp_path / "missing.json")

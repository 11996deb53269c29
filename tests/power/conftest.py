"""Scratch directories in memory for the power-cut tests. POWER_POINTS sets how many random states are tried."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.power.judge import scratch


@pytest.fixture
def work(request: pytest.FixtureRequest) -> Iterator[Path]:
    path = scratch(str(abs(hash(request.node.name))))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def random_points() -> int:
    """Random subsets per case at block level."""
    return int(os.environ.get("POWER_POINTS", "100"))

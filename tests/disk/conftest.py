"""What the disk tests share: a sandbox disk, an image to upgrade to, the command line as a user has it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.sandbox.disk import SandboxDisk, make_disk
from tests.sandbox.image import MadeImage, make_derivative_image
from tests.sandbox.tree import Derivative

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> SandboxDisk:
    """A healthy disk, made once; tests copy it."""
    return make_disk(tmp_path_factory.mktemp("pristine") / "disk.img")


@pytest.fixture
def disk(pristine: SandboxDisk, tmp_path: Path) -> SandboxDisk:
    path = tmp_path / "disk.img"
    subprocess.run(["cp", "--sparse=always", pristine.path, path], check=True)
    return SandboxDisk(path, pristine.sector_bytes, pristine.partitions)


@pytest.fixture(scope="session")
def image_two(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    return make_derivative_image(tmp_path_factory.mktemp("two") / "layout", Derivative("2.0"))


@pytest.fixture
def console(tmp_path: Path) -> Run:
    """Runs `cos-console` with a run directory of its own, without a terminal."""
    environment = {**os.environ, "COS_CONSOLE_RUN_DIR": str(tmp_path / "run")}

    def run(*words: object, **more: object) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "cos_console.cli.main", *map(str, words)]
        return subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            **more,
        )  # type: ignore[call-overload,no-any-return]

    return run

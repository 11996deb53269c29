"""An operation's mounts are private and leave nothing behind."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sandbox.disk import run as tool

pytestmark = pytest.mark.disk

SCRIPT = """
import os, sys
from pathlib import Path
from cos_console.slots import mounts
from cos_console.slots.port import Place, RealPort, Volume
mounts.enter_private_namespace()
with mounts.mounted(Path(sys.argv[1]), offset=1 << 20, size_bytes=16 << 20) as volume:
    port = RealPort({Volume.STATE: volume})
    place = Place(Volume.STATE, "hello")
    port.create(place)
    port.write_at(place, 0, b"there")
    fd = volume.remount()
    print(os.listdir(fd), flush=True)
    if len(sys.argv) > 2:
        os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_range_of_an_image_file_is_mounted_privately_and_goes_with_us(tmp_path: Path, killed: bool) -> None:
    disk, part = tmp_path / "disk", tmp_path / "part"
    with part.open("wb") as f:
        f.truncate(16 << 20)
    tool(["mke2fs", "-q", "-F", "-t", "ext4", part])
    disk.write_bytes(bytes(1 << 20) + part.read_bytes())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, disk, *(["die"] if killed else [])],
        capture_output=True,
        check=False,
        cwd=os.getcwd(),
    )
    assert b"hello" in done.stdout, done.stderr.decode()
    assert done.returncode == (-9 if killed else 0), done.stderr.decode()
    deadline = time.monotonic() + 10  # the kernel clears an unused loop device when it gets to it
    while str(disk) in tool(["losetup", "-a"]).decode() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert str(disk) not in tool(["losetup", "-a"]).decode()
    assert "cos-console-" not in Path("/proc/self/mounts").read_text()

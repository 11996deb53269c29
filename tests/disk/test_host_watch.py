"""Hot-plug, with real loop devices and the kernel's or udev's own events."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pyudev

from cos_console.host.scan import scan
from cos_console.host.watch import Watcher
from tests.sandbox.disk import run

pytestmark = pytest.mark.disk


@pytest.fixture
def udevd() -> Iterator[None]:
    """udev running: the machine's own, or one that ends with the test."""
    if Path("/run/udev/control").exists():
        yield
        return
    daemon = subprocess.Popen(
        ["/lib/systemd/systemd-udevd"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(100):
        if Path("/run/udev/control").exists():
            break
        time.sleep(0.05)
    yield
    daemon.terminate()
    daemon.wait()
    Path("/run/udev/control").unlink(missing_ok=True)


@contextmanager
def plugged(path: Path) -> Iterator[str]:
    loop = run(["losetup", "-f", "--show", path]).decode().strip()
    try:
        yield loop
    finally:
        run(["losetup", "-d", loop])


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as f:
        f.truncate(16 << 20)
    run(["sfdisk", "-q", path], stdin=b"label: gpt\nsize=4M\n")
    return path


@pytest.mark.usefixtures("udevd")
def test_a_plugged_and_an_unplugged_disk_are_told(image):
    told = threading.Event()
    watcher = Watcher(told.set)
    try:
        with plugged(image):
            assert told.wait(10)
            time.sleep(1)
            told.clear()
        assert told.wait(10)
    finally:
        watcher.stop()


@pytest.mark.usefixtures("udevd")
def test_a_scan_makes_no_event_for_the_disk_it_looks_at(image):
    with plugged(image) as loop:
        name = Path(loop).name
        events = pyudev.Monitor.from_netlink(pyudev.Context(), source="udev")
        events.filter_by(subsystem="block")
        events.start()
        settled = time.monotonic() + 15  # udev may still be telling about the attaching
        while _of(events, name, 1.5) and time.monotonic() < settled:
            continue
        for _ in range(3):
            assert any(d.path == loop for d in scan().disks)
            scan(Path(loop))
        assert _of(events, name, 1.0) == []
        fd = os.open(loop, os.O_RDWR)  # what libparted does by itself: the control that this test can fail
        os.close(fd)
        assert _of(events, name, 8.0, enough=1)


def _of(events: pyudev.Monitor, name: str, seconds: float, *, enough: int = 4) -> list[str]:
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        device = events.poll(timeout=0.2)
        if device is not None and device.sys_name == name:
            found.append(str(device.action))
            if len(found) >= enough:
                break
    return found


@pytest.mark.usefixtures("udevd")
def test_events_of_our_own_making_are_not_told(image):
    told = threading.Event()
    watcher = Watcher(told.set)
    try:
        with watcher.quiet(), plugged(image):
            time.sleep(0.5)
        assert not told.wait(0.8)
    finally:
        watcher.stop()


def test_stopping_ends_the_thread():
    watcher = Watcher(lambda: None)
    watcher.stop()
    watcher.stop()
    assert all(t.name != "hot-plug" for t in threading.enumerate())

"""Hot-plug: tells when a disk came, went or changed, once per burst of events.

pyudev's monitor in a thread of its own; the callback runs in that thread, so a scan never blocks the screen. A
scan itself makes no events (it opens nothing for writing). An operation of this machine does: `quiet` drops them.
Without a running udevd the kernel's own events are listened to.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyudev

DEBOUNCE_S = 0.4
_IGNORED = ("ram", "zram", "dm-")


class Watcher:
    """Calls `changed` when block devices have changed and nothing more came for DEBOUNCE_S seconds."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._quiet = 0
        self._deaf_until = 0.0
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        source = "udev" if Path("/run/udev/control").exists() else "kernel"
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source=source)
        self._monitor.filter_by(subsystem="block")
        self._monitor.start()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="hot-plug", daemon=True)
        self._thread.start()

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Events in here, and for a second after, are of our own making."""
        self._quiet += 1
        try:
            yield
        finally:
            self._deaf_until = time.monotonic() + 1.0
            self._quiet -= 1

    def stop(self) -> None:
        """End the thread; no callback comes after this returns (unless called from the callback itself)."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        os.write(self._wake_write, b"x")
        if threading.current_thread() is not self._thread:
            self._thread.join()
        os.close(self._wake_write)
        os.close(self._wake_read)

    def _listen(self) -> None:
        poller = select.poll()
        poller.register(self._monitor.fileno(), select.POLLIN)
        poller.register(self._wake_read, select.POLLIN)
        pending = False
        while not self._stopping.is_set():
            ready = poller.poll(int(DEBOUNCE_S * 1000) if pending else None)
            if self._stopping.is_set():
                return
            if not ready:
                pending = False
                self._changed()
                continue
            device = self._monitor.poll(timeout=0)
            while device is not None:
                pending = pending or self._matters(device)
                device = self._monitor.poll(timeout=0)

    def _matters(self, device: pyudev.Device) -> bool:
        if self._quiet or time.monotonic() < self._deaf_until:
            return False
        return not str(device.sys_name).startswith(_IGNORED)

"""The port with a power cut in it: the call with number `cut` is the first that is not made any more."""

from typing import Any

from cos_console.slots.port import RealPort

CHANGES = {
    "create",
    "reserve",
    "set_size",
    "fill",
    "write_at",
    "punch",
    "link",
    "rename",
    "unlink",
    "fsync_file",
    "fsync_dir",
    "checkpoint",
}


class PowerCut(BaseException):
    """Not an Exception: nothing may tidy up after it as if it were an error."""


class Recorder:
    """Passes everything on to a real port and writes down each call that changes something."""

    def __init__(
        self, port: RealPort, *, cut: int | None = None, without: frozenset[str] = frozenset()
    ) -> None:
        self._port, self._cut, self._without = port, cut, without
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._port, name)
        if name not in CHANGES:
            return real

        def call(*args: object) -> object:
            if self._cut is not None and len(self.calls) >= self._cut:
                raise PowerCut
            self.calls.append(
                " ".join([name, *(str(a) for a in args if not isinstance(a, bytes) and not callable(a))])
            )
            if name in self._without:  # a seeded fault
                return "left out" if name == "checkpoint" else None
            return real(*args)

        return call

"""A blob's bytes from a registry; a lost connection is waited for and goes on at the exact byte.

Sources: OCI distribution-spec 1.1 (pulling blobs, resumable by range) and RFC 9110 section 14 (Range,
Content-Range). A server that knows no ranges sends all of it again; what was had is then read over.
"""

import re
import time
from collections.abc import Callable
from typing import Protocol

import urllib3

from cos_console.model.problem import ExitCode, Problem
from cos_console.sources.connection import discard

_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
_MOST_AT_ONCE = 256 << 10
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Opener(Protocol):
    """Answers 200 or 206 for a blob, logged in and redirected. Raises Problem."""

    def __call__(self, headers: dict[str, str]) -> urllib3.BaseHTTPResponse: ...


class BlobStream:
    """`readinto` waits out what may come back, `wait_limit_s` at most, and raises Problem for the rest."""

    def __init__(
        self,
        host: str,
        size: int,
        open_blob: Opener,
        *,
        wait_limit_s: float,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._host = host
        self._size = size
        self._open = open_blob
        self._wait_limit_s = wait_limit_s
        self._sleep = sleep
        self._at = 0
        self._response: urllib3.BaseHTTPResponse | None = None
        self.refetched_bytes = 0
        """Moved twice, because the server could not begin in the middle."""
        self.lost_connections = 0

    def readinto(self, buffer: memoryview) -> int:
        if self._at >= self._size:
            return 0
        lost_at: float | None = None
        pause = _PAUSE_S
        while True:
            try:
                if self._response is None:
                    self._response = self._connect()
                # One call of recv, so that nothing that came is lost with the connection.
                data = self._response.read1(
                    min(len(buffer), self._size - self._at, _MOST_AT_ONCE), decode_content=False
                )
                if data:
                    buffer[: len(data)] = data
                    self._at += len(data)
                    if self._at == self._size:
                        self._finish()
                    return len(data)
                reason = f"{self._host} closed the connection"
            except urllib3.exceptions.TimeoutError:
                reason = f"{self._host} fell silent"
            except (urllib3.exceptions.HTTPError, OSError):
                reason = f"{self._host} broke the connection"
            except Problem as e:
                if not e.report.code.startswith("COS-NET-"):
                    raise
                reason = e.report.what.removesuffix(".")
            self.close()
            self.lost_connections += 1
            now = time.monotonic()
            lost_at = now if lost_at is None else lost_at
            if now - lost_at + pause > self._wait_limit_s:
                raise self._given_up(reason)
            self._sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def close(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def _finish(self) -> None:
        """Give the connection back for the next layer."""
        if self._response is not None:
            discard(self._response)
            self._response = None

    def _connect(self) -> urllib3.BaseHTTPResponse:
        headers = {"Accept": "*/*", "Accept-Encoding": "identity"}
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
        response = self._open(headers)
        try:
            self._check(response)
        except BaseException:
            response.close()
            raise
        return response

    def _check(self, response: urllib3.BaseHTTPResponse) -> None:
        """See that what follows is the byte at `_at`; read over what was had where it is not."""
        if response.status == 206:
            found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not found or int(found[1]) != self._at or found[3] not in {"*", str(self._size)}:
                raise self._wrong("another part of the layer than was asked for")
            return
        length = response.headers.get("Content-Length", "")
        if length.isdigit() and int(length) != self._size:
            raise self._wrong(f"a layer of {length} bytes where the manifest says {self._size}")
        left = self._at
        while left:
            data = response.read1(min(left, _MOST_AT_ONCE), decode_content=False)
            if not data:
                raise urllib3.exceptions.ProtocolError("it ended before the old place")
            left -= len(data)
            self.refetched_bytes += len(data)

    def _wrong(self, what: str) -> Problem:
        return Problem(
            "COS-REGISTRY-ANSWER",
            f"{self._host} sent {what}.",
            unchanged="active and passive are exactly as before.",
            now="Try again; if it stays, the registry or a proxy before it is at fault.",
            exit_code=ExitCode.SOURCE,
        )

    def _given_up(self, reason: str) -> Problem:
        return Problem(
            "COS-NET-RESET",
            f"{reason} at {self._at} of {self._size} bytes of a layer and did not come back within"
            f" {self._wait_limit_s:.0f} s.",
            unchanged="active and passive are exactly as before.",
            now="Check the network and start again.",
            exit_code=ExitCode.SOURCE,
        )

"""Reading an image back past the page cache, to the last hole, before anything is switched to it."""

import os
import time
from collections.abc import Callable, Sequence

from cos_console.slots.build_pieces import Mismatch, Piece, Reader, check_all
from cos_console.slots.build_problems import cancelled_on_request, unproven
from cos_console.slots.build_room import data_ranges, unwritten_extents
from cos_console.slots.build_values import BuildProgress, BuildResult, ProofResult

_REPORT_S = 0.2


def prove_image(
    fd: int,
    result: BuildResult,
    *,
    report: Callable[[BuildProgress], None] = lambda _: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> ProofResult:
    """Compare what the medium holds with what was written, holes and tables included.

    What was read back while the image was built is not read again, unless the file was written to since then.
    Raises Problem COS-PROOF when a byte differs or a range is there that was never written.
    """
    try:
        os.fsync(fd)
        untouched = os.fstat(fd).st_mtime_ns == result.stamp_ns
        if os.fstat(fd).st_size != result.size_bytes:
            raise unproven("the file has another size")
        stray = unwritten_extents(fd)
        if stray:
            raise unproven(f"{len(stray)} ranges were reserved and never written")
        todo = [p for p in result.pieces if not (p.proven and untouched)]
        early = result.written_bytes - sum(p.length for p in todo)
        reader = Reader(fd)
        try:
            done = early
            last = 0.0
            for n in range(0, len(todo), 32):
                part = todo[n : n + 32]
                check_all(reader, part)
                done += sum(p.length for p in part)
                if cancelled():
                    raise cancelled_on_request()
                if time.monotonic() - last >= _REPORT_S:
                    last = time.monotonic()
                    report(BuildProgress(done, result.written_bytes, detail="reading back"))
            _rest_is_zero(fd, reader, result.pieces)
            method = reader.method
        finally:
            reader.close()
    except Mismatch as e:
        raise unproven(f"the bytes at {e.offset} are not those that were written") from None
    except OSError as e:
        raise unproven(f"reading it back failed ({os.strerror(e.errno or 0)})") from None
    return ProofResult(result.files, done, len(result.pieces), method, early)


def _rest_is_zero(fd: int, reader: Reader, pieces: Sequence[Piece]) -> None:
    """Everything outside the pieces is a hole, or zeros. Raises Mismatch, OSError."""
    n = 0
    for start, end in data_ranges(fd):
        at = start
        while at < end:
            while n < len(pieces) and pieces[n].offset + pieces[n].length <= at:
                n += 1
            stop = min(end, pieces[n].offset) if n < len(pieces) else end
            if stop <= at:
                at = pieces[n].offset + pieces[n].length
                continue
            part = reader.read(at, min(stop - at, 1 << 20))
            if not part or any(part):
                raise Mismatch(at)
            at += len(part)

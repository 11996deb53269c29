"""Build an image from one gzip layer on standard input, in a process of its own; prints the most memory seen.

Memory is the sum of the proportional set sizes of this process and its workers (smaps_rollup), less what this
script's own copy of the layer takes.
"""

import hashlib
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

from cos_console.model.image import (
    Compression,
    ImageReference,
    Layer,
    LayerStream,
    ResolvedImage,
    Transport,
    parse_digest,
)
from cos_console.slots.build import ImageSpec, build_image, prove_image


class FileContent:
    parallel = True

    def __init__(self, path: str) -> None:
        self._path = path
        with Path(path).open("rb") as f:
            digest = parse_digest("sha256:" + hashlib.file_digest(f, "sha256").hexdigest())
        layer = Layer(
            digest=digest,
            diff_id=None,
            size_bytes=os.stat(path).st_size,
            compression=Compression.GZIP,
        )
        self.image = ResolvedImage(
            reference=ImageReference(Transport.OCI, "test"),
            digest=None,
            config_digest=None,
            platform=None,
            layers=(layer,),
            version="",
            created="",
            transfer_bytes=0,
            unpacked_bytes=None,
        )

    def open_layer(self, index: int) -> LayerStream:
        return Path(self._path).open("rb", buffering=0)  # type: ignore[return-value]

    def next_layer(self) -> LayerStream | None:
        return None

    def close(self) -> None:
        pass


def watch(most: list[int], stop: threading.Event) -> None:
    me = os.getpid()
    while not stop.wait(0.05):
        total = 0
        tasks = Path(f"/proc/{me}/task").iterdir()
        pids = {me, *(int(p) for t in tasks for p in (t / "children").read_text().split())}
        for pid in pids:
            try:
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            except OSError:
                continue
            total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
        most[0] = max(most[0], total)


def main(path: str, size: str) -> None:
    with tempfile.NamedTemporaryFile(dir=Path(path).parent) as blob:
        while part := sys.stdin.buffer.read(1 << 20):
            blob.write(part)
        blob.flush()
        content = FileContent(blob.name)
        most, stop = [0], threading.Event()
        threading.Thread(target=watch, args=(most, stop), daemon=True).start()
        fd = os.open(path, os.O_RDWR)
        begun = time.monotonic()
        result = build_image(content, fd, ImageSpec(int(size), "COS_ACTIVE"))
        prove_image(fd, result)
        stop.set()
        print(f"{time.monotonic() - begun:.2f} s", most[0])


main(*sys.argv[1:])

"""The stream of `docker save` in both its forms, in chunks of any size, whole or cut."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cos_console.model.image import Digest
from cos_console.sources.saved import SavedError, SavedImage


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def layer(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


EMPTY = bytes(1024)
"""The layer of a step that changed nothing."""
PLAIN = [layer("etc/a", b"a" * 3000), EMPTY, layer("etc/b", b"b")]
DIFF_IDS = [sha256(x) for x in PLAIN]
CONFIG = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": DIFF_IDS}}).encode()


def stream(members: list[tuple[str, bytes | str]]) -> bytes:
    """A tar; text as content is a symbolic link's target."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.mtime = 1.5  # as Go does it, a pax header before each member
            if isinstance(data, str):
                info.type, info.linkname = tarfile.SYMTYPE, data
                tar.addfile(info)
            else:
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


CLASSIC = stream(
    [
        ("one/VERSION", b"1.0"),
        ("one/json", b'{"id":"one"}'),
        ("one/layer.tar", PLAIN[0]),
        ("two/layer.tar", "../one/layer.tar"),
        ("three/layer.tar", PLAIN[1]),
        (f"{'long' * 40}/layer.tar", PLAIN[2]),
        (f"{sha256(CONFIG)[7:]}.json", CONFIG),
        ("manifest.json", b'[{"Config":"x"}]'),
    ]
)
BLOBS = [gzip.compress(PLAIN[0]), EMPTY, PLAIN[2]]
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "config": {"digest": sha256(CONFIG)},
        "layers": [{"digest": sha256(b)} for b in BLOBS],
    }
).encode()
INDEX = json.dumps({"schemaVersion": 2, "manifests": [{"digest": sha256(MANIFEST)}]}).encode()
MODERN = stream(
    [
        *((f"blobs/sha256/{sha256(b)[7:]}", b) for b in (*BLOBS, CONFIG, MANIFEST, INDEX)),
        ("index.json", INDEX),
        ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'),
    ]
)


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield data[at : at + size]


def read(saved: SavedImage, size: int = 1000) -> list[str]:
    found = []
    buffer = memoryview(bytearray(size))
    while (one := saved.next_layer()) is not None:
        parts = []
        while count := one.readinto(buffer):
            parts.append(bytes(buffer[:count]))
        data = b"".join(parts)
        found.append(sha256(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data))
    return found


@given(st.sampled_from([CLASSIC, MODERN]), st.integers(1, 6000), st.integers(1, 5000))
def test_layers_come_whole_from_chunks_of_any_size(data: bytes, chunk: int, buffer: int) -> None:
    saved = SavedImage(chunks(data, chunk), frozenset(DIFF_IDS))
    assert sorted(read(saved, buffer)) == sorted(DIFF_IDS)


def test_a_layer_that_is_left_early_does_not_shift_the_next() -> None:
    saved = SavedImage(chunks(CLASSIC, 700), frozenset(DIFF_IDS))
    first = saved.next_layer()
    assert first is not None
    first.readinto(memoryview(bytearray(10)))
    assert read(saved) == DIFF_IDS[1:]


@pytest.mark.parametrize(
    ("data", "identity"),
    [
        (CLASSIC, sha256(CONFIG)),
        (MODERN, sha256(CONFIG)),
        (MODERN, sha256(MANIFEST)),
        (MODERN, sha256(INDEX)),
    ],
)
def test_the_image_is_known_by_its_configuration_or_its_manifest(data: bytes, identity: str) -> None:
    saved = SavedImage(iter([data]), frozenset(DIFF_IDS))
    read(saved)
    assert saved.described_by(Digest(identity)) == DIFF_IDS
    assert saved.described_by(Digest(sha256(b"another"))) is None


def test_a_description_is_known_by_its_bytes_not_by_its_name() -> None:
    forged = stream([(f"{sha256(CONFIG)[7:]}.json", CONFIG.replace(b"amd64", b"arm64"))])
    saved = SavedImage(iter([forged]), frozenset(DIFF_IDS))
    assert read(saved) == []
    assert saved.described_by(Digest(sha256(CONFIG))) is None


@given(st.sampled_from([CLASSIC, MODERN]), st.data())
def test_a_stream_cut_anywhere_is_never_taken_as_whole(data: bytes, draw: st.DataObject) -> None:
    end = len(data.rstrip(b"\0"))
    cut = draw.draw(st.integers(0, end))
    with pytest.raises(SavedError, match="too early"):
        read(SavedImage(chunks(data[:cut], 4096), frozenset(DIFF_IDS)))


@given(st.binary(max_size=3000), st.booleans())
def test_any_bytes_are_layers_or_an_error(data: bytes, whole: bool) -> None:
    with pytest.raises(SavedError):
        read(SavedImage(iter([data.ljust(512, b"x") if whole else data]), frozenset()))

"""An OCI image layout directory (OCI image spec, image-layout.md): blobs named by digest, an index beside them."""

import os
from pathlib import Path

from cos_console.model.image import Digest, ImageReference, LayerStream, Platform, ResolvedImage, parse_digest
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import manifest
from cos_console.sources.reference import split_path

_REF = "org.opencontainers.image.ref.name"


class FileStream:
    """A range of a file as a layer's bytes."""

    def __init__(self, path: Path, offset: int = 0, length: int | None = None) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._at = offset
        self._left = os.fstat(self._fd).st_size - offset if length is None else length

    def readinto(self, buffer: memoryview) -> int:
        count = os.preadv(self._fd, [buffer[: min(len(buffer), self._left)]], self._at) if self._left else 0
        self._at += count
        self._left -= count
        return count

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class LayoutContent:
    """Layers are opened where they lie; any number at a time, in any process."""

    parallel = True

    def __init__(self, directory: Path, image: ResolvedImage) -> None:
        self.image = image
        self._directory = directory

    def open_layer(self, index: int) -> LayerStream:
        digest = self.image.layers[index].digest
        assert digest is not None  # noqa: S101 - a layout's layers have digests
        path = _blob(self._directory, digest)
        try:
            return FileStream(path)
        except OSError as e:
            raise _gone(path, e) from None

    def next_layer(self) -> LayerStream | None:
        return None

    def close(self) -> None:
        pass


def open_layout(reference: ImageReference, platform: Platform) -> LayoutContent:
    """Raises Problem COS-IMAGE-UNKNOWN (no layout, no such ref), COS-MANIFEST, COS-PLATFORM, COS-DIGEST."""
    path, ref = split_path(reference.location)
    directory = Path(path)
    try:
        if not (directory / "oci-layout").is_file():
            raise FileNotFoundError(2, "no oci-layout file", path)
        index = manifest.load_json((directory / "index.json").read_bytes(), str(reference))
    except OSError as e:
        raise _gone(directory, e) from None
    digest = choose_ref(index, ref, reference)

    def fetch(wanted: Digest, _what: str, limit: int) -> bytes:
        try:
            with _blob(directory, wanted).open("rb") as f:
                return f.read(limit)
        except OSError as e:
            raise _gone(directory, e) from None

    data = fetch(digest, "manifest", manifest.MANIFEST_LIMIT)
    return LayoutContent(directory, manifest.resolve_manifest(reference, data, digest, fetch, platform, ref))


def choose_ref(index: dict[str, object], ref: str, reference: ImageReference) -> Digest:
    """The descriptor of `ref` in an index.json; without a ref there must be exactly one."""
    entries = index.get("manifests")
    found: list[dict[str, object]] = (
        [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    )
    names = []
    chosen = []
    for entry in found:
        annotations = entry.get("annotations")
        name = str(annotations.get(_REF, "")) if isinstance(annotations, dict) else ""
        names.append(name)
        if not ref or name == ref:
            chosen.append(entry)
    if len({str(e.get("digest")) for e in chosen}) != 1:
        what = f"has no image {ref!r}" if not chosen else f"has {len(chosen)} images"
        raise Problem(
            "COS-IMAGE-UNKNOWN",
            f"{reference} {what}; it offers: {', '.join(n for n in names if n) or 'no named image'}.",
            now="Name one of them after the path, like oci:DIR:NAME.",
            exit_code=ExitCode.NOT_FOUND,
        )
    try:
        return parse_digest(str(chosen[0].get("digest")))
    except ValueError:
        raise manifest.bad_image(reference, "its index has no valid digest") from None


def _blob(directory: Path, digest: str) -> Path:
    algorithm, _, value = digest.partition(":")
    return directory / "blobs" / algorithm / value


def _gone(path: Path, e: OSError) -> Problem:
    return Problem(
        "COS-IMAGE-UNKNOWN",
        f"{path} can't be read as an image: {e.strerror or e}.",
        now="Check the path and that the stick or disk is still there.",
        exit_code=ExitCode.SOURCE,
    )

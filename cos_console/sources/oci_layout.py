"""An OCI image layout directory (OCI image spec, image-layout.md): blobs named by digest, an index beside them."""

import os
from pathlib import Path

from cos_console.model.image import Digest, ImageReference, LayerStream, Platform, ResolvedImage, parse_digest
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import manifest
from cos_console.sources.reference import split_path

_REF = "org.opencontainers.image.ref.name"


class FileStream:
    """A range of a file as a layer's bytes. Raises Problem COS-SOURCE-READ when the medium fails."""

    def __init__(self, path: Path, offset: int = 0, length: int | None = None) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise gone(path, e) from None
        self._path = path
        self._at = offset
        self._left = os.fstat(self._fd).st_size - offset if length is None else length

    @property
    def size_bytes(self) -> int:
        """What is still to come."""
        return self._left

    def readinto(self, buffer: memoryview) -> int:
        if not self._left:
            return 0
        try:
            count = os.preadv(self._fd, [buffer[: min(len(buffer), self._left)]], self._at)
        except OSError as e:
            raise self._stopped(e.strerror or str(e)) from None
        if count == 0:
            raise self._stopped("it is shorter now than when it was opened")
        self._at += count
        self._left -= count
        return count

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _stopped(self, why: str) -> Problem:
        return Problem(
            "COS-SOURCE-READ",
            f"{self._path} can't be read on, {self._left} bytes before the layer's end: {why}.",
            unchanged="active and passive are exactly as before.",
            now="Check that the stick or disk is still there, and start again.",
            exit_code=ExitCode.SOURCE,
        )


class LayoutContent:
    """Layers are opened where they lie; any number at a time, in any process."""

    parallel = True

    def __init__(self, directory: Path, image: ResolvedImage) -> None:
        self.image = image
        self._directory = directory

    def open_layer(self, index: int) -> LayerStream:
        layer = self.image.layers[index]
        assert layer.digest is not None  # noqa: S101 - a layout's layers have digests
        path = _blob(self._directory, layer.digest)
        stream = FileStream(path)
        if stream.size_bytes != layer.size_bytes:
            found = stream.size_bytes
            stream.close()
            raise wrong_size(path, found, layer.size_bytes)
        return stream

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
        index = manifest.load_json(
            _limited(directory / "index.json", manifest.MANIFEST_LIMIT), str(reference)
        )
    except OSError as e:
        raise gone(directory, e) from None
    digest = choose_ref(index, ref, reference)

    def fetch(wanted: Digest, _what: str, limit: int) -> bytes:
        try:
            return _limited(_blob(directory, wanted), limit)
        except OSError as e:
            raise gone(directory, e) from None

    data = fetch(digest, "manifest", manifest.MANIFEST_LIMIT)
    image = manifest.resolve_manifest(reference, data, digest, fetch, platform, ref)
    for layer in image.layers:
        assert layer.digest is not None  # noqa: S101 - resolve_manifest gives each one
        blob = _blob(directory, layer.digest)
        try:
            found = blob.stat().st_size
        except OSError as e:
            raise gone(blob, e) from None
        if found != layer.size_bytes:
            raise wrong_size(blob, found, layer.size_bytes)
    return LayoutContent(directory, image)


def choose_ref(index: dict[str, object], ref: str, reference: ImageReference) -> Digest:
    """The descriptor of `ref` in an index.json; without a ref there must be exactly one."""
    entries = index.get("manifests")
    found: list[dict[str, object]] = (
        [e for e in entries if isinstance(e, dict)] if isinstance(entries, list) else []
    )
    names: list[str] = []
    chosen: list[dict[str, object]] = []
    for entry in found:
        annotations = entry.get("annotations")
        name = str(annotations.get(_REF, "")) if isinstance(annotations, dict) else ""
        names.append(manifest.readable(name))
        if not ref or name == ref:
            chosen.append(entry)
    if len({str(e.get("digest")) for e in chosen}) != 1:
        if not found:
            what = "has no image"
        elif not chosen:
            what = f"has no image {ref!r}"
        else:
            what = f"has {len(chosen)} images"
        raise Problem(
            "COS-IMAGE-UNKNOWN",
            f"{reference} {what}; it offers: {', '.join(n for n in names[:20] if n) or 'no named image'}.",
            now="Name one of them after the path, like oci:DIR:NAME.",
            exit_code=ExitCode.NOT_FOUND,
        )
    try:
        return parse_digest(str(chosen[0].get("digest")))
    except ValueError:
        raise manifest.bad_image(reference, "its index has no valid digest") from None


def wrong_size(path: Path, found: int, stated: int) -> Problem:
    """A blob that can't be the one its manifest means."""
    return Problem(
        "COS-DIGEST",
        f"{path} has {found} bytes, its manifest says {stated}.",
        now="Copy the image again.",
        exit_code=ExitCode.VERIFICATION,
    )


def gone(path: Path, e: OSError) -> Problem:
    """A path that is not there or can't be read."""
    return Problem(
        "COS-IMAGE-UNKNOWN",
        f"{path} can't be read as an image: {e.strerror or e}.",
        now="Check the path and that the stick or disk is still there.",
        exit_code=ExitCode.SOURCE,
    )


def _blob(directory: Path, digest: str) -> Path:
    algorithm, _, value = digest.partition(":")
    return directory / "blobs" / algorithm / value


def _limited(path: Path, limit: int) -> bytes:
    """Raises OSError, also for a file of more than `limit` bytes."""
    with path.open("rb") as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise OSError(27, f"{path.name} is larger than {limit >> 20} MiB")
    return data

"""Images in one tar file, read in place: OCI archives and `docker save` archives. Nothing is unpacked.

Sources: OCI image-layout.md (the layout in a tar); Docker image spec v1.2, "Combined Image JSON + Filesystem
Changeset Format" (manifest.json). Layers of a docker archive carry no digest: they are known by diff_id, and
the image by the digest of its configuration.
"""

import hashlib
import json
import posixpath
import tarfile
from dataclasses import dataclass
from pathlib import Path

from cos_console.model.image import (
    Compression,
    Digest,
    ImageReference,
    Layer,
    LayerStream,
    Platform,
    ResolvedImage,
    parse_digest,
)
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import manifest
from cos_console.sources.oci_layout import FileStream, choose_ref
from cos_console.sources.reference import split_path


@dataclass(frozen=True)
class Member:
    offset: int
    size: int


class ArchiveContent:
    """`places` are the layers' ranges in the file, in the order they are given out."""

    def __init__(self, path: Path, image: ResolvedImage, places: list[Member], *, parallel: bool) -> None:
        self.image = image
        self.parallel = parallel
        self._path = path
        self._places = places
        self._next = 0

    def open_layer(self, index: int) -> LayerStream:
        place = self._places[index]
        return FileStream(self._path, place.offset, place.size)

    def next_layer(self) -> LayerStream | None:
        if self._next >= len(self._places):
            return None
        self._next += 1
        return self.open_layer(self._next - 1)

    def close(self) -> None:
        pass


def open_oci_archive(reference: ImageReference, platform: Platform) -> ArchiveContent:
    """Raises Problem COS-ARCHIVE, COS-IMAGE-UNKNOWN, COS-MANIFEST, COS-PLATFORM, COS-DIGEST."""
    name, ref = split_path(reference.location)
    path = Path(name)
    members = _index(path)
    index = manifest.load_json(_read(path, members, "index.json", manifest.MANIFEST_LIMIT), str(reference))
    digest = choose_ref(index, ref, reference)

    def blob(wanted: str) -> str:
        return f"blobs/{wanted.replace(':', '/')}"

    def fetch(wanted: Digest, _what: str, limit: int) -> bytes:
        return _read(path, members, blob(wanted), limit)

    data = fetch(digest, "manifest", manifest.MANIFEST_LIMIT)
    image = manifest.resolve_manifest(reference, data, digest, fetch, platform, ref)
    return ArchiveContent(
        path, image, [_member(path, members, blob(str(x.digest))) for x in image.layers], parallel=True
    )


def open_docker_archive(reference: ImageReference) -> ArchiveContent:
    """Raises Problem COS-ARCHIVE, COS-IMAGE-UNKNOWN, COS-MANIFEST."""
    name, ref = split_path(reference.location)
    path = Path(name)
    members = _index(path)
    try:
        entries = json.loads(_read(path, members, "manifest.json", manifest.MANIFEST_LIMIT))
        wanted = [
            e for e in entries if not ref or any(t.rpartition(":")[2] == ref for t in e.get("RepoTags") or [])
        ]
        if len(wanted) != 1:
            raise Problem(
                "COS-IMAGE-UNKNOWN",
                f"{path} has {len(wanted)} images that fit.",
                now="Name the tag after the path, like docker-archive:FILE:TAG.",
                exit_code=ExitCode.NOT_FOUND,
            )
        entry = wanted[0]
        raw = _read(path, members, entry["Config"], manifest.CONFIG_LIMIT)
        config = manifest.load_json(raw, str(reference))
        diff_ids = [parse_digest(d) for d in config["rootfs"]["diff_ids"]]  # type: ignore[index]
        places = [_member(path, members, layer) for layer in entry["Layers"]]
        tags = entry.get("RepoTags") or [""]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise manifest.bad_image(reference, "its manifest.json is damaged") from None
    if len(places) != len(diff_ids):
        raise manifest.bad_image(reference, "layers and diff_ids differ in number")
    layers = tuple(
        Layer(digest=None, diff_id=d, size_bytes=p.size, compression=Compression.NONE)
        for d, p in zip(diff_ids, places, strict=True)
    )
    config_digest = Digest("sha256:" + hashlib.sha256(raw).hexdigest())
    tag = str(tags[0]).rpartition(":")[2]
    image = manifest.resolved(reference, config_digest, config_digest, config, layers, tag)
    # Each place once: a layer that stands twice in the image is one member, and known by its diff_id.
    unique = list({p.offset: p for p in places}.values())
    return ArchiveContent(path, image, unique, parallel=False)


def _index(path: Path) -> dict[str, Member]:
    """Name to place of every file; symbolic links (as old docker writes for equal layers) are followed."""
    try:
        with tarfile.open(path, "r:") as tar:
            found: dict[str, Member] = {}
            links: dict[str, str] = {}
            for info in tar:
                name = posixpath.normpath(info.name)
                if info.isfile():
                    found[name] = Member(info.offset_data, info.size)
                elif info.issym() or info.islnk():
                    base = posixpath.dirname(name) if info.issym() else ""
                    links[name] = posixpath.normpath(posixpath.join(base, info.linkname))
            size = path.stat().st_size
    except (OSError, tarfile.TarError) as e:
        raise _broken(path, str(e)) from None
    for name, target in links.items():
        if target in found:
            found[name] = found[target]
    if any(m.offset + m.size > size for m in found.values()):
        raise _broken(path, "it ends too early")
    return found


def _member(path: Path, members: dict[str, Member], name: str) -> Member:
    try:
        return members[posixpath.normpath(name)]
    except KeyError:
        raise _broken(path, f"{name[:80]} is not in it") from None


def _read(path: Path, members: dict[str, Member], name: str, limit: int) -> bytes:
    place = _member(path, members, name)
    if place.size > limit:
        raise _broken(path, f"{name[:80]} is too large")
    with path.open("rb") as f:
        f.seek(place.offset)
        return f.read(place.size)


def _broken(path: Path, why: str) -> Problem:
    return Problem(
        "COS-ARCHIVE",
        f"{path} can't be read as an image archive: {why}.",
        now="Copy it again; a compressed archive must be unpacked first.",
        exit_code=ExitCode.SOURCE,
    )

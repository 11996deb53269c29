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
from typing import Any

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
from cos_console.sources.oci_layout import FileStream, choose_ref, gone, wrong_size
from cos_console.sources.reference import split_path

_MEMBER_LIMIT = 100_000


@dataclass(frozen=True)
class Member:
    """Where a file's bytes stand in the archive."""

    offset: int
    size: int


class ArchiveContent:
    """Layers are read in place; `places` has one range for each layer of the image."""

    parallel = True

    def __init__(self, path: Path, image: ResolvedImage, places: list[Member]) -> None:
        self.image = image
        self._path = path
        self._places = places

    def open_layer(self, index: int) -> LayerStream:
        place = self._places[index]
        return FileStream(self._path, place.offset, place.size)

    def next_layer(self) -> LayerStream | None:
        return None

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
    places = [_member(path, members, blob(str(layer.digest))) for layer in image.layers]
    for place, layer in zip(places, image.layers, strict=True):
        if place.size != layer.size_bytes:
            raise wrong_size(path, place.size, layer.size_bytes)
    return ArchiveContent(path, image, places)


def open_docker_archive(reference: ImageReference, platform: Platform) -> ArchiveContent:
    """Raises Problem COS-ARCHIVE, COS-IMAGE-UNKNOWN, COS-MANIFEST, COS-PLATFORM."""
    name, ref = split_path(reference.location)
    path = Path(name)
    members = _index(path)
    try:
        entries = json.loads(_read(path, members, "manifest.json", manifest.MANIFEST_LIMIT))
        entry = _chosen(path, entries, ref)
        tags = entry.get("RepoTags") or [""]
        raw = _read(path, members, entry["Config"], manifest.CONFIG_LIMIT)
        config = manifest.load_json(raw, str(reference))
        diff_ids = [parse_digest(d) for d in config["rootfs"]["diff_ids"]]  # type: ignore[index]
        places = [_member(path, members, layer) for layer in entry["Layers"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise manifest.bad_image(reference, "its manifest.json is damaged") from None
    if not places or len(places) != len(diff_ids):
        raise manifest.bad_image(reference, "layers and diff_ids differ in number")
    manifest.require_platform(manifest.platform_of(config), platform, reference)
    layers = tuple(
        Layer(digest=None, diff_id=d, size_bytes=p.size, compression=_compression(path, p))
        for d, p in zip(diff_ids, places, strict=True)
    )
    config_digest = Digest("sha256:" + hashlib.sha256(raw).hexdigest())
    tag = str(tags[0]).rpartition(":")[2]
    return ArchiveContent(
        path, manifest.resolved(reference, config_digest, config_digest, config, layers, tag), places
    )


def _chosen(path: Path, entries: list[dict[str, Any]], ref: str) -> dict[str, Any]:
    """The image that `ref` means: a whole name, its tag, or its place as `@0`."""
    if ref.startswith("@") and ref[1:].isdigit():
        wanted = entries[int(ref[1:]) :][:1]
    else:
        names = {ref, f"docker.io/{ref}", ref.removeprefix("docker.io/").removeprefix("library/")}
        wanted = [
            e
            for e in entries
            if not ref or any(t in names or t.rpartition(":")[2] == ref for t in e.get("RepoTags") or [])
        ]
    if len(wanted) != 1:
        offered = [manifest.readable(str(t)) for e in entries for t in e.get("RepoTags") or []]
        raise Problem(
            "COS-IMAGE-UNKNOWN",
            f"{path} has {len(wanted)} images that fit; it offers: {', '.join(offered[:20]) or 'no names'}.",
            now="Name the tag after the path, like docker-archive:FILE:TAG, or the place, like FILE:@0.",
            exit_code=ExitCode.NOT_FOUND,
        )
    return wanted[0]


def _compression(path: Path, place: Member) -> Compression:
    """By the first bytes: some tools write compressed layers into a docker archive."""
    with path.open("rb") as f:
        f.seek(place.offset)
        head = f.read(min(4, place.size))
    if head.startswith(b"\x1f\x8b"):
        return Compression.GZIP
    return Compression.ZSTD if head == b"\x28\xb5\x2f\xfd" else Compression.NONE


def _index(path: Path) -> dict[str, Member]:
    """Name to place of every file; symbolic links (as old docker writes for equal layers) are followed."""
    try:
        with tarfile.open(path, "r:") as tar:
            found: dict[str, Member] = {}
            links: dict[str, str] = {}
            for info in tar:
                if len(found) + len(links) > _MEMBER_LIMIT:
                    raise _broken(path, f"it has more than {_MEMBER_LIMIT} files")
                name = posixpath.normpath(info.name)
                if info.isfile():
                    found[name] = Member(info.offset_data, info.size)
                elif info.issym() or info.islnk():
                    base = posixpath.dirname(name) if info.issym() else ""
                    links[name] = posixpath.normpath(posixpath.join(base, info.linkname))
            size = path.stat().st_size
    except OSError as e:
        raise gone(path, e) from None
    except tarfile.TarError as e:
        raise _broken(path, _kind(path) or f"{e}") from None
    for name, target in links.items():
        if target in found:
            found[name] = found[target]
    if any(m.offset + m.size > size for m in found.values()):
        raise _truncated(path)
    return found


def _kind(path: Path) -> str:
    """What the file is instead, where its first bytes tell."""
    with path.open("rb") as f:
        head = f.read(6)
    packed = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"\xfd7zXZ\x00": "unxz"}
    tool = next((t for magic, t in packed.items() if head.startswith(magic)), "")
    return f"it is compressed as a whole; unpack it with {tool} first" if tool else ""


def _member(path: Path, members: dict[str, Member], name: str) -> Member:
    try:
        return members[posixpath.normpath(name)]
    except KeyError:
        if len(members) and not _has_end(path):
            raise _truncated(path) from None
        raise _broken(path, f"{manifest.readable(name)} is not in it") from None


def _has_end(path: Path) -> bool:
    """Whether the archive has its end mark, two blocks of zeros (POSIX.1-2001 pax)."""
    with path.open("rb") as f:
        f.seek(max(0, path.stat().st_size - 1024))
        return not any(f.read(1024))


def _read(path: Path, members: dict[str, Member], name: str, limit: int) -> bytes:
    place = _member(path, members, name)
    if place.size > limit:
        raise _broken(path, f"{manifest.readable(name)} is too large")
    with path.open("rb") as f:
        f.seek(place.offset)
        return f.read(place.size)


def _truncated(path: Path) -> Problem:
    return Problem(
        "COS-ARCHIVE-TRUNCATED",
        f"{path} ends too early: it was not copied to its end.",
        now="Copy it again and compare the sizes.",
        exit_code=ExitCode.SOURCE,
    )


def _broken(path: Path, why: str) -> Problem:
    return Problem(
        "COS-ARCHIVE",
        f"{path} can't be read as an image archive: {why}.",
        now="Make it again, with skopeo copy or docker save.",
        exit_code=ExitCode.SOURCE,
    )

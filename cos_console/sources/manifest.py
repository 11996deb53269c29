"""Manifests, indexes and configurations of images, checked and turned into a ResolvedImage.

Source: OCI image spec 1.1 (manifest.md, image-index.md, config.md) and Docker's image manifest v2 schema 2.
`fetch(digest, media type, limit)` gives the bytes of a descriptor; they are checked against the digest here.
"""

import hashlib
import json
from collections.abc import Callable

from cos_console.model.image import (
    Compression,
    Digest,
    ImageReference,
    Layer,
    Platform,
    ResolvedImage,
    parse_digest,
)
from cos_console.model.problem import ExitCode, Problem

MANIFEST_LIMIT = 4 << 20
CONFIG_LIMIT = 8 << 20
_INDEXES = {
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
}
_MANIFESTS = {
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
}
ACCEPT = ", ".join(sorted(_MANIFESTS | _INDEXES))
_COMPRESSIONS = {
    "application/vnd.oci.image.layer.v1.tar": Compression.NONE,
    "application/vnd.oci.image.layer.v1.tar+gzip": Compression.GZIP,
    "application/vnd.oci.image.layer.v1.tar+zstd": Compression.ZSTD,
    "application/vnd.docker.image.rootfs.diff.tar": Compression.NONE,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": Compression.GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": Compression.ZSTD,
}
_VERSION = "org.opencontainers.image.version"

Fetch = Callable[[Digest, str, int], bytes]


def resolve_manifest(
    reference: ImageReference, data: bytes, digest: Digest, fetch: Fetch, platform: Platform, tag: str
) -> ResolvedImage:
    """Follow indexes (three deep at most) to the manifest for `platform`. Raises Problem."""
    for _ in range(3):
        document = load(data, digest, str(reference))
        if "manifests" not in document:
            break
        digest = _choose(document, platform, reference)
        data = fetch(digest, "manifest", MANIFEST_LIMIT)
    else:
        raise bad_image(reference, "its index leads to another index too often")
    if document.get("schemaVersion") != 2 or "layers" not in document:
        raise bad_image(reference, "its manifest is of a kind that is not read here (schema 1, or no image)")
    config_digest = _digest(_dict(document.get("config"), reference), reference)
    config = load(fetch(config_digest, "config", CONFIG_LIMIT), config_digest, str(reference))
    diff_ids = _list(_dict(config.get("rootfs"), reference).get("diff_ids"), reference)
    descriptors = [_dict(d, reference) for d in _list(document["layers"], reference)]
    if len(diff_ids) != len(descriptors) or not descriptors or len(descriptors) > 1000:
        raise bad_image(reference, f"{len(descriptors)} layers, but {len(diff_ids)} in its configuration")
    layers = tuple(_layer(d, str(i), reference) for d, i in zip(descriptors, diff_ids, strict=True))
    return resolved(reference, digest, config_digest, config, layers, tag)


def resolved(
    reference: ImageReference,
    digest: Digest,
    config_digest: Digest,
    config: dict[str, object],
    layers: tuple[Layer, ...],
    tag: str,
) -> ResolvedImage:
    """The value, with version and labels from the configuration."""
    inner = config.get("config")
    raw = inner.get("Labels") if isinstance(inner, dict) else None
    labels = {str(k): str(v) for k, v in raw.items()} if isinstance(raw, dict) else {}
    os_name, architecture = config.get("os"), config.get("architecture")
    platform = (
        Platform(str(os_name), str(architecture), str(config.get("variant") or ""))
        if os_name and architecture
        else None
    )
    return ResolvedImage(
        reference=reference,
        digest=digest,
        config_digest=config_digest,
        platform=platform,
        layers=layers,
        version=labels.get(_VERSION) or (tag if tag != "latest" else ""),
        created=str(config.get("created") or ""),
        transfer_bytes=sum(layer.size_bytes for layer in layers),
        unpacked_bytes=None,
        labels=labels,
    )


def load(data: bytes, digest: Digest, what: str) -> dict[str, object]:
    """JSON whose bytes match `digest`. Raises Problem COS-DIGEST or COS-MANIFEST."""
    algorithm, _, value = digest.partition(":")
    if hashlib.new(algorithm, data).hexdigest() != value:
        raise Problem(
            "COS-DIGEST",
            f"What came for {what} is not what its digest says.",
            now="Try again; if it stays, the registry or something on the way to it changes data.",
            exit_code=ExitCode.VERIFICATION,
        )
    return load_json(data, what)


def load_json(data: bytes, what: str) -> dict[str, object]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise Problem(
            "COS-MANIFEST",
            f"The description of {what} is damaged.",
            now="Choose another image, or tell its maker.",
            exit_code=ExitCode.SOURCE,
        )
    return document


def bad_image(reference: ImageReference, why: str) -> Problem:
    return Problem(
        "COS-MANIFEST",
        f"{reference} can't be used: {why}.",
        now="Choose another image, or tell its maker.",
        exit_code=ExitCode.SOURCE,
    )


def _choose(index: dict[str, object], wanted: Platform, reference: ImageReference) -> Digest:
    offered = []
    best: tuple[int, Digest] | None = None
    for raw in _list(index["manifests"], reference):
        entry = _dict(raw, reference)
        if entry.get("mediaType") and entry["mediaType"] not in _MANIFESTS | _INDEXES:
            continue
        platform = entry.get("platform")
        if not isinstance(platform, dict):
            best = best or (0, _digest(entry, reference))
            continue
        have = Platform(
            str(platform.get("os") or ""),
            str(platform.get("architecture") or ""),
            str(platform.get("variant") or ""),
        )
        offered.append(str(have))
        if (have.os, have.architecture) != (wanted.os, wanted.architecture):
            continue
        score = 3 if have.variant == wanted.variant else 2 if not have.variant else 1
        if best is None or score > best[0]:
            best = (score, _digest(entry, reference))
    if best is None:
        raise Problem(
            "COS-PLATFORM",
            f"{reference} is not offered for {wanted}; it is for {', '.join(offered) or 'none'}.",
            now="Choose an image for this machine's architecture.",
            exit_code=ExitCode.SOURCE,
        )
    return best[1]


def _layer(descriptor: dict[str, object], diff_id: str, reference: ImageReference) -> Layer:
    media = str(descriptor.get("mediaType"))
    if media not in _COMPRESSIONS or descriptor.get("urls"):
        raise bad_image(reference, f"a layer of kind {media[:80]}, which is not read here")
    size = descriptor.get("size")
    if not isinstance(size, int) or size < 0:
        raise bad_image(reference, "a layer without a size")
    try:
        plain = parse_digest(diff_id)
    except ValueError:
        raise bad_image(reference, "a diff_id that is not a digest") from None
    return Layer(
        digest=_digest(descriptor, reference),
        diff_id=plain,
        size_bytes=size,
        compression=_COMPRESSIONS[media],
    )


def _digest(descriptor: dict[str, object], reference: ImageReference) -> Digest:
    try:
        return parse_digest(str(descriptor.get("digest")))
    except ValueError:
        raise bad_image(reference, "a descriptor without a valid digest") from None


def _dict(value: object, reference: ImageReference) -> dict[str, object]:
    if not isinstance(value, dict):
        raise bad_image(reference, "its manifest is not one")
    return value


def _list(value: object, reference: ImageReference) -> list[object]:
    if not isinstance(value, list):
        raise bad_image(reference, "its manifest is not one")
    return value

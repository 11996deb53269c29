"""Manifests, indexes and configurations of images, checked and turned into a ResolvedImage.

Source: OCI image spec 1.1 (manifest.md, image-index.md, config.md) and Docker's image manifest v2 schema 2.
`fetch(digest, media type, limit)` gives the bytes of a descriptor; they are checked against the digest here.
"""

import hashlib
import json
import re
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
    told = False
    for _ in range(3):
        document = load(data, digest, str(reference))
        if "manifests" not in document:
            break
        digest, told = _choose(document, platform, reference)
        data = fetch(digest, "manifest", MANIFEST_LIMIT)
    else:
        raise bad_image(reference, "its index leads to another index too often")
    if document.get("schemaVersion") == 1:
        raise bad_image(
            reference, "its manifest is of schema 1, which nothing makes since 2016; push it again"
        )
    if document.get("schemaVersion") != 2 or "layers" not in document:
        raise bad_image(reference, "its manifest is not one of a container image")
    config_digest = _digest(_dict(document.get("config"), reference), reference)
    config = load(fetch(config_digest, "config", CONFIG_LIMIT), config_digest, str(reference))
    if not told:
        require_platform(platform_of(config), platform, reference)
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
    return ResolvedImage(
        reference=reference,
        digest=digest,
        config_digest=config_digest,
        platform=platform_of(config),
        layers=layers,
        version=version_of(labels, tag),
        created=readable(str(config.get("created") or "")),
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
        f"{reference} can't be used: {readable(why, 400)}.",
        now="Choose another image, or tell its maker.",
        exit_code=ExitCode.SOURCE,
    )


def platform_of(config: dict[str, object]) -> Platform | None:
    """What a configuration says it runs on; None where it says nothing."""
    os_name, architecture, variant = (
        readable(str(config.get(key) or "")) for key in ("os", "architecture", "variant")
    )
    return Platform(os_name, architecture, variant) if os_name and architecture else None


def require_platform(have: Platform | None, wanted: Platform, reference: ImageReference) -> None:
    """Raises Problem COS-PLATFORM for an image that says it is for another kind of machine."""
    if have is not None and fitness(have, wanted) == 0:
        raise _not_offered(reference, wanted, [str(have)])


def fitness(have: Platform, machine: Platform) -> int:
    """How well an image for `have` fits `machine`: 0 not at all, more is better.

    Variants (OCI image-index.md): an ARM machine runs what was built for its own and for older versions; an
    x86-64 image of a higher micro-architecture level (v2, v3, v4) runs only where that level was asked for.
    """
    if (have.os, have.architecture) != (machine.os, machine.architecture):
        return 0
    if have.variant == machine.variant:
        return 100
    base = {"amd64": "v1", "arm64": "v8"}.get(have.architecture)
    if not have.variant or have.variant == base:
        return 50
    if have.architecture == "arm":
        built, runs = (re.fullmatch(r"v(\d)", v) for v in (have.variant, machine.variant))
        if built and runs and built[1] <= runs[1]:
            return 50 + int(built[1])
    return 0


def version_of(labels: dict[str, str], tag: str) -> str:
    """As shown to people: the label, else the tag unless that says nothing."""
    return readable(labels.get(_VERSION) or (tag if tag != "latest" else ""))


def readable(text: str, limit: int = 128) -> str:
    """Text from an image that may go to a terminal: no control characters, not endless."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


def _choose(index: dict[str, object], wanted: Platform, reference: ImageReference) -> tuple[Digest, bool]:
    """The manifest that fits best, and whether the index itself says what platform it is for."""
    offered: list[str] = []
    unsaid: list[Digest] = []
    best: tuple[int, Digest] | None = None
    for raw in _list(index["manifests"], reference):
        entry = _dict(raw, reference)
        if entry.get("mediaType") and entry["mediaType"] not in _MANIFESTS | _INDEXES:
            continue
        annotations = entry.get("annotations")
        if isinstance(annotations, dict) and "vnd.docker.reference.type" in annotations:
            continue  # build attestations stand in the index as if they were images
        platform = entry.get("platform")
        have = platform_of(platform) if isinstance(platform, dict) else None
        if have is None:
            unsaid.append(_digest(entry, reference))
            continue
        offered.append(str(have))
        score = fitness(have, wanted)
        if score and (best is None or score > best[0]):
            best = (score, _digest(entry, reference))
    if best is not None:
        return best[1], True
    if len(unsaid) == 1 and not offered:
        return unsaid[0], False
    raise _not_offered(reference, wanted, offered)


def _not_offered(reference: ImageReference, wanted: Platform, offered: list[str]) -> Problem:
    return Problem(
        "COS-PLATFORM",
        f"{reference} is not offered for {wanted}; it is for {', '.join(offered[:20]) or 'none that it names'}.",
        now="Choose an image for this machine's architecture.",
        exit_code=ExitCode.SOURCE,
    )


def _layer(descriptor: dict[str, object], diff_id: str, reference: ImageReference) -> Layer:
    media = str(descriptor.get("mediaType"))
    if media not in _COMPRESSIONS or descriptor.get("urls"):
        raise bad_image(reference, f"a layer of kind {readable(media)}, which is not read here")
    size = descriptor.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
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

"""Container images in an OCI image layout, made with the standard library, so that no tool is needed.

Format: OCI image-layout 1.0.0, image manifest and config (OCI image spec 1.0).
"""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.sandbox.tree import Derivative


@dataclass(frozen=True)
class MadeImage:
    directory: Path
    ref: str
    manifest_digest: str
    config_digest: str
    layer_digests: tuple[str, ...]
    diff_ids: tuple[str, ...]

    @property
    def reference(self) -> str:
        return f"oci:{self.directory}:{self.ref}"


def make_derivative_image(directory: Path, derivative: Derivative, *, ref: str | None = None) -> MadeImage:
    """A three-layer image of `derivative`: base, content, and one that hides and replaces files of the first."""
    base = io.BytesIO()
    with tarfile.open(fileobj=base, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for d in sorted({*derivative.directories(), "usr", "usr/lib", "usr/bin", "etc", "boot", "opt/old"}):
            _add(tar, d, kind=tarfile.DIRTYPE, mode=0o1777 if d == "tmp" else 0o755)
        for name, target in sorted(derivative.symlinks().items()):
            _add(tar, name, kind=tarfile.SYMTYPE, link=target)
        _add(tar, "opt/old/gone", data=b"hidden by the top layer\n")
        _add(tar, "etc/motd", data=b"lower\n")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in sorted(derivative.files().items()):
            _add(tar, name, data=data, mode=0o755 if name.startswith("usr/bin/") else 0o644)
    top = io.BytesIO()
    with tarfile.open(fileobj=top, mode="w", format=tarfile.PAX_FORMAT) as tar:
        _add(tar, "opt/.wh.old", data=b"")
        _add(tar, "etc/motd", data=f"Welcome to {derivative.version}\n".encode())
        _add(tar, "etc/motd.link", kind=tarfile.LNKTYPE, link="etc/motd")
    layers = [base.getvalue(), content.getvalue(), top.getvalue()]
    return write_layout(directory, layers, ref=ref or derivative.version, version=derivative.version)


def write_layout(
    directory: Path,
    layers: Sequence[bytes],
    *,
    ref: str = "latest",
    version: str = "",
    architecture: str = "amd64",
    compress: bool = True,
    append: bool = False,
) -> MadeImage:
    """Write uncompressed layer tars (lowest first) as an OCI image layout."""
    blobs = directory / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return f"sha256:{digest}"

    descriptors = []
    diff_ids = []
    for layer in layers:
        diff_ids.append(f"sha256:{hashlib.sha256(layer).hexdigest()}")
        data = gzip.compress(layer, compresslevel=1, mtime=0) if compress else layer
        suffix = "+gzip" if compress else ""
        descriptors.append(
            {
                "mediaType": f"application/vnd.oci.image.layer.v1.tar{suffix}",
                "digest": put(data),
                "size": len(data),
            }
        )
    config = {
        "created": "2026-01-02T03:04:05Z",
        "architecture": architecture,
        "os": "linux",
        "config": {"Labels": {"org.opencontainers.image.version": version} if version else {}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [{"created": "2026-01-02T03:04:05Z"} for _ in layers],
    }
    config_data = json.dumps(config).encode()
    config_digest = put(config_data)
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": config_digest,
            "size": len(config_data),
        },
        "layers": descriptors,
    }
    manifest_data = json.dumps(manifest).encode()
    manifest_digest = put(manifest_data)
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    index_path = directory / "index.json"
    index = (
        json.loads(index_path.read_text())
        if append and index_path.exists()
        else {"schemaVersion": 2, "manifests": []}
    )
    index["manifests"].append(
        {
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": manifest_digest,
            "size": len(manifest_data),
            "platform": {"architecture": architecture, "os": "linux"},
            "annotations": {"org.opencontainers.image.ref.name": ref},
        }
    )
    index_path.write_text(json.dumps(index))
    return MadeImage(
        directory,
        ref,
        manifest_digest,
        config_digest,
        tuple(d["digest"] for d in descriptors),
        tuple(diff_ids),
    )


def _add(
    tar: tarfile.TarFile,
    name: str,
    *,
    data: bytes | None = None,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    link: str = "",
) -> None:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.mode = 0o777 if kind == tarfile.SYMTYPE else mode
    info.mtime = 1_767_323_045
    info.linkname = link
    info.size = len(data) if data is not None else 0
    tar.addfile(info, io.BytesIO(data) if data is not None else None)

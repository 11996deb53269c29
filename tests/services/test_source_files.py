"""Images in files: layouts and archives as skopeo, docker and umoci write them, and damaged ones."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from cos_console.model.image import Compression
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import SourceSettings, open_pinned, parse_reference, resolve
from tests.sandbox.disk import run
from tests.sandbox.image import MadeImage, write_layout
from tests.services.reading import read_whole, sha256

pytestmark = pytest.mark.services
SETTINGS = SourceSettings()


def layer(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


LAYERS = [layer("a", b"a" * 100_000), layer("b", b"b"), layer("c", bytes(range(256)) * 500)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    return write_layout(tmp_path_factory.mktemp("files") / "layout", LAYERS, ref="1.0", version="1.0")


def refused(reference: str) -> Problem:
    with pytest.raises(Problem) as caught:
        resolve(parse_reference(reference), SETTINGS)
    return caught.value


def archive_of(made: MadeImage, path: Path, transport: str, name: str = "") -> Path:
    run(["skopeo", "copy", "-q", made.reference, f"{transport}:{path}{name}"])
    return path


def test_a_layout_that_umoci_made_is_read(tmp_path: Path) -> None:
    layout = tmp_path / "umoci"
    run(["umoci", "init", "--layout", layout])
    run(["umoci", "new", "--image", f"{layout}:os"])
    bundle = tmp_path / "bundle"
    run(["umoci", "unpack", "--image", f"{layout}:os", bundle])
    (bundle / "rootfs/etc").mkdir()
    (bundle / "rootfs/etc/os-release").write_text("VERSION=1\n")
    run(["umoci", "repack", "--image", f"{layout}:os", bundle])
    content = resolve(parse_reference(f"oci:{layout}:os"), SETTINGS)
    assert read_whole(content) == [x.diff_id for x in content.image.layers]


def test_layers_are_read_in_place_from_both_kinds_of_archive(made: MadeImage, tmp_path: Path) -> None:
    oci = archive_of(made, tmp_path / "oci.tar", "oci-archive", ":any/name:1.0")
    docker = archive_of(made, tmp_path / "docker.tar", "docker-archive", ":quay.io/acme/os:1.0")
    for reference in (
        f"oci-archive:{oci}",
        f"oci-archive:{oci}:any/name:1.0",
        f"docker-archive:{docker}",
        f"docker-archive:{docker}:1.0",
        f"docker-archive:{docker}:quay.io/acme/os:1.0",
        f"docker-archive:{docker}:@0",
    ):
        content = resolve(parse_reference(reference), SETTINGS)
        assert read_whole(content) == list(made.diff_ids), reference
        assert read_whole(open_pinned(content.image, SETTINGS)) == list(made.diff_ids)
        assert content.image.version == "1.0"
    assert content.image.digest == made.config_digest


def test_a_docker_archive_with_linked_and_with_compressed_layers_is_read(tmp_path: Path) -> None:
    """docker before 25 writes a layer that stands twice as a symbolic link; crane compresses layers."""
    diff_ids = [sha256(LAYERS[0]), sha256(LAYERS[1]), sha256(LAYERS[0])]
    config = json.dumps(
        {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    ).encode()
    names = ["one/layer.tar", "two.tar.gz", "three/layer.tar"]
    about = json.dumps([{"Config": "c.json", "RepoTags": None, "Layers": names}]).encode()
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("one/layer.tar", LAYERS[0]),
            ("two.tar.gz", gzip.compress(LAYERS[1])),
            ("c.json", config),
            ("manifest.json", about),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("three/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../one/layer.tar"
        tar.addfile(link)
    content = resolve(parse_reference(f"docker-archive:{path}"), SETTINGS)
    assert read_whole(content) == diff_ids
    assert content.image.layers[1].compression is Compression.GZIP
    assert content.image.digest == sha256(config)


def test_an_archive_cut_anywhere_is_refused_and_never_read_short(made: MadeImage, tmp_path: Path) -> None:
    for transport in ("oci-archive", "docker-archive"):
        whole = archive_of(made, tmp_path / f"{transport}.tar", transport, ":n:1").read_bytes()
        cut = tmp_path / "cut.tar"
        for length in range(0, len(whole) - 10240, 977):
            cut.write_bytes(whole[:length])
            report = refused(f"{transport}:{cut}").report
            assert report.code in {"COS-ARCHIVE", "COS-ARCHIVE-TRUNCATED"}, (length, report)
            assert report.exit_code == ExitCode.SOURCE


def test_a_compressed_archive_says_how_to_unpack_it(made: MadeImage, tmp_path: Path) -> None:
    plain = archive_of(made, tmp_path / "a.tar", "oci-archive")
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert "gunzip" in refused(f"oci-archive:{packed}").report.what


def test_a_name_that_is_not_there_gets_the_names_that_are(made: MadeImage, tmp_path: Path) -> None:
    docker = archive_of(made, tmp_path / "docker.tar", "docker-archive", ":quay.io/acme/os:1.0")
    for reference, offered in (
        (f"docker-archive:{docker}:2.0", "quay.io/acme/os:1.0"),
        (f"oci:{made.directory}:2.0", "1.0"),
    ):
        report = refused(reference).report
        assert report.code == "COS-IMAGE-UNKNOWN"
        assert offered in report.what


def test_two_images_in_a_layout_must_be_told_apart(tmp_path: Path) -> None:
    write_layout(tmp_path, LAYERS[:1], ref="1")
    write_layout(tmp_path, LAYERS[:2], ref="2", append=True)
    assert "2 images" in refused(f"oci:{tmp_path}").report.what
    assert len(resolve(parse_reference(f"oci:{tmp_path}:2"), SETTINGS).image.layers) == 2


def test_a_blob_of_another_size_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    made = write_layout(tmp_path, LAYERS, ref="1")
    blob = tmp_path / "blobs/sha256" / made.layer_digests[0].removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes()[:-1])
    report = refused(made.reference).report
    assert (report.code, report.exit_code) == ("COS-DIGEST", ExitCode.VERIFICATION)
    blob.unlink()
    assert refused(made.reference).report.code == "COS-IMAGE-UNKNOWN"


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    made = write_layout(tmp_path, [layer("x", bytes(4 << 20))], ref="1", compress=False)
    stream = resolve(parse_reference(made.reference), SETTINGS).open_layer(0)
    buffer = memoryview(bytearray(1 << 20))
    assert stream.readinto(buffer)
    (tmp_path / "blobs/sha256" / made.layer_digests[0].removeprefix("sha256:")).write_bytes(b"")
    with pytest.raises(Problem, match="shorter") as caught:
        stream.readinto(buffer)
    assert caught.value.report.code == "COS-SOURCE-READ"


def test_an_image_for_another_architecture_is_refused_from_every_file(tmp_path: Path) -> None:
    made = write_layout(tmp_path / "l", LAYERS, ref="1", architecture="s390x")
    docker = tmp_path / "d.tar"
    run(["skopeo", "--override-arch=s390x", "copy", "-q", made.reference, f"docker-archive:{docker}:n:1"])
    for reference in (made.reference, f"docker-archive:{docker}"):
        assert refused(reference).report.code == "COS-PLATFORM"

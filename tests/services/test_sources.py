"""Every place an image can come from, read for real."""

import hashlib
import http.client
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cos_console.formats.ext4.reader import Ext4
from cos_console.formats.readat import FileReadAt
from cos_console.model.image import Content
from cos_console.model.problem import Problem
from cos_console.slots.build import ImageSpec, build_image, prove_image
from cos_console.sources import SourceSettings, open_pinned, parse_reference, resolve
from tests.sandbox.disk import run
from tests.sandbox.image import MadeImage, make_derivative_image
from tests.sandbox.tree import Derivative
from tests.services.conftest import RunningRegistry

pytestmark = pytest.mark.services
SETTINGS = SourceSettings(wait_limit_s=5.0, stall_timeout_s=2.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    return make_derivative_image(tmp_path_factory.mktemp("oci") / "layout", Derivative("2.0", payload_mib=6))


def built_is_right(content: Content, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "built", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        result = build_image(content, fd, ImageSpec(48 << 20, "COS_ACTIVE"))
        prove_image(fd, result)
        run(["e2fsck", "-fn", tmp_path / "built"])
        ext = Ext4.open(FileReadAt(fd))
        for name, data in Derivative("2.0", payload_mib=6).files().items():
            assert ext.read_file(name, 8 << 20) == data, name
        assert ext.read_file("etc/motd") == b"Welcome to 2.0\n"
        assert not ext.exists("opt/old")
    finally:
        os.close(fd)
        content.close()


def test_from_an_oci_layout(made: MadeImage, tmp_path: Path) -> None:
    content = resolve(parse_reference(made.reference), SETTINGS)
    assert content.image.digest == made.manifest_digest
    assert content.image.version == "2.0"
    built_is_right(content, tmp_path)


def test_from_archives_read_in_place(made: MadeImage, tmp_path: Path) -> None:
    for transport in ("oci-archive", "docker-archive"):
        archive = tmp_path / f"{transport}.tar"
        run(
            [
                "skopeo",
                "copy",
                "-q",
                made.reference,
                f"{transport}:{archive}:sandbox:2.0"[
                    : None if transport == "docker-archive" else -len("sandbox:2.0") - 1
                ],
            ]
        )
        content = resolve(parse_reference(f"{transport}:{archive}"), SETTINGS)
        built_is_right(content, tmp_path)


def test_from_a_directory(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    Derivative("2.0", payload_mib=6).write(tree)
    (tree / "etc/motd").write_text("Welcome to 2.0\n")
    (tree / "proc/secret").write_text("content of /proc stays out")
    content = resolve(parse_reference(f"dir:{tree}"), SETTINGS)
    built_is_right(content, tmp_path)


def test_from_a_registry_and_again_by_its_digest(
    registry: RunningRegistry, made: MadeImage, tmp_path: Path
) -> None:
    name = registry.push(made.directory, made.ref, "os/sandbox:2.0")
    content = resolve(parse_reference(name), SETTINGS)
    assert content.image.digest == made.manifest_digest
    newer = make_derivative_image(tmp_path / "newer", Derivative("3.0"))
    registry.push(newer.directory, newer.ref, "os/sandbox:2.0")
    assert resolve(parse_reference(name), SETTINGS).image.digest == newer.manifest_digest
    built_is_right(open_pinned(content.image, SETTINGS), tmp_path)


def test_tls_with_an_authority_of_ones_own(
    tls_registry: RunningRegistry, made: MadeImage, tmp_path: Path
) -> None:
    name = tls_registry.push(made.directory, made.ref, "os/sandbox:2.0")
    with pytest.raises(Problem) as caught:
        resolve(parse_reference(name), SETTINGS)
    assert caught.value.report.code == "COS-TLS-UNTRUSTED"
    trusted = SourceSettings(ca_file=str(tls_registry.ca))
    built_is_right(resolve(parse_reference(name), trusted), tmp_path)


def test_login_from_dockers_own_configuration(
    login_registry: RunningRegistry, made: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = login_registry.push(made.directory, made.ref, "os/sandbox:2.0", user="operator:s3cret-pass")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(Problem, match="docker's configuration has none") as caught:
        resolve(parse_reference(name), SETTINGS)
    assert caught.value.report.code == "COS-AUTH"
    auth = "b3BlcmF0b3I6czNjcmV0LXBhc3M="
    (tmp_path / "config.json").write_text(json.dumps({"auths": {login_registry.host: {"auth": auth}}}))
    content = resolve(parse_reference(name), SETTINGS)
    assert "s3cret" not in repr(content) + repr(content.image)
    built_is_right(content, tmp_path)


def test_from_a_docker_engine(
    docker_engine: str, made: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "a.tar"
    run(["skopeo", "copy", "-q", made.reference, f"docker-archive:{archive}:sandbox:2.0"])
    run(["docker", "-H", docker_engine, "load", "-q", "-i", archive])
    monkeypatch.setenv("DOCKER_HOST", docker_engine)
    content = resolve(parse_reference("docker-daemon:sandbox:2.0"), SETTINGS)
    assert content.image.digest == made.config_digest
    built_is_right(content, tmp_path)


class Cutting(http.server.BaseHTTPRequestHandler):
    """Hands blobs on from the real registry, but cuts the first answers in the middle."""

    upstream = ""
    cuts = 0
    ranges = True
    seen: list[str] = []

    def do_GET(self) -> None:
        upstream = http.client.HTTPConnection(self.upstream)
        wanted = self.headers.get("Range", "")
        headers = {"Accept": self.headers.get("Accept", "*/*")}
        if wanted and self.ranges:
            headers["Range"] = wanted
        upstream.request("GET", self.path, headers=headers)
        answer = upstream.getresponse()
        data = answer.read()
        self.send_response(answer.status)
        for key in ("Content-Type", "Content-Length", "Content-Range", "Docker-Content-Digest"):
            if answer.headers.get(key):
                self.send_header(key, answer.headers[key])
        self.end_headers()
        cls = type(self)
        if "/blobs/" in self.path and len(data) > 1_000_000:
            cls.seen.append(wanted)
            if cls.cuts:
                cls.cuts -= 1
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                self.connection.close()
                return
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def cutting(registry: RunningRegistry) -> Iterator[type[Cutting]]:
    handler = type("Handler", (Cutting,), {"upstream": registry.host, "cuts": 0, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler
    server.shutdown()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_lost_connection_goes_on_where_it_broke(
    registry: RunningRegistry, cutting: type[Cutting], made: MadeImage, tmp_path: Path, ranges: bool
) -> None:
    registry.push(made.directory, made.ref, "os/cut:2.0")
    cutting.cuts, cutting.ranges = 3, ranges
    content = resolve(parse_reference(f"127.0.0.1:{cutting.port}/os/cut:2.0"), SETTINGS)
    built_is_right(content, tmp_path)
    assert cutting.cuts == 0
    assert any(s.startswith("bytes=") and s != "bytes=0-" for s in cutting.seen)


def test_a_source_that_stays_away_is_given_up_in_one_sentence(
    registry: RunningRegistry, cutting: type[Cutting], made: MadeImage, tmp_path: Path
) -> None:
    registry.push(made.directory, made.ref, "os/cut:2.0")
    cutting.cuts, cutting.ranges = 10_000, False
    impatient = SourceSettings(wait_limit_s=1.0, stall_timeout_s=1.0)
    content = resolve(parse_reference(f"127.0.0.1:{cutting.port}/os/cut:2.0"), impatient)
    fd = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    try:
        with pytest.raises(Problem, match="of a layer") as caught:
            build_image(content, fd, ImageSpec(48 << 20, "X"))
    finally:
        os.close(fd)
    assert caught.value.report.code == "COS-NET-RESET"


def code_of(reference: str) -> str:
    with pytest.raises(Problem) as caught:
        resolve(parse_reference(reference), SourceSettings(connect_timeout_s=2.0))
    return caught.value.report.code


def test_each_failure_has_its_own_answer(registry: RunningRegistry, tmp_path: Path, made: MadeImage) -> None:
    assert code_of(f"{registry.host}/no/such:tag") == "COS-IMAGE-UNKNOWN"
    assert code_of("localhost:1/a:b") == "COS-NET-REFUSED"
    assert code_of("no-such-host.invalid/a:b") == "COS-NET-NAME"
    assert code_of(f"oci:{tmp_path}/none") == "COS-IMAGE-UNKNOWN"
    assert code_of(f"oci:{made.directory}:9.9") == "COS-IMAGE-UNKNOWN"
    (tmp_path / "x.tar").write_bytes(b"not a tar" * 1000)
    assert code_of(f"oci-archive:{tmp_path}/x.tar") == "COS-ARCHIVE"
    other = make_derivative_image(tmp_path / "oci", Derivative("1"))
    blob = other.directory / "blobs/sha256" / other.config_digest.removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes().replace(b"linux", b"LINUX"))
    assert code_of(other.reference) == "COS-DIGEST"
    assert hashlib.sha256(blob.read_bytes()).hexdigest() != blob.name

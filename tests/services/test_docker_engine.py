"""A real Docker Engine: its images, its pulls, its absence."""

from pathlib import Path

import pytest

from cos_console.model.problem import Problem
from cos_console.sources import SourceSettings, open_pinned, parse_reference, resolve
from tests.sandbox.disk import run
from tests.sandbox.image import MadeImage, write_layout
from tests.services.conftest import RunningRegistry, free_port
from tests.services.reading import read_whole
from tests.services.test_source_files import LAYERS

pytestmark = pytest.mark.services
SETTINGS = SourceSettings()
EMPTY = bytes(1024)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    layers = [LAYERS[0], EMPTY, LAYERS[1], LAYERS[0]]
    return write_layout(tmp_path_factory.mktemp("engine") / "layout", layers, ref="1.0", version="1.0")


@pytest.fixture
def engine(docker_engine: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DOCKER_HOST", docker_engine)
    return docker_engine


def problem_of(name: str) -> Problem:
    with pytest.raises(Problem) as caught:
        resolve(parse_reference(name), SETTINGS)
    return caught.value


def test_an_engines_image_is_streamed_and_is_the_one_that_was_planned(
    engine: str, made: MadeImage, tmp_path: Path, registry: RunningRegistry
) -> None:
    archive = tmp_path / "a.tar"
    run(["skopeo", "copy", "-q", made.reference, f"docker-archive:{archive}:sandbox:1.0"])
    run(["docker", "-H", engine, "load", "-q", "-i", archive])
    content = resolve(parse_reference("docker-daemon:sandbox:1.0"), SETTINGS)
    assert content.image.digest == made.config_digest
    assert content.image.version == "1.0"
    assert set(read_whole(content)) == set(made.diff_ids), (
        "a layer that stands twice comes once, an empty one too"
    )
    assert content.image.unpacked_bytes is not None
    by_id = resolve(parse_reference(f"docker-daemon:{made.config_digest}"), SETTINGS)
    assert by_id.image.layers == content.image.layers

    other = write_layout(tmp_path / "other", LAYERS[1:], ref="1.0")
    again = tmp_path / "b.tar"
    run(["skopeo", "copy", "-q", other.reference, f"docker-archive:{again}:sandbox:1.0"])
    run(["docker", "-H", engine, "load", "-q", "-i", again])
    pinned = open_pinned(content.image, SETTINGS)
    assert set(read_whole(pinned)) == set(made.diff_ids), "the name has moved, the plan has not"


def test_an_image_that_is_not_there_is_pulled_with_its_progress(
    engine: str, made: MadeImage, registry: RunningRegistry, tmp_path: Path
) -> None:
    name = registry.push(made.directory, made.ref, "os/pulled:1.0").replace("localhost", "127.0.0.1")
    told: list[tuple[int, int, str]] = []
    content = resolve(
        parse_reference(f"docker-daemon:{name}"), SETTINGS, report=lambda *progress: told.append(progress)
    )
    assert content.image.digest == made.config_digest
    assert any("Pull complete" in words for _, _, words in told)
    assert all(done <= total for done, total, _ in told)
    assert set(read_whole(content)) == set(made.diff_ids)

    missing = problem_of(f"docker-daemon:{name}-none")
    assert missing.report.code == "COS-IMAGE-UNKNOWN"
    refused = problem_of(f"docker-daemon:127.0.0.1:{free_port()}/os:1")
    assert refused.report.code == "COS-ENGINE"
    assert "refused" in refused.report.what
    foreign = write_layout(tmp_path / "s390x", LAYERS, ref="1.0", architecture="s390x")
    name = registry.push(foreign.directory, foreign.ref, "os/foreign:1.0").replace("localhost", "127.0.0.1")
    assert problem_of(f"docker-daemon:{name}").report.code == "COS-PLATFORM"


def test_an_engine_that_is_not_there_is_told_with_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (
        f"unix://{tmp_path}/none.sock",
        f"tcp://127.0.0.1:{free_port()}",
        "ssh://nobody@127.0.0.1:1",
        "odd://x",
    ):
        monkeypatch.setenv("DOCKER_HOST", where)
        found = problem_of("docker-daemon:sandbox:1.0")
        assert found.report.code == "COS-ENGINE-DOWN"
        assert where.rpartition("@")[2].rpartition("//")[2] in found.report.what

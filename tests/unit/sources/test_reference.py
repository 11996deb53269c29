"""How images are named."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cos_console.model.image import Transport
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import parse_reference
from cos_console.sources.reference import split_name, split_path

DIGEST = "sha256:" + "0f" * 32


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.19", "docker.io/library/alpine:3.19"),
        ("rancher/os", "docker.io/rancher/os:latest"),
        ("index.docker.io/library/alpine", "docker.io/library/alpine:latest"),
        (
            "quay.io/costoolkit/releases-green:cos-system-0.5.8",
            "quay.io/costoolkit/releases-green:cos-system-0.5.8",
        ),
        ("docker://localhost:5000/a/b", "localhost:5000/a/b:latest"),
        ("localhost/a", "localhost/a:latest"),
        ("[::1]:5000/a:b", "[::1]:5000/a:b"),
        (f"quay.io/a/b@{DIGEST}", f"quay.io/a/b@{DIGEST}"),
        (f"quay.io/a/b:1@{DIGEST}", f"quay.io/a/b:1@{DIGEST}"),
        ("  alpine\n", "docker.io/library/alpine:latest"),
    ],
)
def test_a_bare_name_means_a_registry_with_dockers_defaults(text: str, location: str) -> None:
    found = parse_reference(text)
    assert (found.transport, found.location) == (Transport.DOCKER, location)


def test_paths_are_split_from_their_name_at_the_first_colon(tmp_path: Path) -> None:
    found = parse_reference("docker-archive:/srv/os.tar:quay.io/acme/os:1.0")
    assert (found.transport, split_path(found.location)) == (
        Transport.DOCKER_ARCHIVE,
        ("/srv/os.tar", "quay.io/acme/os:1.0"),
    )
    assert split_path(parse_reference("oci:/srv/layout").location) == ("/srv/layout", "")
    odd = tmp_path / "os:1.tar"
    odd.touch()
    assert split_path(parse_reference(f"oci-archive:{odd}").location) == (str(odd), "")
    assert parse_reference("dir:/srv/a:b").location == "/srv/a:b"


def test_relative_paths_become_absolute_because_the_engine_runs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_reference("oci:layout:1").location == f"{tmp_path}/layout:1"


def test_an_engine_image_may_be_named_by_its_id() -> None:
    assert parse_reference(f"docker-daemon:{DIGEST}").location == DIGEST
    assert parse_reference("docker-daemon:os:1").location == "docker.io/library/os:1"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "oci:",
        "UPPER",
        "a b",
        "a/b:",
        "a/b@sha256:12",
        "a//b",
        "-a",
        "quay.io:70000/a",
        "https://quay.io/a",
        "ftp:x/y/z://",
        "./layout",
        "/srv/layout",
        "a" * 300,
        "a:" + "t" * 129,
        "docker://",
        "dir:/a\0b",
    ],
)
def test_what_names_no_image_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(Problem) as caught:
        parse_reference(text)
    report = caught.value.report
    assert (report.code, report.exit_code) == ("COS-REFERENCE", ExitCode.USAGE)
    assert report.what.endswith(".")
    assert "\n" not in report.what


def test_a_password_typed_into_a_name_is_not_repeated() -> None:
    with pytest.raises(Problem) as caught:
        parse_reference("https://operator:s3cret-pass@quay.io/a/b")
    assert "s3cret" not in repr(caught.value.report)


names = st.from_regex(
    r"(?:quay\.io|localhost:5000|[a-z]{1,8})(?:/[a-z0-9]{1,8}(?:[._-][a-z0-9]{1,4})?){1,3}(?::[A-Za-z0-9_][\w.-]{0,20})?",
    fullmatch=True,
).filter(str.isascii)


@given(names)
def test_a_normalised_name_stays_as_it_is(text: str) -> None:
    found = parse_reference(text)
    assert parse_reference(str(found)) == found
    host, repository, tag, digest = split_name(found.location)
    assert f"{host}/{repository}:{tag}" == found.location
    assert not digest


@given(st.text(max_size=60))
def test_any_text_is_a_reference_or_a_problem(text: str) -> None:
    code = "COS-REFERENCE"
    try:
        found = parse_reference(text)
    except Problem as e:
        code = e.report.code
    else:
        assert found.location
        if found.transport is Transport.DOCKER:
            assert re.fullmatch(r"[\x21-\x7e]+", found.location)
    assert code == "COS-REFERENCE"

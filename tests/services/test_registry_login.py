"""Logging in: tokens from a real registry's token service, docker's configuration, helpers. No secret shows."""

import base64
import json
import os
import pickle
from pathlib import Path

import pytest

from cos_console.model.problem import Problem
from cos_console.sources import SourceSettings, parse_reference, resolve
from cos_console.sources.login import parse_challenges, stored_credentials
from tests.sandbox.image import MadeImage, write_layout
from tests.services.conftest import RunningRegistry, TokenRegistry
from tests.services.reading import read_whole
from tests.services.test_source_files import LAYERS

pytestmark = pytest.mark.services
SETTINGS = SourceSettings(wait_limit_s=3.0, stall_timeout_s=5.0)
SECRET = "s3cret-pass"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    return write_layout(tmp_path_factory.mktemp("login") / "layout", LAYERS, ref="1.0", version="1.0")


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "docker-config"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    return folder / "config.json"


def know(config: Path, host: str, secret: str = SECRET) -> None:
    auth = base64.b64encode(f"operator:{secret}".encode()).decode()
    config.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def problem_of(name: str) -> Problem:
    with pytest.raises(Problem) as caught:
        resolve(parse_reference(name), SETTINGS)
    return caught.value


def test_anybody_gets_a_token_for_a_public_image(
    token_registry: TokenRegistry, made: MadeImage, docker_config: Path
) -> None:
    name = token_registry.registry.push(made.directory, made.ref, "public/os:1.0", user=f"operator:{SECRET}")
    content = resolve(parse_reference(name), SETTINGS)
    assert read_whole(content) == list(made.diff_ids)
    assert token_registry.service.given[-1] == "repository:public/os:pull"


def test_a_private_image_needs_the_login_from_dockers_configuration(
    token_registry: TokenRegistry, made: MadeImage, docker_config: Path
) -> None:
    name = token_registry.registry.push(made.directory, made.ref, "private/os:1.0", user=f"operator:{SECRET}")
    nobody = problem_of(name)
    assert nobody.report.code == "COS-AUTH"
    know(docker_config, token_registry.host, "wrong-one")
    wrong = problem_of(name)
    assert "user 'operator' from" in wrong.report.what
    assert "wrong-one" not in repr(wrong.report)
    know(docker_config, token_registry.host)
    content = resolve(parse_reference(name), SETTINGS)
    assert read_whole(content) == list(made.diff_ids)
    assert SECRET not in repr(vars(content)) + repr(content.image)


def test_a_token_that_dies_in_mid_pull_is_renewed(
    token_registry: TokenRegistry, made: MadeImage, docker_config: Path
) -> None:
    name = token_registry.registry.push(made.directory, made.ref, "private/os:1.0", user=f"operator:{SECRET}")
    know(docker_config, token_registry.host)
    token_registry.service.life_s = 300
    content = resolve(parse_reference(name), SETTINGS)
    login = content._registry._login  # type: ignore[attr-defined]
    scope = "repository:private/os:pull"
    _, until = login._headers[scope]
    login._headers[scope] = ("Bearer dead.dead.dead", until)
    before = len(token_registry.service.given)
    assert read_whole(content) == list(made.diff_ids)
    assert len(token_registry.service.given) == before + 1, "one new token for all layers"


def test_an_identity_token_is_changed_for_an_access_token(
    token_registry: TokenRegistry, made: MadeImage, docker_config: Path
) -> None:
    name = token_registry.registry.push(made.directory, made.ref, "private/os:1.0", user=f"operator:{SECRET}")
    docker_config.write_text(
        json.dumps({"auths": {token_registry.host: {"auth": "", "identitytoken": "identity-s3cret"}}})
    )
    assert read_whole(resolve(parse_reference(name), SETTINGS)) == list(made.diff_ids)


def test_a_credential_helper_is_asked_and_its_failure_is_told_without_its_words(
    login_registry: RunningRegistry, made: MadeImage, docker_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = login_registry.push(made.directory, made.ref, "private/os:1.0", user=f"operator:{SECRET}")
    docker_config.write_text(json.dumps({"credHelpers": {login_registry.host: "cos-test"}}))
    missing = problem_of(name)
    assert missing.report.code == "COS-LOGIN-HELPER"
    assert "docker-credential-cos-test" in missing.report.what
    helper = docker_config.parent / "docker-credential-cos-test"
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    helper.write_text(f"#!/bin/sh\necho 'broken {SECRET}'\nexit 1\n")
    helper.chmod(0o755)
    failing = problem_of(name)
    assert failing.report.code == "COS-LOGIN-HELPER"
    assert SECRET not in repr(failing.report)
    answer = json.dumps({"ServerURL": login_registry.host, "Username": "operator", "Secret": SECRET})
    helper.write_text(f"#!/bin/sh\ncat > /dev/null\necho '{answer}'\n")
    content = resolve(parse_reference(name), SETTINGS)
    assert read_whole(content) == list(made.diff_ids)
    copied = pickle.loads(pickle.dumps(stored_credentials(login_registry.host)))
    assert SECRET not in f"{copied!r}{copied}"


@pytest.mark.parametrize(
    "text", ["{", '{"auths": {"x": {"auth": "%%%"}}}', '{"auths": ["x"]}', '["x"]', '{"auths":{"x":1}}']
)
def test_a_broken_configuration_is_named(
    login_registry: RunningRegistry, made: MadeImage, docker_config: Path, text: str
) -> None:
    name = login_registry.push(made.directory, made.ref, "private/os:1.0", user=f"operator:{SECRET}")
    docker_config.write_text(text)
    found = problem_of(name)
    assert found.report.code == "COS-LOGIN-CONFIG"
    assert str(docker_config) in found.report.what


def test_challenges_are_read_as_the_standard_writes_them() -> None:
    assert parse_challenges('Bearer realm="https://a/t",service="s",scope="repository:a/b:pull,push"') == [
        ("bearer", {"realm": "https://a/t", "service": "s", "scope": "repository:a/b:pull,push"})
    ]
    assert parse_challenges('Basic realm="x \\"y\\"", Bearer realm=https://a/t , service=s') == [
        ("basic", {"realm": 'x "y"'}),
        ("bearer", {"realm": "https://a/t", "service": "s"}),
    ]
    assert parse_challenges("Negotiate, Basic realm=x") == [("negotiate", {}), ("basic", {"realm": "x"})]
    assert parse_challenges("") == []
    assert parse_challenges('"""') == []

"""Real servers on loopback, each on a free port, ended by pid."""

import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.sandbox.disk import run
from tests.services.servers import TokenService, make_certificate, serving


@dataclass(frozen=True)
class RunningRegistry:
    host: str
    ca: Path | None = None

    def push(self, layout: Path, ref: str, name: str, *, user: str = "") -> str:
        """Copy an image of an OCI layout here with skopeo; its reference."""
        login = ["--dest-creds", user] if user else []
        run(
            [
                "skopeo",
                "copy",
                "-q",
                "--dest-tls-verify=false",
                *login,
                f"oci:{layout}:{ref}",
                f"docker://{self.host}/{name}",
            ]
        )
        return f"{self.host}/{name}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start_registry(
    work: Path, *, extra: str = "", tls: tuple[Path, Path] | None = None
) -> Iterator[RunningRegistry]:
    port = free_port()
    work.mkdir(parents=True, exist_ok=True)
    http = f"http:\n  addr: 127.0.0.1:{port}\n"
    if tls:
        http += f"  tls:\n    certificate: {tls[0]}\n    key: {tls[1]}\n"
    config = work / "config.yml"
    config.write_text(
        f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {work}/data\n{http}{extra}"
    )
    with (work / "log").open("wb") as log:
        server = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            pytest.fail((work / "log").read_text())
        yield RunningRegistry(f"localhost:{port}", tls[0] if tls else None)
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    yield from start_registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="session")
def tls_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    work = tmp_path_factory.mktemp("tls-registry")
    certificate, key = work / "cert.pem", work / "key.pem"
    run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate]
    )
    yield from start_registry(work / "r", tls=(certificate, key))


@pytest.fixture(scope="session")
def login_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    work = tmp_path_factory.mktemp("login-registry")
    (work / "htpasswd").write_bytes(run(["htpasswd", "-Bbn", "operator", "s3cret-pass"]))
    extra = f"auth:\n  htpasswd:\n    realm: test\n    path: {work}/htpasswd\n"
    yield from start_registry(work / "r", extra=extra)


@dataclass(frozen=True)
class TokenRegistry:
    """A registry that sends everybody to a token service; `service` says how long tokens live."""

    registry: RunningRegistry
    service: type[TokenService]

    @property
    def host(self) -> str:
        return self.registry.host


@pytest.fixture
def token_registry(tmp_path: Path) -> Iterator[TokenRegistry]:
    certificate, key = make_certificate(tmp_path / "token")
    service = type("Service", (TokenService,), {"key": key, "certificate": certificate, "given": []})
    with serving(service) as port:
        bundle = tmp_path / "token/bundle.pem"
        bundle.write_bytes(certificate.read_bytes() + (tmp_path / "token/ca.pem").read_bytes())
        extra = (
            f"auth:\n  token:\n    realm: http://127.0.0.1:{port}/token\n    service: cos-registry\n"
            f"    issuer: cos-test\n    rootcertbundle: {bundle}\n"
        )
        for running in start_registry(tmp_path / "r", extra=extra):
            yield TokenRegistry(running, service)


@pytest.fixture
def docker_engine(tmp_path: Path) -> Iterator[str]:
    socket_path = tmp_path / "docker.sock"
    with (tmp_path / "dockerd.log").open("wb") as log:
        daemon = subprocess.Popen(
            [
                "dockerd",
                f"--data-root={tmp_path}/data",
                f"--exec-root={tmp_path}/exec",
                f"--pidfile={tmp_path}/pid",
                f"--host=unix://{socket_path}",
                "--iptables=false",
                "--bridge=none",
                "--storage-driver=overlay2",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        for _ in range(300):
            if socket_path.exists() and daemon.poll() is None:
                done = subprocess.run(
                    ["docker", "-H", f"unix://{socket_path}", "version"], capture_output=True, check=False
                )
                if done.returncode == 0:
                    break
            time.sleep(0.1)
        else:
            pytest.fail((tmp_path / "dockerd.log").read_text()[-2000:])
        yield f"unix://{socket_path}"
    finally:
        daemon.terminate()
        daemon.wait()

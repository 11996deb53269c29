"""Small servers on loopback for what real registries do seldom: break, stall, redirect, let tokens expire."""

import base64
import contextlib
import hashlib
import http.server
import json
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, urlsplit

from tests.sandbox.disk import run
from tests.sandbox.image import MadeImage


class Handler(http.server.BaseHTTPRequestHandler):
    """Keeps connections, says nothing."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def reset(self) -> None:
        """End the connection as a failing link does: RST, nothing more."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


@contextlib.contextmanager
def serving(handler: type[Handler], context: ssl.SSLContext | None = None) -> Iterator[int]:
    """The port of a server for `handler`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign, assignment]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


class OddRegistry(Handler):
    """Serves one OCI layout as `os/sandbox`; `turn` may take a request out of its hands."""

    layout: ClassVar[Path]
    made: ClassVar[MadeImage]
    ranges: ClassVar[bool] = True
    turn: ClassVar[Callable[["OddRegistry"], bool]] = staticmethod(lambda _: False)
    seen: ClassVar[list[tuple[str, dict[str, str]]]] = []
    """(path, headers in small letters) of every request."""

    @property
    def is_layer(self) -> bool:
        return self.path.rpartition("/")[2] in self.made.layer_digests

    @property
    def blob(self) -> bytes:
        name = self.path.rpartition("/")[2]
        name = self.made.manifest_digest if name == self.made.ref else name
        return (self.layout / "blobs/sha256" / name.removeprefix("sha256:")).read_bytes()

    def do_GET(self) -> None:
        cls = type(self)
        cls.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
        if cls.turn(self):
            return
        if urlsplit(self.path).path == "/v2/":
            self.answer(200, b"{}")
            return
        self.serve_blob()

    def serve_blob(self) -> None:
        try:
            data = self.blob
        except OSError:
            self.answer(404, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}')
            return
        wanted = self.headers.get("Range", "")
        if wanted and self.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.answer(206, data[start:], Content_Range=f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.answer(200, data)

    def serve_part(self, count: int) -> None:
        """Promise what is asked for, send `count` bytes of it."""
        data = self.blob
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + count])
        self.wfile.flush()


def odd_registry(made: MadeImage) -> type[OddRegistry]:
    """A fresh one, so that its state is its own."""
    return type("Odd", (OddRegistry,), {"layout": made.directory, "made": made, "seen": []})


class TokenService(Handler):
    """Docker's token authentication: a JWT (RS256 with x5c) for who may pull or push.

    The registry lets a token live 60 s beyond its `exp`; `life_s` is how long it is really taken.
    """

    key: ClassVar[Path]
    certificate: ClassVar[Path]
    life_s: ClassVar[int] = 300
    logins: ClassVar[dict[str, str]] = {"operator": "s3cret-pass"}
    refresh_tokens: ClassVar[tuple[str, ...]] = ("identity-s3cret",)
    given: ClassVar[list[str]] = []
    """Scopes of the tokens that were given."""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        user = ""
        login = self.headers.get("Authorization", "")
        if login.startswith("Basic "):
            user, _, secret = base64.b64decode(login.removeprefix("Basic ")).decode().partition(":")
            if self.logins.get(user) != secret:
                self.answer(401, b'{"details":"wrong"}')
                return
        self._give(user, query.get("scope", []), "token")

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        if form.get("refresh_token", [""])[0] not in self.refresh_tokens:
            self.answer(401, b"{}")
            return
        self._give("operator", form.get("scope", []), "access_token")

    def _give(self, user: str, scopes: list[str], field: str) -> None:
        access = []
        for scope in " ".join(scopes).split():
            kind, name, actions = scope.split(":")
            allowed = [a for a in actions.split(",") if user or (a == "pull" and name.startswith("public/"))]
            access.append({"type": kind, "name": name, "actions": allowed})
        self.given.append(" ".join(scopes))
        now = int(time.time())
        der = subprocess.run(
            ["openssl", "x509", "-in", self.certificate, "-outform", "DER"], capture_output=True, check=True
        ).stdout
        header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
        claims = {
            "iss": "cos-test",
            "sub": user,
            "aud": "cos-registry",
            "exp": now - 60 + self.life_s,
            "nbf": now - 600,
            "iat": now - 600,
            "jti": hashlib.sha256(str(time.monotonic_ns()).encode()).hexdigest(),
            "access": access,
        }
        signed = f"{_segment(header)}.{_segment(claims)}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", self.key],
            input=signed.encode(),
            capture_output=True,
            check=True,
        ).stdout
        token = f"{signed}.{base64.urlsafe_b64encode(signature).decode().rstrip('=')}"
        self.answer(200, json.dumps({field: token, "expires_in": 300}).encode())


def _segment(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def make_certificate(
    work: Path, name: str = "localhost", *, begins: str = "", ends: str = "", issuer: str = ""
) -> tuple[Path, Path]:
    """(certificate, key) for `name`, self-signed, or by an authority `issuer` of its own (`ca.pem` beside).

    Times are as openssl ca has them: YYYYMMDDHHMMSSZ.
    """
    work.mkdir(parents=True, exist_ok=True)
    key, certificate, ca_key, ca = (work / n for n in ("key.pem", "cert.pem", "ca-key.pem", "ca.pem"))
    new = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj"]
    run([*new, f"/CN={issuer or name}", "-x509", "-days", "2", "-keyout", ca_key, "-out", ca])
    run([*new, f"/CN={name}", "-keyout", key, "-out", work / "request.pem"])
    (work / "index").touch()
    (work / "serial").write_text("01\n")
    (work / "ca.cnf").write_text(
        f"[ca]\ndefault_ca=d\n[d]\ndatabase={work}/index\nserial={work}/serial\nnew_certs_dir={work}\n"
        "default_md=sha256\npolicy=p\nx509_extensions=x\ndefault_days=2\n[p]\ncommonName=supplied\n"
        f"[x]\nsubjectAltName=DNS:{name}\n"
    )
    times = (["-startdate", begins] if begins else []) + (["-enddate", ends] if ends else [])
    run(
        ["openssl", "ca", "-batch", "-notext", "-config", work / "ca.cnf", "-cert", ca, "-keyfile", ca_key]
        + ["-in", work / "request.pem", "-out", certificate, *times]
    )
    return certificate, key

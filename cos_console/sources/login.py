"""Logging in to a registry: what docker's own configuration has for it, and tokens.

Sources: distribution's token authentication (`Bearer realm=…,service=…,scope=…`) and its OAuth2 form for
identity tokens; RFC 9110 section 11 (challenges); docker's config.json (auths, credsStore, credHelpers) by way
of the `docker` package. No secret leaves this module but in a header.
"""

import base64
import json
import os
import re
import time
import warnings
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import urllib3

from cos_console.model.problem import ExitCode, Problem
from cos_console.sources.connection import Connections, may_be_plain
from cos_console.sources.settings import SourceSettings

_SCHEME = re.compile(r"\s*,?\s*([A-Za-z][\w-]*)(?:\s+|\s*$|\s*,)(?!=)")
_FIELD = re.compile(r'\s*,?\s*([A-Za-z][\w-]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_ANSWER_LIMIT = 1 << 20
_LEAST_LIFE_S = 60
"""A token without `expires_in` lives that long (distribution's specification)."""


class Credentials:
    """A user's login; prints as its place only."""

    def __init__(self, user: str, secret: str, identity_token: str, where: str) -> None:
        self.user = user
        self.secret = secret
        self.identity_token = identity_token
        self.where = where

    def __repr__(self) -> str:
        return f"<credentials from {self.where}>"

    @property
    def told(self) -> str:
        """Which ones were tried, for a message."""
        who = f"user {self.user!r}" if 0 < len(self.user) <= 64 and self.user.isprintable() else "a token"
        return f"{who} from {self.where}"

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.secret}".encode()).decode()


class Login:
    """The Authorization headers for one registry, one for each scope; made when it asks for them."""

    def __init__(self, host: str, base: str, settings: SourceSettings, connections: Connections) -> None:
        self._host = host
        self._base = base
        self._settings = settings
        self._connections = connections
        self._headers: dict[str, tuple[str, float]] = {}
        self._looked = False
        self._credentials: Credentials | None = None

    def header(self, scope: str) -> str | None:
        """What was given for `scope` and still lives."""
        value, until = self._headers.get(scope, ("", 0.0))
        return value if value and time.monotonic() < until else None

    def answer(self, challenges: list[str], scope: str) -> str:
        """The header that answers a 401. Raises Problem COS-AUTH, COS-LOGIN-CONFIG, COS-NET-*."""
        offered = dict(reversed([c for text in challenges for c in parse_challenges(text)]))
        if "bearer" in offered:
            value, life_s = self._token(offered["bearer"], scope)
        elif "basic" in offered:
            credentials = self._stored()
            if credentials is None or not credentials.secret:
                raise self.denied("it wants a login, and docker's configuration has none for it")
            value, life_s = credentials.basic, float("inf")
        else:
            raise self.denied("it asks for a login of a kind that is not known")
        self._headers[scope] = (value, time.monotonic() + life_s)
        return value

    def denied(self, why: str) -> Problem:
        """COS-AUTH, with which credentials were tried."""
        tried = f" with {self._credentials.told}" if self._credentials else ""
        return Problem(
            "COS-AUTH",
            f"{self._host} did not let us in{tried}: {why}.",
            now=f"Log in with: docker login {self._host}",
            exit_code=ExitCode.SOURCE,
        )

    def _token(self, fields: dict[str, str], scope: str) -> tuple[str, float]:
        realm = fields.get("realm", "")
        split = urlsplit(realm)
        secure = split.scheme == "https" or (
            split.scheme == "http"
            and self._base.startswith("http://")
            and may_be_plain(split.netloc, self._settings)
        )
        if not secure or not split.netloc or "@" in split.netloc:
            raise self.denied("it wants the login sent without encryption, or to no proper address")
        credentials = self._stored()
        query = {"service": fields.get("service", ""), "scope": fields.get("scope") or scope}
        if credentials is not None and credentials.identity_token:
            form = {"grant_type": "refresh_token", "client_id": "cos-console"}
            body = urlencode({**query, **form, "refresh_token": credentials.identity_token})
            response = self._connections.request(
                realm, {"Content-Type": "application/x-www-form-urlencoded"}, method="POST", body=body
            )
        else:
            headers = {"Authorization": credentials.basic} if credentials is not None else {}
            joint = "&" if split.query else "?"
            response = self._connections.request(f"{realm}{joint}{urlencode(query)}", headers)
        return self._read_token(response, split.netloc)

    def _read_token(self, response: urllib3.BaseHTTPResponse, netloc: str) -> tuple[str, float]:
        try:
            data = response.read(_ANSWER_LIMIT)
        except urllib3.exceptions.HTTPError:
            data = b""
        response.release_conn()
        if response.status in {429, 500, 502, 503, 504}:
            raise Problem(
                "COS-NET-STATUS",
                f"The login service {netloc} of {self._host} answered {response.status}.",
                now="Try again later.",
                exit_code=ExitCode.SOURCE,
            )
        if response.status != 200:
            raise self.denied(f"its login service answered {response.status}")
        token, life_s = None, 0.0
        try:
            document = json.loads(data)
            token = document.get("token") or document.get("access_token")
            life_s = float(document.get("expires_in") or _LEAST_LIFE_S)
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise self.denied("its login service gave no token")
        return f"Bearer {token}", max(1.0, life_s * 0.9)

    def _stored(self) -> Credentials | None:
        if not self._looked:
            self._credentials = stored_credentials(self._host)
            self._looked = True
        return self._credentials


def parse_challenges(text: str) -> list[tuple[str, dict[str, str]]]:
    """(scheme in small letters, fields) of a WWW-Authenticate header, in order."""
    found: list[tuple[str, dict[str, str]]] = []
    at = 0
    while at < len(text):
        field = _FIELD.match(text, at)
        if field and found:
            quoted = re.sub(r"\\(.)", r"\1", field[2]) if field[2] is not None else field[3]
            found[-1][1][field[1].lower()] = quoted
            at = field.end()
            continue
        scheme = _SCHEME.match(text, at)
        if not scheme:
            break
        found.append((scheme[1].lower(), {}))
        at = scheme.end()
    return found


def stored_credentials(host: str) -> Credentials | None:
    """From docker's configuration and its helpers. Raises Problem COS-LOGIN-CONFIG, COS-LOGIN-HELPER."""
    folder = os.environ.get("DOCKER_CONFIG") or str(Path("~/.docker").expanduser())
    file = Path(folder, "config.json")
    if not file.is_file():
        return None
    from docker import auth, errors  # heavy: only where there is something to read

    try:
        loaded = auth.load_config(config_dict=json.loads(file.read_bytes()) or {"auths": {}})
    except (OSError, ValueError, TypeError, AttributeError, errors.DockerException):
        raise Problem(
            "COS-LOGIN-CONFIG",
            f"Docker's configuration {file} can't be understood.",
            now=f"Repair it or move it away, then log in with: docker login {host}",
            exit_code=ExitCode.SOURCE,
        ) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a missing helper is told below, not on stderr
            entry = loaded.resolve_authconfig(host)
    except (errors.DockerException, OSError, ValueError, KeyError):
        # The helper's own words may have secrets in them: they are not repeated.
        helper = f"docker-credential-{loaded.get_credential_store(host)}"
        raise Problem(
            "COS-LOGIN-HELPER",
            f"{helper}, which {file} names for {host}, is missing or failed.",
            now="Install or repair the helper, or take it out of the file.",
            exit_code=ExitCode.SOURCE,
        ) from None
    if not entry:
        return None
    user = str(entry.get("Username") or entry.get("username") or "")
    secret = str(entry.get("Password") or entry.get("password") or "")
    identity = str(entry.get("IdentityToken") or "")
    return Credentials(user, secret, identity, str(file)) if secret or identity else None

"""Connections to HTTP servers: certificates, proxies, time-outs, and words for each way they fail.

Certificates: the system's store, the file that the operator named, and docker's and podman's own places
(`certs.d/HOST[:PORT]/*.crt`, with `*.cert` and `*.key` pairs for clients; containers-certs.d(5)).
Proxies: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY (also in small letters), read as docker reads them:
loopback is never proxied; NO_PROXY has names, `.suffixes`, addresses and networks, each with a port or without.
"""

import errno
import ipaddress
import os
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3 import exceptions

from cos_console.model.problem import ExitCode, Problem
from cos_console.sources.certificate import shown_by
from cos_console.sources.settings import SourceSettings

CERTIFICATE_PLACES = ("/etc/docker/certs.d", "/etc/containers/certs.d")
_LOOPBACK = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[?::1\]?)", re.IGNORECASE)
_SHORT = 64 << 10
_EXPIRED, _NOT_YET, _OTHER_NAME, _OTHER_ADDRESS = 10, 9, 62, 64  # X509_V_ERR_* of OpenSSL


def is_loopback(host: str) -> bool:
    """Of a host name without its port."""
    return _LOOPBACK.fullmatch(host) is not None


def may_be_plain(netloc: str, settings: SourceSettings) -> bool:
    """Whether `host[:port]` may be talked to without TLS."""
    return netloc in settings.insecure_hosts or is_loopback(urlsplit(f"//{netloc}").hostname or "")


class Connections:
    """Pools by server. Safe after a fork: what was opened elsewhere is not used here."""

    def __init__(self, settings: SourceSettings) -> None:
        self._settings = settings
        self._pid = 0
        self._pools: dict[str, urllib3.PoolManager] = {}

    def __getstate__(self) -> SourceSettings:
        return self._settings

    def __setstate__(self, settings: SourceSettings) -> None:
        self.__init__(settings)  # type: ignore[misc]

    def request(
        self, url: str, headers: dict[str, str], *, method: str = "GET", body: str | None = None
    ) -> urllib3.BaseHTTPResponse:
        """One request; redirects are the caller's. Raises Problem COS-NET-*, COS-TLS-*."""
        try:
            return self.pool(url).request(
                method, url, headers=headers, body=body, redirect=False, retries=False, preload_content=False
            )
        except (exceptions.HTTPError, OSError, ValueError) as e:
            raise problem_of(e, url, self._settings) from None

    def speaks_tls(self, netloc: str) -> bool:
        """Whether a host that may be plain has TLS all the same: ask once."""
        url = f"https://{netloc}/v2/"
        try:
            self.pool(url).request(
                "GET", url, retries=False, redirect=False, timeout=5.0, preload_content=False
            )
        except exceptions.SSLError as e:
            words = str(e)
            return "WRONG_VERSION_NUMBER" not in words and "record layer" not in words.lower()
        except (exceptions.HTTPError, OSError):
            return False
        return True

    def pool(self, url: str) -> urllib3.PoolManager:
        """Raises Problem COS-CA-FILE, COS-NET-PROXY."""
        if self._pid != os.getpid():
            self._pid, self._pools = os.getpid(), {}
        split = urlsplit(url)
        key = f"{split.scheme}://{split.netloc}"
        if key not in self._pools:
            s = self._settings
            timeout = urllib3.Timeout(connect=s.connect_timeout_s, read=s.stall_timeout_s)
            context = trusting(split.netloc, s) if split.scheme == "https" else None
            proxy = proxy_for(url)
            if proxy:
                address, login = _proxy_login(proxy)
                headers = urllib3.make_headers(proxy_basic_auth=login) if login else None
                self._pools[key] = urllib3.ProxyManager(
                    address, proxy_headers=headers, ssl_context=context, timeout=timeout, maxsize=4
                )
            else:
                self._pools[key] = urllib3.PoolManager(ssl_context=context, timeout=timeout, maxsize=4)
        return self._pools[key]


def discard(response: urllib3.BaseHTTPResponse) -> None:
    """Keep the connection for the next request where the rest of the answer is short."""
    try:
        short = len(response.read(_SHORT, decode_content=False)) < _SHORT
    except (exceptions.HTTPError, OSError):
        short = False
    if short:
        response.release_conn()
    else:
        response.close()


def trusting(netloc: str, settings: SourceSettings) -> ssl.SSLContext:
    """What the system trusts, and what was added for this host. Raises Problem COS-CA-FILE."""
    context = ssl.create_default_context()
    files = [Path(settings.ca_file)] if settings.ca_file else []
    folders = [Path(place, netloc) for place in CERTIFICATE_PLACES]
    files += [f for folder in folders for f in sorted(folder.glob("*.crt"))]
    for file in files:
        try:
            context.load_verify_locations(cafile=file)
        except (OSError, ssl.SSLError) as e:
            raise _bad_certificate(file, e) from None
    for folder in folders:
        for certificate in sorted(folder.glob("*.cert")):
            try:
                context.load_cert_chain(certificate, certificate.with_suffix(".key"), password=lambda: "")
            except (OSError, ssl.SSLError) as e:
                raise _bad_certificate(certificate, e) from None
    return context


def proxy_for(url: str) -> str:
    """The proxy for `url` by the environment; empty for none."""
    split = urlsplit(url)
    host = split.hostname or ""
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(split.scheme) or proxies.get("all") or ""
    if not proxy or is_loopback(host) or _without_proxy(host, split.port, proxies.get("no", "")):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if urlsplit(proxy).scheme not in {"http", "https"}:
        raise Problem(
            "COS-NET-PROXY",
            f"A proxy of the kind {urlsplit(proxy).scheme[:20]} can't be used here.",
            now="Set HTTPS_PROXY to an http:// proxy, or unset it.",
            exit_code=ExitCode.SOURCE,
        )
    return proxy


def _without_proxy(host: str, port: int | None, listed: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    for raw in listed.split(","):
        entry = raw.strip().lower()
        if entry == "*":
            return True
        try:
            if address is not None and address in ipaddress.ip_network(entry, strict=False):
                return True
        except ValueError:
            pass
        name, colon, wanted = entry.rpartition(":")
        if colon and wanted.isdigit():
            if port is not None and int(wanted) != port:
                continue
            entry = name
        entry = entry.removeprefix("*").strip("[]")
        bare = entry.removeprefix(".")
        if bare and (
            host.lower().endswith(f".{bare}") or (host.lower() == bare and not entry.startswith("."))
        ):
            return True
    return False


def _proxy_login(proxy: str) -> tuple[str, str]:
    """(the proxy's address without its login, `user:password` or nothing)."""
    split = urlsplit(proxy)
    login, at, address = split.netloc.rpartition("@")
    return f"{split.scheme}://{address}", unquote(login) if at else ""


def _bad_certificate(file: Path, e: OSError) -> Problem:
    why = "it is not a PEM certificate" if isinstance(e, ssl.SSLError) else (e.strerror or "it can't be read")
    return Problem(
        "COS-CA-FILE",
        f"The certificate file {file} can't be used: {why}.",
        now="Check the path given with --ca, or the file below certs.d.",
        exit_code=ExitCode.USAGE,
    )


# --- words -----------------------------------------------------------------------------------------------------


def problem_of(error: Exception, url: str, settings: SourceSettings) -> Problem:
    """What a failed request means. Never has the URL's query in it: signed addresses are secrets."""
    split = urlsplit(url)
    host = split.netloc.rpartition("@")[2]
    causes = list(_causes(error))
    proxy = proxy_for(url)
    if proxy and any(isinstance(c, exceptions.ProxyError) for c in causes):
        return _proxy_problem(causes, _proxy_login(proxy)[0], host)
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _untrusted(
                cause, host, split.hostname or "", split.port or 443, settings, direct=not proxy
            )
    if any(isinstance(c, socket.gaierror) for c in causes):
        return _problem("NAME", f"{host} has no known address", "Check the name and the DNS server.")
    for cause in causes:
        if isinstance(cause, ConnectionRefusedError):
            return _problem("REFUSED", f"{host} refused the connection", "Check host and port; is it up?")
        if isinstance(cause, OSError) and cause.errno in {errno.ENETUNREACH, errno.EHOSTUNREACH}:
            return _problem("UNREACHABLE", f"There is no way to {host}", "Check link, address and gateway.")
    if any(isinstance(c, (TimeoutError, exceptions.TimeoutError)) for c in causes):
        return _problem("TIMEOUT", f"{host} did not answer in time", "Check the network and the proxy.")
    if any(isinstance(c, (ConnectionResetError, BrokenPipeError)) for c in causes):
        return _problem("RESET", f"{host} broke the connection", "Try again; check what is on the way to it.")
    for cause in causes:
        if isinstance(cause, ssl.SSLError):
            if "WRONG_VERSION_NUMBER" in str(cause) or "record layer" in str(cause).lower():
                return Problem(
                    "COS-TLS-NONE",
                    f"{host} does not speak TLS.",
                    now="If plain HTTP is meant, name it with --insecure-registry.",
                    exit_code=ExitCode.SOURCE,
                )
            return _problem("TLS", f"{host} and this system can't agree on TLS", "Ask who runs the registry.")
    words = type(error).__name__
    return _problem(
        "ERROR", f"{host} can't be used ({words})", "Check the network: link, address, DNS, proxy."
    )


def _causes(error: BaseException | None, depth: int = 0) -> Iterator[BaseException]:
    """The error and all that it was made from, as http.client, ssl and urllib3 nest them."""
    if error is None or depth > 8:
        return
    yield error
    nested = [error.__cause__, error.__context__, getattr(error, "original_error", None), *error.args]
    for inner in {id(n): n for n in nested if isinstance(n, BaseException)}.values():
        yield from _causes(inner, depth + 1)


def _untrusted(
    error: ssl.SSLCertVerificationError,
    host: str,
    name: str,
    port: int,
    settings: SourceSettings,
    *,
    direct: bool,
) -> Problem:
    shown = shown_by(name, port, settings.connect_timeout_s) if direct else None
    today = time.strftime("%Y-%m-%d", time.gmtime())
    if error.verify_code in {_EXPIRED, _NOT_YET}:
        late = error.verify_code == _EXPIRED
        date = (shown.not_after if late else shown.not_before) if shown else ""
        state = "is no longer valid" if late else "is not valid yet"
        detail = f" ({'valid to' if late else 'valid from'} {date})" if date else ""
        return Problem(
            "COS-TLS-EXPIRED" if late else "COS-TLS-NOT-YET",
            f"The certificate of {host} {state}{detail}; this machine's clock says {today}.",
            now="Set the clock if it is wrong; else the registry needs a new certificate.",
            exit_code=ExitCode.SOURCE,
        )
    if error.verify_code in {_OTHER_NAME, _OTHER_ADDRESS}:
        return Problem(
            "COS-TLS-NAME",
            f"The certificate that {host} shows is for another name.",
            now="Use the name in its certificate; or something between here and there answers instead.",
            exit_code=ExitCode.SOURCE,
        )
    issuer = f" issued by {shown.issuer!r}" if shown and shown.issuer else ""
    return Problem(
        "COS-TLS-UNTRUSTED",
        f"{host} shows a certificate{issuer} that this system does not trust.",
        now=f"Give its authority's certificate with --ca FILE, or as {CERTIFICATE_PLACES[0]}/{host}/ca.crt.",
        exit_code=ExitCode.SOURCE,
    )


def _proxy_problem(causes: list[BaseException], proxy: str, host: str) -> Problem:
    words = " ".join(str(c) for c in causes if isinstance(c, OSError))
    if "407" in words:
        what, now = (
            "wants a login",
            "Put user and password into HTTPS_PROXY: http://user:password@proxy:port.",
        )
    elif found := re.search(r"Tunnel connection failed: (\d{3})", words):
        what, now = f"does not let us through to {host} ({found[1]})", "Ask who runs the proxy."
    else:
        what, now = "can't be reached", "Check HTTP_PROXY and HTTPS_PROXY; NO_PROXY lists what needs none."
    return _problem("PROXY", f"The proxy {urlsplit(proxy).netloc} {what}", now)


def _problem(kind: str, what: str, now: str) -> Problem:
    return Problem(f"COS-NET-{kind}", f"{what}.", now=now, exit_code=ExitCode.SOURCE)

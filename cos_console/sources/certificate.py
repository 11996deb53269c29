"""Who issued a server's certificate and when it is valid, for the sentence that says why it is not trusted.

Source: RFC 5280 section 4.1 (Certificate, Name, Validity) in DER (X.690). Nothing is verified here: that is
TLS's own work; a certificate that was refused is only described.
"""

import socket
import ssl
from typing import NamedTuple

_NAMES = {b"\x55\x04\x03": "CN", b"\x55\x04\x0a": "O", b"\x55\x04\x0b": "OU"}


class Shown(NamedTuple):
    """What the certificate says of itself; text is made fit for a screen."""

    issuer: str
    not_before: str
    """As YYYY-MM-DD, empty where it can't be read."""
    not_after: str


def shown_by(host: str, port: int, timeout_s: float) -> Shown | None:
    """Ask once more without checking, only to look; None when nothing can be learnt."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent or read over this connection
    try:
        with (
            socket.create_connection((host, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            der = secured.getpeercert(binary_form=True)
    except (OSError, ValueError):
        return None
    return describe(der) if der else None


def describe(der: bytes) -> Shown | None:
    """None when `der` is not a certificate."""
    try:
        certificate = _children(_element(der)[1])
        fields = _children(certificate[0][1])
        if fields[0][0] == 0xA0:  # the optional version
            fields = fields[1:]
        issuer, validity = fields[2][1], _children(fields[3][1])
        return Shown(_name(issuer), _date(*validity[0]), _date(*validity[1]))
    except (IndexError, ValueError):
        return None


def _name(data: bytes) -> str:
    parts: dict[str, str] = {}
    for _, relative in _children(data):
        for _, pair in _children(relative):
            (_, oid), (_, value) = _children(pair)[:2]
            if oid in _NAMES:
                text = value.decode("utf-8", "replace")[:80]
                parts[_NAMES[oid]] = "".join(c if c.isprintable() else "?" for c in text)
    return parts.get("CN") or parts.get("O") or parts.get("OU") or ""


def _date(tag: int, value: bytes) -> str:
    text = value.decode("ascii")
    if tag == 0x17:  # UTCTime: two-digit year, 50 and above is the last century (RFC 5280, 4.1.2.5.1)
        text = ("19" if text[:2] >= "50" else "20") + text
    return f"{text[:4]}-{text[4:6]}-{text[6:8]}" if text[:8].isdigit() else ""


def _children(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while data:
        tag, value, data = _element(data)
        found.append((tag, value))
    return found


def _element(data: bytes) -> tuple[int, bytes, bytes]:
    """(tag, value, what follows)."""
    tag, length, start = data[0], data[1], 2
    if length & 0x80:
        count = length & 0x7F
        if not 1 <= count <= 4:
            raise ValueError("a length that DER does not have")
        length, start = int.from_bytes(data[2 : 2 + count], "big"), 2 + count
    if start + length > len(data):
        raise ValueError("it ends too early")
    return tag, data[start : start + length], data[start + length :]

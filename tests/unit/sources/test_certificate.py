"""A certificate that was refused is described, whatever it is."""

import subprocess

from hypothesis import given
from hypothesis import strategies as st

from cos_console.sources.certificate import describe


def der_of(subject: str) -> bytes:
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "3", "-keyout", "/dev/null"]
        + ["-subj", subject, "-outform", "DER", "-utf8"],
        capture_output=True,
        check=True,
    )
    return made.stdout


def test_the_issuer_is_its_common_name_else_its_organisation() -> None:
    found = describe(der_of("/O=Acme/CN=Acme Root Ä"))
    assert found is not None
    assert found.issuer == "Acme Root Ä"
    assert found.not_before < found.not_after
    bare = describe(der_of("/O=Acme"))
    assert bare is not None
    assert bare.issuer == "Acme"


@given(st.binary(max_size=200))
def test_any_bytes_are_described_or_not_at_all(data: bytes) -> None:
    found = describe(data)
    assert found is None or found.issuer.isprintable() or found.issuer == ""


@given(st.data())
def test_a_damaged_certificate_raises_nothing(data: st.DataObject) -> None:
    der = bytearray(_WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        der[data.draw(st.integers(0, len(der) - 1))] = data.draw(st.integers(0, 255))
    found = describe(bytes(der[: data.draw(st.integers(0, len(der)))]))
    assert found is None or found.issuer == "" or found.issuer.isprintable()


_WHOLE = der_of("/CN=Acme Root")

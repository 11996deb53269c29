"""A registry, or what stands before it, that misbehaves: waited for, gone on, or told in one sentence."""

import gzip
import http.client
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cos_console.model.image import Content
from cos_console.model.problem import ExitCode, Problem
from cos_console.sources import SourceSettings, list_tags, parse_reference, resolve
from cos_console.sources.connection import proxy_for
from tests.sandbox.image import MadeImage, write_layout
from tests.services.conftest import RunningRegistry, free_port
from tests.services.reading import read_whole
from tests.services.servers import Handler, OddRegistry, make_certificate, odd_registry, serving
from tests.services.test_source_files import layer

pytestmark = pytest.mark.services
SETTINGS = SourceSettings(wait_limit_s=4.0, stall_timeout_s=0.5, connect_timeout_s=2.0)
LAYERS = [layer("noise", os.urandom(3 << 20)), layer("b", b"b")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeImage:
    return write_layout(tmp_path_factory.mktemp("faults") / "layout", LAYERS, ref="1.0", version="1.0")


@pytest.fixture
def odd(made: MadeImage) -> Iterator[type[OddRegistry]]:
    handler = odd_registry(made)
    with serving(handler) as port:
        handler.port = port  # type: ignore[attr-defined]
        yield handler


def content_of(odd: type[OddRegistry], settings: SourceSettings = SETTINGS, name: str = "1.0") -> Content:
    return resolve(parse_reference(f"127.0.0.1:{odd.port}/os/sandbox:{name}"), settings)  # type: ignore[attr-defined]


def refused(odd: type[OddRegistry], settings: SourceSettings = SETTINGS) -> Problem:
    with pytest.raises(Problem) as caught:
        read_whole(content_of(odd, settings))
    report = caught.value.report
    assert report.what.endswith(".")
    assert report.what.isprintable()
    assert report.now
    return caught.value


def times(count: int, act: Callable[[OddRegistry], None]) -> Callable[[OddRegistry], bool]:
    """Do `act` to the first `count` requests for a layer of some size."""
    left = [count]

    def turn(handler: OddRegistry) -> bool:
        if not handler.is_layer or len(handler.blob) < 1 << 20 or not left[0]:
            return False
        left[0] -= 1
        act(handler)
        return True

    return turn


def part_then_reset(handler: OddRegistry) -> None:
    handler.serve_part(700_001)
    time.sleep(0.05)
    handler.reset()


def part_then_silence(handler: OddRegistry) -> None:
    handler.serve_part(700_001)
    time.sleep(1.0)
    handler.close_connection = True


def part_then_end(handler: OddRegistry) -> None:
    handler.serve_part(700_001)
    handler.close_connection = True


@pytest.mark.parametrize("fault", [part_then_reset, part_then_silence, part_then_end])
def test_a_lost_connection_goes_on_at_the_exact_byte(
    odd: type[OddRegistry], made: MadeImage, fault: Callable[[OddRegistry], None]
) -> None:
    odd.turn = staticmethod(times(2, fault))  # type: ignore[assignment]
    assert read_whole(content_of(odd)) == list(made.diff_ids)
    asked = [h["range"] for path, h in odd.seen if "range" in h]
    if fault is part_then_reset:  # what the kernel had taken may be lost with a reset
        assert len(asked) == 2
    else:
        assert asked == ["bytes=700001-", "bytes=1400002-"]


def test_a_server_without_ranges_sends_all_again_and_that_is_counted(
    odd: type[OddRegistry], made: MadeImage
) -> None:
    odd.ranges = False
    odd.turn = staticmethod(times(1, part_then_end))  # type: ignore[assignment]
    stream = content_of(odd).open_layer(0)
    buffer = memoryview(bytearray(1 << 20))
    parts = []
    while count := stream.readinto(buffer):
        parts.append(bytes(buffer[:count]))
    assert gzip.decompress(b"".join(parts)) == LAYERS[0]
    assert stream.refetched_bytes == 700_001  # type: ignore[attr-defined]
    assert stream.lost_connections == 1  # type: ignore[attr-defined]


def test_a_server_that_stays_away_is_given_up_with_the_place(odd: type[OddRegistry]) -> None:
    odd.turn = staticmethod(times(10**6, lambda h: h.serve_part(0) or h.reset()))  # type: ignore[assignment, func-returns-value]
    begun = time.monotonic()
    found = refused(odd, SourceSettings(wait_limit_s=1.0, stall_timeout_s=0.5))
    assert time.monotonic() - begun < 3
    assert found.report.code == "COS-NET-RESET"
    assert "at 0 of" in found.report.what
    assert found.report.exit_code == ExitCode.SOURCE


def test_a_server_that_is_away_for_a_while_is_waited_for(made: MadeImage) -> None:
    handler = odd_registry(made)
    handler.turn = staticmethod(times(1, part_then_end))  # type: ignore[assignment]
    with serving(handler) as port:
        handler.port = port  # type: ignore[attr-defined]
        stream = content_of(handler).open_layer(0)
        buffer = memoryview(bytearray(300_000))
        done = 0
        while done < 700_001:
            done += stream.readinto(buffer)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1)
    import threading

    back = threading.Timer(0.8, lambda: serve_again.set())
    serve_again = threading.Event()
    over = threading.Event()

    def again() -> None:
        serve_again.wait()
        import http.server

        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        over.wait()
        server.shutdown()
        server.server_close()

    second = threading.Thread(target=again, daemon=True)
    second.start()
    back.start()
    try:
        while count := stream.readinto(buffer):
            done += count
    finally:
        over.set()
        second.join()
    assert done == content_size(made)


def content_size(made: MadeImage) -> int:
    return (made.directory / "blobs/sha256" / made.layer_digests[0].removeprefix("sha256:")).stat().st_size


@pytest.mark.parametrize(
    "lie",
    [
        lambda h, d: h.answer(206, d[5:], Content_Range=f"bytes 5-{len(d) - 1}/{len(d)}"),
        lambda h, d: h.answer(206, d, Content_Range=f"bytes 700001-{len(d) + 9}/{len(d) + 10}"),
        lambda h, d: h.answer(206, d),
        lambda h, d: h.answer(200, d + b"x"),
    ],
)
def test_another_range_than_was_asked_for_is_never_taken(
    odd: type[OddRegistry], lie: Callable[[OddRegistry, bytes], None]
) -> None:
    first = times(1, part_then_end)
    odd.turn = staticmethod(  # type: ignore[assignment]
        lambda h: first(h) or (("range" in {k.lower() for k in h.headers}) and (lie(h, h.blob) or True))
    )
    assert refused(odd).report.code == "COS-REGISTRY-ANSWER"


def test_a_blob_elsewhere_is_fetched_without_the_login(
    odd: type[OddRegistry], made: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    (tmp_path / "config.json").write_text(
        f'{{"auths": {{"127.0.0.1:{odd.port}": {{"auth": "b3BlcmF0b3I6czNjcmV0LXBhc3M="}}}}}}'  # type: ignore[attr-defined]
    )
    storage = odd_registry(made)
    with serving(storage) as port:

        def turn(handler: OddRegistry) -> bool:
            if "Authorization" not in handler.headers and handler.path != "/v2/":
                handler.answer(401, WWW_Authenticate='Basic realm="x"')
            elif handler.is_layer:
                handler.answer(307, Location=f"http://localhost:{port}{handler.path}?signature=s3cret-link")
            else:
                return False
            return True

        odd.turn = staticmethod(turn)  # type: ignore[assignment]
        storage.turn = staticmethod(times(1, part_then_end))  # type: ignore[assignment]
        storage.is_layer = True  # type: ignore[assignment, misc]
        storage.blob = property(  # type: ignore[assignment, misc]
            lambda h: (
                made.directory / "blobs/sha256" / h.path.partition("?")[0].rpartition(":")[2]
            ).read_bytes()
        )
        assert read_whole(content_of(odd)) == list(made.diff_ids)
    assert any(h.get("authorization") for _, h in odd.seen)
    assert len(storage.seen) == 3
    assert not any(h.get("authorization") for _, h in storage.seen)
    assert [h["range"] for _, h in storage.seen if "range" in h] == ["bytes=700001-"]


def test_a_redirect_without_end_and_one_to_no_address_are_refused(odd: type[OddRegistry]) -> None:
    odd.turn = staticmethod(lambda h: h.is_layer and (h.answer(302, Location=h.path) or True))  # type: ignore[assignment]
    assert refused(odd).report.code == "COS-REGISTRY-ANSWER"
    odd.turn = staticmethod(lambda h: h.is_layer and (h.answer(302, Location="file:///etc/shadow") or True))  # type: ignore[assignment]
    assert refused(odd).report.code == "COS-REGISTRY-ANSWER"


@pytest.mark.parametrize(
    ("status", "headers", "code", "word"),
    [
        (404, {}, "COS-IMAGE-UNKNOWN", "1.0"),
        (403, {}, "COS-AUTH", "403"),
        (429, {"Retry_After": "17"}, "COS-NET-LIMIT", "429"),
        (503, {}, "COS-NET-BUSY", "503"),
        (418, {}, "COS-REGISTRY-ANSWER", "418"),
    ],
)
def test_each_answer_has_its_own_words(
    odd: type[OddRegistry], status: int, headers: dict[str, str], code: str, word: str
) -> None:
    odd.turn = staticmethod(  # type: ignore[assignment]
        lambda h: h.path != "/v2/" and (h.answer(status, b'{"errors":[{"code":"X\x1b"}]}', **headers) or True)
    )
    report = refused(odd).report
    assert (report.code, word in report.what) == (code, True)
    if status == 429:
        assert "17 s" in report.now


def test_a_limit_or_an_outage_in_mid_pull_is_waited_out(odd: type[OddRegistry], made: MadeImage) -> None:
    statuses = [429, 503, 502]
    odd.turn = staticmethod(  # type: ignore[assignment]
        lambda h: bool(h.is_layer and statuses) and (h.answer(statuses.pop()) or True)
    )
    assert read_whole(content_of(odd)) == list(made.diff_ids)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"{not json", "COS-MANIFEST"),
        (b"[" * 100_000, "COS-MANIFEST"),
        (b"", "COS-MANIFEST"),
        (b" " * (5 << 20), "COS-MANIFEST"),
    ],
)
def test_a_manifest_that_is_none_is_refused(odd: type[OddRegistry], data: bytes, code: str) -> None:
    odd.turn = staticmethod(lambda h: "/manifests/" in h.path and (h.answer(200, data) or True))  # type: ignore[assignment]
    assert refused(odd).report.code == code


def test_a_manifest_that_is_not_what_was_pinned_is_refused(odd: type[OddRegistry], made: MadeImage) -> None:
    wrong = lambda h: "/manifests/" in h.path and (h.answer(200, h.blob + b"\n") or True)  # noqa: E731
    odd.turn = staticmethod(wrong)  # type: ignore[assignment]
    with pytest.raises(Problem) as caught:
        resolve(parse_reference(f"127.0.0.1:{odd.port}/os/sandbox@{made.manifest_digest}"), SETTINGS)  # type: ignore[attr-defined]
    assert caught.value.report.code == "COS-DIGEST"
    assert caught.value.report.exit_code == ExitCode.VERIFICATION


def test_one_broken_connection_while_resolving_is_no_reason_to_give_up(
    odd: type[OddRegistry], made: MadeImage
) -> None:
    left = [1]

    def turn(handler: OddRegistry) -> bool:
        if "/manifests/" in handler.path and left[0]:
            left[0] -= 1
            handler.reset()
            return True
        return False

    odd.turn = staticmethod(turn)  # type: ignore[assignment]
    assert content_of(odd).image.digest == made.manifest_digest


def test_layers_share_one_connection(odd: type[OddRegistry], made: MadeImage) -> None:
    ports: set[int] = set()
    odd.turn = staticmethod(lambda h: ports.add(h.client_address[1]) or False)  # type: ignore[assignment, func-returns-value]
    content = content_of(odd)
    ports.clear()
    assert read_whole(content) == list(made.diff_ids)
    assert len(ports) == 1


# --- certificates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("begins", "ends", "name", "code", "word"),
    [
        ("", "", "localhost", "COS-TLS-UNTRUSTED", "Acme Root"),
        ("20200101000000Z", "20200201000000Z", "localhost", "COS-TLS-EXPIRED", "valid to 2020-02-01"),
        ("20400101000000Z", "20410101000000Z", "localhost", "COS-TLS-NOT-YET", "valid from 2040-01-01"),
        ("", "", "elsewhere.example", "COS-TLS-NAME", "another name"),
    ],
)
def test_each_fault_of_a_certificate_is_told_apart(
    made: MadeImage, tmp_path: Path, begins: str, ends: str, name: str, code: str, word: str
) -> None:
    import ssl

    certificate, key = make_certificate(tmp_path, name, begins=begins, ends=ends, issuer="Acme Root")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    trusted = SourceSettings(ca_file="" if code == "COS-TLS-UNTRUSTED" else str(tmp_path / "ca.pem"))
    with serving(odd_registry(made), context) as port, pytest.raises(Problem) as caught:
        resolve(parse_reference(f"localhost:{port}/os/sandbox:1.0"), trusted)
    report = caught.value.report
    assert report.code == code
    assert word in report.what
    assert ("--ca" in report.now) is (code == "COS-TLS-UNTRUSTED")
    assert ("clock" in report.now) is (code in {"COS-TLS-EXPIRED", "COS-TLS-NOT-YET"})


def test_an_authority_in_dockers_own_place_is_trusted_for_its_host_only(
    tls_registry: RunningRegistry, made: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tls_registry.ca is not None
    name = tls_registry.push(made.directory, made.ref, "os/sandbox:1.0")
    folder = tmp_path / tls_registry.host
    folder.mkdir()
    (folder / "ca.crt").write_bytes(tls_registry.ca.read_bytes())
    monkeypatch.setattr("cos_console.sources.connection.CERTIFICATE_PLACES", (str(tmp_path),))
    assert read_whole(resolve(parse_reference(name), SETTINGS)) == list(made.diff_ids)
    folder.rename(tmp_path / "localhost:1")
    with pytest.raises(Problem, match="does not trust"):
        resolve(parse_reference(name), SETTINGS)


def test_a_file_that_is_no_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("no")
    for file in ("ca", "none"):
        with pytest.raises(Problem) as caught:
            resolve(parse_reference("example.invalid/a:b"), SourceSettings(ca_file=str(tmp_path / file)))
        assert caught.value.report.code == "COS-CA-FILE"


def test_a_host_without_tls_is_used_only_when_named_insecure(
    monkeypatch: pytest.MonkeyPatch, made: MadeImage
) -> None:
    from cos_console.sources import connection

    monkeypatch.setattr(connection, "is_loopback", lambda _: False)
    with serving(odd_registry(made)) as port:
        with pytest.raises(Problem) as caught:
            resolve(parse_reference(f"localhost:{port}/os/sandbox:1.0"), SETTINGS)
        assert caught.value.report.code == "COS-TLS-NONE"
        assert "--insecure-registry" in caught.value.report.now
        named = SourceSettings(insecure_hosts=(f"localhost:{port}",))
        assert read_whole(resolve(parse_reference(f"localhost:{port}/os/sandbox:1.0"), named)) == list(
            made.diff_ids
        )


# --- proxies ---------------------------------------------------------------------------------------------------


class Proxy(Handler):
    """Passes requests on to `upstream`, whatever host they name, for who logs in."""

    upstream = 0
    hosts: list[str] = []

    def do_GET(self) -> None:
        if self.headers.get("Proxy-Authorization") != "Basic b3BlcmF0b3I6cHJveHktczNjcmV0":
            self.answer(407)
            return
        type(self).hosts.append(self.path.split("/")[2])
        link = http.client.HTTPConnection("127.0.0.1", self.upstream)
        link.request("GET", "/" + self.path.split("/", 3)[3])
        reply = link.getresponse()
        self.answer(reply.status, reply.read())

    def do_CONNECT(self) -> None:
        self.answer(407)


def test_a_proxy_of_the_environment_is_used_with_its_login(
    odd: type[OddRegistry], made: MadeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = type("P", (Proxy,), {"upstream": odd.port, "hosts": []})  # type: ignore[attr-defined]
    settings = SourceSettings(insecure_hosts=("registry.test",), wait_limit_s=1.0)
    with serving(proxy) as port:
        monkeypatch.setenv("http_proxy", f"http://operator:proxy-s3cret@127.0.0.1:{port}")
        content = resolve(parse_reference("registry.test/os/sandbox:1.0"), settings)
        assert read_whole(content) == list(made.diff_ids)
        assert set(proxy.hosts) == {"registry.test"}
        monkeypatch.setenv("https_proxy", f"http://operator:proxy-s3cret@127.0.0.1:{port}")
        with pytest.raises(Problem) as caught:
            resolve(parse_reference("other.test/os/sandbox:1.0"), settings)
    assert caught.value.report.code == "COS-NET-PROXY"
    assert "wants a login" in caught.value.report.what
    assert "proxy-s3cret" not in repr(caught.value.report)
    monkeypatch.setenv("https_proxy", f"127.0.0.1:{free_port()}")
    with pytest.raises(Problem, match="can't be reached") as caught:
        resolve(parse_reference("other.test/os/sandbox:1.0"), settings)
    assert caught.value.report.code == "COS-NET-PROXY"


@pytest.mark.parametrize(
    ("url", "excepted", "used"),
    [
        ("https://quay.io/", "", True),
        ("https://quay.io/", "quay.io", False),
        ("https://cdn.quay.io/", "quay.io", False),
        ("https://cdn.quay.io/", ".quay.io", False),
        ("https://quay.io/", ".quay.io", True),
        ("https://notquay.io/", "quay.io", True),
        ("https://10.1.2.3/", "10.0.0.0/8", False),
        ("https://11.1.2.3/", "10.0.0.0/8", True),
        ("https://quay.io:8443/", "quay.io:443", True),
        ("https://quay.io:8443/", "a.b, quay.io:8443", False),
        ("https://quay.io/", "*", False),
        ("https://localhost:5000/", "", False),
        ("https://127.0.0.9/", "", False),
    ],
)
def test_no_proxy_is_read_as_docker_reads_it(
    monkeypatch: pytest.MonkeyPatch, url: str, excepted: str, used: bool
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", excepted)
    assert bool(proxy_for(url)) is used


def test_all_tags_are_listed_from_a_real_registry(registry: RunningRegistry, made: MadeImage) -> None:
    for tag in ("1.0", "1.1", "2.0"):
        name = registry.push(made.directory, made.ref, f"os/tags:{tag}")
    assert sorted(list_tags(parse_reference(name), SETTINGS)) == ["1.0", "1.1", "2.0"]


def test_tags_are_listed_page_by_page(odd: type[OddRegistry]) -> None:
    pages = {"n=1000": (b'{"tags":["1","2"]}', "last=2"), "last=2": (b'{"tags":["3\x7f"]}', "")}

    def turn(handler: OddRegistry) -> bool:
        if "/tags/list" not in handler.path:
            return False
        body, following = pages[handler.path.partition("?")[2]]
        more = {"Link": f'</v2/os/sandbox/tags/list?{following}>; rel="next"'} if following else {}
        handler.answer(200, body, **more)
        return True

    odd.turn = staticmethod(turn)  # type: ignore[assignment]
    reference = parse_reference(f"127.0.0.1:{odd.port}/os/sandbox")  # type: ignore[attr-defined]
    assert list_tags(reference, SETTINGS) == ("1", "2", "3?")

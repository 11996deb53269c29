"""Which image of a multi-platform one is taken, and what is refused."""

import hashlib
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cos_console.model.image import Compression, Digest, Platform, ResolvedImage
from cos_console.model.problem import Problem
from cos_console.sources import parse_reference
from cos_console.sources.manifest import fitness, readable, resolve_manifest

REFERENCE = parse_reference("quay.io/a/b:1.0")
AMD64 = Platform("linux", "amd64")
OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker"


def digest_of(data: bytes) -> Digest:
    return Digest(f"sha256:{hashlib.sha256(data).hexdigest()}")


class Store:
    """Blobs by digest."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def put(self, document: object) -> Digest:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = digest_of(data)
        self.blobs[digest] = data
        return digest

    def image(
        self, *, media: str = f"{OCI}.layer.v1.tar+gzip", arch: str = "amd64", **config: object
    ) -> Digest:
        plain = digest_of(b"layer")
        about = self.put(
            {"os": "linux", "architecture": arch, "rootfs": {"type": "layers", "diff_ids": [plain]}, **config}
        )
        return self.put(
            {
                "schemaVersion": 2,
                "config": {"digest": about},
                "layers": [{"mediaType": media, "digest": plain, "size": 5}],
            }
        )

    def index(self, *entries: tuple[Digest, dict[str, str] | None], **more: object) -> Digest:
        manifests = [
            {"mediaType": f"{OCI}.manifest.v1+json", "digest": d, **({"platform": p} if p else {}), **more}
            for d, p in entries
        ]
        return self.put({"schemaVersion": 2, "manifests": manifests})

    def resolve(self, digest: Digest, platform: Platform = AMD64) -> ResolvedImage:
        def fetch(wanted: Digest, _what: str, _limit: int) -> bytes:
            return self.blobs[wanted]

        return resolve_manifest(REFERENCE, self.blobs[digest], digest, fetch, platform, "1.0")

    def refused(self, digest: Digest, platform: Platform = AMD64) -> tuple[str, str]:
        with pytest.raises(Problem) as caught:
            self.resolve(digest, platform)
        return caught.value.report.code, caught.value.report.what


@pytest.fixture
def store() -> Store:
    return Store()


def test_the_machines_platform_is_taken_from_an_index(store: Store) -> None:
    arm, intel = store.image(arch="arm64"), store.image()
    index = store.index(
        (arm, {"os": "linux", "architecture": "arm64", "variant": "v8"}),
        (intel, {"os": "linux", "architecture": "amd64"}),
    )
    assert store.resolve(index).digest == intel
    assert store.resolve(index, Platform("linux", "arm64", "v8")).digest == arm


def test_a_refusal_lists_what_is_offered(store: Store) -> None:
    index = store.index((store.image(arch="s390x"), {"os": "linux", "architecture": "s390x"}))
    code, what = store.refused(index)
    assert code == "COS-PLATFORM"
    assert "linux/s390x" in what


def test_an_image_for_another_machine_is_refused_without_an_index_too(store: Store) -> None:
    assert store.refused(store.image(arch="arm64"))[0] == "COS-PLATFORM"


def test_build_attestations_in_an_index_are_not_taken_for_images(store: Store) -> None:
    index = store.put(
        {
            "schemaVersion": 2,
            "manifests": [
                {
                    "mediaType": f"{OCI}.manifest.v1+json",
                    "digest": store.image(),
                    "platform": {"os": "unknown", "architecture": "unknown"},
                    "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
                }
            ],
        }
    )
    assert store.refused(index)[0] == "COS-PLATFORM"


def test_an_index_within_an_index_is_followed_but_not_for_ever(store: Store) -> None:
    image = store.image()
    nested = store.index((store.index((image, None)), None))
    assert store.resolve(nested).digest == image
    deep = image
    for _ in range(4):
        deep = store.index((deep, None))
    assert store.refused(deep)[0] == "COS-MANIFEST"


@pytest.mark.parametrize(
    ("have", "machine", "runs"),
    [
        (("amd64", "v1"), ("amd64", ""), True),
        (("amd64", "v3"), ("amd64", ""), False),
        (("amd64", "v3"), ("amd64", "v3"), True),
        (("arm64", ""), ("arm64", "v8"), True),
        (("arm64", "v9"), ("arm64", "v8"), False),
        (("arm", "v6"), ("arm", "v7"), True),
        (("arm", "v7"), ("arm", "v6"), False),
        (("arm64", ""), ("amd64", ""), False),
    ],
)
def test_an_image_that_the_processor_cant_run_is_not_taken(
    have: tuple[str, str], machine: tuple[str, str], runs: bool
) -> None:
    assert (fitness(Platform("linux", *have), Platform("linux", *machine)) > 0) is runs


def test_the_newest_arm_version_that_runs_is_preferred(store: Store) -> None:
    v5, v6, v7 = (store.image(arch="arm", variant=v) for v in ("v5", "v6", "v7"))
    index = store.index(
        *(
            (d, {"os": "linux", "architecture": "arm", "variant": v})
            for d, v in ((v5, "v5"), (v7, "v7"), (v6, "v6"))
        )
    )
    assert store.resolve(index, Platform("linux", "arm", "v6")).digest == v6
    assert store.resolve(index, Platform("linux", "arm", "v8")).digest == v7


@pytest.mark.parametrize(
    ("media", "compression"),
    [
        (f"{OCI}.layer.v1.tar", Compression.NONE),
        (f"{OCI}.layer.v1.tar+zstd", Compression.ZSTD),
        (f"{DOCKER}.image.rootfs.diff.tar.gzip", Compression.GZIP),
    ],
)
def test_layers_of_both_standards_are_read(store: Store, media: str, compression: Compression) -> None:
    assert store.resolve(store.image(media=media)).layers[0].compression is compression


Change = Callable[[dict[str, object]], object]


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(schemaVersion=1),
        lambda d: d.pop("layers"),
        lambda d: d.update(layers=[]),
        lambda d: d.update(layers="x"),
        lambda d: d.update(config=None),
        lambda d: d["layers"].append(d["layers"][0]),
        lambda d: d["layers"][0].update(size=-1),
        lambda d: d["layers"][0].update(size=True),
        lambda d: d["layers"][0].update(size="5"),
        lambda d: d["layers"][0].update(digest="sha256:zz"),
        lambda d: d["layers"][0].update(urls=["https://elsewhere"]),
        lambda d: d["layers"][0].update(mediaType=f"{DOCKER}.image.rootfs.foreign.diff.tar.gzip"),
        lambda d: d["layers"][0].update(mediaType="x\x1b[31m" * 50),
    ],
)
def test_what_is_no_image_is_refused_in_words(store: Store, change: Change) -> None:
    document = json.loads(store.blobs[store.image()])
    change(document)
    code, what = store.refused(store.put(document))
    assert code == "COS-MANIFEST"
    assert what.isprintable()


def test_bytes_that_differ_from_their_digest_are_refused(store: Store) -> None:
    image = store.image()
    config = json.loads(store.blobs[image])["config"]["digest"]
    store.blobs[config] += b" "
    assert store.refused(image)[0] == "COS-DIGEST"


def test_the_version_is_the_label_else_the_tag_and_never_a_terminal_command(store: Store) -> None:
    assert store.resolve(store.image()).version == "1.0"
    labelled = store.image(config={"Labels": {"org.opencontainers.image.version": "2.0\x1b]0;x\x07"}})
    assert store.resolve(labelled).version == "2.0?]0;x?"


@given(st.text())
def test_text_from_an_image_can_always_be_shown(text: str) -> None:
    shown = readable(text)
    assert shown == "" or shown.isprintable()
    assert len(shown) <= 128


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda x: (
            st.lists(x, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["manifests", "layers", "config", "schemaVersion", "digest", "platform", "mediaType"]
                ),
                x,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_an_image_or_a_problem(document: object) -> None:
    store = Store()
    image = store.put(document)
    store.blobs["x"] = b""
    with pytest.raises((Problem, KeyError)) as caught:  # KeyError is this store's own: no such blob
        store.resolve(image)
    if isinstance(caught.value, KeyError):
        assert str(caught.value.args[0]).startswith("sha256:")

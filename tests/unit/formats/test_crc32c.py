from cos_console.formats.crc32c import crc32c


def test_the_published_vectors_of_rfc_3720() -> None:
    inverted = {
        bytes(32): 0x8A9136AA,
        b"\xff" * 32: 0x62A8AB43,
        bytes(range(32)): 0x46DD794E,
        b"123456789": 0xE3069283,
    }
    for data, wanted in inverted.items():
        assert crc32c(data) ^ 0xFFFFFFFF == wanted
    assert crc32c(b"456789", crc32c(b"123")) == crc32c(b"123456789")

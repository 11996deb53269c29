"""The tar reader against what GNU tar, Python and hostile hands write."""

import base64
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cos_console.formats.readat import FormatError
from cos_console.formats.tar import (
    CHARACTER,
    DIRECTORY,
    HARDLINK,
    MAX_PAX,
    REGULAR,
    ByteStream,
    Parts,
    Runs,
    TarEntry,
    read_tar,
    show,
)


def read(
    data: bytes, *, chunk: int = 1 << 20, max_entries: int = 1000
) -> dict[bytes, tuple[TarEntry, bytes]]:
    """Entries with their content, holes filled in."""
    pieces = iter([data[n : n + chunk] for n in range(0, len(data), chunk)])
    stored: list[bytes] = []

    def store(stream: ByteStream, size: int, parts: Parts | None) -> Runs:
        content = bytearray(size)
        for offset, length in ((0, size),) if parts is None else parts:
            part = stream.take(length)
            if len(part) < length:
                raise FormatError("the tar stream ends inside this file")
            content[offset : offset + length] = part
        stored.append(bytes(content))
        return ((0, len(stored), 1),)

    stream = ByteStream(lambda: next(pieces, b""))
    entries = list(read_tar(stream, store, max_entries=max_entries))
    return {e.name: (e, stored[e.runs[0][1] - 1] if e.runs else b"") for e in entries}


def pack(*infos: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT, **options: object) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, **options) as tar:  # type: ignore[call-overload]
        for info, data in infos:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def member(name: str, **facts: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in facts.items():
        setattr(info, key, value)
    return info


def raw_header(
    name: bytes, kind: bytes = b"0", size: bytes = b"00000000000\0", magic: bytes = b"ustar\x0000"
) -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[108:124] = b"0000000\0" * 2
    header[124:136] = size
    header[136:148] = b"00000000000\0"
    header[156:157] = kind
    header[257:265] = magic
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_each_format_gives_the_same_members(form: int) -> None:
    long = "d" * 90 + "/" + "n" * 90
    found = read(
        pack(
            (member("plain", mode=0o4755, uid=1000, gid=2000, mtime=1_600_000_000), b"data"),
            (member("dir/", type=tarfile.DIRTYPE, mode=0o1777), b""),
            (member(long), b"long"),
            (member("dev", type=tarfile.CHRTYPE, devmajor=5, devminor=300), b""),
            (member("hard", type=tarfile.LNKTYPE, linkname="plain"), b""),
            form=form,
        )
    )
    entry, data = found[b"plain"]
    assert (entry.mode, entry.uid, entry.gid, entry.mtime_ns, data) == (
        0o4755, 1000, 2000, 1_600_000_000 * 10**9, b"data",
    )  # fmt: skip
    directory = found.get(b"dir/", found.get(b"dir"))
    assert directory is not None
    assert (directory[0].kind, directory[0].mode) == (DIRECTORY, 0o1777)
    assert found[long.encode()][1] == b"long"
    assert (found[b"dev"][0].kind, found[b"dev"][0].major, found[b"dev"][0].minor) == (CHARACTER, 5, 300)
    assert (found[b"hard"][0].kind, found[b"hard"][0].link) == (HARDLINK, b"plain")


def test_names_longer_than_a_header_come_whole_in_both_ways() -> None:
    name, link = "n/" * 500 + "end", "l/" * 900 + "end"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        found = read(pack((member(name, type=tarfile.SYMTYPE, linkname=link), b""), form=form))
        assert found[name.encode()][0].link == link.encode()


def test_large_numbers_come_in_base_256_and_in_pax() -> None:
    info = lambda: member("x", uid=3_000_000_000, gid=2_999_999_999, mtime=-5)  # noqa: E731
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        entry = read(pack((info(), b""), form=form))[b"x"][0]
        assert (entry.uid, entry.gid, entry.mtime_ns) == (3_000_000_000, 2_999_999_999, -5 * 10**9)
    ten_gib = b"\x80" + (10 << 30).to_bytes(11, "big")
    sizes = []

    def store(stream: ByteStream, size: int, _: Parts | None) -> Runs:
        sizes.append(size)
        raise FormatError("enough")

    with pytest.raises(FormatError, match="big: enough"):
        list(read_tar(ByteStream(iter([raw_header(b"big", size=ten_gib)]).__next__), store))
    assert sizes == [10 << 30]


@pytest.mark.parametrize(
    ("text", "ns"),
    [
        ("1.5", 1_500_000_000),
        ("-1.25", -1_250_000_000),
        ("-0.5", -500_000_000),
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("7.1234567899", 7_123_456_789),
        ("12", 12_000_000_000),
    ],
)
def test_fractions_of_a_second_are_kept(text: str, ns: int) -> None:
    assert read(pack((member("x", pax_headers={"mtime": text}), b"")))[b"x"][0].mtime_ns == ns


def test_standing_records_hold_until_a_member_says_otherwise() -> None:
    data = pack(
        (member("one"), b""),
        (member("two", pax_headers={"uid": "7"}), b""),
        pax_headers={"uid": "1234", "comment": "c"},
    )
    found = read(data)
    assert (found[b"one"][0].uid, found[b"two"][0].uid) == (1234, 7)


def test_extended_attributes_in_both_spellings() -> None:
    value = b"\x01\0\0\x02\xff"
    found = read(
        pack(
            (
                member(
                    "x",
                    pax_headers={
                        "SCHILY.xattr.user.a": "plain",
                        "LIBARCHIVE.xattr.user.b%20c": base64.b64encode(value).decode().rstrip("="),
                        "LIBARCHIVE.xattr.user.a": base64.b64encode(b"second choice").decode(),
                    },
                ),
                b"",
            )
        )
    )
    assert found[b"x"][0].xattrs == {b"user.a": b"plain", b"user.b c": value}


@pytest.mark.parametrize("form", ["gnu", "posix-0.0", "posix-0.1", "posix-1.0"])
def test_sparse_files_of_gnu_tar_in_all_four_forms(tmp_path: Path, form: str) -> None:
    file = tmp_path / "holes"
    with file.open("wb") as f:
        for n in range(60):
            f.seek(n * 100_000)
            f.write(bytes([n + 1]) * 5000)
        f.truncate(9_000_000)
    kind, _, version = form.partition("-")
    argv = ["tar", "--create", "--file=-", "--sparse", f"--format={kind}", f"--directory={tmp_path}"]
    argv += [f"--sparse-version={version}"] if version else []
    data = subprocess.run([*argv, "holes"], check=True, capture_output=True).stdout
    assert len(data) < 2_000_000
    found = read(data, chunk=7001)
    assert list(found) == [b"holes"]
    entry, content = found[b"holes"]
    assert (entry.kind, entry.size) == (REGULAR, 9_000_000)
    assert content == file.read_bytes()


def test_content_behind_the_end_mark_is_refused_and_padding_is_not() -> None:
    good = pack((member("x"), b"1"))
    assert list(read(good + bytes(512 * 40))) == [b"x"]
    with pytest.raises(FormatError, match="end mark"):
        read(good.rstrip(b"\0") + bytes(-len(good.rstrip(b"\0")) % 512) + bytes(512) + raw_header(b"y"))


def test_a_stream_may_end_without_its_mark_but_not_inside_a_member() -> None:
    whole = raw_header(b"x", size=b"%011o\0" % 5) + b"hello" + bytes(507)
    assert read(whole)[b"x"][1] == b"hello"
    for cut in (1, 511, 513, 520, 1023):
        with pytest.raises(FormatError, match="ends inside"):
            read(whole[:cut])


def test_any_flipped_bit_of_a_header_is_noticed() -> None:
    header = raw_header(b"some/name")
    for at in range(0, 512, 3):
        for bit in (1, 0x80):
            bad = bytearray(header)
            bad[at] ^= bit
            if 148 <= at < 156 and bytes(bad[148:156]).strip(b"\0 ") == header[148:156].strip(b"\0 "):
                continue
            with pytest.raises(FormatError):
                read(bytes(bad) + bytes(1024))


def test_a_checksum_over_signed_characters_is_taken_too() -> None:
    header = bytearray(raw_header("ä".encode()))
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(b - 256 if b > 127 else b for b in header)
    assert list(read(bytes(header) + bytes(1024))) == ["ä".encode()]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (raw_header(b"v", kind=b"V"), "v: a kind of tar member that is not known"),
        (raw_header(b"", kind=b"0"), "an empty name"),
        (raw_header(b"neg", size=b"\xff" * 12), "neg: a negative size"),
        (raw_header(b"bad", size=b"0000000009x\0"), "bad: .* is no octal number"),
        (raw_header(b"h", kind=b"x", size=b"%011o\0" % (MAX_PAX + 1)), "extension header of 1048577 bytes"),
        (
            raw_header(b"h", kind=b"x", size=b"%011o\0" % 9) + b"9 a=bbbbb".ljust(512, b"\0"),
            "damaged pax record",
        ),
        (
            raw_header(b"h", kind=b"x", size=b"%011o\0" % 9) + b"99999 a=b".ljust(512, b"\0"),
            "damaged pax record",
        ),
        (
            raw_header(b"h", kind=b"x", size=b"%011o\0" % 9) + b"-5 a=bcd\n".ljust(512, b"\0"),
            "damaged pax record",
        ),
    ],
)
def test_what_can_not_be_is_refused_with_the_entry_named(data: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        read(data + bytes(1024))


@pytest.mark.parametrize(
    "headers",
    [
        {"uid": "-1"},
        {"uid": "4294967295"},
        {"size": "x"},
        {"mtime": "1e9"},
        {"path": "a\0b"},
        {"path": "n" * 5000},
        {"LIBARCHIVE.xattr.user.x": "*"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        {"GNU.sparse.size": "10", "GNU.sparse.map": "0,5,3,5"},
        {"GNU.sparse.size": "10", "GNU.sparse.map": "0,5,6"},
        {"GNU.sparse.size": "10", "GNU.sparse.map": "5,50"},
        {"GNU.sparse.size": "1099511627776", "GNU.sparse.map": "0,3"},
    ],
)
def test_impossible_records_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(FormatError):
        read(pack((member("name", pax_headers=headers), b"12345")))


def test_too_many_entries_are_refused() -> None:
    data = pack(*((member(f"f{n}"), b"") for n in range(11)))
    assert len(read(data, max_entries=11)) == 11
    with pytest.raises(FormatError, match="f10: more than 10 entries"):
        read(data, max_entries=10)


def test_a_name_in_a_message_is_printable_and_short() -> None:
    assert show(b"a\x1b[31mred\xff\n") == "a\\x1b[31mred\\xff\\x0a"
    assert len(show(b"n" * 4000)) == 120


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=150).filter(
            lambda t: t not in {".", ".."}
        ),
        st.binary(max_size=3000),
        max_size=8,
    ),
    st.integers(1, 5000),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_whatever_python_packs_comes_out_again(files: dict[str, bytes], chunk: int, form: int) -> None:
    data = pack(*((member(name), content) for name, content in files.items()), form=form)
    found = read(data, chunk=chunk)
    assert {name: content for name, (_, content) in found.items()} == {
        name.encode(): content for name, content in files.items()
    }


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=40))
def test_damage_never_gives_anything_but_a_format_error(where: int, junk: bytes) -> None:
    data = bytearray(
        pack(
            (member("a" * 150, pax_headers={"SCHILY.xattr.user.x": "y"}), os.urandom(700)),
            (member("b"), b"2"),
        )
    )
    at = where % len(data)
    data[at : at + len(junk)] = junk
    try:
        read(bytes(data), chunk=333)
    except FormatError:
        pass

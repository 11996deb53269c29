"""GRUB's environment block: 1024 bytes of `name=value` lines.

Source: GRUB 2.06 grub-core/lib/envblk.c and util/grub-editenv.c, checked against the real grub-editenv in the
tests. The block starts with a signature line; lines end in LF; `#` fills the rest; backslash escapes a
backslash or a LF in a value and nothing else. GRUB's `save_env` writes the blocks in place, so a file never
grows; a value that does not fit is refused and the block stays as it was.
"""

from cos_console.formats.readat import FormatError

SIGNATURE = b"# GRUB Environment Block\n"
BLOCK_BYTES = 1024
SECTOR_BYTES = 512


def is_valid(block: bytes) -> bool:
    """Whether GRUB would load it at all."""
    return len(block) > len(SIGNATURE) and block.startswith(SIGNATURE)


def variables(block: bytes) -> dict[str, str]:
    """What GRUB has after load_env: of a name that stands twice, the last value. Raises FormatError."""
    return {_text(name): _text(_unescape(value)) for name, value, _, _ in _entries(block)}


def empty_block() -> bytes:
    return SIGNATURE.ljust(BLOCK_BYTES, b"#")


def change(block: bytes, changes: dict[str, str | None]) -> bytes:
    """A block of the same length with these variables set, or unset where None; all others as they were.

    Duplicates of a changed name are removed. Padding with NUL, which GRUB can't write to, becomes `#`. A name
    keeps its place and its padding is taken from the end. Raises FormatError when the block is none, a name
    can't be one, or the values don't fit.
    """
    lines: list[bytes] = []
    pending = {_name(k): v for k, v in changes.items()}
    for name, value, start, end in _entries(block):
        del value
        if name not in pending and name.decode("utf-8", "surrogateescape") in changes:
            continue  # a duplicate of one that was written already
        if name in pending:
            new = pending.pop(name)
            if new is not None:
                lines.append(name + b"=" + _escape(new) + b"\n")
            continue
        lines.append(block[start:end])
    lines += [name + b"=" + _escape(new) + b"\n" for name, new in pending.items() if new is not None]
    comments = _comments(block)
    body = SIGNATURE + comments + b"".join(lines)
    if len(body) > len(block):
        raise FormatError(f"the variables take {len(body)} bytes, the environment block has {len(block)}")
    return body.ljust(len(block), b"#")


def changed_sectors(old: bytes, new: bytes) -> tuple[int, ...]:
    """Numbers of the 512-byte sectors that differ: more than one can tear at a power cut."""
    return tuple(
        n
        for n in range(max(len(old), len(new)) // SECTOR_BYTES + 1)
        if old[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES] != new[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES]
    )


def _entries(block: bytes) -> list[tuple[bytes, bytes, int, int]]:
    """(name, raw value, start, end with LF) of each line with `=`. Raises FormatError without signature."""
    if not is_valid(block):
        raise FormatError("no GRUB environment block: the signature line is missing")
    found = []
    at = len(SIGNATURE)
    while at < len(block):
        if block[at : at + 1] == b"#":  # a comment line, or the padding that has no LF
            end = block.find(b"\n", at)
            if end < 0:
                break
            at = end + 1
            continue
        end = at
        while end < len(block) and block[end] != 0x0A:
            end += 2 if block[end] == 0x5C else 1
        if end >= len(block):
            break
        line = block[at:end]
        name, equals, value = line.partition(b"=")
        if equals and name:
            found.append((name, value, at, end + 1))
        at = end + 1
    return found


def _comments(block: bytes) -> bytes:
    """Comment lines right behind the signature (the WARNING line that newer tools write)."""
    at = len(SIGNATURE)
    while block[at : at + 1] == b"#":
        end = block.find(b"\n", at)
        if end < 0:
            break
        at = end + 1
    return block[len(SIGNATURE) : at]


def _name(name: str) -> bytes:
    if not name or not all(c.isascii() and (c.isalnum() or c == "_") for c in name):
        raise FormatError(f"not a name for a GRUB variable: {name!r}")
    return name.encode()


def _escape(value: str) -> bytes:
    if "\0" in value:
        raise FormatError("a GRUB variable can't hold a NUL byte")
    return value.encode("utf-8", "surrogateescape").replace(b"\\", b"\\\\").replace(b"\n", b"\\\n")


def _unescape(value: bytes) -> bytes:
    out = bytearray()
    at = 0
    while at < len(value):
        if value[at] == 0x5C and at + 1 < len(value):
            at += 1
        out.append(value[at])
        at += 1
    return bytes(out)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")

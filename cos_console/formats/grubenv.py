"""GRUB's environment block: 1024 bytes of `name=value` lines.

Source: GRUB 2.06 grub-core/lib/envblk.c and util/grub-editenv.c, checked against the real grub-editenv in the
tests. The block starts with a signature line; lines end in LF; `#` fills the rest; backslash escapes a
backslash or a LF in a value and nothing else. GRUB's `save_env` writes the blocks in place, so a file never
grows; a value that does not fit is refused and the block stays as it was.
"""

from dataclasses import dataclass

from cos_console.formats.readat import FormatError

SIGNATURE = b"# GRUB Environment Block\n"
BLOCK_BYTES = 1024
SECTOR_BYTES = 512


def is_valid(block: bytes) -> bool:
    """Whether GRUB would load it at all."""
    return len(block) > len(SIGNATURE) and block.startswith(SIGNATURE)


def variables(block: bytes) -> dict[str, str]:
    """What GRUB has after load_env: of a name that stands twice, the last value. Raises FormatError."""
    return {_text(i.name): _text(_unescape(i.value)) for i in _items(block) if i.name}


def empty_block() -> bytes:
    return SIGNATURE.ljust(BLOCK_BYTES, b"#")


def change(block: bytes, changes: dict[str, str | None]) -> bytes:
    """A block of the same length with these variables set, or unset where None; all others as they were.

    Duplicates of a changed name are removed; padding with NUL, which GRUB can't write to, becomes `#`. Where it
    can be had, only one 512-byte sector differs (a power cut tears no sector): a line that gets shorter is
    followed by a comment of `#` that keeps the rest in its place, and a line that grows takes such a comment
    up. Raises FormatError when the block is none, a name can't be one, or the values don't fit.
    """
    wanted = {_name(k): v for k, v in changes.items()}
    items = _items(block)
    tight = _render(block, [i for i in _changed(items, wanted) if not _is_filler(i.raw)])
    plain = _render(block, _changed(items, wanted))
    in_place = _render(block, _changed_in_place(items, wanted))
    for candidate in (plain, in_place, tight):
        if candidate is not None and len(changed_sectors(block, candidate)) <= 1:
            return candidate
    for candidate in (plain, tight):
        if candidate is not None:
            return candidate
    raise FormatError(f"the variables do not fit into the {len(block)} bytes of the environment block")


def faults(block: bytes) -> tuple[str, ...]:
    """What is wrong with a block, a sentence each; `change` mends all but a missing signature and the length."""
    if not is_valid(block):
        return ("It has no signature line, so GRUB loads nothing from it.",)
    found = []
    if len(block) != BLOCK_BYTES:
        found.append(f"It is {len(block)} bytes long and not {BLOCK_BYTES}.")
    items = _items(block)
    names = [i.name for i in items if i.name]
    twice = sorted({_text(n) for n in names if names.count(n) > 1})
    if twice:
        found.append(f"More than one line sets {', '.join(twice)}: the last one counts.")
    if any(b"\n" in n for n in names):
        found.append("A line without = hides the variable in the line behind it.")
    used = len(SIGNATURE) + sum(len(i.raw) for i in items)
    if block[used:].strip(b"#"):
        found.append("It is not padded with #, so GRUB can't change it.")
    return tuple(found)


def changed_sectors(old: bytes, new: bytes) -> tuple[int, ...]:
    """Numbers of the 512-byte sectors that differ: more than one can tear at a power cut."""
    return tuple(
        n
        for n in range(max(len(old), len(new)) // SECTOR_BYTES + 1)
        if old[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES] != new[n * SECTOR_BYTES : (n + 1) * SECTOR_BYTES]
    )


@dataclass(frozen=True)
class _Item:
    """One line, or one variable over several lines. `name` is empty for a comment."""

    raw: bytes
    name: bytes = b""
    value: bytes = b""


def _items(block: bytes) -> list[_Item]:
    """Everything between signature and padding, as GRUB's iterator takes it apart. Raises FormatError.

    A name reaches to the next `=`, over the end of its line: a line without `=` spoils the one behind it.
    """
    if not is_valid(block):
        raise FormatError("no GRUB environment block: the signature line is missing")
    found = []
    at = len(SIGNATURE)
    while at < len(block):
        equals = at if block[at : at + 1] == b"#" else block.find(b"=", at)
        end = _line_end(block, equals) if equals >= 0 else -1
        if end < 0:
            break
        raw = block[at : end + 1]
        if block[at : at + 1] == b"#":
            found.append(_Item(raw))
        else:
            found.append(_Item(raw, block[at:equals], block[equals + 1 : end]))
        at = end + 1
    return found


def _line_end(block: bytes, at: int) -> int:
    """Where the LF is that ends the line, an escaped one being none; -1 when there is none."""
    while at < len(block) and block[at] != 0x0A:
        at += 2 if block[at] == 0x5C else 1
    return at if at < len(block) else -1


def _is_filler(raw: bytes) -> bool:
    return raw.endswith(b"#\n") and not raw[:-1].strip(b"#")


def _line(name: bytes, value: str) -> _Item:
    escaped = _escape(value)
    return _Item(name + b"=" + escaped + b"\n", name, escaped)


def _means(item: _Item) -> bytes:
    """The name that GRUB's `set` would find in this item's last line."""
    return item.name.rpartition(b"\n")[2]


def _changed(items: list[_Item], wanted: dict[bytes, str | None]) -> list[_Item]:
    out: list[_Item] = []
    left = dict(wanted)
    for item in items:
        if not item.name or _means(item) not in wanted:
            out.append(item)
        elif item.name in left:
            value = left.pop(item.name)
            if value is not None:
                out.append(_line(item.name, value))
    return out + [_line(name, value) for name, value in left.items() if value is not None]


def _changed_in_place(items: list[_Item], wanted: dict[bytes, str | None]) -> list[_Item]:
    """The same, with every other line at the offset where it was, as far as comments of `#` can do that."""
    out: list[_Item] = []
    left = dict(wanted)
    spare = 0  # bytes by which what follows would move up, negative: down
    for item in items:
        if _is_filler(item.raw):
            spare += len(item.raw)
            continue
        if item.name and _means(item) in wanted:
            spare += len(item.raw)
            value = left.pop(item.name, None)
            if value is not None:
                line = _line(item.name, value)
                out.append(line)
                spare -= len(line.raw)
            continue
        if spare >= 2:
            out.append(_Item(b"#" * (spare - 1) + b"\n"))
            spare = 0
        out.append(item)
    return out + [_line(name, value) for name, value in left.items() if value is not None]


def _render(block: bytes, items: list[_Item]) -> bytes | None:
    body = SIGNATURE + b"".join(i.raw for i in items)
    return body.ljust(len(block), b"#") if len(body) <= len(block) else None


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

"""file_contexts(5): which SELinux context a path gets.

As libselinux reads it (src/label_file.c, regex.c): file_contexts, then .homedirs, then .local; specs without
meta characters go behind all others; of those that match path and file type the last one wins; `<<none>>` means
no context. `.subs` and `.subs_dist` replace the head of a path before the lookup.
"""

import re
import stat
from collections import defaultdict
from dataclasses import dataclass

from cos_console.formats.readat import FormatError

_META = frozenset(b".^$?*+|[({")
_TYPES = {
    b"--": stat.S_IFREG,
    b"-d": stat.S_IFDIR,
    b"-c": stat.S_IFCHR,
    b"-b": stat.S_IFBLK,
    b"-l": stat.S_IFLNK,
    b"-s": stat.S_IFSOCK,
    b"-p": stat.S_IFIFO,
}
_NONE = b"<<none>>"


@dataclass(frozen=True)
class Spec:
    regex: bytes
    kind: int
    """S_IFREG, ...; 0: every type."""
    context: bytes

    @property
    def meta(self) -> bool:
        """Whether it has a meta character that is not escaped."""
        return any(literal is None for literal in _literals(self.regex))


def parse(data: bytes) -> tuple[Spec, ...]:
    """The specs of one file in its order. Raises FormatError."""
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        if len(words) == 2:
            found.append(Spec(words[0], 0, words[1]))
        elif len(words) == 3 and words[1] in _TYPES:
            found.append(Spec(words[0], _TYPES[words[1]], words[2]))
        else:
            raise FormatError(f"line {number} of file_contexts is no spec")
    return tuple(found)


def parse_substitutions(data: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """(head, what replaces it) of a .subs or .subs_dist file."""
    rows = [line.split() for line in data.splitlines()]
    return tuple((r[0], r[1]) for r in rows if len(r) >= 2 and not r[0].startswith(b"#"))


class FileContexts:
    """The lookup. Regular expressions are compiled when a path first needs them."""

    def __init__(
        self,
        specs: tuple[Spec, ...],
        *,
        local_substitutions: tuple[tuple[bytes, bytes], ...] = (),
        distribution_substitutions: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self._specs = sorted(specs, key=lambda s: not s.meta)  # stable: those with meta characters first
        self._compiled: dict[int, re.Pattern[bytes]] = {}
        self._by_head: dict[bytes, list[int]] = defaultdict(list)
        for n, spec in enumerate(self._specs):
            self._by_head[_head(spec.regex)].append(n)
        self._lengths = sorted({len(head) for head in self._by_head})
        self._local, self._distribution = local_substitutions, distribution_substitutions

    def lookup(self, path: bytes, mode: int) -> bytes | None:
        """The context of `path` (absolute), None when it gets none. Raises FormatError (a bad expression)."""
        path = _substituted(_substituted(path, self._local), self._distribution)
        candidates: list[int] = []
        for length in self._lengths:
            if length > len(path):
                break
            candidates += self._by_head.get(path[:length], ())
        candidates.sort(reverse=True)
        kind = stat.S_IFMT(mode)
        for n in candidates:
            spec = self._specs[n]
            if spec.kind in (0, kind) and self._pattern(n).search(path):
                return None if spec.context == _NONE else spec.context
        return None

    def _pattern(self, n: int) -> re.Pattern[bytes]:
        found = self._compiled.get(n)
        if found is None:
            regex = self._specs[n].regex
            try:
                found = self._compiled[n] = re.compile(b"^" + regex + b"$", re.DOTALL)
            except re.error as e:
                shown = regex.decode(errors="replace")
                raise FormatError(f"the expression {shown} of file_contexts can't be read: {e}") from None
        return found


def _substituted(path: bytes, table: tuple[tuple[bytes, bytes], ...]) -> bytes:
    for head, new in table:
        if path.startswith(head) and path[len(head) : len(head) + 1] in (b"", b"/"):
            return new + path[len(head) :]
    return path


def _literals(regex: bytes) -> list[int | None]:
    """Byte by byte what it matches literally, up to and with the first meta character (None)."""
    out: list[int | None] = []
    at = 0
    while at < len(regex):
        byte = regex[at]
        if byte == 0x5C and at + 1 < len(regex):
            following = regex[at + 1]
            if chr(following).isalnum():  # a class such as \d, not a literal
                return [*out, None]
            out.append(following)
            at += 2
            continue
        if byte in _META:
            return [*out, None]
        out.append(byte)
        at += 1
    return out


def _head(regex: bytes) -> bytes:
    """Bytes that every match begins with."""
    if _alternates(regex):
        return b""
    literals = _literals(regex)
    fixed = bytes(x for x in literals if x is not None)
    if literals and literals[-1] is None:
        rest = regex[len(regex) - _after(regex, len(fixed)) :]
        if rest[:1] in (b"?", b"*", b"{"):
            return fixed[:-1]  # the last one may be there or not
    return fixed


def _after(regex: bytes, literals: int) -> int:
    """Bytes of the expression behind so many literal ones."""
    at = 0
    for _ in range(literals):
        at += 2 if regex[at] == 0x5C else 1
    return len(regex) - at


def _alternates(regex: bytes) -> bool:
    """Whether `|` stands outside of every group and class."""
    depth, in_class, escaped = 0, False, False
    for byte in regex:
        if escaped:
            escaped = False
        elif byte == 0x5C:
            escaped = True
        elif in_class:
            in_class = byte != 0x5D
        elif byte == 0x5B:
            in_class = True
        elif byte == 0x28:
            depth += 1
        elif byte == 0x29:
            depth -= 1
        elif byte == 0x7C and depth == 0:
            return True
    return False

"""GRUB's scripting language taken apart into commands, never run.

Source: GRUB manual, "Writing full configuration files directly" (shell-like scripting). Read are: words with
quotes and variables, if/elif/else/fi, function, and commands with a block (menuentry, submenu). Loops are kept as
commands by their name, so that a reader sees that something was not understood.
"""

import re
from dataclasses import dataclass

from cos_console.formats.readat import FormatError

_LIMIT = 256 * 1024
_MAX_NESTING = 32
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_]\w*|[0-9]+|[?#@*])\}|([A-Za-z_]\w*|[0-9?#@*]))")


@dataclass(frozen=True)
class Variable:
    name: str


Word = tuple[str | Variable, ...]
"""Literal pieces and variables, joined without space."""


@dataclass(frozen=True)
class Command:
    words: tuple[Word, ...]
    body: tuple["Statement", ...] | None = None
    """What stands in its braces."""

    @property
    def name(self) -> str:
        return literal(self.words[0]) or ""


@dataclass(frozen=True)
class If:
    branches: tuple[tuple[tuple["Statement", ...], tuple["Statement", ...]], ...]
    """(condition, body) of if and each elif."""
    otherwise: tuple["Statement", ...]


Statement = Command | If


def literal(word: Word) -> str | None:
    """The word's text when there is no variable in it."""
    if any(isinstance(p, Variable) for p in word):
        return None
    return "".join(p for p in word if isinstance(p, str))


def parse(data: bytes) -> tuple[Statement, ...]:
    """Raises FormatError for more than 256 KiB, nesting over 32, or a block without its end."""
    if len(data) > _LIMIT:
        raise FormatError("a GRUB script larger than 256 KiB")
    parser = _Parser(_tokens(data.decode("utf-8", "replace")))
    statements = parser.block(frozenset(), 0)
    if parser.more:
        raise FormatError("a GRUB script with an end that nothing began")
    return statements


_Token = Word | str
"""A word, or one of the strings ';' '{' '}'."""


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    at, end = 0, len(text)
    while at < end:
        c = text[at]
        if c in " \t\r":
            at += 1
        elif text.startswith("\\\n", at):
            at += 2
        elif c == "#":
            stop = text.find("\n", at)
            at = end if stop < 0 else stop
        elif c in "\n;|&":
            tokens.append(";")
            if c in "|&":  # not understood: shown as a command of that name
                tokens += [(c,), ";"]
            at += 1
        else:
            word, quoted, at = _word(text, at)
            alone = not quoted and len(word) == 1 and word[0] in {"{", "}"}
            tokens.append(str(word[0]) if alone else word)
    return tokens


def _word(text: str, at: int) -> tuple[Word, bool, int]:
    """(the word from `at`, whether any of it was quoted, the place behind it)."""
    parts: list[str | Variable] = []
    quoted = False
    inside = ""
    while at < len(text):
        c = text[at]
        if inside == "'":
            if c == "'":
                inside = ""
            else:
                parts.append(c)
            at += 1
            continue
        if not inside and c in " \t\r\n;|&":
            break
        if c == "\\" and at + 1 < len(text):
            following = text[at + 1]
            if following == "\n":
                pass
            elif inside and following not in '"$\\':
                parts.append("\\" + following)
            else:
                parts.append(following)
            quoted = True
            at += 2
        elif c == '"':
            inside = "" if inside else '"'
            quoted = True
            at += 1
        elif c == "'" and not inside:
            inside = "'"
            quoted = True
            at += 1
        elif c == "$" and (match := _VARIABLE.match(text, at)):
            parts.append(Variable(match[1] or match[2]))
            at = match.end()
        else:
            parts.append(c)
            at += 1
    if inside:
        raise FormatError("a GRUB script with a quotation mark that is not closed")
    joined: list[str | Variable] = []
    for part in parts:
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return tuple(joined), quoted, at


class _Parser:
    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._at = 0

    @property
    def more(self) -> bool:
        return self._at < len(self._tokens)

    def block(self, ends: frozenset[str], depth: int) -> tuple[Statement, ...]:
        """Statements up to one of `ends`, which is left standing."""
        if depth > _MAX_NESTING:
            raise FormatError(f"a GRUB script nested more than {_MAX_NESTING} deep")
        found: list[Statement] = []
        while self.more:
            item = self._tokens[self._at]
            if item == ";":
                self._at += 1
            elif item == "}" or self._keyword() in ends:
                break
            elif self._keyword() == "if":
                found.append(self._if(depth))
            else:
                found.append(self._command(depth))
        return tuple(found)

    def _keyword(self) -> str:
        item = self._tokens[self._at] if self.more else ";"
        return literal(item) or "" if isinstance(item, tuple) else ""

    def _if(self, depth: int) -> If:
        branches = []
        otherwise: tuple[Statement, ...] = ()
        while self._keyword() in {"if", "elif"}:
            self._at += 1
            condition = self.block(frozenset({"then"}), depth + 1)
            self._expect("then")
            body = self.block(frozenset({"elif", "else", "fi"}), depth + 1)
            branches.append((condition, body))
        if self._keyword() == "else":
            self._at += 1
            otherwise = self.block(frozenset({"fi"}), depth + 1)
        self._expect("fi")
        return If(tuple(branches), otherwise)

    def _expect(self, word: str) -> None:
        if self._keyword() != word:
            raise FormatError(f"a GRUB script in which {word!r} is missing")
        self._at += 1

    def _command(self, depth: int) -> Command:
        words: list[Word] = []
        body: tuple[Statement, ...] | None = None
        while self.more:
            item = self._tokens[self._at]
            if isinstance(item, tuple):
                words.append(item)
            elif item == "{":
                self._at += 1
                body = self.block(frozenset(), depth + 1)
                if not self.more or self._tokens[self._at] != "}":
                    raise FormatError("a GRUB script with a block that is not closed")
                self._at += 1
                break
            else:
                break
            self._at += 1
        return Command(tuple(words) or (("{",),), body)

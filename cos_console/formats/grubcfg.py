"""What an installed grub.cfg and an image's bootargs.cfg say, followed through without running them.

Every variable has a set of possible values: both branches of a condition that can't be decided from the text are
followed, and what comes from outside (an environment block, the firmware) stays in a value as `${name}`. What is
not understood is listed in `unknown` and never guessed. Source: GRUB manual (commands menuentry, set, search,
load_env, save_env, source; "default", "fallback").
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from cos_console.formats.grubscript import Command, If, Statement, Variable, Word, literal, parse
from cos_console.formats.readat import FormatError

_MAX_VALUES = 16
_MAX_STEPS = 20_000
_SYMBOL = "\0"
_OPTIONS_WITH_VALUE = {"--class", "--users", "--hotkey", "--id", "-c", "-u", "-k"}
_NOT_FOLLOWED = {
    "source",
    "configfile",
    "normal",
    "for",
    "while",
    "until",
    "eval",
    "chainloader",
    "|",
    "&",
    ".",
}


@dataclass(frozen=True)
class Entry:
    """One menu entry."""

    entry_id: str
    title: str
    """With `${name}` for what an environment block may set."""
    image: str
    """img=, the loop-mounted file; empty when none or more than one is possible."""
    label: str
    """label=, what the initrd will look for; empty as above."""
    images: tuple[str, ...] = ()
    """All files that `image` may be, in the order of the script."""
    root_label: str = ""
    """The label by which the entry searches its partition; empty when it does not, or it can't be told."""
    bootargs: str = ""
    """The file inside the image that the entry sources."""
    kernel_line: str = ""
    """Arguments of `linux`, with `${name}` for what bootargs.cfg and the environment give."""
    conditional: bool = False
    """It stands in a condition that can't be decided from the text."""


@dataclass(frozen=True)
class EnvironmentFile:
    """One load_env. `found_by`: file (first device that has `path`), label, uuid, root (GRUB's own), unknown."""

    path: str
    found_by: str
    key: str = ""
    """The label or UUID searched for."""


@dataclass(frozen=True)
class GrubConfig:
    entries: tuple[Entry, ...]
    environment_files: tuple[str, ...]
    """Paths without leading slash in loading order: of a variable in two of them, the later one wins."""
    honours_next_entry: bool
    honours_saved_entry: bool
    fallback: tuple[str, ...]
    environment: tuple[EnvironmentFile, ...] = ()
    clears_next_entry: bool = False
    sourced: tuple[str, ...] = ()
    """Other files that it reads after or between its own lines (grubmenu, grubcustom): entries may be there."""
    unknown: tuple[str, ...] = ()
    """What was not understood, as `command: words`."""

    @property
    def reads_environment(self) -> bool:
        return bool(self.environment_files) and self.honours_saved_entry


@dataclass(frozen=True)
class BootArguments:
    kernel: str
    initramfs: str
    command_line: str
    """With `${name}` for what the menu entry sets."""
    unknown: tuple[str, ...] = ()

    @property
    def root_by_image_label(self) -> bool:
        """The initrd finds the root by the label inside the image (cOS), and not by the file's name."""
        return bool(re.search(r"root=LABEL=\$\{?label\b", self.command_line))

    def filled(self, variables: dict[str, str]) -> str:
        """The command line with these; a name without a value becomes empty, as in GRUB."""
        return re.sub(r"\$\{([^}]*)\}", lambda m: variables.get(m[1], ""), self.command_line)


def parse_grub_cfg(data: bytes) -> GrubConfig:
    """Raises FormatError when it is no GRUB script or has no menu entry."""
    run = _Run()
    run.statements(parse(data), sure=True)
    if not run.entries:
        raise FormatError("grub.cfg has no menu entry")
    fallback = [v for v in run.values("fallback") if "${" not in v]
    return GrubConfig(
        entries=tuple(run.entries),
        environment_files=tuple(dict.fromkeys(f.path for f in run.environment if f.path)),
        honours_next_entry=any("${next_entry}" in v for v in run.defaults),
        honours_saved_entry=any("${saved_entry}" in v for v in run.defaults),
        fallback=tuple(fallback[0].split()) if fallback else (),
        environment=tuple(dict.fromkeys(run.environment)),
        clears_next_entry="next_entry" in run.saved,
        sourced=tuple(dict.fromkeys(run.sourced)),
        unknown=tuple(dict.fromkeys(run.unknown)),
    )


def parse_bootargs(data: bytes) -> BootArguments:
    """/etc/cos/bootargs.cfg. Raises FormatError when it names no kernel, or one that can't be told."""
    run = _Run()
    run.statements(parse(data), sure=True)
    kernels = run.values("kernel")
    if len(kernels) != 1 or not kernels[0] or "${" in kernels[0]:
        raise FormatError(
            "bootargs.cfg names no kernel" if not any(kernels) else "bootargs.cfg's kernel is unclear"
        )
    unclear = [n for n in ("initramfs", "kernelcmd") if len(run.values(n)) > 1]
    unknown = [*run.unknown, *(f"{name}: more than one value is possible" for name in unclear)]
    return BootArguments(
        kernels[0], run.first("initramfs"), run.first("kernelcmd"), tuple(dict.fromkeys(unknown))
    )


class _Run:
    """Follows a script; `env` maps a name to its possible values, in the order they were met."""

    def __init__(self) -> None:
        self.env: dict[str, tuple[str, ...]] = {}
        self.entries: list[Entry] = []
        self.environment: list[EnvironmentFile] = []
        self.defaults: list[str] = []
        self.saved: set[str] = set()
        self.sourced: list[str] = []
        self.unknown: list[str] = []
        self._functions: dict[str, tuple[Statement, ...]] = {}
        self._entry: Entry | None = None
        self._steps = 0
        self._active: set[str] = set()

    def values(self, name: str) -> tuple[str, ...]:
        return self.env.get(name, ())

    def first(self, name: str) -> str:
        return next(iter(self.values(name)), "")

    def statements(self, body: tuple[Statement, ...], *, sure: bool) -> None:
        for statement in body:
            self._steps += 1
            if self._steps > _MAX_STEPS:
                raise FormatError(f"a GRUB script of more than {_MAX_STEPS} steps")
            if isinstance(statement, If):
                self._if(statement, sure=sure)
            else:
                self._command(statement, sure=sure)

    # --- conditions ------------------------------------------------------------------------------------------

    def _if(self, statement: If, *, sure: bool) -> None:
        outcomes: list[dict[str, tuple[str, ...]]] = []
        before = self.env
        decided = False
        for condition, body in statement.branches:
            truth = self._condition(condition)
            if truth is False:
                continue
            self.env = dict(before)
            self.statements(body, sure=sure and truth is True and not outcomes)
            outcomes.append(self.env)
            if truth is True:
                decided = True
                break
        if not decided:
            self.env = dict(before)
            self.statements(statement.otherwise, sure=sure and not outcomes)
            outcomes.append(self.env)
        merged: dict[str, tuple[str, ...]] = {}
        for name in dict.fromkeys(n for env in outcomes for n in env):
            found = dict.fromkeys(v for env in outcomes for v in env.get(name, (f"${{{name}}}",)))
            merged[name] = tuple(found)[:_MAX_VALUES]
        self.env = merged

    def _condition(self, condition: tuple[Statement, ...]) -> bool | None:
        """True, False, or None when the text does not tell."""
        if len(condition) != 1 or not isinstance(condition[0], Command):
            return None
        words = list(condition[0].words)
        name = condition[0].name
        if name == "[" and literal(words[-1]) == "]":
            words = words[1:-1]
        elif name == "test":
            words = words[1:]
        elif name in {"true", "false"}:
            return name == "true"
        else:
            return None
        negate = bool(words) and literal(words[0]) == "!"
        truth = self._test(words[1:] if negate else words)
        return truth if truth is None else truth != negate

    def _test(self, words: list[Word]) -> bool | None:
        sides = [self._known(w) for w in words]
        if len(words) == 1:
            return None if sides[0] is None else bool(sides[0])
        if len(words) == 2 and sides[0] in {"-z", "-n"}:
            return None if sides[1] is None else bool(sides[1]) == (sides[0] == "-n")
        if (
            len(words) == 3
            and sides[1] in {"=", "==", "!="}
            and sides[0] is not None
            and sides[2] is not None
        ):
            return (sides[0] == sides[2]) == (sides[1] != "!=")
        return None

    def _known(self, word: Word) -> str | None:
        found = self._expand(word)
        return found[0] if len(found) == 1 and "${" not in found[0] and _SYMBOL not in found[0] else None

    def _expand(self, word: Word) -> tuple[str, ...]:
        choices = [(p,) if isinstance(p, str) else self._variable(p) for p in word]
        found: dict[str, None] = {}
        for parts in product(*choices):
            found["".join(parts)] = None
            if len(found) >= _MAX_VALUES:
                break
        return tuple(found)

    def _variable(self, variable: Variable) -> tuple[str, ...]:
        return self.env.get(variable.name) or (f"${{{variable.name}}}",)

    # --- commands --------------------------------------------------------------------------------------------

    def _command(self, command: Command, *, sure: bool) -> None:
        name = command.name
        if name in {"menuentry", "submenu"}:
            self._menuentry(command, sure=sure)
        elif name == "function" and len(command.words) == 2 and command.body is not None:
            self._functions[literal(command.words[1]) or ""] = command.body
        elif name in self._functions:
            if name in self._active:  # one that calls itself
                self._not_understood(command)
                return
            self._active.add(name)
            self.statements(self._functions[name], sure=sure)
            self._active.discard(name)
        elif name == "set":
            for word in command.words[1:]:
                self._set(word)
        elif name == "unset":
            for word in command.words[1:]:
                self.env[literal(word) or ""] = ("",)
        elif name == "search" or name.startswith("search."):
            self._search(command)
        elif name == "load_env":
            self._load_env(command)
        elif name == "save_env":
            self.saved |= {literal(w) or "" for w in command.words[1:]}
        elif name in {"linux", "linux16", "linuxefi"} and self._entry is not None:
            line = " ".join(self._expand(w)[0] for w in command.words[1:])
            self._entry = replace(self._entry, kernel_line=self._entry.kernel_line or line)
        elif name in {"source", "."} and self._entry is not None:
            path = self._path(command.words[-1])
            self._entry = replace(self._entry, bootargs=self._entry.bootargs or path)
        elif name in {"source", "configfile"} and len(command.words) == 2:
            self.sourced.append(self._path(command.words[1]))
        elif name in _NOT_FOLLOWED or command.body is not None or not name:
            self._not_understood(command)

    def _not_understood(self, command: Command) -> None:
        text = " ".join(
            "".join(p if isinstance(p, str) else f"${{{p.name}}}" for p in w) for w in command.words
        )
        self.unknown.append(text[:120])

    def _set(self, word: Word) -> None:
        name, equals, head = word[0].partition("=") if word and isinstance(word[0], str) else ("", "", "")
        if not equals:
            return
        self.env[name] = self._expand((head, *word[1:]))
        if name == "default":
            self.defaults += self.env[name]

    def _search(self, command: Command) -> None:
        kind, target, keys = "file", "root", list[Word]()
        words = iter(command.words[1:])
        for word in words:
            text = literal(word) or ""
            if text in {"--label", "-l"}:
                kind = "label"
            elif text in {"--fs-uuid", "-u"}:
                kind = "uuid"
            elif text in {"--set", "-s"}:
                # `--set VAR`; with nothing but the key behind it, VAR is left out and means root
                rest = list(words)
                if len(rest) > 1:
                    target, rest = literal(rest[0]) or "", rest[1:]
                keys += [w for w in rest if not (literal(w) or "").startswith("--")]
                break
            elif text.startswith("--set="):
                target = text[6:]
            elif not text.startswith("-"):
                keys.append(word)
        key = self._expand(keys[-1])[0] if keys else ""
        self.env[target] = (f"{_SYMBOL}{kind}:{key}{_SYMBOL}",)

    def _load_env(self, command: Command) -> None:
        words = [w for w in command.words[1:] if literal(w) not in {"-s", "--skip-sig"}]
        place: Word | None = None
        only: list[str] = []
        while words:
            word = words.pop(0)
            text = literal(word) or (word[0] if word and isinstance(word[0], str) else "")
            if text in {"-f", "--file"} and words:
                place = words.pop(0)
            elif text.startswith("--file="):
                place = (text[7:], *word[1:])
            else:
                only.append(text)
        if place is None:
            self.environment.append(EnvironmentFile("", "unknown"))
            self.unknown.append("load_env without a file: $prefix/grubenv")
        else:
            self._loaded(place)
        for name in only or [n for n, v in self.env.items() if not any(_SYMBOL in x for x in v)]:
            old = self.env.get(name, ())
            self.env[name] = tuple(dict.fromkeys((*old, f"${{{name}}}")))[:_MAX_VALUES]

    def _loaded(self, place: Word) -> None:
        found = [p for p in self._expand(place) if "${" not in p.rpartition(")")[2]]
        if not found:
            self.unknown.append("load_env of a file whose name can't be told")
        for path in dict.fromkeys(found):
            device, closed, name = path.rpartition(")")
            match = re.search(f"{_SYMBOL}(\\w+):([^{_SYMBOL}]*){_SYMBOL}", device)
            if not closed:
                file = EnvironmentFile(name.lstrip("/"), "root")
            elif match is not None:
                file = EnvironmentFile(name.lstrip("/"), match[1], match[2] if match[1] != "file" else "")
            else:
                file = EnvironmentFile(
                    name.lstrip("/"), "root" if device in {"($root", "(${root}"} else "unknown"
                )
            self.environment.append(file)

    def _path(self, word: Word) -> str:
        """Without its device."""
        return self._expand(word)[0].rpartition(")")[2]

    def _menuentry(self, command: Command, *, sure: bool) -> None:
        title, entry_id = "", ""
        for text in self._menu_words(command.words[1:]):
            if text.startswith("--id="):
                entry_id = text[5:]
            elif not title:
                title = text
        if command.name == "submenu" or command.body is None or self._entry is not None:
            self._not_understood(command)
            self.entries.append(Entry(entry_id, title, "", "", conditional=not sure))
            return
        outer = dict(self.env)
        for name in ("img", "label", "recoverylabel"):
            self.env.pop(name, None)
        self._entry = Entry(entry_id, title, "", "", conditional=not sure)
        self.statements(command.body, sure=False)
        images = tuple(v for v in self.values("img") if v and "${" not in v)
        labels = self.values("label") or self.values("recoverylabel")
        root = re.fullmatch(f"\\(?{_SYMBOL}label:([^{_SYMBOL}]*){_SYMBOL}\\)?", self.first("root"))
        self.entries.append(
            replace(
                self._entry,
                image=images[0] if len(images) == 1 else "",
                images=images,
                label=labels[0] if len(labels) == 1 and "${" not in labels[0] else "",
                root_label=root[1] if root else "",
            )
        )
        self._entry = None
        self.env = outer

    def _menu_words(self, words: tuple[Word, ...]) -> Iterator[str]:
        """Title and `--id=` of a menu entry, its other options left out."""
        rest = list(words)
        while rest:
            word = rest.pop(0)
            values = self._expand(word)
            # what an environment block may set is shown as such, whatever the default in the script
            text = next((v for v in values if "${" in v), values[0] if values else "")
            if text == "${menuentry_id_option}":
                text = "--id"
            if text in _OPTIONS_WITH_VALUE:
                value = self._expand(rest.pop(0))[0] if rest else ""
                if text == "--id":
                    yield f"--id={value}"
            elif text.startswith("--id=") or not text.startswith("--"):
                yield text

"""What an installed grub.cfg and an image's bootargs.cfg say, read without running them.

Not a GRUB script interpreter: it recognises the statements that cos-toolkit's, Elemental's and Harvester's
files are made of (menuentry with --id, set, load_env, search, source) and reports what it could not tell.
"""

import re
from dataclasses import dataclass

from cos_console.formats.readat import FormatError

_LIMIT = 256 * 1024
_ENTRY = re.compile(r"^\s*menuentry\s+(?P<title>\"[^\"]*\"|'[^']*'|\S+)(?P<rest>[^{]*)\{", re.MULTILINE)
_SET = re.compile(r"^\s*set\s+(?P<name>[A-Za-z_]\w*)=(?P<value>\"[^\"]*\"|'[^']*'|\S*)", re.MULTILINE)
_LOAD_ENV = re.compile(r"^\s*load_env\b.*?(?P<file>[\w.-]+)\"?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One menu entry. `image` is the loop-mounted file (img=), `label` what the initrd will look for."""

    entry_id: str
    title: str
    image: str
    label: str


@dataclass(frozen=True)
class GrubConfig:
    entries: tuple[Entry, ...]
    environment_files: tuple[str, ...]
    """File names in loading order: of a variable in two of them, the later one wins."""
    honours_next_entry: bool
    honours_saved_entry: bool
    fallback: tuple[str, ...]

    @property
    def reads_environment(self) -> bool:
        return bool(self.environment_files) and self.honours_saved_entry


@dataclass(frozen=True)
class BootArguments:
    kernel: str
    initramfs: str
    command_line: str

    @property
    def root_by_image_label(self) -> bool:
        """The initrd finds the root by the label inside the image (cOS), and not by the file's name."""
        return bool(re.search(r"root=LABEL=\$\{?label\b", self.command_line))


def parse_grub_cfg(data: bytes) -> GrubConfig:
    """Raises FormatError when there is not one menu entry in it."""
    text = data[:_LIMIT].decode("utf-8", "replace")
    text = "\n".join("" if line.lstrip().startswith("#") else line for line in text.splitlines())
    starts = list(_ENTRY.finditer(text))
    if not starts:
        raise FormatError("grub.cfg has no menu entry")
    entries = []
    for match in starts:
        end = text.find("\n}", match.end())
        body = text[match.end() : end if end >= 0 else len(text)]
        values = {m["name"]: _unquote(m["value"]) for m in _SET.finditer(body)}
        found = re.search(r"--id(?:=|\s+)(\S+)", match["rest"])
        entries.append(
            Entry(
                entry_id=_unquote(found[1]) if found else "",
                title=_unquote(match["title"]),
                image=values.get("img", ""),
                label=values.get("label", values.get("recoverylabel", "")),
            )
        )
    head = text[: starts[0].start()]
    fallback = next(
        (m["value"] for m in _SET.finditer(head) if m["name"] == "fallback" and "$" not in m["value"]), ""
    )
    return GrubConfig(
        entries=tuple(entries),
        environment_files=tuple(dict.fromkeys(m["file"] for m in _LOAD_ENV.finditer(head))),
        honours_next_entry=bool(re.search(r"set\s+default=\"?\$\{?next_entry", head)),
        honours_saved_entry=bool(re.search(r"set\s+default=\"?\$\{?saved_entry", head)),
        fallback=tuple(_unquote(fallback).split()),
    )


def parse_bootargs(data: bytes) -> BootArguments:
    """/etc/cos/bootargs.cfg. Raises FormatError when it names no kernel."""
    text = data[:_LIMIT].decode("utf-8", "replace")
    values = {m["name"]: _unquote(m["value"]) for m in _SET.finditer(text)}
    if not values.get("kernel"):
        raise FormatError("bootargs.cfg names no kernel")
    return BootArguments(values["kernel"], values.get("initramfs", ""), values.get("kernelcmd", ""))


def _unquote(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'" else text

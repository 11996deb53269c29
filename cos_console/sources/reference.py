"""Image names as in containers-transports(5); a bare one means the registry, with docker's defaults."""

import re
from pathlib import Path

from cos_console.model.image import ImageReference, Transport, parse_digest
from cos_console.model.problem import ExitCode, Problem

_PATHS = {
    "oci": Transport.OCI,
    "oci-archive": Transport.OCI_ARCHIVE,
    "docker-archive": Transport.DOCKER_ARCHIVE,
    "dir": Transport.DIRECTORY,
}
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]{1,5})?")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)


def parse_reference(text: str) -> ImageReference:
    """Raises Problem COS-REFERENCE."""
    text = text.strip()
    prefix, colon, rest = text.partition(":")
    if colon and prefix in _PATHS:
        if not rest:
            raise _bad(text, "a path must follow")
        file, _, ref = (rest, "", "") if prefix == "dir" else _split_path(rest)
        if "\0" in rest:
            raise _bad(text, "a path can't have a NUL in it")
        return ImageReference(
            _PATHS[prefix], f"{Path(file).absolute()}:{ref}" if ref else str(Path(file).absolute())
        )
    if text.startswith("docker-daemon:"):
        return ImageReference(
            Transport.DOCKER_DAEMON, _name(text.removeprefix("docker-daemon:"), text, engine=True)
        )
    name = text.removeprefix("docker://")
    if "://" in name or name.startswith("docker:"):
        raise _bad(text, "the transport is not known")
    if name.startswith(("/", "./", "../")):
        raise _bad(
            text, "it looks like a path, so it needs oci:, oci-archive:, docker-archive: or dir: before it"
        )
    return ImageReference(Transport.DOCKER, _name(name, text))


def split_path(location: str) -> tuple[str, str]:
    """(path, ref) of an oci or archive location; the ref may be empty."""
    path, _, ref = _split_path(location)
    return path, ref


def split_name(location: str) -> tuple[str, str, str, str]:
    """(host, repository, tag, digest) of a registry location as `parse_reference` normalises it."""
    name, _, digest = location.partition("@")
    host, _, path = name.partition("/")
    repository, _, tag = path.partition(":")
    return host, repository, tag, digest


def _split_path(rest: str) -> tuple[str, str, str]:
    """At the first colon, as containers-transports(5) has it, unless a file of the whole name is there."""
    head, colon, ref = rest.partition(":")
    if colon and head and not Path(rest).exists():
        return head, colon, ref
    return rest, "", ""


def _name(name: str, whole: str, *, engine: bool = False) -> str:
    if engine and re.fullmatch(r"sha256:[0-9a-f]{64}", name):
        return name
    name, at, digest = name.partition("@")
    if at:
        try:
            parse_digest(digest)
        except ValueError:
            raise _bad(whole, "what follows @ is not a digest") from None
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        host, path = first, rest
        if host == "index.docker.io":
            host = "docker.io"
    else:
        host, path = "docker.io", name
    path, colon, tag = path.partition(":")
    if host == "docker.io" and "/" not in path:
        path = f"library/{path}"
    port = re.search(r":(\d+)$", host)
    if port and not 0 < int(port[1]) < 1 << 16:
        raise _bad(whole, "there is no such port")
    if not _HOST.fullmatch(host) or not _REPOSITORY.fullmatch(path) or len(path) > 255:
        raise _bad(whole, "the name is not a valid repository name")
    if colon and not _TAG.fullmatch(tag):
        raise _bad(whole, "the tag is not valid")
    if not colon and not at:
        tag = "latest"
    return f"{host}/{path}" + (f":{tag}" if tag else "") + (f"@{digest}" if at else "")


def _bad(text: str, why: str) -> Problem:
    text = re.sub(r"[^/@\s]*:[^/@\s]*@(?!sha)", "", text)  # somebody's user:password@ is not for the log
    return Problem(
        "COS-REFERENCE",
        f"{text[:120]!r} does not name an image: {why}.",
        now="Write it like quay.io/costoolkit/releases-green:cos-system-0.5.8, oci:DIR:TAG or oci-archive:FILE.",
        exit_code=ExitCode.USAGE,
    )

"""os-release(5): KEY=value lines with shell quoting, read without a shell."""

_LIMIT = 64 * 1024


def parse(data: bytes) -> dict[str, str]:
    """All assignments of the file; a line that is none is skipped, as os-release(5) asks of readers."""
    found: dict[str, str] = {}
    for line in data[:_LIMIT].decode("utf-8", "replace").splitlines():
        key, equals, raw = line.strip().partition("=")
        if equals and key and not key.startswith("#") and key.replace("_", "a").isalnum():
            found[key] = _unquote(raw)
    return found


def version(fields: dict[str, str]) -> str:
    """The version that tells one build from another: IMAGE_VERSION, else VERSION, else VERSION_ID.

    cOS puts its own release in VERSION (its VERSION_ID follows the base distribution in derivatives).
    """
    for key in ("IMAGE_VERSION", "KAIROS_VERSION", "VERSION", "VERSION_ID"):
        if fields.get(key):
            return fields[key]
    return ""


def _unquote(raw: str) -> str:
    raw = raw.strip()
    if len(raw) >= 2 and raw[0] == raw[-1] == "'":
        return raw[1:-1]
    if len(raw) >= 2 and raw[0] == raw[-1] == '"':
        out = []
        at = 1
        while at < len(raw) - 1:
            if raw[at] == "\\" and at + 1 < len(raw) - 1 and raw[at + 1] in '\\"$`':
                at += 1
            out.append(raw[at])
            at += 1
        return "".join(out)
    return raw

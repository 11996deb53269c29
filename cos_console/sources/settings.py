"""How sources are reached: certificates, hosts without TLS, patience."""

import platform as platform_module

import msgspec

from cos_console.model.image import Digest, Platform, ResolvedImage

_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
}
"""uname's names to those of GOARCH; the others are the same in both."""


class SourceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Travels with a plan to the engine's process; holds no secret (docker's own config has those)."""

    ca_file: str = ""
    """PEM file trusted beside the system's store."""
    insecure_hosts: tuple[str, ...] = ()
    """host[:port] reached by plain HTTP; loopback always may be."""
    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0
    """A connection without a byte for that long is taken as lost."""
    wait_limit_s: float = 300.0
    """How long a lost connection is waited for before giving up."""
    pin: Digest | None = None
    """Take this manifest whatever the tag says now."""

    def pinned(self, image: ResolvedImage) -> "SourceSettings":
        return msgspec.structs.replace(self, pin=image.digest)

    @property
    def platform(self) -> Platform:
        machine = platform_module.machine()
        architecture, variant = _ARCHITECTURES.get(machine, (machine, ""))
        return Platform("linux", architecture, variant)

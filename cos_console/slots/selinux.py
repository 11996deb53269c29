"""SELinux contexts of a new image, from the policy that lies in it: what setfiles would write, without a mount.

cos-upgrade runs the running system's setfiles over the mounted target, when the target has a policy. Here the
writer asks for each file's context while it writes the inode. Every file gets the policy's context, whatever a
layer brought (as `setfiles -F`); without a policy in the image nothing is labelled.
"""

from cos_console.formats import filecontexts
from cos_console.formats.filecontexts import FileContexts
from cos_console.formats.readat import FormatError
from cos_console.model.problem import ExitCode, Problem
from cos_console.slots.build import Contexts, ImageTree

_LIMIT = 16 << 20
_CONFIG = "etc/selinux/config"


def contexts_from(tree: ImageTree) -> Contexts | None:
    """The lookup that the image's own policy gives; None when it has none. Raises Problem COS-SELINUX, OSError."""
    base = f"etc/selinux/{_policy(tree)}/contexts/files/file_contexts"
    first = tree.read_file(base, _LIMIT)
    if first is None:
        return None
    try:
        specs = filecontexts.parse(first)
        for more in (".homedirs", ".local"):
            specs += filecontexts.parse(tree.read_file(base + more, _LIMIT) or b"")
        known = FileContexts(
            specs,
            local_substitutions=filecontexts.parse_substitutions(
                tree.read_file(f"{base}.subs", _LIMIT) or b""
            ),
            distribution_substitutions=filecontexts.parse_substitutions(
                tree.read_file(f"{base}.subs_dist", _LIMIT) or b""
            ),
        )
    except FormatError as e:
        raise _unreadable(e) from None

    def context(path: bytes, mode: int) -> bytes | None:
        try:
            return known.lookup(path, mode)
        except FormatError as e:
            raise _unreadable(e) from None

    return context


def _policy(tree: ImageTree) -> str:
    """SELINUXTYPE of etc/selinux/config; without one, the policy that cos-upgrade looks for."""
    for line in (tree.read_file(_CONFIG, 1 << 16) or b"").decode(errors="replace").splitlines():
        key, equals, value = line.partition("=")
        if equals and key.strip() == "SELINUXTYPE" and value.strip():
            return value.strip().strip('"').replace("/", "")
    return "targeted"


def _unreadable(error: FormatError) -> Problem:
    return Problem(
        "COS-SELINUX",
        f"The SELinux policy in the new image can't be read: {error}.",
        unchanged="active and passive are exactly as before.",
        now="Tell the makers of the image; without contexts it would not start.",
        exit_code=ExitCode.VERIFICATION,
    )

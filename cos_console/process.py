"""The one way to run a tool: argv, time-out, captured output; failure is a Problem with the tool's words.

The table below is the whole list of programs this project calls.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence

from cos_console.model.problem import ExitCode, Problem

TOOLS: dict[str, str] = {
    "losetup": "mount",
    "mount": "mount",
    "umount": "mount",
    "e2fsck": "e2fsprogs",
    "setfiles": "policycoreutils",
    "systemd-run": "systemd",
    "systemctl": "systemd",
    "mksquashfs": "squashfs-tools",
}
"""Program to the Debian package that has it."""

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(
    argv: Sequence[str],
    *,
    timeout_s: float = 120.0,
    ok: Sequence[int] = (0,),
    input_bytes: bytes | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run one of TOOLS and return its result.

    Output is in the C locale. Raises Problem COS-TOOL-MISSING when the program is not installed,
    COS-TOOL-FAILED on a status not in `ok` or when `timeout_s` seconds have passed (the program is killed).
    """
    name = argv[0]
    package = TOOLS[name]
    environment = {"PATH": _PATH, "LC_ALL": "C", "HOME": os.environ.get("HOME", "/"), **(env or {})}
    try:
        done = subprocess.run(
            list(argv),
            input=input_bytes,
            stdin=subprocess.DEVNULL if input_bytes is None else None,
            capture_output=True,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        raise Problem(
            "COS-TOOL-MISSING",
            f"The program {name} is not installed on this system.",
            now=f"Install the package {package} and try again.",
            exit_code=ExitCode.REFUSED,
        ) from None
    except subprocess.TimeoutExpired:
        raise Problem(
            "COS-TOOL-FAILED",
            f"{name} did not answer within {timeout_s:.0f} s and was ended.",
            now="Look at the kernel's messages (dmesg) for a disk that does not answer.",
            detail=" ".join(argv),
        ) from None
    if done.returncode not in ok:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        last = words.splitlines()[-1] if words else f"exit status {done.returncode}"
        raise Problem(
            "COS-TOOL-FAILED",
            f"{name} failed: {last}",
            now="Save the report and look at the details in it.",
            detail=f"{' '.join(argv)}\nexit status {done.returncode}\n{words}",
        )
    return done

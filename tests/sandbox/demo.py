"""`./cos demo`: the main job on a sandbox disk, as a stranger would do it. No disk of the machine is touched.

On a terminal it opens the console on the sandbox; without one it finds, plans, upgrades, rolls back and proves
with other tools (e2fsck, GRUB's own file system code when grub-fstest is there), and prints what it saw.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.sandbox.disk import Recipe, SandboxDisk, make_disk, run
from tests.sandbox.image import make_derivative_image
from tests.sandbox.tree import Derivative

CONSOLE = [sys.executable, "-m", "cos_console.cli.main"]


def main() -> int:
    work = Path(tempfile.mkdtemp(prefix="cos-demo-"))
    device = ""
    try:
        say("making a sandbox disk (GPT, cOS 1.0 active, 0.9 passive) and two images to upgrade to")
        recipe = Recipe(
            active=Derivative("1.0", payload_mib=40), image_mib=96, state_mib=512, recovery_mib=160
        )
        disk = make_disk(work / "disk.img", recipe)
        image = make_derivative_image(work / "images", Derivative("2.0", payload_mib=60))
        make_derivative_image(work / "images-next", Derivative("2.1", payload_mib=60))
        device = run(["losetup", "-f", "--show", disk.path]).decode().strip()
        run(["partx", "-a", device])
        os.environ["COS_CONSOLE_RUN_DIR"] = str(work / "run")
        if sys.stdin.isatty() and sys.stdout.isatty():
            print(f"Images to upgrade to: {image.reference} and oci:{work}/images-next:2.1", flush=True)
            return subprocess.run([*CONSOLE, "--target", device], check=False).returncode
        return headless(disk, device, image.reference, work)
    finally:
        if device:
            run(["sh", "-c", f"partx -d {device} 2>/dev/null; losetup -d {device}"])
        shutil.rmtree(work)


def headless(disk: SandboxDisk, device: str, reference: str, work: Path) -> int:
    target = ["--target", device]
    before = slot_hash(disk, "active", work)
    for words in (
        ["status"],
        ["upgrade", reference, "--yes"],
        ["status"],
        ["rollback", "once", "--yes"],
        ["rollback", "once", "--slot", "active", "--yes"],
        ["rollback", "swap", "--yes"],
        ["status"],
        ["history"],
    ):
        say("cos-console " + " ".join(words))
        code = subprocess.run([*CONSOLE, *words, *target], check=False, stdin=subprocess.DEVNULL).returncode
        if code != 0:
            print(f"the demo stopped: exit code {code}")
            return code
    say("proof, with other tools")
    os.sync()
    part = disk.read_partition("COS_STATE", work / "state.part")
    run(["e2fsck", "-fn", part])
    print("e2fsck -fn on COS_STATE: clean")
    after = slot_hash(disk, "active", work)
    print(
        f"active after the roll back is the 1.0 of before, byte for byte: {'yes' if before == after else 'NO'}"
    )
    if shutil.which("grub-fstest"):
        version = run(["grub-fstest", part, "crc", "--", "(loop0)/cOS/active.img"]).decode().strip()
        print(f"GRUB's own code reads active.img whole (crc {version})")
    return 0 if before == after else 1


def slot_hash(disk: SandboxDisk, slot: str, work: Path) -> str:
    os.sync()
    part = disk.read_partition("COS_STATE", work / "hash.part")
    run(["debugfs", "-R", f"dump /cOS/{slot}.img {work}/slot", part])
    return hashlib.sha256((work / "slot").read_bytes()).hexdigest()


def say(text: str) -> None:
    print(f"\n\033[1m==> {text}\033[0m" if sys.stdout.isatty() else f"\n==> {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""`cos-console`: words in, exit code out. Heavy imports wait until a command needs them."""

import argparse
import sys
import time
from pathlib import Path

from cos_console import __version__
from cos_console.model.problem import ExitCode, Problem

_EXAMPLES = """\
examples:
  cos-console                                       the console (full screen)
  cos-console status                                what is installed, what boots next
  cos-console plan quay.io/acme/os:2.0              what an upgrade would do; changes nothing
  cos-console upgrade quay.io/acme/os:2.0 --yes     upgrade, without a question
  cos-console upgrade oci:/mnt/stick/image:2.0      from an OCI layout, no network
  cos-console rollback once                         boot the other slot once
  cos-console status --target disk.img --json       a whole-disk image file works everywhere

images are written as in containers-transports(5):
  docker://REF (or just REF)  docker-daemon:REF  oci:DIR[:REF]  oci-archive:FILE[:REF]
  docker-archive:FILE[:TAG]   dir:PATH (or --directory PATH)

exit codes:
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line; also the source of completion."""
    codes = "\n".join(f"  {c.value:2}  {_CODE_WORDS[c]}" for c in ExitCode)
    p = argparse.ArgumentParser(
        prog="cos-console",
        description="Find cOS installations, upgrade them, roll them back. Without a command: the console.",
        epilog=_EXAMPLES + codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"cos-console {__version__}")
    p.add_argument(
        "--machine",
        metavar="FILE",
        help="a recorded machine (JSON) instead of this one; nothing can be changed",
    )
    p.add_argument("--target", metavar="DEVICE-OR-IMAGE", help="only this disk or whole-disk image file")
    p.add_argument("--dry-run", action="store_true", help="show plans, change nothing")
    sub = p.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str, *, changes: bool = False) -> argparse.ArgumentParser:
        c = sub.add_parser(name, help=text, description=text, allow_abbrev=False)
        c.add_argument("--json", action="store_true", help="JSON on standard output")
        c.add_argument(
            "--target",
            metavar="DEVICE-OR-IMAGE",
            default=argparse.SUPPRESS,
            help="only this disk or image file",
        )
        if changes:
            c.add_argument("--yes", action="store_true", help="do not ask")
            c.add_argument(
                "--dry-run",
                action="store_true",
                default=argparse.SUPPRESS,
                help="print the plan, change nothing",
            )
            c.add_argument("--detach", action="store_true", help="start it and leave; watch it with attach")
        return c

    def image(c: argparse.ArgumentParser) -> None:
        c.add_argument("image", nargs="?", metavar="IMAGE", help="where the new system comes from")
        c.add_argument("--directory", metavar="PATH", help="take a local tree instead of an image")
        c.add_argument("--size", metavar="MIB", type=int, help="size of the new image's file system")
        c.add_argument(
            "--try-once", action="store_true", help="boot it once; passive stays the default until confirm"
        )
        c.add_argument(
            "--remove-passive-first",
            action="store_true",
            help="where three images have no room: give up passive before the upgrade (no fallback meanwhile)",
        )
        c.add_argument("--ca", metavar="FILE", default="", help="certificate authority of the registry (PEM)")
        c.add_argument(
            "--insecure-registry",
            metavar="HOST",
            action="append",
            default=[],
            help="plain HTTP for this host",
        )

    command("status", "Show every installation: slots, health, what boots next, left-overs.")
    image(command("plan", "Show what an upgrade would do. Changes nothing."))
    image(
        command(
            "upgrade", "Write a new image and make it active; the old active becomes passive.", changes=True
        )
    )
    rollback = command("rollback", "Go back, in one of five exact ways.", changes=True)
    rollback.add_argument(
        "way",
        choices=["once", "default", "swap", "restore", "restore-from-recovery"],
        help="once: boot the other slot once. default: boot it from now on. swap: change the places of active and"
        " passive. restore: a copy of passive replaces active. restore-from-recovery: a copy of recovery does.",
    )
    rollback.add_argument(
        "--slot", choices=["active", "passive", "recovery"], help="which slot, for once and default"
    )
    rollback.add_argument(
        "--by-copy", action="store_true", help="swap through a copy of passive, without recovery as guard"
    )
    command("confirm", "Keep what was tried once: it becomes the default.", changes=True)
    repair = command("repair", "Mend what an interrupted operation left.", changes=True)
    repair.add_argument("way", choices=["finish", "undo", "relabel"])
    repair.add_argument("--slot", choices=["active", "passive", "recovery"], help="which slot, for relabel")
    command("history", "Show what was done to an installation.")
    command("attach", "Watch the operation at work, or read how the last one went.")
    command("cancel", "Stop the operation at work, while nothing of the slots is changed.")
    completion = command("completion", "Print completion for a shell.")
    completion.add_argument("shell", choices=["bash", "zsh"])
    return p


_CODE_WORDS = {
    ExitCode.OK: "done",
    ExitCode.INTERNAL: "an error of the program itself; a report was saved",
    ExitCode.USAGE: "the command line can't be understood",
    ExitCode.REFUSED: "refused; nothing was changed",
    ExitCode.NOT_FOUND: "no such installation, slot or image",
    ExitCode.SOURCE: "the image can't be read (network, registry, engine, archive)",
    ExitCode.VERIFICATION: "bytes are not what they must be",
    ExitCode.FAILED: "the operation stopped; the message says what boots",
    ExitCode.ATTENTION: "an interrupted operation waits to be finished or undone",
    ExitCode.BUSY: "another operation is at work",
    ExitCode.CANCELLED: "stopped on request, before the switch",
    ExitCode.DAMAGED: "status: an installation can't boot what it would boot next",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command. Every end is an exit code of ExitCode."""
    try:
        args = parser().parse_args(argv)
        return _dispatch(args)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else int(ExitCode.USAGE)
    except Problem as problem:
        say_problem(problem)
        return problem.report.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130
    except Exception:  # noqa: BLE001 - no traceback reaches the screen
        return _saved_report()


def _dispatch(args: argparse.Namespace) -> int:
    if args.command is None:
        from cos_console.tui.app import run

        target = Path(args.target) if args.target else None
        return run(
            machine_file=Path(args.machine) if args.machine else None, dry_run=args.dry_run, target=target
        )
    from cos_console.cli import commands

    return commands.COMMANDS[args.command](args)


def say_problem(problem: Problem) -> None:
    """Three sentences and the code, on standard error."""
    r = problem.report
    print(f"{r.what}\n{r.unchanged}\n{r.now}  ({r.code})", file=sys.stderr)


def _saved_report() -> int:
    import tempfile
    import traceback

    name = f"cos-console-report-{time.strftime('%Y%m%d-%H%M%S')}-"
    with tempfile.NamedTemporaryFile("w", prefix=name, suffix=".txt", delete=False) as f:
        f.write(traceback.format_exc())
    print(
        f"The program made an error of its own and stopped.\nNo operation was harmed by it.\n"
        f"Send {f.name} to the makers.  (COS-INTERNAL)",
        file=sys.stderr,
    )
    return int(ExitCode.INTERNAL)


if __name__ == "__main__":
    sys.exit(main())

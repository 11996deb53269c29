"""What each command does: look, plan, ask, start the engine, follow it."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from cos_console.model.machine import Installation, Machine, SlotName
from cos_console.model.plan import Action, Plan, Request
from cos_console.model.problem import ExitCode, Problem


def _json(value: object) -> None:
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")


def _scan(args: argparse.Namespace) -> Machine:
    target = getattr(args, "target", None)
    machine_file = getattr(args, "machine", None)
    if machine_file:
        from cos_console.host.recorded import load_machine

        return load_machine(Path(machine_file))
    from cos_console.host.scan import scan

    return scan(Path(target) if target else None)


def _one(machine: Machine) -> Installation:
    """The only installation, or a refusal that lists them."""
    found = machine.installations
    if not found:
        raise Problem(
            "COS-NO-INSTALLATION",
            "No cOS installation was found.",
            now="Check the disks with: cos-console status, or name one with --target.",
            exit_code=ExitCode.NOT_FOUND,
        )
    if len(found) > 1:
        listed = "; ".join(
            f"{i.disk.path} ({' '.join(p for p in (i.disk.model, i.disk.serial) if p) or i.disk.disk_id})"
            for i in found
        )
        raise Problem(
            "COS-AMBIGUOUS",
            f"There are {len(found)} installations: {listed}.",
            now="Name one disk with --target.",
            exit_code=ExitCode.REFUSED,
        )
    return found[0]


def status(args: argparse.Namespace) -> int:
    from cos_console.cli.text import status_text
    from cos_console.host.scan import damaged

    machine = _scan(args)
    if args.json:
        _json(machine)
    else:
        sys.stdout.write(status_text(machine))
    if any(x.kind == "operation-record" for i in machine.installations for x in i.leftovers):
        return int(ExitCode.ATTENTION)
    return int(ExitCode.DAMAGED) if damaged(machine) else 0


def _upgrade_plan(args: argparse.Namespace) -> tuple[Plan, object]:
    from cos_console.planner import make_plan
    from cos_console.sources import SourceSettings, parse_reference, resolve

    if bool(args.image) == bool(args.directory):
        raise Problem(
            "COS-USAGE",
            "Name one image, or one --directory.",
            now="See: cos-console upgrade --help",
            exit_code=ExitCode.USAGE,
        )
    reference = parse_reference(f"dir:{args.directory}" if args.directory else args.image)
    machine = _scan(args)
    installation = _one(machine)
    settings = SourceSettings(
        ca_file=str(Path(args.ca).absolute()) if args.ca else "", insecure_hosts=tuple(args.insecure_registry)
    )
    request = Request(
        action=Action.UPGRADE,
        installation=installation.id,
        image=reference,
        try_once=args.try_once,
        image_size_bytes=args.size << 20 if args.size else None,
        remove_passive_first=args.remove_passive_first,
    )
    content = resolve(reference, settings)
    content.close()
    return make_plan(machine, request, content.image), settings


def plan(args: argparse.Namespace) -> int:
    made, _ = _upgrade_plan(args)
    _show(made, as_json=args.json)
    return 0


def _idle() -> None:
    """Say first that somebody is at work: a plan made meanwhile would be stale."""
    from cos_console import engine

    if (busy := engine.current()) is not None:
        raise engine.busy_problem(busy)


def upgrade(args: argparse.Namespace) -> int:
    _idle()
    made, settings = _upgrade_plan(args)
    return _act(args, made, settings)


def rollback(args: argparse.Namespace) -> int:
    return _simple(args, Action(args.way), args.slot)


def confirm(args: argparse.Namespace) -> int:
    return _simple(args, Action.CONFIRM, None)


def repair(args: argparse.Namespace) -> int:
    return _simple(args, Action(args.way), args.slot)


def _simple(args: argparse.Namespace, action: Action, slot: str | None) -> int:
    from cos_console.planner import make_plan

    _idle()
    machine = _scan(args)
    request = Request(
        action=action,
        installation=_one(machine).id,
        target_slot=SlotName(slot) if slot else None,
        swap_by_copy=getattr(args, "by_copy", False),
    )
    return _act(args, make_plan(machine, request), None)


def _show(made: Plan, *, as_json: bool) -> None:
    from cos_console.planner import plan_text

    if as_json:
        _json(made)
    else:
        sys.stdout.write(plan_text(made))
        sys.stdout.flush()


def _act(args: argparse.Namespace, made: Plan, settings: object) -> int:
    """Show, ask, start, follow."""
    from cos_console import engine
    from cos_console.cli.text import follow_to_end
    from cos_console.sources import SourceSettings

    if args.dry_run or not args.json:
        _show(made, as_json=args.json)
    if args.dry_run:
        return 0
    if not args.yes:
        if args.json or not sys.stdin.isatty():
            raise Problem(
                "COS-NOBODY-TO-ASK",
                "Nobody is there to ask.",
                now="Look at the plan with --dry-run and give --yes.",
                exit_code=ExitCode.REFUSED,
            )
        if input("\nGo on? Type yes: ").strip() != "yes":
            raise Problem(
                "COS-NOT-CONFIRMED",
                "It was not confirmed.",
                now="Start again whenever you like.",
                exit_code=ExitCode.REFUSED,
            )
    handle = engine.start(made, settings if isinstance(settings, SourceSettings) else None)
    if args.detach:
        print(f"Operation {handle.id} is at work. Watch it with: cos-console attach")
        return 0
    return follow_to_end(handle, as_json=args.json)


def history(args: argparse.Namespace) -> int:
    from cos_console import engine

    entries = engine.history(_one(_scan(args)))
    if args.json:
        _json(entries)
        return 0
    for e in entries:
        print(f"{e.time[:19].replace('T', ' ')}  {e.action:10} {e.result:10} {e.text}")
    if not entries:
        print("Nothing was done to this installation yet.")
    return 0


def attach(args: argparse.Namespace) -> int:
    from cos_console import engine
    from cos_console.cli.text import follow_to_end

    handle = engine.latest()
    if handle is None:
        raise _nothing()
    return follow_to_end(handle, as_json=args.json)


def cancel(args: argparse.Namespace) -> int:
    from cos_console import engine

    del args
    handle = engine.current()
    if handle is None:
        raise _nothing()
    print(engine.cancel(handle))
    return 0


def completion(args: argparse.Namespace) -> int:
    import shtab

    from cos_console.cli.main import parser

    print(shtab.complete(parser(), shell=args.shell))
    return 0


def _nothing() -> Problem:
    return Problem(
        "COS-NOTHING",
        "No operation is at work, and none was since this machine started.",
        now="Look at older ones with: cos-console history",
        exit_code=ExitCode.NOT_FOUND,
    )


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "status": status,
    "plan": plan,
    "upgrade": upgrade,
    "rollback": rollback,
    "confirm": confirm,
    "repair": repair,
    "history": history,
    "attach": attach,
    "cancel": cancel,
    "completion": completion,
}

"""One request to one plan: what every action refuses, then the action's own module."""

from cos_console.model.image import ResolvedImage
from cos_console.model.machine import Machine
from cos_console.model.plan import Action, Plan, Request
from cos_console.model.problem import ExitCode
from cos_console.planner.boot_choice import plan_boot_choice
from cos_console.planner.given import Given, PlanSettings
from cos_console.planner.repair import plan_relabel, plan_repair
from cos_console.planner.restore import plan_restore
from cos_console.planner.swap import plan_swap
from cos_console.planner.upgrade import plan_upgrade
from cos_console.planner.words import disk, refused


def make_plan(
    machine: Machine,
    request: Request,
    image: ResolvedImage | None = None,
    settings: PlanSettings | None = None,
) -> Plan:
    """The plan for `request`. `image` is the resolved image of an upgrade. Raises Problem; changes nothing."""
    inst = machine.installation(request.installation)
    if inst is None:
        raise refused(
            "COS-NO-INSTALLATION",
            "That installation is not there any more.",
            "Look again.",
            ExitCode.NOT_FOUND,
        )
    if not inst.layout.handled:
        raise refused(
            "COS-LAYOUT",
            f"{disk(inst)} has the layout {inst.layout.value}, which is recognised and not changed by this tool.",
            "Use that system's own tool for it.",
        )
    interrupted = any(x.kind == "operation-record" for x in inst.leftovers)
    if interrupted and request.action not in {Action.FINISH, Action.UNDO}:
        raise refused(
            "COS-INTERRUPTED",
            "An interrupted operation is waiting on this disk.",
            "Finish or undo it first: cos-console repair finish, or cos-console repair undo.",
            ExitCode.ATTENTION,
        )
    given = Given(inst, request, image, settings or PlanSettings())
    match request.action:
        case Action.UPGRADE:
            return plan_upgrade(given)
        case Action.RESTORE | Action.RESTORE_FROM_RECOVERY:
            return plan_restore(given)
        case Action.SWAP:
            return plan_swap(given)
        case Action.BOOT_ONCE | Action.DEFAULT | Action.CONFIRM:
            return plan_boot_choice(given)
        case Action.FINISH | Action.UNDO:
            return plan_repair(given)
        case Action.RELABEL:
            return plan_relabel(given)

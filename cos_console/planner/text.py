"""A plan as text, for --dry-run, logs and the plain tier."""

import humanize

from cos_console.model.machine import BootOutlook
from cos_console.model.plan import Plan


def plan_text(plan: Plan) -> str:
    """Several lines, at most about 100 columns; says what is estimated (~) and what was not checked."""
    lines = [plan.title + ".", "Nothing has been changed yet.", ""]
    if plan.changes:
        width = max(12, *(len(c.now) for c in plan.changes)) + 2
        lines.append(f"  {'':9} {'now':{width}} after")
        for c in plan.changes:
            note = f"   {c.note}" if c.note else ""
            lines.append(f"  {c.slot.value:9} {c.now:{width}} {c.after}{note}")
    lines.append(f"  boots     {_boots(plan.boots_before)}  ->  {_boots(plan.boots_after)}")
    lines.append("")
    for n, step in enumerate(plan.steps, 1):
        size = f"  {humanize.naturalsize(step.size_bytes)}" if step.size_bytes else ""
        writes = f"  writes {step.writes}" if step.writes else ""
        lines.append(f"  {n}. {step.title}{size}{writes}")
    lines.append("")
    for phase in plan.space:
        about = "~" if phase.estimated else ""
        lines.append(
            f"Space      {phase.phase}: needs {about}{humanize.naturalsize(phase.needed_bytes)},"
            f" {phase.where} has {humanize.naturalsize(phase.available_bytes)}"
        )
    if plan.image is not None:
        lines.append(f"Image      {plan.image.reference}")
        lines.append(f"           {plan.image.digest or 'a directory has no digest'}")
        lines.append(f"Signature  {plan.signature.text}")
    if plan.estimate_s is not None:
        lines.append(f"Time       about {humanize.naturaldelta(plan.estimate_s)}")
    lines.append(f"Passive    {plan.passive_fate}")
    lines.append(f"Undo       {plan.undo}")
    lines += [f"Note       {w.what}" for w in plan.warnings]
    return "\n".join(lines) + "\n"


def _boots(outlook: BootOutlook) -> str:
    first = outlook.next.value if outlook.next else "nothing"
    if outlook.after is not outlook.next and outlook.after is not None:
        return f"{first} once, then {outlook.after.value}"
    return first

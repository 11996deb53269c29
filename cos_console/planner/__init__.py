"""Machine and Request to Plan: pure decisions, no I/O. A plan that can't be made is a Problem."""

from cos_console.planner.facts import facts_of
from cos_console.planner.given import PlanSettings
from cos_console.planner.plan import make_plan
from cos_console.planner.text import plan_text

__all__ = ["PlanSettings", "facts_of", "make_plan", "plan_text"]

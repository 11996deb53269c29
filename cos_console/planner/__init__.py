"""Machine and Request to Plan: pure decisions, no I/O. A plan that can't be made is a Problem."""

from cos_console.planner.plan import PlanSettings, make_plan
from cos_console.planner.text import plan_text

__all__ = ["PlanSettings", "make_plan", "plan_text"]

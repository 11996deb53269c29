"""One operation, one process: started detached, followed by anyone, cancelled until the switch.

Under the run directory each operation has its own: plan.json, events.jsonl, a control socket. The lock file
beside them says who is at work; it is held by flock, so a dead engine holds nothing.
"""

from cos_console.engine.control import (
    OperationHandle,
    busy_problem,
    cancel,
    current,
    latest,
    run_directory,
    start,
)
from cos_console.engine.follow import follow
from cos_console.engine.history import HistoryEntry, history

__all__ = [
    "HistoryEntry",
    "OperationHandle",
    "busy_problem",
    "cancel",
    "current",
    "follow",
    "history",
    "latest",
    "run_directory",
    "start",
]

"""The only error that reaches people: what happened, what is unchanged, what to do now."""

from enum import IntEnum

import msgspec


class ExitCode(IntEnum):
    """Exit status of every command; a script may rely on these numbers."""

    OK = 0
    INTERNAL = 1  # our own fault; a report was saved
    USAGE = 2  # the command line can't be understood
    REFUSED = 3  # the plan can't be made or was not accepted; nothing was changed
    NOT_FOUND = 4  # no installation, slot or image of that name
    SOURCE = 5  # the image can't be read: network, registry, engine, archive
    VERIFICATION = 6  # bytes or signature are not what they must be
    FAILED = 7  # an operation stopped; the slots that boot are as the message says
    ATTENTION = 8  # an interrupted operation is waiting to be finished or undone
    BUSY = 9  # another operation holds the machine
    CANCELLED = 10  # stopped on request, before the switch
    DAMAGED = 11  # status only: at least one installation can't boot what it would boot next


class ProblemReport(msgspec.Struct, frozen=True, kw_only=True):
    """A problem as a value, for events, history and JSON."""

    code: str
    """Stable and searchable, such as COS-SPACE-STATE."""
    what: str
    """One sentence: what happened."""
    unchanged: str
    """One sentence: what is as it was before."""
    now: str
    """One sentence: what to do now."""
    exit_code: int
    detail: str = ""
    """For the support bundle: tool output, errno; never a secret, never on the first screen."""


class Problem(Exception):  # noqa: N818 - a problem is what the operator has, not what the code did
    """Raised anywhere, shown as three sentences and an exit code; never as a traceback."""

    def __init__(
        self,
        code: str,
        what: str,
        *,
        unchanged: str = "Nothing was changed.",
        now: str,
        exit_code: ExitCode = ExitCode.FAILED,
        detail: str = "",
    ) -> None:
        super().__init__(what)
        self.report = ProblemReport(
            code=code, what=what, unchanged=unchanged, now=now, exit_code=int(exit_code), detail=detail
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (_from_report, (self.report,))


def from_report(report: ProblemReport) -> Problem:
    """The exception that says what `report` says (used where a problem crosses a process)."""
    return _from_report(report)


def _from_report(report: ProblemReport) -> Problem:
    return Problem(
        report.code,
        report.what,
        unchanged=report.unchanged,
        now=report.now,
        exit_code=ExitCode(report.exit_code),
        detail=report.detail,
    )

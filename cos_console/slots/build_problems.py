"""How the image builder says what went wrong."""

from cos_console.model.problem import ExitCode, Problem

UNTOUCHED = "active and passive are exactly as before."


def hostile_layer(why: str) -> Problem:
    return Problem(
        "COS-LAYER",
        f"A layer of the image can't be unpacked: {why}.",
        unchanged=UNTOUCHED,
        now="Choose another image, or tell its maker.",
        exit_code=ExitCode.VERIFICATION,
    )


def too_big(size_bytes: int) -> Problem:
    return Problem(
        "COS-IMAGE-TOO-BIG",
        f"The image's files don't fit into {size_bytes >> 20} MiB.",
        unchanged=UNTOUCHED,
        now="Choose a larger image with --size.",
        exit_code=ExitCode.REFUSED,
    )


def cancelled_on_request() -> Problem:
    return Problem(
        "COS-CANCELLED",
        "The operation was stopped on request.",
        unchanged=UNTOUCHED,
        now="Start it again whenever you like.",
        exit_code=ExitCode.CANCELLED,
    )


def unproven(why: str) -> Problem:
    return Problem(
        "COS-PROOF",
        f"The new image did not read back as it was written: {why}.",
        unchanged=UNTOUCHED,
        now="Check the disk (SMART, kernel messages); don't trust it with an upgrade.",
        exit_code=ExitCode.VERIFICATION,
    )


def disk_failed(why: str, detail: str) -> Problem:
    return Problem(
        "COS-DISK-WRITE",
        f"The new image could not be written: {why}.",
        unchanged=UNTOUCHED,
        now="Check the disk (SMART, kernel messages) and its free space.",
        detail=detail,
    )


def contradiction(detail: str) -> Problem:
    return Problem(
        "COS-INTERNAL",
        "The image builder contradicted itself and stopped.",
        unchanged=UNTOUCHED,
        now="Report this, with the log.",
        exit_code=ExitCode.INTERNAL,
        detail=detail,
    )

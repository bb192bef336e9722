"""How a command ends: an error in one line on standard error, and the exit code."""

from __future__ import annotations

import sys

from svnup import distributed
from svnup.files import fault
from svnup.results.stored import plain
from svnup.secrets import redact


def outcome(error: BaseException) -> tuple[str, int] | None:
    """What to say of an error, and the exit code: 2 for a user's mistake, 1 for a fault of the system, 130 for Ctrl-C.

    None where it is a fault of the program, which ends in a traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted (Ctrl-C)", 130
    if isinstance(error, ValueError):
        return str(error), 2
    if isinstance(error, distributed.Lost):
        return str(error), 1
    told = fault(error)
    return None if told is None else (told, 1)


def end(message: str, code: int) -> int:
    """Say why a job ends, of its processes the first one for all; returns the exit code."""
    message, code = distributed.end(message, code)
    tell("svnup", message)
    return code


def tell(program: str, message: str) -> None:
    """Say a message in one line, without secrets and without what drives a terminal."""
    sys.stderr.write(redact(f"{program}: {plain(' '.join(message.split()))}\n"))

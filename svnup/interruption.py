"""Ctrl-C and SIGTERM: they end the work in order, whatever code they arrive in."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any


class Stopped(BaseException):
    """SIGTERM, as of a batch system that takes its machine back."""

    code = 128 + signal.SIGTERM


_came: ContextVar[list[BaseException] | None] = ContextVar("interruptions", default=None)  # of the innermost `stoppable`


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that what is done is saved and the run is told to be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[BaseException] = []

    def stop(number: int, frame: Any) -> None:
        # One SIGTERM is enough, since what follows saves; a second Ctrl-C does not wait for that.
        signal.signal(number, signal.SIG_IGN if number == signal.SIGTERM else signal.default_int_handler)
        came.append(Stopped(signal.Signals(number).name) if number == signal.SIGTERM else KeyboardInterrupt())
        raise came[0]

    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, stop)}
    if (usual := signal.getsignal(signal.SIGINT)) not in (signal.SIG_IGN, None):  # ignored in the background
        before[signal.SIGINT] = usual
        signal.signal(signal.SIGINT, stop)
    token = _came.set(came)
    try:
        with unhidden():
            yield
    finally:
        _came.reset(token)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def unhidden() -> Iterator[None]:
    """Raise an interruption that came, in place of what the block ends in.

    Code that is interrupted halfway may end in another error, or as if nothing had been. What records how the block ended must
    not take the one for a failure, nor the other for success.
    """
    try:
        yield
    except Exception:
        raise_interruption()
        raise
    raise_interruption()


def raise_interruption() -> None:
    """Raise the interruption that came, if one did and was not raised to the end."""
    if came := _came.get():
        raise came[0] from None

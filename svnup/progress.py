"""One progress display for the long stages: bar, count, rate and time left on a terminal, nothing in logs."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from svnup.interruption import raise_interruption


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.3g}/s" if speed else "")


# Of a stage: its name, steps done, of how many, their unit, and numbers measured in the last ones, by name.
Listener = Callable[[str, int, int, str, Mapping[str, float]], None]
_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


class Advance(Protocol):
    """Call it with the number of steps done, and with numbers that were measured in them."""

    def __call__(self, steps: int, /, **numbers: float) -> None: ...


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """While the block runs, tell a listener too how far each stage is."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextlib.contextmanager
def stage(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show a stage of `total` steps while the block runs; call what it yields with the number of steps done."""
    done = 0

    def advance(steps: int, /, **numbers: float) -> None:
        nonlocal done
        raise_interruption()
        done += steps
        progress.advance(task, steps)
        for listener in _listeners.get():
            listener(description, done, total, unit, numbers)

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        advance(0)
        yield advance


_unsaid: list[OSError] = []  # why standard output took no more, for `close_output`


def open_streams() -> None:
    """Give a process that was started without standard output or error a place for them: else a file would get their number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
            if name == "stdout":
                _unsaid.append(OSError(errno.EBADF, "is closed"))


def say(text: str) -> None:
    """Write to standard output; that it takes no more, as with `| head -1` or on a full disk, stops no work."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        to_nobody()
    except OSError as error:
        _unsaid.append(error)
        to_nobody()


def close_output() -> str | None:
    """Write what is left for standard output; returns why it did not take everything, if a reader has not just left."""
    say("")
    why = _unsaid[0] if _unsaid else None
    _unsaid.clear()
    if why is None:
        return None
    return f"standard output: {why.strerror}; what was computed is kept, only its text is lost: run it again to read it"


def to_nobody() -> None:
    """Send the rest of standard output nowhere: its reader has left, and what Python still flushes must not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

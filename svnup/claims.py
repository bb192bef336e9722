"""One process at a time, on one machine or on several that share a file system."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from svnup.files import alive, naming, unfinished

logger = logging.getLogger(__name__)
LEASE = 90.0  # seconds without a sign of life after which a claim of another host can be taken over
DEAD_AFTER = 600.0  # the same for a reader, whose clock may be another


@contextlib.contextmanager
def claimed(place: Path, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the claim that is the file `place`; who comes later waits, after a call of `waiting`.

    The claim is filelock's soft lease: a file made by O_EXCL, which also shared file systems decide once, with host and process
    in it, touched every half minute while it is held. That of a process of this host that has died is taken over at once, that
    of another host when it has not been touched for LEASE seconds.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        _clear_empty(place)
    lease = SoftFileLease(place, lease_duration=LEASE, timeout=-1, poll_interval=0.2)
    with naming(place):
        try:
            lease.acquire(timeout=0.5)
        except Timeout:
            if waiting is not None:
                waiting()
            lease.acquire()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lease.release()


def _clear_empty(place: Path) -> None:
    """Remove a claim without a holder: its process was killed after it made the file and before it wrote its name there."""
    told = place.stat()
    if told.st_size or time.time() - told.st_mtime < 10:
        return
    aside = unfinished(place)
    place.rename(aside)
    if aside.stat().st_size:  # another process has claimed it in between
        os.link(aside, place)
    aside.unlink()


def holder(place: Path) -> str | None:
    """The holder of a claim in words; None if it has none, or if its process ran on this host and has died."""
    try:
        told = dict(line.split("=", 1) for line in place.read_text(encoding="utf-8").splitlines() if "=" in line)
        dead = told["host"] == socket.gethostname() and not alive(int(told["pid"]))
        return None if dead else f"process {told['pid']} of {told['host']}"
    except OSError:
        return None
    except (ValueError, KeyError):
        return "another process"


def is_dead(place: Path, host: str, pid: int) -> bool:
    """Whether the process that should hold a claim runs no more, as far as can be told from here."""
    try:
        touched = place.stat().st_mtime
    except OSError:
        return True
    if host == socket.gethostname():
        return pid <= 0 or not alive(pid)
    return time.time() - touched > DEAD_AFTER

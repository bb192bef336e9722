"""One process at a time, on one machine or on several that share a file system."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from svnup.files import alive, naming, remove, unfinished

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


@contextlib.contextmanager
def claimed_of(folder: Path, names: Iterable[str]) -> Iterator[list[str]]:
    """Hold the claims of a folder, by their names, that no process holds; yields these.

    One process at a time picks, so that of two with the same names one gets all. One lease stands for all claims: each is a
    link to its file, made where none is there yet, and touched with it. On a file system without links no process is kept
    from holding the same.
    """
    lease = folder / f"{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    mine: list[str] = []
    with claimed(lease):
        try:
            with claimed(folder / "picking"):
                mine += [name for name in names if _linked(lease, folder / name)]
            yield mine
        finally:
            for name in mine:
                with contextlib.suppress(OSError):
                    (folder / name).unlink()
            for left in folder.iterdir():  # by processes of this host that were killed
                if holder(left) is None:
                    remove(left)


def _linked(lease: Path, place: Path) -> bool:
    for _ in range(2):
        try:
            os.link(lease, place)
        except FileExistsError:
            if holder(place) is not None:
                return False
            remove(place)
        except OSError:
            return True
        else:
            return True
    return False


def holders(place: Path) -> Iterator[str]:
    """Yield who holds a claim again and again, in growing intervals, as long as it is held by one who shows signs of life."""
    seen, since, pause = 0, time.monotonic(), 0.05
    while (who := holder(place)) is not None:
        with contextlib.suppress(OSError):
            if (touched := place.stat().st_mtime_ns) != seen:
                seen, since = touched, time.monotonic()
        if time.monotonic() - since >= LEASE:
            _remove_links(place)
            return
        yield who
        time.sleep(pause)
        pause = min(2 * pause, 2.0)


def _remove_links(place: Path) -> None:
    """Remove a claim with all others of the same lease."""
    with contextlib.suppress(OSError):
        inode = place.stat().st_ino
        for other in place.parent.iterdir():
            with contextlib.suppress(OSError):
                if other.stat().st_ino == inode:
                    remove(other)


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

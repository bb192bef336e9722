"""Paths as people write them, where svnup keeps files of its own, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)
SEAL = "sha256"  # the key of a file's own checksum, beside what it is of
WAYS = {
    errno.ENOSPC: "make room there and start again, what is done is kept",
    errno.EDQUOT: "the quota is used up: make room there and start again, what is done is kept",
    errno.EFBIG: "a limit of the size of files is reached: raise it (ulimit -f) and start again, what is done is kept",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and start again, what is done is kept",
    errno.ENFILE: "wait until the system has fewer files open, and start again, what is done is kept",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk and start again, what is done is kept",
    errno.EACCES: "choose a place where you may read and write",
    errno.EROFS: "choose a place that can be written",
}


def at_home(key: str, path: str | Path) -> Path:
    """A path with `~` as the home folder. Raises ValueError, with the key, where `~name` is a user who has none here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{key}={path}: there is no home folder of that user here; write the path in full") from None


def means_folder(name: str) -> bool:
    """Whether the name of a model can only be meant as a folder: hub names are `name` or `organisation/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def default_cache_dir() -> Path:
    """The user's cache folder for svnup (XDG). Raises ValueError where the user has no home."""
    if place := os.environ.get("XDG_CACHE_HOME"):
        return at_home("XDG_CACHE_HOME", place) / "svnup"
    return at_home("cache_dir", "~") / ".cache" / "svnup"


# -- whole files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write a file, which then takes the place of `path`: whole, or, where that fails, not at all.

    A folder in that place, where svnup has none, is set aside.
    """
    partial = unfinished(path)
    try:
        with naming(path):
            yield partial
            if path.is_dir() and not path.is_symlink():
                logger.warning("%s: a folder where a file belongs; set aside as %s", path, set_aside(path).name)
            partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole, in place of one that was there."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def unfinished(path: Path) -> Path:
    """Where this process makes what will be `path`: beside it, named by host and process.

    What processes of this host that have died left of the same is removed.
    """
    mine = f".{path.name}.{socket.gethostname()}."
    with contextlib.suppress(OSError):
        for left in path.parent.iterdir():
            if left.name.startswith(mine) and left.name[len(mine) :].isdigit() and not alive(int(left.name[len(mine) :])):
                remove(left)
    return path.with_name(f"{mine}{os.getpid()}")


def take_place(new: Path, folder: Path) -> None:
    """Move a file or a folder to where another may be, which goes only when the new one is there."""
    old = unfinished(folder.with_name(f"{folder.name}.old"))
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def alive(pid: int) -> bool:
    """Whether a process of this host runs; on Windows, which cannot be asked without harm, any does."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


# -- checksums


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """JSON values with their checksum beside them."""
    return data | {SEAL: _digest(data)}


def unsealed(data: Any) -> dict[str, Any]:
    """What `sealed` has sealed, or what has no checksum, as files of earlier versions.

    Raises ValueError where the two do not fit each other.
    """
    if not isinstance(data, dict):
        raise ValueError("it holds no object")
    rest = {key: value for key, value in data.items() if key != SEAL}
    if SEAL in data and data[SEAL] != _digest(rest):
        raise ValueError(f"its content is not that of its checksum, {SEAL}")
    return rest


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]


def set_aside(path: Path) -> Path:
    """Move a damaged file out of the way, to be looked at; returns its new name."""
    aside = path.with_name(f"{path.name}.damaged")
    remove(aside)  # an earlier one, which as a folder would be in the way
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        path.replace(aside)
    return aside


# -- what goes wrong with files


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system say at which path they were met, also those that libraries tell in words."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        if told := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(told[1]), os.strerror(int(told[1])), str(path)) from error
        raise


def fault(error: BaseException) -> str | None:
    """An error of the system in one line: the path, what is wrong there, and what to do; None where it is another error."""
    if not isinstance(error, OSError) or error.errno is None:
        return None
    place = "a file" if error.filename is None else os.fsdecode(error.filename)
    place = place if len(place) <= 200 else f"{place[:200]}..."
    return f"{place}: {error.strerror or os.strerror(error.errno)}; {WAYS.get(error.errno, 'name another')}"

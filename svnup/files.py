"""Paths as people write them, and where svnup keeps files of its own."""

from __future__ import annotations

import os
from pathlib import Path


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
    """The user's cache folder for svnup (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svnup"

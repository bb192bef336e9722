"""Where svnup keeps files of its own."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache_dir() -> Path:
    """The user's cache folder for svnup (XDG)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svnup"

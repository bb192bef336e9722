"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


def at_home(key: str, path: str | Path) -> Path:
    """A path with `~` as the home folder. Raises ValueError, with the key, where `~name` is a user who has none here."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{key}={path}: there is no home folder of that user here; write the path in full") from None

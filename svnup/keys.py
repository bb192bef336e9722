"""Dotted keys of nested mappings: all of them, and the one that was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def walk(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested mappings with its value: that of a mapping, then those inside it."""
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from walk(value, f"{prefix}{name}.")


def flatten(node: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    return {key: value for key, value in walk(node) if not isinstance(value, Mapping)}


def did_you_mean(given: str, options: Iterable[str]) -> str:
    """The end of a message that names the option that was meant; empty where none is near."""
    lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]}?" if close else ""

"""Times, sizes and counts in units that people read."""

from __future__ import annotations

import math


def duration(seconds: float) -> str:
    """Seconds in words of two units at most: 40 s, 12 min, 3 h 5 min, 2 d 4 h."""
    if seconds == math.inf:
        return "for ever"
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    whole, rest, units = (*divmod(minutes, 60), "h min") if minutes < 48 * 60 else (*divmod(round(minutes / 60), 24), "d h")
    large, small = units.split()
    return f"{whole} {large}" + (f" {rest} {small}" if rest else "")


def scaled(value: float, unit: str) -> str:
    """A number with three digits and a prefix of its unit: 1.23 GB, 45 TFLOP, 7 kB."""
    prefixes = iter(("", "k", "M", "G", "T", "P", "E"))
    prefix = next(prefixes)
    while abs(value) >= 999.5 and (larger := next(prefixes, None)) is not None:
        value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}{unit}"

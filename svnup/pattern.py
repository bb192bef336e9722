"""Sparsity patterns: unstructured, N:M, mixed:M."""

from __future__ import annotations

import re

UNSTRUCTURED = "unstructured"


def parse_pattern(pattern: str) -> tuple[int | None, int] | None:
    """Read a sparsity pattern: None for 'unstructured', (N, M) for 'N:M' (N zeros in every M consecutive inputs), (None, M)
    for 'mixed:M' (each block has an N of its own, by its budget).

    Raises ValueError for anything else; unquoted 2:4 in yaml arrives as the number 124 and is explained.
    """
    pattern = str(pattern)  # yaml and JSON may hold a number
    if pattern == UNSTRUCTURED:
        return None
    if match := re.fullmatch(r"mixed:([2-9]|[1-9]\d+)", pattern):
        return None, int(match[1])
    if pattern.isdigit():
        raise ValueError(f"pattern={pattern}: unquoted N:M in yaml is a number in base 60; write it as '2:4', in quotes")
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern={pattern}: choose 'unstructured' or N:M with 0 < N < M, such as '2:4', or 'mixed:8'")
    return int(match[1]), int(match[2])


def steps_of(pattern: str, sparsity: float) -> tuple[int, int] | None:
    """(N, M): how many of every M consecutive inputs go at a sparsity; of 'mixed:M' the N nearest to it. None: unstructured."""
    group = parse_pattern(pattern)
    if group is None:
        return None
    n, m = group
    return (round(sparsity * m) if n is None else n), m

"""Sparsity patterns: unstructured, N:M, mixed:M."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

UNSTRUCTURED = "unstructured"


class Steps(NamedTuple):
    """`zeros` of every `group` consecutive inputs of a row go."""

    zeros: int
    group: int


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern as its text says it: 'unstructured', 'N:M' (N zeros in every M consecutive inputs) or 'mixed:M' (each
    block has an N of its own, by its budget).

    `group` is M, None where the pattern is unstructured; `zeros` is N, None where no N is fixed.
    """

    text: str
    group: int | None = None
    zeros: int | None = None

    @classmethod
    def parse(cls, text: object) -> Pattern:
        """Read a pattern, once for each text.

        Raises ValueError for what is none; unquoted 2:4 in yaml arrives as the number 124 and is explained.
        """
        return _parsed(str(text))  # yaml and JSON may hold a number

    @property
    def mixed(self) -> bool:
        """Whether each block has an N of its own."""
        return self.group is not None and self.zeros is None

    def steps(self, sparsity: float) -> Steps | None:
        """How many of every M consecutive inputs go at a sparsity: of 'mixed:M' the N nearest to it. None: unstructured."""
        if self.group is None:
            return None
        return Steps(round(sparsity * self.group) if self.zeros is None else self.zeros, self.group)


@cache
def _parsed(text: str) -> Pattern:
    if text == UNSTRUCTURED:
        return Pattern(text)
    if match := re.fullmatch(r"mixed:([2-9]|[1-9]\d+)", text):
        return Pattern(text, group=int(match[1]))
    if text.isdigit():
        raise ValueError(f"pattern={text}: unquoted N:M in yaml is a number in base 60; write it as '2:4', in quotes")
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"pattern={text}: choose 'unstructured' or N:M with 0 < N < M, such as '2:4', or 'mixed:8'")
    return Pattern(text, group=int(match[2]), zeros=int(match[1]))

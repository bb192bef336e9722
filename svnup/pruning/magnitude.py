"""Magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from svnup.pruning.masks import lowest, lowest_of_groups
from svnup.types import parse_pattern


@dataclass(frozen=True)
class Magnitude:
    """Zero the smallest |W| of each matrix, or of each group of M inputs; needs no calibration data.

    Source: Han et al. 2015 (arXiv 1506.02626); per matrix as in the comparisons of arXiv 2306.11695.
    """

    pattern: str = "unstructured"
    needs_inputs: ClassVar[bool] = False
    prunes: ClassVar[bool] = True

    def new_stats(self, weight: Tensor) -> None:
        return None

    def observe(self, stats: None, x: Tensor) -> None:
        return None

    def prune(self, weight: Tensor, stats: None, sparsity: float) -> Tensor:
        group = parse_pattern(self.pattern)
        if sparsity == 0:
            return weight
        scores = weight.abs()
        mask = lowest_of_groups(scores, *group) if group else lowest(scores.reshape(1, -1), sparsity).reshape(scores.shape)
        return weight.masked_fill(mask, 0)

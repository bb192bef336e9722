"""Magnitude pruning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from svnup.pruning.masks import smallest, without


@dataclass(frozen=True)
class Magnitude:
    """Zero the smallest |W| of each matrix, of each output row (`per=row`), or of each group of M inputs in a row.

    It needs no calibration text.

    Source: Han et al. 2015 (arXiv 1506.02626); per matrix as in the comparisons of arXiv 2306.11695.
    """

    pattern: str = "unstructured"
    per: Literal["matrix", "row"] = "matrix"
    needs_inputs: ClassVar[bool] = False
    prunes: ClassVar[bool] = True

    def new_stats(self, weight: Tensor) -> None:
        return None

    def observe(self, stats: None, x: Tensor) -> None:
        return None

    def prune(self, weight: Tensor, stats: None, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        return without(weight, smallest(weight.abs(), sparsity, self.pattern, self.per))

"""RIA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svnup.pruning.masks import smallest, without
from svnup.pruning.wanda import InputNorms


@dataclass(frozen=True)
class RIA:
    """Relative importance and activations: zero the smallest scores of each output row, or of each group of M inputs in a row.

    The score is (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a. The first factor, relative importance, is a
    weight's share of its column and of its row, so that no row or column is pruned as a whole. Scores are compared within a
    row, as in the released code and in Wanda; the permutation of inputs for N:M is left out.

    Args:
        a: power of the input norms.

    Source: Zhang et al., ICLR 2024, 'Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models'.
    """

    pattern: str = "unstructured"
    a: float = 0.5
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.a < 0:
            raise ValueError(f"a={self.a}: choose the power of the input norms, such as 0.5; 0 leaves them out")

    def new_stats(self, weight: Tensor) -> InputNorms:
        return InputNorms.empty(weight)

    def observe(self, stats: InputNorms, x: Tensor) -> None:
        stats.add(x)

    def prune(self, weight: Tensor, stats: InputNorms, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        size = weight.float().abs()
        of_column, of_row = (size / size.sum(axis, keepdim=True).clamp(min=torch.finfo().tiny) for axis in (0, 1))
        scores = (of_column + of_row) * stats.squares.pow(self.a / 2)
        return without(weight, smallest(scores, sparsity, self.pattern))

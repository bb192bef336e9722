"""Wanda."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from svnup.pruning.masks import smallest, without
from svnup.pruning.walk import Total


@dataclass
class InputNorms:
    """Sum of squares of each input over all observed tokens, float32 (d_in,)."""

    squares: Tensor

    @classmethod
    def empty(cls, weight: Tensor) -> Self:
        return cls(torch.zeros(weight.shape[1], dtype=torch.float32, device=weight.device))

    def add(self, x: Tensor) -> None:
        """Add inputs (tokens, d_in)."""
        self.squares += x.float().square().sum(0)

    def add_up(self, total: Total) -> None:
        total(self.squares)


@dataclass(frozen=True)
class Wanda:
    """Zero the smallest |W_ij| * ||X_j||_2 of each output row, or of each group of M inputs in a row.

    Source: Sun et al. 2023 (arXiv 2306.11695), equation 1.
    """

    pattern: str = "unstructured"
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def new_stats(self, weight: Tensor) -> InputNorms:
        return InputNorms.empty(weight)

    def observe(self, stats: InputNorms, x: Tensor) -> None:
        stats.add(x)

    def prune(self, weight: Tensor, stats: InputNorms, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        scores = weight.float().abs() * stats.squares.sqrt()
        return without(weight, smallest(scores, sparsity, self.pattern))

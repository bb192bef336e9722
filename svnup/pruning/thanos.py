"""Thanos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svnup.machines import Work
from svnup.pattern import Pattern
from svnup.pruning.masks import all_finite, check_groups, lowest_counts, lowest_of_groups, n_zeros
from svnup.pruning.refit import CHUNK, FLOAT, solve_rows
from svnup.pruning.sparsegpt import Hessian, cholesky_of_inverse


@dataclass(frozen=True)
class Thanos:
    """Prune block of columns by block; all weights of a block that go are compensated for at once, by those that are left.

    With H = X^T X / n_tokens + damp * mean(diag) I of the columns from this block on, the weights P of a row that go from the
    block, those with the smallest |W_ij| * ||X_j||_2 of the whole block, change the row from here on by
    -w_P (H^-1_PP)^-1 H^-1_P: the least change of its outputs that makes them zero. In N:M a block is a group of M columns, and
    N go from each row of it. H^-1 of the columns that are left is U^T U of the last columns of one Cholesky factor. All is
    float32.

    Args:
        damp: fraction of the mean diagonal.
        block_size: columns of a block; in N:M those whose errors are passed on together.

    Source: Ilin and Richtarik 2025 (arXiv 2504.05346), of which the released code was read: algorithm, metric and defaults are
    its own. Our zero counts are exact over the matrix. The released code rounds down in each block, zeroes all weights of dead
    inputs even beyond the budget, and compensates nothing in the last rows where their number is no multiple of 64.
    """

    pattern: str = "unstructured"
    damp: float = 0.01
    block_size: int = 128
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        group = Pattern.parse(self.pattern).group
        if self.damp <= 0:
            raise ValueError(f"damp={self.damp}: choose a positive fraction of the mean diagonal, such as 0.01")
        if self.block_size < 1 or (group and self.block_size % group):
            raise ValueError(f"block_size={self.block_size}: choose a positive multiple of the M of pattern={self.pattern}")

    def new_stats(self, weight: Tensor) -> Hessian:
        return Hessian.empty(weight)

    def observe(self, stats: Hessian, x: Tensor) -> None:
        stats.add(x)

    def workspace(self, d_out: int, d_in: int) -> int:
        """Bytes that `prune` takes for one matrix: four times the systems that are solved at once, and copies of matrices."""
        systems = min(CHUNK, d_out * min(self.block_size, d_in) ** 2)
        return FLOAT * (4 * systems + 8 * d_out * d_in + 6 * d_in**2)

    def work(self, d_out: int, d_in: int, sparsity: float) -> Work:
        """The factor, a system for each row of each block, and the updates of the columns after it."""
        size = Pattern.parse(self.pattern).group or min(self.block_size, d_in)
        n_systems, gone = d_out * d_in / size, sparsity * size
        solved = d_in**3 + n_systems * (gone**3 / 3 + 2 * gone**2)
        calls = 40.0 * d_in / size
        return Work({"float32": float(d_out * d_in**2)}, solved=solved, moved=6.0 * FLOAT * n_systems * gone**2, calls=calls)

    def prune(self, weight: Tensor, stats: Hessian, sparsity: float) -> Tensor:
        steps = Pattern.parse(self.pattern).steps(sparsity)
        if steps:
            check_groups(*steps, weight.shape[1])
        if sparsity == 0 or (steps and steps.zeros == 0):
            return weight
        _, u, _ = stats.damped(self.damp, cholesky_of_inverse)
        w, norms = weight.float().clone(), stats.xtx.diagonal().sqrt()
        if not (all_finite(w) and all_finite(norms)):
            raise ValueError("nan or infinity in the weights, or in the statistics of their inputs")
        rows, columns = w.shape
        for start in range(0, columns, self.block_size):
            end = min(start + self.block_size, columns)
            errors = []
            size = steps.group if steps else end - start
            for first in range(start, end, size):
                last = first + size
                part, own = w[:, first:last], u[first:last, first:last]
                scores = part.abs() * norms[first:last]
                if steps:
                    gone = lowest_of_groups(scores, *steps)
                else:
                    count = n_zeros(sparsity, rows * end) - n_zeros(sparsity, rows * start)
                    gone = lowest_counts(scores.reshape(1, -1), torch.tensor([count])).reshape(scores.shape)
                errors.append(solve_rows(own.T @ own, gone, part) @ own.T)
                w[:, first:end].addmm_(errors[-1], u[first:last, first:end], alpha=-1)
                part.masked_fill_(gone, 0)
            w[:, end:].addmm_(torch.cat(errors, 1), u[start:end, end:], alpha=-1)
        return w.to(weight.dtype)

"""Thanos."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svnup.machines import Work
from svnup.pattern import Pattern
from svnup.pruning.masks import all_finite, lowest_of_groups
from svnup.pruning.refit import CHUNK, FLOAT, solve_rows
from svnup.pruning.sparsegpt import ColumnBlocks, Hessian, cholesky_of_inverse


@dataclass(frozen=True)
class Thanos(ColumnBlocks):
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

    def _pruned(self, weight: Tensor, stats: Hessian, sparsity: float) -> Tensor:
        steps = Pattern.parse(self.pattern).steps(sparsity)
        u, _ = stats.factored(self.damp, cholesky_of_inverse)
        w, norms = weight.float().clone(), stats.xtx.diagonal().sqrt()
        if not (all_finite(w) and all_finite(norms)):
            raise ValueError("nan or infinity in the weights, or in the statistics of their inputs")
        columns = w.shape[1]
        for start in range(0, columns, self.block_size):
            end = min(start + self.block_size, columns)
            errors = []
            size = steps.group if steps else end - start
            for first in range(start, end, size):
                last = first + size
                part, own = w[:, first:last], u[first:last, first:last]
                scores = part.abs() * norms[first:last]
                gone = lowest_of_groups(scores, *steps) if steps else self._lowest(scores, sparsity, first)
                errors.append(solve_rows(own.T @ own, gone, part) @ own.T)
                w[:, first:end].addmm_(errors[-1], u[first:last, first:end], alpha=-1)
                part.masked_fill_(gone, 0)
            w[:, end:].addmm_(torch.cat(errors, 1), u[start:end, end:], alpha=-1)
        return w.to(weight.dtype)

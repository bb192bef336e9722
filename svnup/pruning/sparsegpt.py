"""SparseGPT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svnup.pruning.masks import lowest_of_groups, n_zeros
from svnup.types import parse_pattern, steps_of


@dataclass
class Hessian:
    """X^T X summed over all observed tokens, float32 (d_in, d_in)."""

    xtx: Tensor
    n_tokens: int = 0


@dataclass(frozen=True)
class SparseGPT:
    """Prune column by column and let the kept weights to the right make up for each error.

    H = X^T X + damp * mean(diag) I; the mask of a block of `block_size` columns takes the smallest W^2 / diag(U)^2 with U the
    upper Cholesky factor of H^-1 (of a group of M columns for N:M, on the weights as they are by then). Weights of dead inputs
    go first. Where the factorisation fails, damping grows tenfold, at most 4 times, then ValueError gives the range of the
    diagonal. All in float32.

    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1; exact zero counts where the released code prunes
    one weight more per block of columns, and zeroes all weights of dead inputs even beyond the budget.
    """

    pattern: str = "unstructured"
    damp: float = 0.01
    block_size: int = 128
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        group = parse_pattern(self.pattern)
        if self.damp <= 0:
            raise ValueError(f"damp={self.damp}: choose a positive fraction of the mean diagonal, such as 0.01")
        if self.block_size < 1 or (group and self.block_size % group[1]):
            raise ValueError(f"block_size={self.block_size}: choose a positive multiple of the M of pattern={self.pattern}")

    def new_stats(self, weight: Tensor) -> Hessian:
        return Hessian(torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float32, device=weight.device))

    def observe(self, stats: Hessian, x: Tensor) -> None:
        x = x.float()
        stats.xtx.addmm_(x.T, x)
        stats.n_tokens += len(x)

    def prune(self, weight: Tensor, stats: Hessian, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        h = stats.xtx / max(1, stats.n_tokens)
        dead = h.diagonal() == 0
        damping = self.damp * (h.diagonal().mean() if not dead.all() else 1.0)
        h.diagonal()[dead] = 1  # not before the mean: in which unit inputs are measured must not matter
        w = weight.to(torch.float32, copy=True)
        u = self._factor(h, damping)
        rows, columns = w.shape
        group = steps_of(self.pattern, sparsity)
        for start in range(0, columns, self.block_size):
            end = min(start + self.block_size, columns)
            block, factor = w[:, start:end].clone(), u[start:end, start:end]
            scale = factor.diagonal().masked_fill(dead[start:end], torch.inf)  # what a dead input reads goes first
            if group is None:
                count = n_zeros(sparsity, rows * end) - n_zeros(sparsity, rows * start)
                mask = torch.zeros(block.numel(), dtype=torch.bool, device=w.device)
                order = (block / scale).square().reshape(-1).argsort(stable=True)
                mask = mask.index_fill(0, order[:count], True).reshape(block.shape)
            else:
                mask = torch.zeros_like(block, dtype=torch.bool)
            errors = torch.zeros_like(block)
            for j in range(end - start):
                if group is not None and j % group[1] == 0:
                    near = slice(j, j + group[1])
                    mask[:, near] = lowest_of_groups((block[:, near] / scale[near]).square(), *group)
                errors[:, j] = block[:, j].masked_fill(~mask[:, j], 0) / factor[j, j]
                block[:, j:] -= errors[:, j, None] * factor[j, j:]
            w[:, start:end] = block.masked_fill(mask, 0)
            w[:, end:] -= errors @ u[start:end, end:]
        return w.to(weight.dtype)

    def _factor(self, h: Tensor, damping: Tensor | float) -> Tensor:
        """The upper Cholesky factor of the inverse of the damped H."""
        diagonal = h.diagonal().clone()
        for _ in range(5):
            h.diagonal().copy_(diagonal + damping)
            lower, failed = torch.linalg.cholesky_ex(h)
            if not failed:
                upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not failed and upper.isfinite().all():
                    return upper
            damping = damping * 10
        raise ValueError(
            f"the Hessian cannot be factorised even with damping {self.damp * 1e4:g} of its mean diagonal; its diagonal goes "
            f"from {diagonal.min():.3g} to {diagonal.max():.3g}"
        )

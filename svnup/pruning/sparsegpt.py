"""SparseGPT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from svnup.pattern import Pattern
from svnup.pruning.column_block import prune_columns
from svnup.pruning.masks import all_finite, check_groups, lowest_counts, n_zeros

Factor = TypeVar("Factor")
SLAB = 512  # columns of X^T X that one matrix product makes
MIRRORED = 128  # columns that are copied to the other triangle at once: all at once takes eight times as long


@dataclass
class Hessian:
    """X^T X summed over all observed tokens.

    Args:
        xtx: float32 (d_in, d_in); only its upper triangle is valid.
        n_tokens: number of observed tokens.
        fallback: says that more damping than asked was needed; None if it was not.
    """

    xtx: Tensor
    n_tokens: int = 0
    fallback: str | None = None
    _known: tuple[Any, Any] | None = None  # the arguments of the last call of `damped` and its result

    @classmethod
    def empty(cls, weight: Tensor) -> Self:
        return cls(torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float32, device=weight.device))

    def add(self, x: Tensor) -> None:
        """Add inputs (tokens, d_in); the entries below the diagonal's slab follow by symmetry and are not computed."""
        x, self._known = x.float(), None
        for start in range(0, x.shape[1], SLAB):
            self.xtx[start : start + SLAB, start:].addmm_(x[:, start : start + SLAB].T, x[:, start:])
        self.n_tokens += len(x)

    def mean(self) -> Tensor:
        """X^T X / n_tokens, (d_in, d_in), both triangles."""
        mean = self.xtx / max(1, self.n_tokens)
        for start in range(0, len(mean), MIRRORED):
            own, beyond = slice(start, start + MIRRORED), slice(start + MIRRORED, None)
            mean[own, own] = mean[own, own].triu() + mean[own, own].triu(1).T
            mean[beyond, own] = mean[own, beyond].T
        return mean

    def damped(self, damp: float, factor: Callable[[Tensor], Factor | None]) -> tuple[Tensor, Factor, Tensor]:
        """The damped Hessian H = X^T X / n_tokens + damp * mean(diag) I and its factor.

        The diagonal of a dead input, which is zero in every token, is 1. If the factorisation fails, damping grows tenfold, at
        most 4 times, and `fallback` says so. Linear layers that read the same input share the factor.

        Args:
            damp: fraction of the mean diagonal.
            factor: factorises H; None means that it failed.

        Returns:
            H (d_in, d_in), its factor, and which inputs are dead, bool (d_in,).

        Raises:
            ValueError: it fails with the most damping; the message has the range of the diagonal.
        """
        if self._known is None or self._known[0] != (damp, factor):
            self._known = (damp, factor), self._factored(damp, factor)
        return self._known[1]

    def _factored(self, damp: float, factor: Callable[[Tensor], Factor | None]) -> tuple[Tensor, Factor, Tensor]:
        h = self.mean()
        dead = h.diagonal() == 0
        damping = damp * (h.diagonal().mean() if not dead.all() else 1.0)
        h.diagonal()[dead] = 1  # after the mean, so that the scale of inputs does not matter
        diagonal = h.diagonal().clone()
        for tries in range(5):
            h.diagonal().copy_(diagonal + damping)
            if (factored := factor(h)) is not None:
                self.fallback = f"damping {damp * 10**tries:g} instead of {damp:g}" if tries else None
                return h, factored, dead
            damping = damping * 10
        raise ValueError(
            f"the Hessian cannot be factorised even with damping {damp * 1e4:g} of its mean diagonal; its diagonal goes "
            f"from {diagonal.min():.3g} to {diagonal.max():.3g}"
        )


def cholesky(h: Tensor) -> Tensor | None:
    """The lower Cholesky factor of H (d_in, d_in); None if it has none."""
    lower, failed = torch.linalg.cholesky_ex(h)
    return None if failed or not all_finite(lower) else lower


def cholesky_of_inverse(h: Tensor) -> Tensor | None:
    """The upper Cholesky factor U of H^-1 = U^T U; None if it has none.

    Cholesky with rows and columns in reverse order gives H = R R^T with R upper, so that U = R^-1. H^-1 itself is not computed,
    which takes half the time.
    """
    lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
    if failed:
        return None
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True)
    return upper if all_finite(upper) else None


@dataclass(frozen=True)
class SparseGPT:
    """Prune column by column and let the kept weights to the right compensate each error.

    H = X^T X / n_tokens + damp * mean(diag) I, and U is the upper Cholesky factor of H^-1. In each block of `block_size`
    columns the weights with the smallest W^2 / diag(U)^2 are zeroed; for N:M in each group of M columns, by the weights at its
    turn. Weights of dead inputs are zeroed first. If the factorisation fails, damping grows tenfold, at most 4 times; then
    ValueError has the range of the diagonal. All is float32.

    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1. Our zero counts are exact; the released code prunes one
    weight more per block of columns and zeroes all weights of dead inputs even beyond the budget.
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
        """Bytes that `prune` takes for one matrix, as measured."""
        return 4 * (5 * d_out * d_in + 6 * d_in**2)

    def prune(self, weight: Tensor, stats: Hessian, sparsity: float) -> Tensor:
        steps = Pattern.parse(self.pattern).steps(sparsity)
        if steps:
            check_groups(*steps, weight.shape[1])
        if sparsity == 0 or (steps and steps.zeros == 0):
            return weight
        _, u, dead = stats.damped(self.damp, cholesky_of_inverse)
        return self.prune_with_factor(weight, u, dead, sparsity)

    def prune_with_factor(self, weight: Tensor, u: Tensor, dead: Tensor, sparsity: float) -> Tensor:
        """The pruned matrix, (d_out, d_in).

        Args:
            weight: (d_out, d_in).
            u: upper Cholesky factor of H^-1, (d_in, d_in).
            dead: which inputs are zero in every token, bool (d_in,).
            sparsity: fraction of zeros.
        """
        steps = Pattern.parse(self.pattern).steps(sparsity)
        w = weight.float().T.clone(memory_format=torch.contiguous_format).T  # columns contiguous in memory
        rows, columns = w.shape
        for start in range(0, columns, self.block_size):
            end = min(start + self.block_size, columns)
            block, factor, mask = w[:, start:end], u[start:end, start:end], None
            scale = factor.diagonal().masked_fill(dead[start:end], torch.inf)  # zeroes weights of dead inputs first
            if steps is None:
                count = n_zeros(sparsity, rows * end) - n_zeros(sparsity, rows * start)
                scores = (block / scale).square().reshape(1, -1)
                mask = lowest_counts(scores, torch.tensor([count])).reshape(block.shape)
            block[:], errors = prune_columns(block, factor, mask, steps, scale)
            w[:, end:].addmm_(errors, u[start:end, end:], alpha=-1)
        return w.to(weight.dtype).contiguous()

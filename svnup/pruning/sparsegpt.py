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
from svnup.pruning.walk import Total

Factor = TypeVar("Factor")
# Columns of X^T X that one matrix product makes, and tokens that it sums; on a CPU few, so that less is computed twice and MKL
# does not share a sum between threads, whose number would decide its last bits.
SLAB, TOKENS = {"cpu": 64, "cuda": 512}, {"cpu": 256, "cuda": 8192}
MIRRORED = 128  # columns that are copied to the other triangle at once: all at once takes eight times as long
FACTORISED = 128  # columns that LAPACK factorises at once on a CPU: of more, the last bits depend on the number of threads


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
    _known: tuple[Any, Any] | None = None  # the last arguments of `factored`; what it returned, and the damping

    @classmethod
    def empty(cls, weight: Tensor) -> Self:
        return cls(torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float32, device=weight.device))

    def add(self, x: Tensor) -> None:
        """Add inputs (tokens, d_in); the entries below the diagonal's slab follow by symmetry and are not computed."""
        x, self._known = x.float(), None
        slab, tokens = (sizes.get(x.device.type, sizes["cuda"]) for sizes in (SLAB, TOKENS))
        for part in x.split(tokens):
            for start in range(0, x.shape[1], slab):
                self.xtx[start : start + slab, start:].addmm_(part[:, start : start + slab].T, part[:, start:])
        self.n_tokens += len(x)

    def add_up(self, total: Total) -> None:
        total(self.xtx)
        self.n_tokens, self._known = int(total(torch.tensor(self.n_tokens))), None

    def mean(self) -> Tensor:
        """X^T X / n_tokens, (d_in, d_in), both triangles."""
        mean = self.xtx / max(1, self.n_tokens)
        for start in range(0, len(mean), MIRRORED):
            own, beyond = slice(start, start + MIRRORED), slice(start + MIRRORED, None)
            mean[own, own] = mean[own, own].triu() + mean[own, own].triu(1).T
            mean[beyond, own] = mean[own, beyond].T
        return mean

    def factored(self, damp: float, factor: Callable[[Tensor], Factor | None]) -> tuple[Factor, Tensor]:
        """A factor of the damped Hessian H = X^T X / n_tokens + damp * mean(diag) I, kept for all layers that read this input.

        The diagonal of a dead input, which is zero in every token, is 1. If the factorisation fails, damping grows tenfold, at
        most 4 times, and `fallback` says so.

        Args:
            damp: fraction of the mean diagonal.
            factor: factorises H; None means that it failed.

        Returns:
            The factor, and which inputs are dead, bool (d_in,).

        Raises:
            ValueError: it fails with the most damping; the message has the range of the diagonal.
        """
        if self._known is None or self._known[0] != (damp, factor):
            self._known = (damp, factor), self._factored(damp, factor)
        factored, dead, _ = self._known[1]
        return factored, dead

    def damped(self, damp: float, factor: Callable[[Tensor], Factor | None]) -> tuple[Tensor, Factor]:
        """H itself (d_in, d_in), made anew, and its factor. Args and Raises as `factored`."""
        self.factored(damp, factor)
        assert self._known is not None
        factored, dead, damping = self._known[1]
        h = self.mean()
        h.diagonal()[dead] = 1
        h.diagonal().add_(damping)
        return h, factored

    def _factored(self, damp: float, factor: Callable[[Tensor], Factor | None]) -> tuple[Factor, Tensor, Tensor | float]:
        h = self.mean()
        dead = h.diagonal() == 0
        damping = damp * (h.diagonal().mean() if not dead.all() else 1.0)
        h.diagonal()[dead] = 1  # after the mean, so that the scale of inputs does not matter
        diagonal = h.diagonal().clone()
        for tries in range(5):
            h.diagonal().copy_(diagonal + damping)
            if (factored := factor(h)) is not None:
                self.fallback = f"damping {damp * 10**tries:g} instead of {damp:g}" if tries else None
                return factored, dead, damping
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
    """The upper Cholesky factor U of H^-1 = U^T U; None if it has none. Of H only the upper triangle is read.

    Cholesky with rows and columns in reverse order gives H = R R^T with R upper, so that U = R^-1; H^-1 itself is not computed.
    Both go by halves, which on a CPU is nearly all in matrix products: some twice as fast as in one.
    """
    u = torch.zeros_like(h)
    return u if _inverse_factor(h, u) and all_finite(u) else None


def _inverse_factor(h: Tensor, u: Tensor) -> bool:
    """Write U = R^-1 for H = R R^T with R upper over zeros; False if there is none.

    Of H = [A B; . C], R = [S T; 0 V] has V of C, T = B V^-T and S of A - T T^T, and U = [S^-1, -S^-1 T V^-1; 0, V^-1].
    """
    if h.device.type != "cpu" or len(h) <= FACTORISED:
        lower, failed = torch.linalg.cholesky_ex(h.flip(0, 1))
        if failed:
            return False
        u.copy_(torch.linalg.solve_triangular(lower.flip(0, 1), torch.eye(len(h), dtype=h.dtype, device=h.device), upper=True))
        return True
    first, last = slice(len(h) // 2), slice(len(h) // 2, None)
    if not _inverse_factor(h[last, last], u[last, last]):
        return False
    beside = h[first, last] @ u[last, last].T
    if not _inverse_factor(torch.addmm(h[first, first], beside, beside.T, alpha=-1), u[first, first]):
        return False
    u[first, last].addmm_(u[first, first] @ beside, u[last, last], alpha=-1)
    return True


@dataclass(frozen=True)
class ColumnBlocks:
    """A pruner that goes from left to right through blocks of `block_size` columns, with a Hessian; subclasses say how."""

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

    def prune(self, weight: Tensor, stats: Hessian, sparsity: float) -> Tensor:
        steps = Pattern.parse(self.pattern).steps(sparsity)
        if steps:
            check_groups(*steps, weight.shape[1])
        if sparsity == 0 or (steps and steps.zeros == 0):
            return weight
        return self._pruned(weight, stats, sparsity)

    def _pruned(self, weight: Tensor, stats: Hessian, sparsity: float) -> Tensor:
        """The pruned matrix where there is something to prune, as `prune`."""
        raise NotImplementedError

    @staticmethod
    def _lowest(scores: Tensor, sparsity: float, start: int) -> Tensor:
        """The smallest scores of a block of columns that begins with column `start`, bool (rows, columns); of equal ones the
        first. They are as many as the rounding rule leaves for it, after the columns before."""
        rows, columns = scores.shape
        count = n_zeros(sparsity, rows * (start + columns)) - n_zeros(sparsity, rows * start)
        return lowest_counts(scores.reshape(1, -1), torch.tensor([count])).reshape(scores.shape)


@dataclass(frozen=True)
class SparseGPT(ColumnBlocks):
    """Prune column by column and let the kept weights to the right compensate each error.

    H = X^T X / n_tokens + damp * mean(diag) I, and U is the upper Cholesky factor of H^-1. In each block of `block_size`
    columns the weights with the smallest W^2 / diag(U)^2 are zeroed; for N:M in each group of M columns, by the weights at its
    turn. Weights of dead inputs are zeroed first. If the factorisation fails, damping grows tenfold, at most 4 times; then
    ValueError has the range of the diagonal. All is float32.

    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), algorithm 1. Our zero counts are exact; the released code prunes one
    weight more per block of columns and zeroes all weights of dead inputs even beyond the budget.
    """

    def workspace(self, d_out: int, d_in: int) -> int:
        """Bytes that `prune` takes for one matrix, as measured on CPU and GPU."""
        return 4 * (4 * d_out * d_in + 3 * d_in**2)

    def _pruned(self, weight: Tensor, stats: Hessian, sparsity: float) -> Tensor:
        u, dead = stats.factored(self.damp, cholesky_of_inverse)
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
        columns = w.shape[1]
        for start in range(0, columns, self.block_size):
            end = min(start + self.block_size, columns)
            block, factor, mask = w[:, start:end], u[start:end, start:end], None
            scale = factor.diagonal().masked_fill(dead[start:end], torch.inf)  # zeroes weights of dead inputs first
            if steps is None:
                mask = self._lowest((block / scale).square(), sparsity, start)
            block[:], errors = prune_columns(block, factor, mask, steps, scale)
            w[:, end:].addmm_(errors, u[start:end, end:], alpha=-1)
        return w.to(weight.dtype).contiguous()

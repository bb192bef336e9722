"""The mask of another pruner with least-squares weights on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from svnup.machines import Work
from svnup.pruning.masks import zeroed
from svnup.pruning.sparsegpt import Hessian, cholesky
from svnup.pruning.walk import Pruner, Total, workspace

FLOAT = 4  # bytes
CHUNK = 2**25  # entries of the linear systems that are solved at once: 128 MiB


@dataclass
class RefitStats:
    """The Hessian of the least squares, and the statistics of the pruner that makes the mask."""

    hessian: Hessian
    base: Any

    @property
    def fallback(self) -> str | None:
        return self.hessian.fallback or getattr(self.base, "fallback", None)

    def add_up(self, total: Total) -> None:
        self.hessian.add_up(total)
        if self.base is not None:
            self.base.add_up(total)


class OnMask:
    """Statistics of a pruner that goes on from the mask of another one, `base`, by the Hessian."""

    base: Pruner

    def new_stats(self, weight: Tensor) -> RefitStats:
        return RefitStats(Hessian.empty(weight), self.base.new_stats(weight))

    def observe(self, stats: RefitStats, x: Tensor) -> None:
        stats.hessian.add(x)
        self.base.observe(stats.base, x)


@dataclass(frozen=True)
class Refit(OnMask):
    """Take the mask of `base` and set the kept weights of each output row to their least-squares values.

    W' minimises tr((W - W') H (W - W')^T) on the mask, where H = X^T X / n_tokens + damp * mean(diag) I. By this measure it is
    never worse than the mask alone or any other update on it, such as SparseGPT's. The solution is exact, by one Cholesky
    factor per row. Raises ValueError if H or a submatrix of it cannot be factorised.

    Source: the normal equations; as the optimum on a fixed mask in Frantar and Alistarh 2023 (arXiv 2301.00774), equation 2.
    """

    base: Pruner
    pattern: str = "unstructured"
    damp: float = 0.01
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_base(self.base, self.pattern)
        if self.damp <= 0:
            raise ValueError(f"damp={self.damp}: choose a positive fraction of the mean diagonal, such as 0.01")

    def workspace(self, d_out: int, d_in: int) -> int:
        """Bytes that `prune` takes for one matrix, as measured: four times the systems that are solved at once."""
        own = 4 * (4 * min(CHUNK, d_out * d_in**2) + 5 * d_out * d_in + 3 * d_in**2)
        return max(own, workspace(self.base, d_out, d_in))

    def work(self, d_out: int, d_in: int, sparsity: float) -> Work:
        """A Cholesky factor of each row's system, which is gathered from the Hessian first."""
        kept = (1 - sparsity) * d_in
        systems = 6 * FLOAT * d_out * kept**2
        return Work({"float32": 2.0 * d_out * d_in**2}, solved=d_out * (kept**3 / 3 + 2 * kept**2), moved=systems, calls=40)

    def prune(self, weight: Tensor, stats: RefitStats, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        gone = zeroed(self.base.prune(weight, stats.base, sparsity), sparsity, self.pattern)
        if not gone.any():
            return weight
        h, _ = stats.hessian.damped(self.damp, cholesky)
        return least_squares(weight, gone, h)


def check_base(base: Pruner, pattern: str) -> None:
    """Raise ValueError if a pruner cannot make masks of this pattern for another one."""
    if not getattr(base, "prunes", False):
        raise ValueError(f"base={base}: makes no masks; choose a pruner that does, as in +pruner@pruner.base=sparsegpt")
    if base.pattern != pattern:
        raise ValueError(f"pattern={pattern}: differs from base.pattern={base.pattern}; give both the same")


def least_squares(weight: Tensor, gone: Tensor, h: Tensor) -> Tensor:
    """Least-squares weights on a mask: each row solves H_kk d = H_kg w_g for the change d of its kept weights.

    It is solved in float32, which for the change (rather than the weights) differs from float64 by less than 1e-6 of the
    largest weight and takes half the time.

    Args:
        weight: dense weights, (d_out, d_in).
        gone: the pruned ones, bool (d_out, d_in).
        h: the Hessian, float32 (d_in, d_in).

    Returns:
        The pruned matrix, (d_out, d_in).

    Raises:
        ValueError: the submatrix of H of a row's kept inputs cannot be factorised.
    """
    w = weight.float()
    pull = w.masked_fill(~gone, 0) @ h
    return solve_rows(h, ~gone, pull).add_(w.masked_fill(gone, 0)).to(weight.dtype)


def solve_rows(h: Tensor, chosen: Tensor, right: Tensor) -> Tensor:
    """The solution x of h_cc x_c = right_c for the chosen inputs c of each row; 0 at the others.

    Args:
        h: symmetric and positive definite, float32 (d_in, d_in).
        chosen: bool (d_out, d_in).
        right: float32 (d_out, d_in).

    Returns:
        x, float32 (d_out, d_in).

    Raises:
        ValueError: the submatrix of h of a row's chosen inputs cannot be factorised.
    """
    x = torch.zeros_like(right)
    n_chosen = chosen.sum(1)
    chosen_first = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)
    order = n_chosen.argsort(descending=True, stable=True)  # so that systems of a chunk have nearly the same size
    start = 0
    while start < len(order) and (most := int(n_chosen[order[start]])):
        rows = order[start : start + max(1, CHUNK // most**2)]
        start += len(rows)
        inputs = chosen_first[rows, :most]
        beyond = torch.arange(most, device=x.device) >= n_chosen[rows, None]  # where smaller systems are padded, by ones
        system = h[inputs[:, :, None], inputs[:, None, :]].masked_fill_(beyond[:, :, None] | beyond[:, None, :], 0)
        system.diagonal(dim1=1, dim2=2).masked_fill_(beyond, 1)
        lower, failed = torch.linalg.cholesky_ex(system)
        if failed.any():
            raise ValueError(f"the Hessian of some inputs of {int((failed != 0).sum())} outputs cannot be factorised")
        solved = torch.cholesky_solve(right[rows].gather(1, inputs).masked_fill(beyond, 0)[:, :, None], lower)[:, :, 0]
        x[rows] = x[rows].scatter(1, inputs, solved)
    return x

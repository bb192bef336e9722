"""SparseSwaps: the best swap of two weights of a mask, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svnup.machines import Work
from svnup.pattern import Pattern
from svnup.pruning.masks import all_finite, without, zeroed
from svnup.pruning.refit import OnMask, RefitStats, check_base
from svnup.pruning.walk import Pruner, workspace

CHUNK = 2**24  # pairs of weights that are compared at once: 64 MiB
LEAST_GAIN = 1e-6  # of the error of the row; less is rounding


@dataclass(frozen=True)
class SparseSwaps(OnMask):
    """Refine another pruner's mask by swaps within an output row that lower its reconstruction error; kept weights stay dense.

    The error of a row is r G r^T, where G = X^T X and r has the row's pruned weights and zeros for the kept ones. Bringing back
    the pruned weight p and pruning the kept weight q changes it by

        w_p^2 G_pp - 2 w_p (r G)_p  +  w_q^2 G_qq + 2 w_q (r G)_q  -  2 w_p w_q G_pq.

    Of all such pairs the one with the lowest change is swapped, until no swap lowers the error by more than rounding, or
    `max_swaps` were made: the mask that is left is optimal among those one swap away. In N:M both weights are of one group. All
    rows are refined at once, in float32. Each swap of a row compares d_in^2 pairs, which is work for a GPU; on a CPU a wide
    matrix takes minutes.

    Args:
        base: the pruner that makes the mask.
        max_swaps: the most swaps of a row.

    Source: Zimmer et al. 2025 (arXiv 2512.10922), of which the abstract was available to us: optimal 1-swaps by the Gram matrix
    from any mask, rows of equal sparsity. The change of a swap follows from the error; the bound on swaps is ours.
    """

    base: Pruner
    pattern: str = "unstructured"
    max_swaps: int = 100
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_base(self.base, self.pattern)
        if self.max_swaps < 1:
            raise ValueError(f"max_swaps={self.max_swaps}: of an output row; choose at least 1")

    def workspace(self, d_out: int, d_in: int) -> int:
        """Bytes that `prune` takes for one matrix: thrice the pairs that are compared at once, and copies of both matrices."""
        own = 4 * (3 * max(CHUNK, d_in**2) + 8 * d_out * d_in + 3 * d_in**2)
        return max(own, workspace(self.base, d_out, d_in))

    def work(self, d_out: int, d_in: int, sparsity: float) -> Work:
        """All swaps of all rows, each of which compares the pairs of a group, or of the whole row."""
        pairs = d_out * d_in * (Pattern.parse(self.pattern).group or d_in)
        return Work({"float32": 2.0 * d_out * d_in**2}, moved=4.0 * 10 * pairs * self.max_swaps, calls=40 * self.max_swaps)

    def prune(self, weight: Tensor, stats: RefitStats, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        gone = zeroed(self.base.prune(weight, stats.base, sparsity), sparsity, self.pattern)
        gram = stats.hessian.mean()
        if not all_finite(gram):
            raise ValueError("nan or infinity in the statistics of the inputs")
        size = Pattern.parse(self.pattern).group or weight.shape[1]
        rows = max(1, CHUNK // (weight.shape[1] * size))
        for start in range(0, len(weight), rows):
            swap(gone[start : start + rows], weight[start : start + rows].float(), gram, size, self.max_swaps)
        return without(weight, gone)


def swap(gone: Tensor, w: Tensor, gram: Tensor, size: int, most: int) -> None:
    """Refine masks in place by the best swaps within every `size` consecutive inputs of a row.

    Args:
        gone: the pruned weights, bool (n, d_in).
        w: dense weights, float32 (n, d_in).
        gram: float32 (d_in, d_in).
        size: of a group; d_in for the whole row.
        most: swaps of a row.
    """
    n_groups = w.shape[1] // size
    own = gram.unflatten(0, (n_groups, size)).unflatten(2, (n_groups, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    alone = w.square() * gram.diagonal()
    pull = w.masked_fill(~gone, 0) @ gram  # r G
    error = (pull * w).masked_fill(~gone, 0).sum(1)
    rows = torch.arange(len(w), device=w.device)
    for _ in range(most):
        w_r, gone_r, twice = w[rows], gone[rows], 2 * w[rows] * pull[rows]
        back = (alone[rows] - twice).masked_fill(~gone_r, torch.inf).unflatten(1, (n_groups, size))
        away = (alone[rows] + twice).masked_fill(gone_r, torch.inf).unflatten(1, (n_groups, size))
        grouped = w_r.unflatten(1, (n_groups, size))
        change = torch.einsum("ngp,ngq,gpq->ngpq", grouped, grouped, own).mul_(-2)
        change += back[..., :, None]
        change += away[..., None, :]
        least, at = change.flatten(1).min(1)
        better = least < -LEAST_GAIN * error[rows]
        if not better.any():
            return
        rows, least, at = rows[better], least[better], at[better]
        group, pair = at // size**2, at % size**2
        p, q = group * size + pair // size, group * size + pair % size
        gone[rows, p], gone[rows, q] = False, True
        error[rows] += least
        pull[rows] += w[rows, q, None] * gram[q] - w[rows, p, None] * gram[p]

"""Which weights go: the one rounding rule, and the smallest scores under it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def n_zeros(sparsity: float, size: int) -> int:
    """How many of `size` weights in a row are zeroed: floor(sparsity * size).

    THE rounding rule: of weights counted from the first, those up to position p hold floor(sparsity * p) zeros, so group r of m
    weights gets floor((r+1) s m) - floor(r s m) and a whole matrix is exact to one weight. Products within 1e-6 below a
    whole number count as whole: 0.29 * 100 is 29.
    """
    return math.floor(sparsity * size + 1e-6)


def zeros_per_group(sparsity: float, n_groups: int, group: int, device: torch.device) -> Tensor:
    """Zeros of each of `n_groups` groups of `group` weights by the rounding rule, int64 (n_groups,)."""
    ends = torch.arange(n_groups + 1, dtype=torch.float64, device=device) * (sparsity * group)
    return torch.floor(ends + 1e-6).to(torch.int64).diff()


def lowest(scores: Tensor, sparsity: float) -> Tensor:
    """True at the smallest scores of each row: (rows, m) to bool (rows, m); among equals the first goes first."""
    counts = zeros_per_group(sparsity, scores.shape[0], scores.shape[1], scores.device)
    order = scores.argsort(dim=1, stable=True)
    chosen = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(chosen).scatter_(1, order, chosen)


def lowest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """True at the n smallest scores of every m consecutive ones in a row: (rows, d) to bool (rows, d), d divisible by m."""
    if scores.shape[1] % m:
        raise ValueError(f"pattern {n}:{m} does not fit {scores.shape[1]} inputs: {m} must divide them")
    order = scores.reshape(-1, m).argsort(dim=1, stable=True)
    mask = torch.zeros(order.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, order[:, :n], True).reshape(scores.shape)

"""Masks: the rounding rule for the number of zeros, and the smallest scores under it."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from svnup.pattern import Pattern


def n_zeros(sparsity: float, size: int) -> int:
    """The rounding rule: the first `size` weights of a matrix have floor(sparsity * size) zeros.

    So group r of m weights gets floor((r+1) s m) - floor(r s m) zeros, and a whole matrix is exact to one weight. A product
    within 1e-6 below a whole number counts as whole: 0.29 * 100 is 29.
    """
    return math.floor(sparsity * size + 1e-6)


def zeros_per_group(sparsity: float, n_groups: int, group: int, device: torch.device) -> Tensor:
    """Number of zeros in each of `n_groups` groups of `group` weights by the rounding rule, int64 (n_groups,)."""
    ends = torch.arange(n_groups + 1, dtype=torch.float64, device=device) * (sparsity * group)
    return torch.floor(ends + 1e-6).to(torch.int64).diff()


def smallest(scores: Tensor, sparsity: float, pattern: str, per: Literal["row", "matrix"] = "row") -> Tensor:
    """The weights to zero, bool (d_out, d_in): those with the smallest scores under the pattern.

    Args:
        scores: (d_out, d_in).
        sparsity: fraction of zeros.
        pattern: N:M takes the smallest of every M consecutive inputs of a row.
        per: whether the smallest are of each row or of the whole matrix, if unstructured.

    Raises:
        ValueError: a score is nan or infinite, or M does not divide d_in.
    """
    if not all_finite(scores):
        raise ValueError("nan or infinity in the weights, in the statistics of their inputs, or in products of both")
    steps = Pattern.parse(pattern).steps(sparsity)
    if steps is not None:
        return lowest_of_groups(scores, *steps)
    return lowest(scores if per == "row" else scores.reshape(1, -1), sparsity).reshape(scores.shape)


def zeroed(pruned: Tensor, sparsity: float, pattern: str) -> Tensor:
    """The pruned weights of a pruned matrix, bool (d_out, d_in): as many of its zeros as the rounding rule asks for.

    A kept weight may be zero too; which zeros count as pruned makes no difference to the matrix.
    """
    return smallest(pruned.abs(), sparsity, pattern, "matrix")


def lowest(scores: Tensor, sparsity: float) -> Tensor:
    """The smallest scores of each row, (rows, m) to bool (rows, m); of equal scores the first."""
    return lowest_counts(scores, zeros_per_group(sparsity, scores.shape[0], scores.shape[1], scores.device))


def lowest_counts(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts[r]` smallest scores of row r, (rows, m) to bool (rows, m); of equal scores the first.

    Args:
        scores: (rows, m).
        counts: int64 (rows,); they differ by at most one.
    """
    last = _kth(scores, counts.clamp(min=1))
    mask, ties = scores < last, scores == last
    left = counts.to(scores.device)[:, None] - mask.sum(1, keepdim=True)
    crowded = (ties.sum(1, keepdim=True) > left).squeeze(1).nonzero().squeeze(1)
    if len(crowded):  # rare: more equal scores than are left to choose
        ties[crowded] &= ties[crowded].cumsum(1) <= left[crowded]
    return mask | ties


def _kth(scores: Tensor, counts: Tensor) -> Tensor:
    """The score of rank `counts[r]` (from 1) of row r, (rows, m) to (rows, 1)."""
    if scores.device.type != "cpu":
        return scores.sort(dim=1).values.gather(1, counts.to(scores.device)[:, None] - 1)
    # numpy selects and torch sorts: 6 times faster for a matrix of 2048 x 2048
    values = (scores if scores.dtype in (torch.float32, torch.float64) else scores.float()).numpy()
    if counts.min() == counts.max():  # without a copy of the rows
        return torch.from_numpy(_selected(values, int(counts.min()))).to(scores.dtype)
    last = np.empty((len(values), 1), values.dtype)
    for count in counts.unique().tolist():
        rows = (counts == count).numpy()
        last[rows] = _selected(values[rows], count)
    return torch.from_numpy(last).to(scores.dtype)


def _selected(values: np.ndarray, count: int) -> np.ndarray:
    return np.partition(values, count - 1, axis=1)[:, count - 1 : count]


def check_groups(n: int, m: int, d_in: int) -> None:
    """Raise ValueError if m does not divide the number of inputs."""
    if d_in % m:
        raise ValueError(f"pattern {n}:{m} does not fit {d_in} inputs: {m} must divide them")


def lowest_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The n smallest of every m consecutive scores of a row, of equal ones the first; (rows, d) to bool (rows, d); m divides d.

    All pairs of a group are compared, which for m = 4 is 20 times faster than sorting; ranks are bytes, for speed too.
    """
    check_groups(n, m, scores.shape[1])
    places = [place.contiguous() for place in scores.reshape(-1, m).unbind(1)]  # the first of all groups, the second, ...
    ranks = [torch.full_like(place, j, dtype=torch.uint8 if m <= 256 else torch.int16) for j, place in enumerate(places)]
    for i, j in combinations(range(m), 2):
        later_first = (places[j] < places[i]).view(torch.uint8)
        ranks[i] += later_first
        ranks[j] -= later_first
    return torch.stack([rank < n for rank in ranks], dim=1).reshape(scores.shape)


def all_finite(x: Tensor) -> bool:
    """Whether no entry is nan or infinite. Then the sum is finite too, unless it overflows, and is found ten times as fast."""
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def without(weight: Tensor, gone: Tensor) -> Tensor:
    """`weight.masked_fill(gone, 0)`, bit for bit, (d_out, d_in).

    On the CPU it is made of bits: masked_fill takes a branch at every weight, which a mask makes hard to predict and three
    times slower.
    """
    if weight.device.type != "cpu":
        return weight.masked_fill(gone, 0)
    bits = getattr(torch, f"int{8 * weight.element_size()}")
    return gone.to(bits).sub_(1).bitwise_and_(weight.view(bits)).view(weight.dtype)

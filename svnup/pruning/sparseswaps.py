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

CHUNK = 2**22  # weights of rows, or pairs of weights, that are looked at at once: 16 MiB
FEW = 8  # pruned and kept weights of a row whose pairs are tried first
N_CHUNKS = 8  # of the rows: those with about as many weights to try are looked at together
KNOTS = 16  # points between which a bound is interpolated
LEAST_GAIN = 1e-6  # of the error of the row; less is rounding


@dataclass(frozen=True)
class SparseSwaps(OnMask):
    """Refine another pruner's mask by swaps within an output row that lower its reconstruction error; kept weights stay dense.

    The error of a row is r G r^T, where G = X^T X and r has the row's pruned weights and zeros for the kept ones. Bringing back
    the pruned weight p and pruning the kept weight q changes it by

        w_p^2 G_pp - 2 w_p (r G)_p  +  w_q^2 G_qq + 2 w_q (r G)_q  -  2 w_p w_q G_pq.

    Of all such pairs the one with the lowest change is swapped, until no swap lowers the error by more than rounding, or
    `max_swaps` were made: the mask that is left is optimal among those one swap away. In N:M both weights are of one group. All
    rows are refined at once, in float32. A row has some d_in^2 / 4 pairs, of which bounds on what a weight can gain
    leave about one in a hundred: the swap is the best of all pairs, and finding it takes time in d_in and not in d_in^2.

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
        """Bytes that `prune` takes for one matrix: what is made of the rows or pairs that are looked at at once, and copies."""
        own = 4 * (24 * max(CHUNK, d_in) + 4 * d_out * d_in + 3 * d_in**2)
        return max(own, workspace(self.base, d_out, d_in))

    def work(self, d_out: int, d_in: int, sparsity: float) -> Work:
        """All swaps of all rows: a row is read often for the bounds, or in N:M for the pairs of its groups."""
        reads = 10 * (Pattern.parse(self.pattern).group or 2 * KNOTS)
        calls = (8 * KNOTS + 80) * -(-d_out * d_in // CHUNK)
        moved = 4.0 * reads * d_out * d_in
        return Work({"float32": 2.0 * d_out * d_in**2}, moved=moved * self.max_swaps, calls=calls * self.max_swaps)

    def prune(self, weight: Tensor, stats: RefitStats, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        gone = zeroed(self.base.prune(weight, stats.base, sparsity), sparsity, self.pattern)
        gram = stats.hessian.mean()
        if not all_finite(gram):
            raise ValueError("nan or infinity in the statistics of the inputs")
        size = Pattern.parse(self.pattern).group or weight.shape[1]
        rows = max(1, CHUNK // (weight.shape[1] * (size if size < weight.shape[1] else 1)))
        cosines = closest(gram)
        for start in range(0, len(weight), rows):
            swap(gone[start : start + rows], weight[start : start + rows].float(), gram, cosines, size, self.max_swaps)
        return without(weight, gone)


def swap(gone: Tensor, w: Tensor, gram: Tensor, cosines: Tensor, size: int, most: int) -> None:
    """Refine masks in place by the best swaps within every `size` consecutive inputs of a row.

    Args:
        gone: the pruned weights, bool (n, d_in).
        w: dense weights, float32 (n, d_in).
        gram: float32 (d_in, d_in).
        cosines: the largest of each input with another, (d_in,).
        size: of a group; d_in for the whole row.
        most: swaps of a row.
    """
    alone = w.square() * gram.diagonal()
    pull = w.masked_fill(~gone, 0) @ gram  # r G
    error = (pull * w).masked_fill(~gone, 0).sum(1)
    root = alone.sqrt()
    reach = root * cosines
    rows = torch.arange(len(w), device=w.device)
    for _ in range(most):
        w_r, gone_r, alone_r, pull_r = (each.index_select(0, rows) for each in (w, gone, alone, pull))
        twice = pull_r.mul_(w_r).mul_(2)
        back = torch.where(gone_r, alone_r - twice, torch.inf)
        away = torch.where(gone_r, torch.inf, alone_r + twice)
        rounding = -LEAST_GAIN * error[rows]
        if size < w.shape[1]:
            change, p, q = best_in_groups(back, away, w_r, gram, size)
        else:
            maybe_p, maybe_q = promising(back, away, w_r, gram, root[rows], reach[rows], rounding)
            change, p, q = best_in_rows(maybe_p, maybe_q, back, away, w_r, gram)
        better = change < rounding
        if not better.any():
            return
        rows, p, q = rows[better], p[better], q[better]
        gone[rows, p], gone[rows, q] = False, True
        error[rows] += change[better]
        pull[rows] += w[rows, q, None] * gram[q] - w[rows, p, None] * gram[p]


def best_in_groups(back: Tensor, away: Tensor, w: Tensor, gram: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The swap of each row that changes its error least, of all within groups: change, p and q, (n,) each."""
    n_groups = w.shape[1] // size
    own = gram.unflatten(0, (n_groups, size)).unflatten(2, (n_groups, size)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    grouped = w.unflatten(1, (n_groups, size))
    change = torch.einsum("ngp,ngq,gpq->ngpq", grouped, grouped, own).mul_(-2)
    change += back.unflatten(1, (n_groups, size))[..., :, None]
    change += away.unflatten(1, (n_groups, size))[..., None, :]
    least, at = change.flatten(1).min(1)
    group, pair = at // size**2, at % size**2
    return least, group * size + pair // size, group * size + pair % size


def best_in_rows(
    maybe_p: Tensor, maybe_q: Tensor, back: Tensor, away: Tensor, w: Tensor, gram: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The swap of each row that changes its error least, of all of maybe_p and maybe_q, bool (n, d_in): change, p and q."""
    least = back.new_full((len(w),), torch.inf)
    best = torch.zeros(2, len(w), dtype=torch.int64, device=w.device)
    n_q = maybe_q.sum(1)
    for rows in n_q.argsort().chunk(N_CHUNKS):  # of about as many q
        k = max(1, int(n_q[rows[-1]]))
        q = maybe_q[rows].byte().topk(k).indices
        away_q, w_q = away[rows].gather(1, q), w[rows].gather(1, q)
        row, p = maybe_p[rows].nonzero(as_tuple=True)
        back_p, w_p = back[rows[row], p, None], w[rows[row], p, None]
        change, to = torch.empty_like(p, dtype=w.dtype), torch.empty_like(p)
        for part in torch.arange(len(p), device=w.device).split(max(1, CHUNK // w.shape[1])):
            away_of, w_of, q_of = (each.index_select(0, row[part]) for each in (away_q, w_q, q))
            product = w_of.mul_(w_p[part]).mul_(gram.index_select(0, p[part]).gather(1, q_of))
            change[part], at = away_of.add_(back_p[part]).sub_(product, alpha=2).min(1)
            to[part] = q_of.gather(1, at[:, None])[:, 0]
        least[rows] = lowest = least[rows].scatter_reduce(0, row, change, "amin")
        at = (change == lowest[row]).nonzero()[:, 0]
        first = torch.full_like(rows, len(row)).scatter_reduce(0, row[at], at, "amin")  # of equal ones
        found = first < len(row)
        best[:, rows[found]] = torch.stack([p, to])[:, first[found]]
    return least, *best


def closest(gram: Tensor) -> Tensor:
    """The largest absolute cosine of each input with another one, (d_in,)."""
    scale = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny).rsqrt()
    return (gram * scale * scale[:, None]).fill_diagonal_(0).abs_().amax(0)


def promising(
    back: Tensor, away: Tensor, w: Tensor, gram: Tensor, root: Tensor, reach: Tensor, rounding: Tensor
) -> tuple[Tensor, Tensor]:
    """The few weights of whole rows among which the best swap is: no swap with another one can change the error as much.

    A swap of p and q changes the error by at least back_p + away_q - 2 c_p s_p s_q, where s_p^2 = w_p^2 G_pp and c_p is the
    largest absolute cosine of input p with another. The best swap of the FEW lowest p and q tells what has to be undercut.

    Args:
        back: what bringing back the pruned weight p changes, infinity for kept ones, (n, d_in).
        away: what pruning the kept weight q changes, infinity for pruned ones.
        w: weights.
        gram: (d_in, d_in).
        root: s.
        reach: c s.
        rounding: changes above are no more than that, (n,).

    Returns:
        the pruned and the kept ones, bool (n, d_in) both.
    """
    few = min(FEW, w.shape[1])
    p, q = back.topk(few, largest=False).indices, away.topk(few, largest=False).indices
    w_p, w_q = w.gather(1, p)[:, :, None], w.gather(1, q)[:, None, :]
    tried = back.gather(1, p)[:, :, None] + away.gather(1, q)[:, None, :] - 2 * w_p * w_q * gram[p[:, :, None], q[:, None, :]]
    limit = (torch.minimum(tried.flatten(1).amin(1), rounding) - rounding)[:, None]  # with a margin for rounding
    return lower_bound(back, away, root, reach) <= limit, lower_bound(away, back, root, reach) <= limit


def lower_bound(own: Tensor, other: Tensor, root: Tensor, reach: Tensor) -> Tensor:
    """own_i + h(reach_i) with h(t) = min_j other_j - 2 t root_j, from below, (n, d_in).

    h is concave, so that it lies above its chords between KNOTS points.
    """
    t = torch.where(own.isinf(), 0, reach)
    step = t.amax(1, keepdim=True).div_(KNOTS - 1).clamp_(min=torch.finfo(t.dtype).tiny)
    h = torch.stack([torch.addcmul(other, root, step * i, value=-2).amin(1) for i in range(KNOTS)], 1)
    t = t.div_(step)
    i = t.long().clamp_(max=KNOTS - 2)
    return torch.lerp(h.gather(1, i), h.gather(1, i + 1), t.sub_(i)).add_(own)

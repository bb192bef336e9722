"""SparseGPT's inner loop: prune a block of columns, one after the other."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

STEP = 32  # columns between two matrix products: fewer make more products, more make longer sums per column
FEW = 8  # columns of a step that are settled by additions


def prune_columns(
    block: Tensor, factor: Tensor, mask: Tensor | None, group: tuple[int, int] | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Zero weights in a block of columns and let the columns to their right compensate.

    On CUDA this is one launch of a Triton kernel if Triton can build it; otherwise `prune_columns_torch`, the reference, from
    which the kernel differs by rounding.

    Args:
        block: weights, float32 (rows, b).
        factor: upper Cholesky factor of the inverse Hessian at these columns, float32 (b, b).
        mask: the weights to zero, bool (rows, b); None chooses them by `group`.
        group: (n, m): zero the n smallest |weight / scale| of every m columns in a row, by the weights at the turn of the
            group, of equal ones the first.
        scale: float32 (b,).

    Returns:
        The new block, and errors (rows, b): these times the remaining columns of the factor's rows is what the columns beyond
        the block have to subtract.

    Source: Frantar and Alistarh 2023 (arXiv 2301.00774), the inner loop of algorithm 1.
    """
    assert (mask is None) != (group is None), "give either a mask or a group"
    if block.is_cuda and can_build_kernels():
        from svnup.pruning.column_block_triton import prune_columns_triton

        return prune_columns_triton(block, factor, mask, group, scale)
    return prune_columns_torch(block, factor, mask, group, scale)


@cache  # it is asked for every block of columns
def can_build_kernels() -> bool:
    """Whether Triton is installed and finds the C compiler with which it builds its launchers."""
    return importlib.util.find_spec("triton") is not None and any((os.environ.get("CC"), *map(shutil.which, ("gcc", "clang"))))


def prune_columns_torch(
    block: Tensor, factor: Tensor, mask: Tensor | None, group: tuple[int, int] | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`prune_columns` on any device.

    Columns are stored as rows. Each column takes in the errors before it only when its turn comes: those of earlier steps by
    one matrix product, those of its own step by a short one. What is gone is 1 and what is kept 0, since torch turns booleans
    into numbers ten times slower than it multiplies.
    """
    w, lower, diagonal = block.T.clone(memory_format=torch.contiguous_format), factor.T.contiguous(), factor.diagonal()[:, None]
    errors = torch.empty_like(w)
    gone = torch.empty_like(w) if mask is None else mask.T.to(w.dtype, memory_format=torch.contiguous_format)
    step = group[1] if group else STEP
    choose = Lowest(*group, w.device) if group else None
    parts = zip(*(x.split(step) for x in (w, lower, diagonal, scale[:, None], gone, errors)), strict=True)
    settle = _settle_few if step <= FEW else _settle
    for start, (now, lower_now, diagonal_now, scale_now, gone_now, errors_now) in zip(
        range(0, len(w), step), parts, strict=True
    ):
        if start:
            now.addmm_(lower_now[:, :start], errors[:start], alpha=-1)
        if choose is not None:
            choose(now.div(scale_now).abs_(), gone_now)
        settle(now, lower_now[:, start : start + step], gone_now / diagonal_now, errors_now)
    return w.addcmul_(gone, w, value=-1).T, errors.T


def _settle(w: Tensor, lower: Tensor, share: Tensor, errors: Tensor) -> None:
    """Errors of one step of columns, (step, rows), each after what those before it make of its weights."""
    for j, (w_j, share_j, errors_j) in enumerate(zip(w.unbind(), share.unbind(), errors.unbind(), strict=True)):
        if j:
            w_j.addmv_(errors[:j].T, lower[j, :j], alpha=-1)
        torch.mul(w_j, share_j, out=errors_j)


def _settle_few(w: Tensor, lower: Tensor, share: Tensor, errors: Tensor) -> None:
    """The same of a few columns, by additions alone: a call costs more than what it computes."""
    done = errors.unbind()
    for w_j, share_j, errors_j, factors in zip(w.unbind(), share.unbind(), done, lower.tolist(), strict=True):
        for earlier, factor in zip(done, factors, strict=False):
            if earlier is errors_j:
                break
            w_j.add_(earlier, alpha=-factor)
        torch.mul(w_j, share_j, out=errors_j)


class Lowest:
    """The n smallest of m scores, (m, columns) to float32 (m, columns): 1 for these, 0 for the others; of equal ones the first.

    Like `lowest_of_groups`, for few columns and by few calls: a product with the signs of all differences gives the ranks.
    """

    def __init__(self, n: int, m: int, device: torch.device) -> None:
        self._i, self._j = torch.tensor([*combinations(range(m), 2)], dtype=torch.int64, device=device).reshape(-1, 2).T
        places = torch.eye(m, device=device)
        self._moves = (places[self._j] - places[self._i]).T.contiguous()  # where j goes before i
        self._left = n - torch.arange(m, dtype=torch.float32, device=device)[:, None]  # n less the rank of equal scores

    def __call__(self, scores: Tensor, out: Tensor) -> None:
        j_first = scores.index_select(0, self._i).sub_(scores.index_select(0, self._j)).sign_().clamp_(min=0)
        torch.addmm(self._left, self._moves, j_first, out=out).clamp_(0, 1)

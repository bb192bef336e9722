"""SparseGPT's inner loop: prune a block of columns, one after the other."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import Tensor

from svnup.pruning.masks import lowest_in_columns

STEP = 32  # columns between two matrix products: fewer make more products, more make longer sums per column


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
        group: (n, m): zero the n smallest (weight / scale)^2 of every m columns in a row, by the weights at the turn of the
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


def can_build_kernels() -> bool:
    """Whether Triton is installed and finds the C compiler with which it builds its launchers."""
    return importlib.util.find_spec("triton") is not None and any((os.environ.get("CC"), *map(shutil.which, ("gcc", "clang"))))


def prune_columns_torch(
    block: Tensor, factor: Tensor, mask: Tensor | None, group: tuple[int, int] | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`prune_columns` on any device.

    Columns are stored as rows. Each column takes in the errors before it only when its turn comes: those of earlier steps by
    one matrix product, those of its own step by a short matrix-vector product.
    """
    w, lower, diagonal = block.T.clone(memory_format=torch.contiguous_format), factor.T.contiguous(), factor.diagonal()[:, None]
    errors = torch.empty_like(w)
    gone = torch.empty_like(w, dtype=torch.bool) if mask is None else mask.T.contiguous()
    step = group[1] if group else STEP
    for start in range(0, len(w), step):
        now = slice(start, start + step)
        w[now].addmm_(lower[now, :start], errors[:start], alpha=-1)
        if group:
            gone[now] = lowest_in_columns((w[now] / scale[now, None]).square(), group[0])
        share = gone[now] / diagonal[now]
        for j, share_j in enumerate(share, start):
            if j > start:
                w[j].addmv_(errors[start:j].T, lower[j, start:j], alpha=-1)
            torch.mul(w[j], share_j, out=errors[j])
    return torch.where(gone, 0, w).T, errors.T

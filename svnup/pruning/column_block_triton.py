"""`prune_columns` as one Triton kernel: a tile of rows stays in registers while all its columns are pruned."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # weights that one program holds: 16 rows of 128 columns


@triton.jit  # type: ignore[untyped-decorator]
def _prune_columns(  # type: ignore[no-untyped-def]
    block, factor, mask, scale, out, errors, rows, width, block_stride, factor_stride,
    N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (column < width)
    place = row.to(tl.int64) * width + column
    w = tl.load(block + row.to(tl.int64) * block_stride + column, mask=here, other=0.0)
    if M == 0:
        gone = tl.load(mask + place, mask=here, other=0) != 0
    else:
        gone = tl.zeros([ROWS, COLUMNS], dtype=tl.int1)
        scales = tl.load(scale + column, mask=column < width, other=1.0)
    lost = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for j in range(width):
        if M > 0:  # noqa: SIM102 (known when the kernel is compiled)
            if j % M == 0:  # rank every weight of the group against each of its members
                scores = tl.div_rn(w, tl.broadcast_to(scales, [ROWS, COLUMNS]))
                scores = scores * scores
                rank = tl.zeros([ROWS, COLUMNS], dtype=tl.int32)
                for k in range(j, j + M):
                    other = tl.sum(tl.where(column == k, scores, 0.0), axis=1)[:, None]
                    rank += ((other < scores) | ((other == scores) & (k < column))).to(tl.int32)
                gone = gone | ((column >= j) & (column < j + M) & (rank < N))
        line = tl.load(factor + j * factor_stride + column, mask=(column >= j) & (column < width), other=0.0)
        diagonal = tl.load(factor + j * factor_stride + j)
        error = tl.sum(tl.where((column == j) & gone, w, 0.0), axis=1)[:, None] / diagonal
        w -= error * line
        lost = tl.where(column == j, error, lost)
    tl.store(out + place, tl.where(gone, 0.0, w), mask=here)
    tl.store(errors + place, lost, mask=here)


def prune_columns_triton(
    block: Tensor, factor: Tensor, mask: Tensor | None, group: tuple[int, int] | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """`svnup.pruning.column_block.prune_columns` in one launch."""
    rows, width = block.shape
    block, factor = (x if x.stride(1) == 1 else x.contiguous() for x in (block, factor))
    out, errors = (torch.empty(rows, width, dtype=torch.float32, device=block.device) for _ in range(2))
    n, m = group or (0, 0)
    flags = out if mask is None else mask.contiguous().view(torch.uint8)  # out: never read
    columns = triton.next_power_of_2(width)
    tile = max(1, TILE // columns)
    with torch.cuda.device(block.device if block.is_cuda else -1):  # the launch goes to the current device; -1: none
        _prune_columns[(triton.cdiv(rows, tile),)](
            block, factor, flags, scale.contiguous(), out, errors, rows, width, block.stride(0), factor.stride(0),
            N=n, M=m, ROWS=tile, COLUMNS=columns, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, errors

"""SparseGPT's inner loop against a plain loop in float64, and its Triton kernel, interpreted, against the torch version."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from svnup.pruning.column_block import Lowest, prune_columns_torch
from svnup.pruning.sparsegpt import SparseGPT

CASES = [  # rows, columns, group
    (16, 128, None),
    (21, 128, None),  # the kernel's last tile of rows is not full
    (3, 44, None),  # the narrow last block of a matrix
    (1, 1, None),
    (21, 128, (2, 4)),
    (37, 48, (4, 8)),
    (5, 64, (0, 8)),  # a block of 'mixed:8' may lose nothing, or everything
    (5, 64, (8, 8)),
    (9, 36, (5, 12)),
    (6, 6, (1, 3)),
]


def a_case(rows, columns, group, seed=0):
    g = torch.Generator().manual_seed(seed)
    block = torch.randn(rows, columns, generator=g)
    x = torch.randn(4 * columns, columns, generator=g) * torch.exp(torch.randn(columns, generator=g))
    x += 0.5 * x.roll(1, dims=1)
    h = (x.T @ x / len(x)).double()
    factor = torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()
    scale = factor.diagonal().clone()
    scale[::3] = torch.inf  # dead inputs: their scores are equal
    block[:, columns // 2 + 1 :: 7] = 0
    mask = torch.rand(rows, columns, generator=g) < 0.5 if group is None else None
    return block, factor, mask, group, scale


def plainly(block, factor, mask, group, scale):
    """Column after column, row after row, in float64."""
    w, u = block.double().numpy().copy(), factor.double().numpy()
    gone = np.zeros(w.shape, dtype=bool) if mask is None else mask.numpy()
    errors = np.zeros_like(w)
    for row in range(len(w)):
        for j in range(w.shape[1]):
            if group is not None and j % group[1] == 0:
                near = slice(j, j + group[1])
                order = np.argsort((w[row, near] / scale.double().numpy()[near]) ** 2, kind="stable")
                gone[row, j + order[: group[0]]] = True
            if gone[row, j]:
                errors[row, j] = w[row, j] / u[j, j]
                w[row, j:] -= errors[row, j] * u[j, j:]
    return np.where(gone, 0, w), errors, gone


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_settles_as_the_plain_loop_does(case):
    block, *rest = a_case(*case)
    before = block.clone()
    new, errors = prune_columns_torch(block, *rest)
    expected, expected_errors, gone = plainly(block, *rest)
    assert torch.equal(block, before), "a new block"
    assert (new.numpy()[gone] == 0).all()
    np.testing.assert_allclose(new, expected, atol=1e-4)
    np.testing.assert_allclose(errors, expected_errors, atol=1e-4 * max(1, np.abs(expected_errors).max()))
    np.testing.assert_array_equal(errors.numpy() != 0, expected_errors != 0)


@pytest.mark.parametrize("n", [0, 3, 8])
def test_sparsegpt_with_a_budget_of_each_block_in_whole_steps(n):
    g = torch.Generator().manual_seed(n)
    weight, x = torch.randn(5, 40, generator=g), torch.randn(90, 40, generator=g)
    pruner = SparseGPT("mixed:8", block_size=16)
    stats = pruner.new_stats(weight)
    pruner.observe(stats, x)
    pruned = pruner.prune(weight, stats, n / 8)
    assert ((pruned == 0).reshape(5, 5, 8).sum(-1) == n).all()
    assert pruned.is_contiguous()


@pytest.mark.slow
def test_triton_settles_as_torch_does():
    """By Triton's interpreter, in a process of its own: it must be chosen before anything imports Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["settled", str(len(CASES))]


def interpret():
    from svnup.pruning.column_block_triton import prune_columns_triton

    for case in CASES:
        block, factor, *rest = a_case(*case)
        wide = torch.randn(len(block), block.shape[1] + 7)  # a block is a piece of a matrix
        wide[:, 3:-4] = block
        new, errors = prune_columns_triton(wide[:, 3:-4], factor, *rest)
        expected, expected_errors = prune_columns_torch(block, factor, *rest)
        torch.testing.assert_close(new, expected, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(errors, expected_errors, atol=1e-4, rtol=1e-5)
        assert torch.equal(new == 0, expected == 0)
    print("settled", len(CASES))


@pytest.mark.parametrize("n", range(5))
def test_of_equal_scores_the_first_go(n):
    scores = torch.tensor([[2.0, 0, 1], [2, 1, 0], [2, 0, 1], [2, 1, 0]])
    order = scores.T.argsort(dim=1, stable=True)[:, :n]
    expected = torch.zeros(3, 4).scatter_(1, order, 1)
    out = torch.empty(4, 3)
    Lowest(n, 4, scores.device)(scores, out)
    assert torch.equal(out, expected.T)


if __name__ == "__main__":
    interpret()

"""The one rounding rule."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svnup.pruning.masks import all_finite, lowest, lowest_of_groups, n_zeros, without, zeros_per_group

# A sparsity of 4 decimals times a whole number is at least 1e-4 below the next whole number, or is one.
SPARSITIES = st.integers(0, 10_000).map(lambda i: (i / 10_000, Fraction(i, 10_000)))
CPU = torch.device("cpu")


@given(SPARSITIES, st.integers(1, 10**9))
def test_zeros_are_the_floor_of_the_exact_product(sparsity, size):
    assert n_zeros(sparsity[0], size) == int(sparsity[1] * size)


@pytest.mark.parametrize(
    ("sparsity", "size", "zeros"), [(0.29, 100, 29), (0.7, 10, 7), (0.57, 100, 57), (0.999, 10, 9), (0, 5, 0), (1, 5, 5)]
)
def test_zeros_where_floats_would_mislead(sparsity, size, zeros):
    assert n_zeros(sparsity, size) == zeros
    assert zeros_per_group(sparsity, 1, size, CPU).tolist() == [zeros]


@given(SPARSITIES, st.integers(1, 200), st.integers(1, 300))
def test_groups_get_their_share_and_the_whole_is_exact(sparsity, n_groups, group):
    given_, exact = sparsity
    counts = zeros_per_group(given_, n_groups, group, CPU).tolist()
    assert counts == [int((r + 1) * exact * group) - int(r * exact * group) for r in range(n_groups)]
    assert sum(counts) == int(exact * n_groups * group)
    assert max(counts) - min(counts) <= 1


@given(st.floats(0, 1), st.integers(1, 100), st.integers(1, 100))
def test_any_sparsity_is_met_to_one_weight(sparsity, n_groups, group):
    counts = zeros_per_group(sparsity, n_groups, group, CPU)
    assert counts.min() >= 0
    assert counts.max() <= group
    assert -1 < counts.sum().item() - Fraction(sparsity) * n_groups * group <= Fraction(1, 10**5)


@given(SPARSITIES, st.integers(1, 12), st.integers(1, 40), st.integers(0, 10))
def test_the_lowest_of_each_row_go(sparsity, rows, columns, seed):
    scores = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    mask = lowest(scores, sparsity[0])
    assert mask.shape == scores.shape
    assert mask.dtype == torch.bool
    assert mask.sum().item() == int(sparsity[1] * rows * columns)
    for row, gone in zip(scores, mask, strict=True):
        if gone.any() and not gone.all():
            assert row[gone].max() <= row[~gone].min()


def test_the_lowest_by_hand():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 5.0, 4.0]])
    # half of six is three: floor(1.5) = 1 in the first row, 3 - 1 = 2 in the second
    assert lowest(scores, 0.5).tolist() == [[False, True, False], [True, False, True]]


def test_among_equals_the_first_goes_first():
    scores = torch.zeros(3, 200)
    mask = lowest(scores, 0.25)
    assert mask[:, :50].all()
    assert not mask[:, 50:].any()
    groups = lowest_of_groups(torch.ones(2, 8), 2, 4)
    assert groups.tolist() == [[True, True, False, False] * 2] * 2
    mixed = lowest(torch.tensor([[2.0, 1.0, 1.0, 0.0, 1.0]]), 0.4)
    assert mixed.tolist() == [[False, True, False, True, False]]


@given(st.integers(1, 10), st.integers(1, 6), st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 8), (1, 4)]), st.integers(0, 10))
def test_every_group_loses_exactly_its_lowest(rows, groups, pattern, seed):
    n, m = pattern
    scores = torch.randn(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    mask = lowest_of_groups(scores, n, m)
    assert mask.shape == scores.shape
    for row, gone in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), m):
            kept = [s for s, g in zip(row[start : start + m], gone[start : start + m], strict=True) if not g]
            lost = [s for s, g in zip(row[start : start + m], gone[start : start + m], strict=True) if g]
            assert len(lost) == n
            assert max(lost) < min(kept)


def as_bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_without_is_masked_fill_to_the_bit(dtype):
    weight = torch.tensor([[1.5, -2.0, -0.0], [torch.inf, torch.nan, -3e-8]], dtype=dtype)
    gone = torch.tensor([[True, False, False], [True, False, True]])
    for w, g in ((weight, gone), (weight.T, gone.T)):
        assert torch.equal(as_bits(without(w, g)), as_bits(w.masked_fill(g, 0)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_entry_decides_what_is_finite(bad):
    x = torch.linspace(-1e38, 1e38, 999).reshape(27, 37)
    assert all_finite(x)
    x[13, 5] = bad
    assert not all_finite(x)


def test_groups_must_fit_the_inputs():
    with pytest.raises(ValueError, match=r"pattern 2:4 does not fit 6 inputs: 4 must divide them"):
        lowest_of_groups(torch.zeros(2, 6), 2, 4)

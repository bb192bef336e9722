"""Budgets from measured curves of the loss by sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from svnup.allocation import Loss
from svnup.allocation.maps import Uniform
from svnup.allocation.projection import bounds_of, check_bounds, check_pattern, in_steps, to_budget
from svnup.pattern import UNSTRUCTURED, parse_pattern
from svnup.types import BlockScores, Floats, Ints, SparsityProfile


@dataclass(frozen=True)
class Curves:
    """Water-filling over measured curves: the budget at which another weight costs the same loss in every block.

    The curve of a block is the held-out loss with it alone pruned, to each of `levels` sparsities evenly from `lower` to
    `upper`, and the other blocks dense (under a pattern 'mixed:M' to those that are multiples of 1/M); its lower convex hull
    is used. From `lower` on, weights go where a hull is flattest per weight until the budget is met; segments as steep as the
    last are taken by equal shares. That is the exact optimum of the hulls' sum: as good as losses add up over blocks. Where the
    model pruned by it loses no less than by the uniform profile, that is taken instead.

    Raises ValueError where a loss is not finite. Source: our choice; the greedy way is that of Fox, Discrete optimization via
    marginal analysis, 1966.
    """

    levels: int = 5
    lower: float | None = None
    upper: float | None = None
    uniform_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels={self.levels}: a curve has at least 2 points; choose 5, for example")

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        check_pattern(sparsity, pattern, self.uniform_only)
        check_bounds(*bounds_of(sparsity, self.lower, self.upper), sparsity)

    def n_losses(self, n_blocks: int, sparsity: float) -> int:
        return n_blocks * self.levels + 2  # the budget that follows, and the uniform one

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        assert loss is not None
        grid = self._grid(sparsity, pattern)
        tried = []
        for block, level in np.ndindex(len(params), len(grid)):
            alone = np.where(np.arange(len(params)) == block, grid[level], 0.0)
            mean = float(np.average(alone, weights=params))
            tried.append((f"layer {block} at {grid[level]:.3g}", in_steps(alone, params, mean, pattern)))
        curves = np.reshape(loss.many(tried), (len(params), len(grid)))
        if not np.isfinite(curves).all():
            block, level = np.argwhere(~np.isfinite(curves))[0]
            raise ValueError(
                f"allocator.upper={grid[-1]:g}: the loss with layer {block} alone at {grid[level]:.3g} is not finite; "
                "choose a smaller upper"
            )
        wish = water_fill(grid, curves, params, sparsity)
        filled = to_budget(wish, params, sparsity, pattern, (float(grid[0]), float(grid[-1])))
        uniform = Uniform().allocate(None, params, sparsity, pattern)
        of_filled, of_uniform = loss.many([("water-filling", filled), ("uniform", uniform)])
        return filled if of_filled < of_uniform else uniform

    def _grid(self, sparsity: float, pattern: str) -> Floats:
        lower, upper = bounds_of(sparsity, self.lower, self.upper)
        grid, group = np.linspace(lower, upper, self.levels), parse_pattern(pattern)
        if group is None:
            return np.unique(grid)
        m = group[1]
        steps = np.round(grid * m)
        steps[0], steps[-1] = np.floor(lower * m), np.ceil(upper * m)
        return np.unique(np.clip(steps, 0, m - 1)) / m


def water_fill(grid: Floats, curves: Floats, params: Ints, target: float) -> Floats:
    """The sparsities (n,) that minimise the sum of the curves' lower convex hulls at a parameter-weighted mean of `target`.

    `curves` (n, m) are losses at the sparsities `grid` (m,), increasing, with grid[0] <= target <= grid[-1].
    """
    segments = []  # block, width in sparsity, loss per weight
    for block, curve in enumerate(curves):
        for i, j in pairwise(_hull(grid, curve)):
            width = grid[j] - grid[i]
            segments.append((block, width, (curve[j] - curve[i]) / (width * params[block])))
    sparsity, need = np.full(len(params), grid[0]), (target - grid[0]) * float(np.sum(params))
    if not segments or need <= 0:
        return sparsity
    owner, widths, slope = (np.array(column) for column in zip(*segments, strict=True))
    weights = widths * params[owner]
    order = np.argsort(slope, kind="stable")
    last = slope[order[min(int(np.searchsorted(np.cumsum(weights[order]), need)), len(order) - 1)]]
    tied = np.abs(slope - last) <= 1e-9 * np.abs(slope).max()
    below = (slope < last) & ~tied
    share = min(1.0, max(0.0, (need - weights[below].sum()) / weights[tied].sum()))
    np.add.at(sparsity, owner, widths * (below + share * tied))
    return sparsity


def _hull(x: Floats, y: Floats) -> list[int]:
    """The points of a curve on its lower convex hull, from the first to the last."""

    def slope(i: int, j: int) -> float:
        return float((y[j] - y[i]) / (x[j] - x[i]))

    hull: list[int] = []
    for k in range(len(x)):
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-2], k):
            hull.pop()
        hull.append(k)
    return hull

"""Budgets from measured curves of the loss by sparsity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import numpy as np

from svnup.allocation import Budget, Needs, Trial
from svnup.pattern import Pattern
from svnup.types import BlockScores, Floats, Ints, SparsityProfile


@dataclass(frozen=True)
class Curves:
    """Water-filling over measured curves: the budget at which another weight costs the same loss in every block.

    The curve of a block is the held-out loss with it alone pruned, to each of `levels` sparsities evenly from `lower` to
    `upper`, and the other blocks dense (under a pattern 'mixed:M' to those that are multiples of 1/M); its lower convex hull
    is used. From `lower` on, weights are zeroed where a hull is flattest per weight until the budget is met; segments as steep
    as the last are taken by equal shares. That is the exact optimum of the hulls' sum: as good as losses add up over blocks.
    Where the model pruned by it loses no less than by the uniform profile, that is taken instead.

    Raises ValueError where a loss is not finite. Source: our choice; the greedy way is that of Fox, Discrete optimization via
    marginal analysis, 1966.
    """

    levels: int = 5
    lower: float | None = None
    upper: float | None = None
    needs: ClassVar[Needs] = Needs(selection=True)

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels={self.levels}: a curve has at least 2 points; choose 5, for example")

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False)
        budget.check_bounds(self.lower, self.upper)

    def n_losses(self, budget: Budget) -> int:
        return budget.n_units * self.levels + 2  # the budget that follows, and the uniform one

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        assert trial is not None
        grid, n = self._grid(budget), budget.n_units
        tried = []
        for block, level in np.ndindex(n, len(grid)):
            alone = np.where(np.arange(n) == block, grid[level], 0.0)
            own = replace(budget, sparsity=float(np.average(alone, weights=budget.params)))
            tried.append((f"layer {block} at {grid[level]:.3g}", own.in_steps(alone)))
        curves = np.reshape(trial.losses(tried), (n, len(grid)))
        if not np.isfinite(curves).all():
            block, level = np.argwhere(~np.isfinite(curves))[0]
            raise ValueError(
                f"allocator.upper={grid[-1]:g}: the loss with layer {block} alone at {grid[level]:.3g} is not finite; "
                "choose a smaller upper"
            )
        wish = water_fill(grid, curves, budget.params, budget.sparsity)
        filled, uniform = budget.project(wish, (float(grid[0]), float(grid[-1]))), budget.uniform()
        of_filled, of_uniform = trial.losses([("water-filling", filled), ("uniform", uniform)])
        return filled if of_filled < of_uniform else uniform

    def _grid(self, budget: Budget) -> Floats:
        lower, upper = budget.bounds(self.lower, self.upper)
        grid, m = np.linspace(lower, upper, self.levels), Pattern.parse(budget.pattern).group
        if m is None:
            return np.unique(grid)
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

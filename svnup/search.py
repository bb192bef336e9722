"""Allocators that measure profiles as well as blocks, or instead of them: pure numpy on a loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar

import numpy as np

from svnup.allocation import (
    Loss,
    Scale,
    ScoreBudget,
    Uniform,
    best_of,
    bounds_of,
    check_bounds,
    check_pattern,
    in_steps,
    to_budget,
)
from svnup.types import UNSTRUCTURED, BlockScores, Floats, Granularity, Ints, Players, SparsityProfile, parse_pattern

MOVES = 3  # the most in one mutation, as in EvoPress
FLOOR = 1e-3  # of the largest value, for those near 0 or below it
FLOOR_OF_MEDIAN = 0.02


@dataclass(frozen=True)
class Search:
    """Evolutionary search from the uniform profile: sparsity moves between blocks, and what loses less on held-out text stays.

    A mutation is one to three moves (the lesser of two draws): of two random blocks the smaller becomes sparser or denser by
    `step` and the other takes over its weights, so that the budget stays exact. Each generation makes `offspring` mutants of
    the parent; stage i measures them on `sequences[i]` sequences and keeps the best `survivors[i]`; those left at the end are
    measured on the whole text, and the best becomes the parent if it is better. Deterministic by `seed`; losses that are known
    are not measured again, so that a search that was interrupted goes on. Under a pattern 'mixed:M' a step is at least 1/M.

    With `trial` candidates are put together from weights that are pruned in advance; only the best and the uniform profile are
    pruned for real, of which the better is taken. `granularity`: sparsity moves between blocks, between attentions and MLPs, or
    between linear layers.

    Source: EvoPress, arXiv 2410.14649, algorithm 1 and its multi-step selection, and the released code. There a level is a
    fixed number of weights of one linear, so that two linears of any size trade a level for a level; all levels are pruned
    in advance, each on the inputs of the dense model, and a candidate is put together from them; the text of every stage is
    drawn anew in each generation, the parent measured again with the last; and the fitness is the KL divergence to the
    dense model by default (here `selection_loss=kl`). Here by default levels belong to blocks, every profile is pruned anew,
    block after block, and the fitness is the NLL; the text of a stage is always the same, so that losses can be kept.
    """

    generations: int = 25
    offspring: int = 16
    sequences: list[int] = field(default_factory=lambda: [4, 16])
    survivors: list[int] = field(default_factory=lambda: [4, 1])
    step: float = 0.05
    lower: float | None = None
    upper: float | None = None
    seed: int = 0
    trial: bool = False
    granularity: Granularity = "block"
    uniform_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("generations", "offspring"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.step < 1:
            raise ValueError(f"step={self.step}: a change of a block's sparsity; choose more than 0, such as 0.05")
        for name, signed, what in (("sequences", 1, "grow"), ("survivors", -1, "shrink")):
            given: list[int] = getattr(self, name)
            numbers = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given)
            if not numbers or any(signed * (b - a) < 0 for a, b in pairwise(given)):
                raise ValueError(f"{name}={given}: must be whole numbers from 1 that {what} from stage to stage")
        if len(self.survivors) != len(self.sequences):
            raise ValueError(f"survivors={self.survivors}: as many stages as sequences={self.sequences} are needed")
        if self.survivors and self.survivors[0] > self.offspring:
            raise ValueError(f"survivors={self.survivors}: more than the {self.offspring} offspring; choose at most that")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be at least 0")

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        check_pattern(sparsity, pattern, self.uniform_only)
        if self.granularity != "block" and pattern != UNSTRUCTURED:
            raise ValueError(
                f"pattern={pattern}: the linears of a block share its N; add allocator.granularity=block, or use "
                "pattern=unstructured"
            )
        check_bounds(*bounds_of(sparsity, self.lower, self.upper), sparsity)

    def n_losses(self, n_blocks: int, sparsity: float) -> int:
        return 1 + self.generations * (self.offspring + sum(self.survivors)) + 2 * self.trial

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        assert loss is not None
        rng = np.random.default_rng(self.seed)
        parent = uniform = Uniform().allocate(None, params, sparsity, pattern)
        least = loss(parent, "uniform", trial=self.trial)
        for generation in range(1, self.generations + 1):
            label = f"generation {generation}"
            left = self._offspring(parent, rng)
            for n_seq, n_left in zip(self.sequences, self.survivors, strict=True):
                losses = loss.many([(label, profile) for profile in left], n_seq, self.trial)
                left = [left[i] for i in np.argsort(losses, kind="stable")[:n_left]]
            reached = loss.many([(label, profile) for profile in left], trial=self.trial)
            for profile, value in zip(left, reached, strict=True):
                if value < least:
                    parent, least = profile, value
        return best_of([("uniform", uniform), ("best", parent)], loss)[1] if self.trial else parent

    def _offspring(self, parent: SparsityProfile, rng: np.random.Generator) -> list[SparsityProfile]:
        """Mutants of a profile, none twice; fewer where so many could not be found."""
        budget = parent.sparsity if parent.requested is None else parent.requested
        mutants: dict[bytes, SparsityProfile] = {}
        tried = {_levels(budget)}
        for _ in range(10 * self.offspring):
            moved = self._mutant(budget, parent, rng)
            if _levels(moved) in tried:
                continue
            tried.add(_levels(moved))
            mutant = in_steps(np.clip(moved, *self._bounds(parent)), parent.params, parent.target, parent.pattern)
            if _levels(mutant.sparsity) != _levels(parent.sparsity):  # under steps of a pattern
                mutants.setdefault(_levels(mutant.sparsity), mutant)
            if len(mutants) == self.offspring:
                break
        return list(mutants.values())

    def _mutant(self, budget: Floats, parent: SparsityProfile, rng: np.random.Generator) -> Floats:
        lower, upper = self._bounds(parent)
        group, params = parse_pattern(parent.pattern), parent.params
        step = self.step if group is None else max(self.step, 1 / group[1])
        weights = step * np.minimum.outer(params, params)  # that block i loses and block j gets back
        less, more = weights / params[:, None], weights / params[None, :]
        out = budget.copy()
        for _ in range(rng.integers(1, MOVES + 1, size=2).min()):
            fits = (out[:, None] + less <= upper + 1e-9) & (out[None, :] - more >= lower - 1e-9)
            pairs = np.argwhere(fits & ~np.eye(len(params), dtype=bool))
            if not len(pairs):
                break
            i, j = pairs[rng.integers(len(pairs))]
            out[i] += less[i, j]
            out[j] -= more[i, j]
        return np.where(np.abs(out - budget) < 1e-9, budget, out)  # who came back is where it was, to the last bit

    def _bounds(self, profile: SparsityProfile) -> tuple[float, float]:
        return bounds_of(profile.target, self.lower, self.upper)


@dataclass(frozen=True)
class ShapleyRounds:
    """A Shapley budget that Shapley values of the model pruned by it correct, round after round, on held-out text.

    The first round is `ScoreBudget`: of the amplitudes 0 (uniform), `lam` / 2 and `lam` the one with the least loss. Each other
    plays a game in the pruned model: a present block has `delta` less sparsity than the budget gives it, an absent one `delta`
    more, and the payoff is minus the negative log-likelihood; so a value is what sparsity costs a block where it stands. Then
    s_l moves by `step` / 2 or `step` times the log of the value per weight that differs, centred, where that lowers the loss;
    else the rounds end. With `granularity=sublayer` attention and MLP have values and budgets apart.

    Source: our choice; arXiv 2505.01731 takes the values of the dense model alone.
    """

    rounds: int = 3
    scale: Scale = "log"
    lam: float = 0.2
    step: float = 0.08
    delta: float = 0.1
    lower: float | None = None
    upper: float | None = None
    granularity: Players = "block"
    uniform_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: the first is the budget by the dense model's values; choose 1 or more")
        for name in ("lam", "step", "delta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a difference of sparsities; choose one above 0, at most 1")

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        self._first(self.lam).check(n_blocks, sparsity, pattern)
        if pattern != UNSTRUCTURED:
            raise ValueError(
                f"pattern={pattern}: rounds move budgets by less than its steps; use allocator=shapley, or pattern=unstructured"
            )

    def n_losses(self, n_blocks: int, sparsity: float) -> int:
        return 3 + 2 * (self.rounds - 1)

    def _first(self, lam: float) -> ScoreBudget:
        return ScoreBudget(self.scale, lam, self.lower, self.upper)

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        amplitudes = (0.0, self.lam / 2, self.lam)
        tried = [(f"lam={lam:.4g}", self._first(lam).allocate(scores, params, sparsity, pattern)) for lam in amplitudes]
        assert loss is not None
        least, profile = best_of(tried, loss)
        for number in range(2, self.rounds + 1):
            denser, sparser = (_shifted(profile, by) for by in (-self.delta, self.delta))
            values = loss.values(denser, sparser) / (params * (sparser.sparsity - denser.sparsity))
            if values.max() <= 0:  # more weights help no block
                break
            z = np.log(np.maximum(values, FLOOR * values.max()))
            z -= np.average(z, weights=params)
            bounds = bounds_of(sparsity, self.lower, self.upper)
            tried = [
                (f"round {number}, step={step:.4g}", to_budget(profile.sparsity - step * z, params, sparsity, pattern, bounds))
                for step in (self.step / 2, self.step)
            ]
            reached, moved_to = best_of(tried, loss)
            if reached >= least:
                break
            least, profile = reached, moved_to
        return profile


@dataclass(frozen=True)
class ShapleyMargins:
    """Budgets at which another weight costs the same loss everywhere, by values at the margin, round after round.

    Each round plays a game in the pruned model, on weights that are pruned in advance: a present part (a block, its attention
    or its MLP, or a linear layer) has `delta` less sparsity than its budget, an absent one `delta` more, and the payoff is
    minus the loss. Its Aumann-Shapley values, by `nodes` nodes, take as many backward passes over `n_seq` payoff sequences,
    whatever the number of parts; each round reads the next sequences. Then s_l moves by `step` times the log of the value per
    weight that differs, centred, within 2 `step`; a value near 0 or below counts as 2 % of the median. A trial on `trial_n_seq`
    selection sequences follows; the profile with the least, and the uniform one, are pruned for real and measured on the whole
    selection text, and the better is taken.

    `data` is the payoff text. Source: our choice. The value is that of Aumann and Shapley (1974) for a game with degrees of
    presence, the condition that of Lagrange for the least loss under a budget; weights in advance as in EvoPress (arXiv
    2410.14649).
    """

    data: Annotated[Any, "text"]  # a svnup.data.TokenSource
    rounds: int = 6
    step: float = 0.05
    delta: float = 0.05
    nodes: int = 1
    n_seq: int = 8
    trial_n_seq: int | None = 16
    lower: float | None = None
    upper: float | None = None
    granularity: Granularity = "block"
    uniform_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("rounds", "nodes", "n_seq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more")
        if self.trial_n_seq is not None and self.trial_n_seq < 1:
            raise ValueError(
                f"trial_n_seq={self.trial_n_seq}: selection sequences of a trial; choose 1 or more, or null for all"
            )
        for name in ("step", "delta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a difference of sparsities; choose one above 0, at most 1")

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        check_pattern(sparsity, pattern, self.uniform_only)
        if pattern != UNSTRUCTURED:
            raise ValueError(
                f"pattern={pattern}: rounds move budgets by less than its steps; use allocator=shapley, or pattern=unstructured"
            )
        check_bounds(*bounds_of(sparsity, self.lower, self.upper), sparsity)

    def n_losses(self, n_blocks: int, sparsity: float) -> int:
        return 2

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        assert loss is not None
        profile = uniform = Uniform().allocate(None, params, sparsity, pattern)
        bounds, tried = bounds_of(sparsity, self.lower, self.upper), []
        for number in range(self.rounds):
            denser, sparser = (_shifted(profile, by) for by in (-self.delta, self.delta))
            values = loss.margins(denser, sparser, number * self.n_seq, self.n_seq, self.nodes)
            values /= params * (sparser.sparsity - denser.sparsity)
            if values.max() <= 0:  # more weights help no part
                break
            least = FLOOR * values.max() if np.median(values) <= 0 else FLOOR_OF_MEDIAN * np.median(values)
            z = np.log(np.maximum(values, least))
            z -= np.average(z, weights=params)
            profile = to_budget(profile.sparsity - self.step * np.clip(z, -2, 2), params, sparsity, pattern, bounds)
            label = f"round {number + 1}"
            tried.append((loss(profile, label, self.trial_n_seq, trial=True), label, profile))
        best = min(tried, key=lambda one: one[0])[1:] if tried else ("uniform", uniform)
        return best_of([("uniform", uniform), best], loss)[1]


def _shifted(profile: SparsityProfile, by: float) -> SparsityProfile:
    sparsity = np.clip(profile.sparsity + by, 0.0, 1.0)
    return SparsityProfile(sparsity, profile.params, float(np.average(sparsity, weights=profile.params)))


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


def _levels(sparsity: Floats) -> bytes:
    return np.round(sparsity, 9).tobytes()

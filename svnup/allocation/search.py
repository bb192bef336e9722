"""Evolutionary search for a budget on held-out text."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np

from svnup.allocation import Loss
from svnup.allocation.maps import Uniform, best_of
from svnup.allocation.projection import bounds_of, check_bounds, check_pattern, in_steps
from svnup.pattern import UNSTRUCTURED, parse_pattern
from svnup.types import BlockScores, Floats, Granularity, Ints, SparsityProfile

MOVES = 3  # the most in one mutation, as in EvoPress


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


def _levels(sparsity: Floats) -> bytes:
    return np.round(sparsity, 9).tobytes()

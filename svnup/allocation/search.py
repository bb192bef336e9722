"""Evolutionary search for a budget on held-out text."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np

from svnup.allocation import Budget, Needs, Trial
from svnup.allocation.maps import best_of
from svnup.pattern import Pattern
from svnup.types import BlockScores, Floats, Granularity, SparsityProfile

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
    pruned for real, of which the better is taken. `granularity`: sparsity moves between blocks, between attentions and MLPs,
    between experts, or between linear layers.

    Source: EvoPress, arXiv 2410.14649, algorithm 1 and its multi-step selection, and the released code. There a level is a
    fixed number of weights of one linear, so that two linear layers of any size trade a level for a level; all levels are
    pruned in advance, each on the inputs of the dense model, and a candidate is put together from them; the text of every stage
    is drawn anew in each generation, the parent measured again with the last; and the fitness is the KL divergence to the dense
    model by default (here `selection_loss=kl`). Here by default levels belong to blocks, every profile is pruned anew, block
    after block, and the fitness is the NLL; the text of a stage is always the same, so that losses can be kept.
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
    needs: ClassVar[Needs] = Needs(selection=True)

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

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False, granularity=self.granularity)
        budget.check_bounds(self.lower, self.upper)

    def n_losses(self, budget: Budget) -> int:
        return 1 + self.generations * (self.offspring + sum(self.survivors)) + 2 * self.trial

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        assert trial is not None
        rng = np.random.default_rng(self.seed)
        parent = uniform = budget.uniform()
        least = trial.loss(parent, "uniform", in_advance=self.trial)
        for generation in range(1, self.generations + 1):
            label = f"generation {generation}"
            left = self._offspring(budget, parent, rng)
            for n_seq, n_left in zip(self.sequences, self.survivors, strict=True):
                losses = trial.losses([(label, profile) for profile in left], n_seq, self.trial)
                left = [left[i] for i in np.argsort(losses, kind="stable")[:n_left]]
            reached = trial.losses([(label, profile) for profile in left], in_advance=self.trial)
            for profile, value in zip(left, reached, strict=True):
                if value < least:
                    parent, least = profile, value
        return best_of([("uniform", uniform), ("best", parent)], trial)[1] if self.trial else parent

    def _offspring(self, budget: Budget, parent: SparsityProfile, rng: np.random.Generator) -> list[SparsityProfile]:
        """Mutants of a profile, none twice; fewer where so many could not be found."""
        current = parent.sparsity if parent.requested is None else parent.requested
        mutants: dict[bytes, SparsityProfile] = {}
        tried = {_levels(current)}
        for _ in range(10 * self.offspring):
            moved = self._mutant(budget, current, rng)
            if _levels(moved) in tried:
                continue
            tried.add(_levels(moved))
            mutant = budget.in_steps(np.clip(moved, *budget.bounds(self.lower, self.upper)))
            if _levels(mutant.sparsity) != _levels(parent.sparsity):  # under steps of a pattern
                mutants.setdefault(_levels(mutant.sparsity), mutant)
            if len(mutants) == self.offspring:
                break
        return list(mutants.values())

    def _mutant(self, budget: Budget, current: Floats, rng: np.random.Generator) -> Floats:
        (lower, upper), params = budget.bounds(self.lower, self.upper), budget.params
        m = Pattern.parse(budget.pattern).group
        step = self.step if m is None else max(self.step, 1 / m)
        weights = step * np.minimum.outer(params, params)  # that block i loses and block j gets back
        less, more = weights / params[:, None], weights / params[None, :]
        out = current.copy()
        for _ in range(rng.integers(1, MOVES + 1, size=2).min()):
            fits = (out[:, None] + less <= upper + 1e-9) & (out[None, :] - more >= lower - 1e-9)
            pairs = np.argwhere(fits & ~np.eye(len(params), dtype=bool))
            if not len(pairs):
                break
            i, j = pairs[rng.integers(len(pairs))]
            out[i] += less[i, j]
            out[j] -= more[i, j]
        return np.where(np.abs(out - current) < 1e-9, current, out)  # who came back is where it was, to the last bit


def _levels(sparsity: Floats) -> bytes:
    return np.round(sparsity, 9).tobytes()

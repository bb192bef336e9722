"""Budgets that values of the pruned model correct, round after round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from svnup.allocation import Budget, Needs, Trial
from svnup.allocation.budget import Scale
from svnup.allocation.maps import ScoreBudget, best_of
from svnup.pattern import UNSTRUCTURED
from svnup.types import BlockScores, Granularity, Players, SparsityProfile

FLOOR = 1e-3  # of the largest value, for those near 0 or below it
FLOOR_OF_MEDIAN = 0.02


@dataclass(frozen=True)
class ShapleyRounds:
    """A Shapley budget that Shapley values of the model pruned by it correct, round after round, on held-out text.

    The first round is `ScoreBudget`: of the amplitudes 0 (uniform), `lam` / 2 and `lam` the one with the least loss. Each other
    evaluates a game in the pruned model: a present block has `delta` less sparsity than the budget gives it, an absent one
    `delta` more, and the payoff is minus the negative log-likelihood; so a value is what sparsity costs a block where it
    stands. Then s_l moves by `step` / 2 or `step` times the log of the value per weight that differs, centred, where that
    lowers the loss; else the rounds end. With `granularity=sublayer` attention and MLP have values and budgets apart.

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

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: the first is the budget by the dense model's values; choose 1 or more")
        for name in ("lam", "step", "delta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: a difference of sparsities; choose one above 0, at most 1")

    @property
    def needs(self) -> Needs:
        return Needs(scores=True, selection=True, n_games=self.rounds - 1)

    def check(self, budget: Budget) -> None:
        self._first(self.lam).check(budget)
        _refuse_steps(budget)

    def n_losses(self, budget: Budget) -> int:
        return 3 + 2 * (self.rounds - 1)

    def _first(self, lam: float) -> ScoreBudget:
        return ScoreBudget(self.scale, lam, self.lower, self.upper)

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        amplitudes = (0.0, self.lam / 2, self.lam)
        tried = [(f"lam={lam:.4g}", self._first(lam).allocate(budget, scores)) for lam in amplitudes]
        assert trial is not None
        least, profile = best_of(tried, trial)
        params, bounds = budget.params, budget.bounds(self.lower, self.upper)
        for number in range(2, self.rounds + 1):
            denser, sparser = (_shifted(profile, by) for by in (-self.delta, self.delta))
            values = trial.shapley_values(denser, sparser) / (params * (sparser.sparsity - denser.sparsity))
            if values.max() <= 0:  # more weights help no block
                break
            z = np.log(np.maximum(values, FLOOR * values.max()))
            z -= np.average(z, weights=params)
            tried = [
                (f"round {number}, step={step:.4g}", budget.project(profile.sparsity - step * z, bounds))
                for step in (self.step / 2, self.step)
            ]
            reached, moved_to = best_of(tried, trial)
            if reached >= least:
                break
            least, profile = reached, moved_to
        return profile


@dataclass(frozen=True)
class ShapleyMargins:
    """Budgets at which another weight costs the same loss everywhere, by values at the margin, round after round.

    Each round evaluates a game in the pruned model, on weights that are pruned in advance: a present part (a block, its
    attention or its MLP, or a linear layer) has `delta` less sparsity than its budget, an absent one `delta` more, and the
    payoff is minus the loss. Its Aumann-Shapley values, by `nodes` nodes, take as many backward passes over `n_seq` payoff
    sequences, whatever the number of parts; each round reads the next sequences. Then s_l moves by `step` times the log of the
    value per weight that differs, centred, within 2 `step`; a value near 0 or below counts as 2 % of the median. A trial on
    `trial_n_seq` selection sequences follows; the profile with the least, and the uniform one, are pruned for real and measured
    on the whole selection text, and the better is taken. With `refresh` the statistics by which weights are pruned in advance
    are taken anew in each round, behind blocks that are pruned by its profile, and not once, in the dense model.

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
    refresh: bool = False
    lower: float | None = None
    upper: float | None = None
    granularity: Granularity = "linear"
    needs: ClassVar[Needs] = Needs(selection=True)

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

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False)
        _refuse_steps(budget)
        budget.check_bounds(self.lower, self.upper)

    def n_losses(self, budget: Budget) -> int:
        return 2

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        assert trial is not None
        uniform = ("uniform", budget.uniform())
        return best_of([uniform, self._best_round(budget, trial) or uniform], trial)[1]

    def _best_round(self, budget: Budget, trial: Trial) -> tuple[str, SparsityProfile] | None:
        """The profile of the round with the least loss by trial, and its label; None where more weights help no part."""
        profile = budget.uniform()
        params, bounds = budget.params, budget.bounds(self.lower, self.upper)
        tried = []
        for number in range(self.rounds):
            if self.refresh:
                trial.calibrate_behind(profile)
            denser, sparser = (_shifted(profile, by) for by in (-self.delta, self.delta))
            values = trial.marginal_values(denser, sparser, number * self.n_seq, self.n_seq, self.nodes)
            values /= params * (sparser.sparsity - denser.sparsity)
            if values.max() <= 0:  # more weights help no part
                break
            least = FLOOR * values.max() if np.median(values) <= 0 else FLOOR_OF_MEDIAN * np.median(values)
            z = np.log(np.maximum(values, least))
            z -= np.average(z, weights=params)
            profile = budget.project(profile.sparsity - self.step * np.clip(z, -2, 2), bounds)
            label = f"round {number + 1}"
            tried.append((trial.loss(profile, label, self.trial_n_seq, in_advance=True), label, profile))
        return min(tried, key=lambda one: one[0])[1:] if tried else None


@dataclass(frozen=True)
class MarginsAndInfluence(ShapleyMargins):
    """Budgets between those of values at the margin and of block influence: `influence` is the share of the latter.

    The best profile of the rounds of `ShapleyMargins` and that of `ScoreBudget` by the scores, with its usual scale and
    amplitude, are averaged; then as there, it and the uniform one are pruned for real, and the better is taken. Values at the
    margin are measured on little text of one kind, scores of the dense model by its activations: neither sees what the other
    does, and a mean of both is less of either's accidents. Scores are of blocks; finer parts share those of their block.

    Source: our choice; block influence is that of ShortGPT, arXiv 2403.03853.
    """

    influence: float = 0.5
    needs: ClassVar[Needs] = Needs(scores=True, as_fine=False, selection=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.influence <= 1:
            raise ValueError(f"influence={self.influence}: a share of the budget; choose 0 to 1, such as 0.5")

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        influence = ScoreBudget(lower=self.lower, upper=self.upper).allocate(budget, scores)
        assert trial is not None
        tried = [("uniform", budget.uniform())]
        if (best := self._best_round(budget, trial)) is not None:
            label, margins = best
            mixed = (1 - self.influence) * margins.sparsity + self.influence * influence.sparsity
            profile = budget.project(mixed, budget.bounds(self.lower, self.upper))
            tried.append((f"{label} and influence", profile))
        return best_of(tried, trial)[1]


def _refuse_steps(budget: Budget) -> None:
    if budget.pattern != UNSTRUCTURED:
        raise ValueError(
            f"pattern={budget.pattern}: rounds move budgets by less than its steps; use allocator=shapley, or "
            "pattern=unstructured"
        )


def _shifted(profile: SparsityProfile, by: float) -> SparsityProfile:
    sparsity = np.clip(profile.sparsity + by, 0.0, 1.0)
    return SparsityProfile(sparsity, profile.params, float(np.average(sparsity, weights=profile.params)))

"""Allocators that map scores, or nothing, to budgets."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from svnup.allocation import Allocator, Budget, Needs, Trial
from svnup.allocation.budget import Scale, project, rescale, split_block
from svnup.files import at_home, unsealed
from svnup.pattern import UNSTRUCTURED
from svnup.types import BlockScores, ExpertScores, Granularity, Players, SparsityProfile

logger = logging.getLogger(__name__)
Compare = Literal["trial", "off"]  # with the uniform budget
GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # as many for every option, so that none is tuned at more cost


@dataclass(frozen=True)
class Uniform:
    """Every block gets the target sparsity."""

    needs: ClassVar[Needs] = Needs()

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=True)

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        return budget.uniform()


@dataclass(frozen=True)
class ScoreBudget:
    """Densities linear in scaled scores, then projected onto the exact budget: blocks that matter keep more weights.

    z = scale(scores) in [0, 1]; k_l = 2 lam z_l - mean_p(2 lam z) + 1 - S; s_l = 1 - k_l, clipped to [lower, upper] with the
    parameter-weighted mean kept at S. `lower` and `upper` default to max(0, S - 0.3) and min(0.95, S + 0.2). Two controls that
    a useful score has to beat: `reverse` reverses the profile afterwards, 2 S - s_l within [0, 1]; `shuffle` is the
    seed by which scores are permuted over the blocks at random. `granularity` says what has scores and a budget of its own:
    each block, or its attention and its MLP; these then are the l above.

    `compare_uniform=trial` guards against scores that mislead: the profile and the uniform one are tried on the selection text,
    by weights that one pass over the calibration text prunes in advance, and where the uniform profile loses no more it is
    taken, with a warning.

    Source: the amplitude form (2 lam, mean restored) is that of OWL's released code, arXiv 2310.05175; its text bounds s_l by
    S +- lam instead. Scales, bounds and the exact projection are ours, since the budget map of arXiv 2505.01731 is not public.
    """

    scale: Scale = "log"
    lam: float = 0.15
    lower: float | None = None
    upper: float | None = None
    reverse: bool = False
    shuffle: int | None = None
    granularity: Players = "block"
    compare_uniform: Compare = "off"
    tuned_option: ClassVar[str] = "lam"

    def __post_init__(self) -> None:
        _check_amplitude(self.lam)
        if self.shuffle is not None and self.shuffle < 0:
            raise ValueError(f"shuffle={self.shuffle}: a seed; choose 0 or more, or null")

    @property
    def needs(self) -> Needs:
        compares = self.compare_uniform == "trial"
        return Needs(scores=True, selection=compares, once=compares)

    def grid(self, budget: Budget) -> tuple[float, ...]:
        return GRID

    def n_losses(self, budget: Budget) -> int:
        return 2 if self.compare_uniform == "trial" else 0

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False, granularity=self.granularity)
        budget.check_bounds(self.lower, self.upper)

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        z = rescale(_needed(scores).values, self.scale)
        if self.shuffle is not None:
            z = np.random.default_rng(self.shuffle).permutation(z)
        if _needed(scores).higher_is == "sparser":
            z = 1 - z
        wish = 1 - (2 * self.lam * (z - np.average(z, weights=budget.params)) + 1 - budget.sparsity)
        bounds = budget.bounds(self.lower, self.upper)
        if self.reverse:
            wish, bounds = 2 * budget.sparsity - project(wish, budget.params, budget.sparsity, *bounds), (0.0, 1.0)
        profile = budget.project(wish, bounds)
        if self.compare_uniform == "off":
            return profile
        assert trial is not None
        return _no_worse_than_uniform(profile, budget, trial)


@dataclass(frozen=True)
class ExpertBudget:
    """Inside each block of a mixture densities by the scores of its experts; what is of no expert, and each block, gets S.

    Inside a block it is the map of `ScoreBudget`, with its usual bounds. Scores that name no blocks are those of one.

    Source: our choice. Scores of experts are not compared between blocks, which have games of their own.
    """

    scale: Scale = "raw"
    lam: float = 0.15
    granularity: Literal["expert"] = "expert"
    needs: ClassVar[Needs] = Needs(scores=True)
    tuned_option: ClassVar[str] = "lam"

    def __post_init__(self) -> None:
        _check_amplitude(self.lam)

    def grid(self, budget: Budget) -> tuple[float, ...]:
        return GRID

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False, granularity=self.granularity)

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        values = _needed(scores).values
        if _needed(scores).higher_is == "sparser":
            values = -values
        blocks, units = np.zeros(len(values), dtype=np.int64), np.arange(len(values))
        if isinstance(scores, ExpertScores) and scores.units is not None:
            blocks, units = scores.blocks, scores.units
        sparsity = np.full(budget.n_units, budget.sparsity)
        for block in np.unique(blocks):
            own, at = values[blocks == block], units[blocks == block]
            scale: Scale = "raw" if self.scale == "log" and not own.max() > 0 else self.scale
            sparsity[at] = split_block(own, budget.params[at], budget.sparsity, self.lam, scale)
        return budget.in_steps(sparsity)


@dataclass(frozen=True)
class CountBudget:
    """Numbers of zeros, not densities, linear in the scores: LSA's map.

    With z the scores scaled to [0, 1] by minimum and maximum, a part of N weights loses S N + 2 lam (mean(z) - z) mean(N) of
    them, so that small parts spread more than large ones; then as for `ScoreBudget`, within the same bounds.

    Source: the released code of LSA, ICLR 2026, where lam is called beta and is chosen by S for blocks (0.1 at 60 %, 0.15 at
    70 %, 0.12 at 80 %), 0.07 for finer parts. Its blocks are of one size; it has no bounds.
    """

    lam: float = 0.15
    lower: float | None = None
    upper: float | None = None
    granularity: Granularity = "block"
    needs: ClassVar[Needs] = Needs(scores=True)
    tuned_option: ClassVar[str] = "lam"

    def __post_init__(self) -> None:
        _check_amplitude(self.lam)

    def grid(self, budget: Budget) -> tuple[float, ...]:
        return GRID

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False, granularity=self.granularity)
        budget.check_bounds(self.lower, self.upper)

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        z = rescale(_needed(scores).values, "raw")
        if _needed(scores).higher_is == "sparser":
            z = 1 - z
        sizes = budget.params / budget.params.mean()
        return budget.project(budget.sparsity + 2 * self.lam * (z.mean() - z) / sizes, budget.bounds(self.lower, self.upper))


@dataclass(frozen=True)
class Ratios:
    """Sparsities, not densities, proportional to a factor that is linear in the scores: AlphaPruning's map.

    r_l = 1 - epsilon + 2 epsilon minmax(score), turned round for scores whose higher is denser; s_l = r_l S sum(p) / sum(p r),
    no more than 1. Source: arXiv 2410.10912 section 3, and the released code, which weighs by parameters too but lets s_l
    exceed 1, where we project.
    """

    epsilon: float = 0.2
    needs: ClassVar[Needs] = Needs(scores=True)
    tuned_option: ClassVar[str] = "epsilon"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon}: sparsities lie between 1 - epsilon and 1 + epsilon; choose 0.2 to 0.3")

    def grid(self, budget: Budget) -> tuple[float, ...]:
        return GRID

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False)

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        z = rescale(_needed(scores).values, "raw")
        if _needed(scores).higher_is == "denser":
            z = 1 - z
        ratios = 1 - self.epsilon + 2 * self.epsilon * z
        return budget.project(ratios * budget.sparsity / np.average(ratios, weights=budget.params))


@dataclass(frozen=True)
class Atp:
    """Sparsities in arithmetic progression over depth, s_l = S - beta (n - 1) / 2 + beta l; no scores, no data.

    `beta` None is half of the largest that fits between 0 and 1, min(S, 1 - S) / (n - 1): ours, for want of a search. Blocks
    of unequal size are projected onto the exact budget. Source: arXiv 2502.14770, section 3: there beta is found by a grid
    search; `beta: auto` does that, on selection text.
    """

    beta: float | None = None
    needs: ClassVar[Needs] = Needs()
    tuned_option: ClassVar[str] = "beta"

    def grid(self, budget: Budget) -> tuple[float, ...]:
        largest = 2 * min(budget.sparsity, 1 - budget.sparsity) / max(1, budget.n_units - 1)
        return tuple(largest * step / (len(GRID) - 1) for step in range(len(GRID)))

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False)
        largest = self.grid(budget)[-1]
        if self.beta is not None and not abs(self.beta) <= largest + 1e-12:
            raise ValueError(
                f"beta={self.beta}: with {budget.n_units} blocks at sparsity={budget.sparsity:g} sparsities would leave "
                f"[0, 1]; choose at most {largest:.4g}, or null"
            )

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        n = budget.n_units
        beta = self.grid(budget)[-1] / 2 if self.beta is None else self.beta
        return budget.project(budget.sparsity + beta * (np.arange(n, dtype=np.float64) - (n - 1) / 2))


@dataclass(frozen=True)
class FromFile:
    """A profile from a JSON file as runs write it (`profile.json`): sparsity per block, params, target, pattern."""

    path: str

    @property
    def needs(self) -> Needs:
        return Needs(whole_blocks=self._read().linears is None)

    def _read(self) -> SparsityProfile:
        if not self.path or not at_home("path", self.path).is_file():
            raise ValueError(f"path={self.path or chr(39) * 2}: no such profile; name a profile.json of a run")
        try:
            data = json.loads(at_home("path", self.path).read_text(encoding="utf-8"))
            return SparsityProfile.from_dict(unsealed(data))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"path={self.path}: not a sparsity profile ({reason}); use a profile.json of a run") from None

    def check(self, budget: Budget) -> None:
        profile = self._read()
        if len(profile.sparsity) != budget.n_units:
            raise ValueError(
                f"path={self.path}: a profile of {len(profile.sparsity)} blocks, and the model has {budget.n_units}; "
                "use one of this model"
            )
        if abs(profile.target - budget.sparsity) > 1e-6:
            raise ValueError(
                f"path={self.path}: its target is {profile.target:g}, but sparsity={budget.sparsity:g}; "
                f"add sparsity={profile.target:g}"
            )
        budget.check_pattern(uniform=bool(np.ptp(profile.sparsity) < 1e-9))
        if profile.linears is not None and budget.pattern != UNSTRUCTURED:
            raise ValueError(
                f"pattern={budget.pattern}: {self.path} divides blocks among their linear layers; use pattern=unstructured"
            )

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        self.check(budget)
        profile = self._read()
        try:
            if profile.pattern != budget.pattern or profile.params.tolist() != budget.params.tolist():
                if profile.linears is not None:
                    raise ValueError(f"it divides blocks of {profile.params.tolist()} weights among their linear layers")
                return budget.in_steps(profile.sparsity if profile.requested is None else profile.requested)
            return profile
        except ValueError as error:
            raise ValueError(
                f"path={self.path}: does not fit the blocks of this model: {error}; use one of this model"
            ) from None


def _no_worse_than_uniform(profile: SparsityProfile, budget: Budget, trial: Trial) -> SparsityProfile:
    """The profile, or the uniform one where that loses no more by trial."""
    uniform = budget.uniform()
    if np.allclose(profile.sparsity, uniform.sparsity, rtol=0, atol=1e-9):
        return profile
    scored, even = trial.losses([("scores", profile), ("uniform", uniform)], in_advance=True, keep=False)
    trial.took("scores" if scored < even else "uniform")
    if scored < even:
        return profile
    logger.warning(
        "allocator.compare_uniform=trial: the uniform budget is taken, which loses %.4f nats per token on selection text, by "
        "trial, where the budget by scores loses %.4f; to prune by the scores all the same, add compare_uniform=off",
        even,
        scored,
    )
    return uniform


def _check_amplitude(lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam}: an amplitude of densities; choose 0 to 1, such as 0.15")


def _needed(scores: BlockScores | None) -> BlockScores:
    if scores is None:
        raise ValueError("scorer=null: this allocator needs scores; leave its scorer as its yaml has it")
    return scores


@dataclass(frozen=True)
class Tuned:
    """An allocator whose option is chosen on held-out text: of its grid the value with the least loss, and the uniform profile
    where none beats it."""

    allocator: Any

    @property
    def needs(self) -> Needs:
        needs: Needs = self.allocator.needs
        return replace(needs, selection=True, once=False)

    def check(self, budget: Budget) -> None:
        self.allocator.check(budget)

    def candidates(self, budget: Budget) -> dict[str, Allocator]:
        """The allocators to try, by what tells them apart."""
        knob = self.allocator.tuned_option
        return {f"{knob}={v:.4g}": replace(self.allocator, **{knob: v}) for v in self.allocator.grid(budget)}

    def n_losses(self, budget: Budget) -> int:
        return len(self.candidates(budget))

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        assert trial is not None
        profiles = [(label, candidate.allocate(budget, scores)) for label, candidate in self.candidates(budget).items()]
        return best_of(profiles, trial)[1]


def best_of(tried: Sequence[tuple[str, SparsityProfile]], trial: Trial) -> tuple[float, SparsityProfile]:
    """The least loss of labelled profiles and the one that has it, the first of equals."""
    losses = trial.losses(tried)
    index = int(np.argmin(losses))
    return losses[index], tried[index][1]

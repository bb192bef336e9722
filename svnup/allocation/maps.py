"""Allocators that map scores, or nothing, to budgets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from svnup.allocation import Allocator, Loss
from svnup.allocation.projection import Scale, bounds_of, check_bounds, check_pattern, in_steps, project, rescale, to_budget
from svnup.files import unsealed
from svnup.pattern import UNSTRUCTURED
from svnup.types import BlockScores, Ints, Players, SparsityProfile

GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)  # as many for every knob, so that none is tuned at more cost


@dataclass(frozen=True)
class Uniform:
    """Every block gets the target sparsity."""

    uniform_only: ClassVar[bool] = True

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        check_pattern(sparsity, pattern, self.uniform_only)

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        return in_steps(np.full(len(params), sparsity), params, sparsity, pattern)


@dataclass(frozen=True)
class ScoreBudget:
    """Densities linear in scaled scores, then projected onto the exact budget: blocks that matter keep more weights.

    z = scale(scores) in [0, 1]; k_l = 2 lam z_l - mean_p(2 lam z) + 1 - S; s_l = 1 - k_l, clipped to [lower, upper] with the
    parameter-weighted mean kept at S. `lower` and `upper` default to max(0, S - 0.3) and min(0.95, S + 0.2). Two controls that
    a useful score has to beat: `reverse` turns the profile upside down afterwards, 2 S - s_l within [0, 1]; `shuffle` is the
    seed by which scores are dealt to the blocks at random. `granularity` says what has scores and a budget of its own: each
    block, or its attention and its MLP; these then are the l above.

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
    uniform_only: ClassVar[bool] = False
    knob: ClassVar[str] = "lam"

    def __post_init__(self) -> None:
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam={self.lam}: an amplitude of densities; choose 0 to 1, such as 0.15")
        if self.shuffle is not None and self.shuffle < 0:
            raise ValueError(f"shuffle={self.shuffle}: a seed; choose 0 or more, or null")

    def grid(self, n_blocks: int, sparsity: float) -> tuple[float, ...]:
        return GRID

    def bounds(self, sparsity: float) -> tuple[float, float]:
        return bounds_of(sparsity, self.lower, self.upper)

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        check_pattern(sparsity, pattern, self.uniform_only)
        if self.granularity == "sublayer" and pattern != UNSTRUCTURED:
            raise ValueError(
                f"pattern={pattern}: the linears of a block share its N; add allocator.granularity=block, or use "
                "pattern=unstructured"
            )
        check_bounds(*self.bounds(sparsity), sparsity)

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        z = rescale(_needed(scores).values, self.scale)
        if self.shuffle is not None:
            z = np.random.default_rng(self.shuffle).permutation(z)
        if _needed(scores).higher_is == "sparser":
            z = 1 - z
        wish = 1 - (2 * self.lam * (z - np.average(z, weights=params)) + 1 - sparsity)
        if not self.reverse:
            return to_budget(wish, params, sparsity, pattern, self.bounds(sparsity))
        return to_budget(2 * sparsity - project(wish, params, sparsity, *self.bounds(sparsity)), params, sparsity, pattern)


@dataclass(frozen=True)
class Ratios:
    """Sparsities, not densities, proportional to a factor that is linear in the scores: AlphaPruning's map.

    r_l = 1 - epsilon + 2 epsilon minmax(score), turned round for scores whose higher is denser; s_l = r_l S sum(p) / sum(p r),
    no more than 1. Source: arXiv 2410.10912 section 3, and the released code, which weighs by parameters too but lets s_l
    exceed 1, where we project.
    """

    epsilon: float = 0.2
    uniform_only: ClassVar[bool] = False
    knob: ClassVar[str] = "epsilon"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise ValueError(f"epsilon={self.epsilon}: sparsities lie between 1 - epsilon and 1 + epsilon; choose 0.2 to 0.3")

    def grid(self, n_blocks: int, sparsity: float) -> tuple[float, ...]:
        return GRID

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        check_pattern(sparsity, pattern, self.uniform_only)

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        z = rescale(_needed(scores).values, "raw")
        if _needed(scores).higher_is == "denser":
            z = 1 - z
        ratios = 1 - self.epsilon + 2 * self.epsilon * z
        return to_budget(ratios * sparsity / np.average(ratios, weights=params), params, sparsity, pattern)


@dataclass(frozen=True)
class Atp:
    """Sparsities in arithmetic progression over depth, s_l = S - beta (n - 1) / 2 + beta l; no scores, no data.

    `beta` None is half of the largest that fits between 0 and 1, min(S, 1 - S) / (n - 1): ours, for want of a search. Blocks
    of unequal size are projected onto the exact budget. Source: arXiv 2502.14770, section 3: there beta is found by a grid
    search; `beta: auto` does that, on selection text.
    """

    beta: float | None = None
    uniform_only: ClassVar[bool] = False
    knob: ClassVar[str] = "beta"

    def grid(self, n_blocks: int, sparsity: float) -> tuple[float, ...]:
        largest = 2 * min(sparsity, 1 - sparsity) / max(1, n_blocks - 1)
        return tuple(largest * step / (len(GRID) - 1) for step in range(len(GRID)))

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        check_pattern(sparsity, pattern, self.uniform_only)
        largest = self.grid(n_blocks, sparsity)[-1]
        if self.beta is not None and not abs(self.beta) <= largest + 1e-12:
            raise ValueError(
                f"beta={self.beta}: with {n_blocks} blocks at sparsity={sparsity:g} sparsities would leave [0, 1]; "
                f"choose at most {largest:.4g}, or null"
            )

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        n = len(params)
        beta = self.grid(n, sparsity)[-1] / 2 if self.beta is None else self.beta
        return to_budget(sparsity + beta * (np.arange(n, dtype=np.float64) - (n - 1) / 2), params, sparsity, pattern)


@dataclass(frozen=True)
class FromFile:
    """A profile from a JSON file as runs write it (`profile.json`): sparsity per block, params, target, pattern."""

    path: str
    uniform_only: ClassVar[bool] = False

    @property
    def divided(self) -> bool:
        """Whether the profile says what the linears of a block get."""
        return self._read().linears is not None

    def _read(self) -> SparsityProfile:
        if not self.path or not Path(self.path).expanduser().is_file():
            raise ValueError(f"path={self.path or chr(39) * 2}: no such profile; name a profile.json of a run")
        try:
            data = json.loads(Path(self.path).expanduser().read_text(encoding="utf-8"))
            return SparsityProfile.from_dict(unsealed(data))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"path={self.path}: not a sparsity profile ({reason}); use a profile.json of a run") from None

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        profile = self._read()
        if len(profile.sparsity) != n_blocks:
            raise ValueError(
                f"path={self.path}: a profile of {len(profile.sparsity)} blocks, and the model has {n_blocks}; "
                "use one of this model"
            )
        if abs(profile.target - sparsity) > 1e-6:
            raise ValueError(
                f"path={self.path}: its target is {profile.target:g}, but sparsity={sparsity:g}; "
                f"add sparsity={profile.target:g}"
            )
        check_pattern(sparsity, pattern, bool(np.ptp(profile.sparsity) < 1e-9))
        if profile.linears is not None and pattern != UNSTRUCTURED:
            raise ValueError(f"pattern={pattern}: {self.path} divides blocks among their linears; use pattern=unstructured")

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        self.check(len(params), sparsity, pattern)
        profile = self._read()
        try:
            if profile.pattern != pattern or profile.params.tolist() != params.tolist():
                if profile.linears is not None:
                    raise ValueError(f"it divides blocks of {profile.params.tolist()} weights among their linears")
                budget = profile.sparsity if profile.requested is None else profile.requested
                return in_steps(budget, params, sparsity, pattern)
            return profile
        except ValueError as error:
            raise ValueError(
                f"path={self.path}: does not fit the blocks of this model: {error}; use one of this model"
            ) from None


def _needed(scores: BlockScores | None) -> BlockScores:
    if scores is None:
        raise ValueError("scorer=null: this allocator needs scores; leave its scorer as its yaml has it")
    return scores


@dataclass(frozen=True)
class Tuned:
    """An allocator whose knob is chosen on held-out text: of its grid the value with the least loss, and the uniform profile
    where none beats it."""

    allocator: Any
    uniform_only: ClassVar[bool] = False

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        self.allocator.check(n_blocks, sparsity, pattern)

    def candidates(self, n_blocks: int, sparsity: float) -> dict[str, Allocator]:
        """The allocators to try, by what tells them apart."""
        knob = self.allocator.knob
        return {f"{knob}={v:.4g}": replace(self.allocator, **{knob: v}) for v in self.allocator.grid(n_blocks, sparsity)}

    def n_losses(self, n_blocks: int, sparsity: float) -> int:
        return len(self.candidates(n_blocks, sparsity))

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile:
        assert loss is not None
        candidates = self.candidates(len(params), sparsity).items()
        profiles = [(label, candidate.allocate(scores, params, sparsity, pattern)) for label, candidate in candidates]
        return best_of(profiles, loss)[1]


def best_of(tried: Sequence[tuple[str, SparsityProfile]], loss: Loss) -> tuple[float, SparsityProfile]:
    """The least loss of labelled profiles and the one that has it, the first of equals."""
    losses = loss.many(tried)
    index = int(np.argmin(losses))
    return losses[index], tried[index][1]

"""A budget of sparsity, and the exact projection of wished sparsities onto it, its bounds and its pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from svnup.pattern import UNSTRUCTURED, Pattern
from svnup.types import Floats, Granularity, Ints, SparsityProfile

Scale = Literal["clip", "rank", "log", "raw"]
Bounds = tuple[float, float]  # the least and the largest sparsity of a part


@dataclass(frozen=True, eq=False)
class Budget:
    """What an allocator divides: of all prunable weights the share `sparsity` goes, under a `pattern`.

    `params` (n,) has the weights of each part that gets a sparsity of its own: of blocks, of attention and MLP by turns (2n
    of n blocks), or of linear layers.
    """

    params: Ints
    sparsity: float
    pattern: str = UNSTRUCTURED

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", np.asarray(self.params, dtype=np.int64))

    @classmethod
    def of_equal(cls, n_units: int, sparsity: float, pattern: str = UNSTRUCTURED) -> Self:
        """That of parts of one size: where only their number is known, before a model is."""
        return cls(np.ones(n_units, dtype=np.int64), sparsity, pattern)

    @property
    def n_units(self) -> int:
        return len(self.params)

    def uniform(self) -> SparsityProfile:
        """Every part at the sparsity of the whole."""
        return self.in_steps(np.full(self.n_units, self.sparsity))

    def project(self, wish: Floats, bounds: Bounds = (0.0, 1.0)) -> SparsityProfile:
        """The one way from wished sparsities (n,) to a profile: projected onto the exact budget within `bounds`."""
        return self.in_steps(project(wish, self.params, self.sparsity, *bounds))

    def in_steps(self, sparsity: Floats) -> SparsityProfile:
        """The profile of sparsities (n,) that meet the budget: under 'mixed:M' rounded so that part l loses N_l of every M.

        Each part gets the N nearest to its sparsity, at most M - 1; then those that rounding moved most in one direction go a
        step back, as long as that moves the total nearer to the target (among equals the first part keeps more).
        """
        pattern = Pattern.parse(self.pattern)
        if pattern.group is None or not pattern.mixed:
            return SparsityProfile(sparsity, self.params, self.sparsity, self.pattern)
        m = pattern.group
        steps = np.clip(np.floor(sparsity * m + 0.5), 0, m - 1)
        weights, off = np.asarray(self.params, dtype=np.float64), sparsity * m - steps  # off > 0: it wants to lose more
        while True:
            excess = float(weights @ (steps - self.sparsity * m))
            step = -1 if excess > 0 else 1
            fits = (steps + step >= 0) & (steps + step <= m - 1) & (np.abs(excess + step * weights) < abs(excess) - 1e-9)
            if not fits.any():
                return SparsityProfile(steps / m, self.params, self.sparsity, self.pattern, requested=sparsity)
            gain = np.where(fits, step * off, -np.inf)
            best = len(gain) - 1 - int(np.argmax(gain[::-1])) if step > 0 else int(np.argmax(gain))
            steps[best] += step
            off[best] -= step

    def bounds(self, lower: float | None = None, upper: float | None = None) -> Bounds:
        """The least and the largest sparsity of a part, by default max(0, S - 0.3) and min(0.95, S + 0.2)."""
        usual = usual_bounds(self.sparsity)
        return (usual[0] if lower is None else lower, usual[1] if upper is None else upper)

    def check_bounds(self, lower: float | None = None, upper: float | None = None) -> None:
        """Raise ValueError where no profile within these bounds meets the budget."""
        check_bounds(*self.bounds(lower, upper), self.sparsity)

    def check_pattern(self, uniform: bool, granularity: Granularity = "block") -> None:
        """Raise ValueError where the pattern does not go with the sparsity, or with what an allocator makes of it.

        Args:
            uniform: all parts get the same sparsity, which a fixed N:M needs.
            granularity: the parts; under a pattern they are blocks.
        """
        pattern, sparsity = Pattern.parse(self.pattern), self.sparsity
        if pattern.group is None:
            return
        named = f"pattern={self.pattern}"
        if pattern.zeros is None:
            most = (pattern.group - 1) / pattern.group
            if sparsity > most:
                raise ValueError(
                    f"{named}: leaves every block at least 1 of {pattern.group} weights, but sparsity={sparsity:g}; "
                    f"choose at most {most:g}, or pattern=unstructured"
                )
        elif abs(sparsity - (fixed := pattern.zeros / pattern.group)) > 1e-9:
            raise ValueError(f"{named}: prunes {fixed:g} of the weights, but sparsity={sparsity:g}; add sparsity={fixed:g}")
        elif not uniform:
            raise ValueError(
                f"{named}: a fixed N:M has the same sparsity in every block; add allocator=uniform, or use pattern=unstructured"
            )
        if granularity != "block":
            raise ValueError(
                f"{named}: the linear layers of a block share its N; "
                "add allocator.granularity=block, or use pattern=unstructured"
            )


def split_block(scores: Floats, sizes: Ints, sparsity: float, lam: float, scale: Scale = "log") -> Floats:
    """Divide a block's budget among its linear layers: higher scores (n,) keep more, exactly at the block's sparsity.

    The same map as `ScoreBudget` inside the block; bounds max(0, s - 0.3) and max(s, min(0.95, s + 0.2)).
    """
    z = rescale(scores, scale)
    wish = sparsity - 2 * lam * (z - np.average(z, weights=sizes))
    lower, upper = usual_bounds(sparsity)
    return project(wish, sizes, sparsity, lower, max(sparsity, upper))


def rescale(scores: Floats, scale: Scale) -> Floats:
    """Scores (n,) to z (n,) in [0, 1] with the order kept; constant scores give zeros.

    clip: winsorised to the 5 % and 95 % quantiles, min-max; rank: average ranks, min-max; log: log(max(x, 1e-4 max x)),
    min-max; raw: min-max. `log` raises ValueError where no score is positive.
    """
    x = np.asarray(scores, dtype=np.float64)
    if np.ptp(x) == 0:
        return np.zeros_like(x)
    if scale == "clip":
        x = np.clip(x, *np.quantile(x, [0.05, 0.95]))
    elif scale == "rank":
        x = ((x[:, None] > x).sum(1) + (x[:, None] >= x).sum(1)).astype(np.float64)
    elif scale == "log":
        if x.max() <= 0:
            raise ValueError(f"allocator.scale=log: no score is positive ({x}); choose clip, rank or raw")
        x = np.log(np.maximum(x, 1e-4 * x.max()))
    spread = np.ptp(x)
    return (x - x.min()) / spread if spread > 0 else np.zeros_like(x)


def project(wish: Floats, params: Ints, target: float, lower: float, upper: float) -> Floats:
    """The nearest profile of the form clip(wish - tau, lower, upper) whose parameter-weighted mean is `target`.

    Shapes (n,). Raises ValueError where lower <= target <= upper does not hold.
    """
    check_bounds(lower, upper, target)
    weights = np.asarray(params) / np.sum(params)
    low, high = float(wish.min() - upper), float(wish.max() - lower)  # tau there: all at upper, all at lower
    before = None
    while before != (low, high):
        before, tau = (low, high), (low + high) / 2
        if weights @ np.clip(wish - tau, lower, upper) > target:
            low = tau
        else:
            high = tau
    sparsity = np.clip(wish - high, lower, upper)
    free = (sparsity > lower) & (sparsity < upper)
    if free.any():  # what bisection leaves, about 1e-17
        sparsity[free] += (target - weights @ sparsity) / weights[free].sum()
    return np.clip(sparsity, lower, upper)


def usual_bounds(sparsity: float) -> Bounds:
    """max(0, S - 0.3) and min(0.95, S + 0.2)."""
    return max(0.0, sparsity - 0.3), min(0.95, sparsity + 0.2)


def check_bounds(lower: float, upper: float, sparsity: float) -> None:
    """Raise ValueError where no profile between two bounds has a mean sparsity."""
    if not 0 <= lower <= upper <= 1:
        raise ValueError(f"lower={lower:g}, upper={upper:g}: bounds of sparsity must satisfy 0 <= lower <= upper <= 1")
    if not lower <= sparsity <= upper:
        raise ValueError(
            f"lower={lower:g}, upper={upper:g}: no profile between these bounds has mean sparsity={sparsity:g}; "
            "widen the bounds"
        )

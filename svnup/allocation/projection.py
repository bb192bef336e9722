"""Exact projection of wished sparsities onto a budget, bounds and patterns."""

from __future__ import annotations

from typing import Literal

import numpy as np

from svnup.pattern import parse_pattern
from svnup.types import Floats, Ints, SparsityProfile

Scale = Literal["clip", "rank", "log", "raw"]


def to_budget(
    wish: Floats, params: Ints, target: float, pattern: str, bounds: tuple[float, float] = (0.0, 1.0)
) -> SparsityProfile:
    """The one way from wished sparsities per block (n,) to a profile: projected onto the exact budget within `bounds`."""
    return in_steps(project(wish, params, target, *bounds), params, target, pattern)


def check_pattern(sparsity: float, pattern: str, uniform: bool) -> None:
    """Raise ValueError where a fixed N:M pattern meets another sparsity than N/M, or a profile that is not uniform."""
    group = parse_pattern(pattern)
    if group is None:
        return
    if group[0] is None:
        if sparsity > (group[1] - 1) / group[1]:
            raise ValueError(
                f"pattern={pattern}: leaves every block at least 1 of {group[1]} weights, but sparsity={sparsity:g}; "
                f"choose at most {(group[1] - 1) / group[1]:g}, or pattern=unstructured"
            )
        return
    if abs(sparsity - group[0] / group[1]) > 1e-9:
        raise ValueError(
            f"pattern={pattern}: prunes {group[0] / group[1]:g} of the weights, but sparsity={sparsity:g}; "
            f"add sparsity={group[0] / group[1]:g}"
        )
    if not uniform:
        raise ValueError(
            f"pattern={pattern}: a fixed N:M has the same sparsity in every block; add allocator=uniform, "
            "or use pattern=unstructured"
        )


def in_steps(budget: Floats, params: Ints, target: float, pattern: str) -> SparsityProfile:
    """The profile of a budget (n,): under a pattern 'mixed:M' rounded so that block l loses N_l of every M weights.

    Each block gets the N nearest to its budget, at most M - 1; then those that rounding moved most in one direction go a step
    back, as long as that brings the total nearer to the target (among equals the first block keeps more).
    """
    group = parse_pattern(pattern)
    if group is None or group[0] is not None:
        return SparsityProfile(budget, params, target, pattern)
    m = group[1]
    steps = np.clip(np.floor(budget * m + 0.5), 0, m - 1)
    weights, off = np.asarray(params, dtype=np.float64), budget * m - steps  # off > 0: the block wants to lose more
    while True:
        excess = float(weights @ (steps - target * m))
        step = -1 if excess > 0 else 1
        fits = (steps + step >= 0) & (steps + step <= m - 1) & (np.abs(excess + step * weights) < abs(excess) - 1e-9)
        if not fits.any():
            return SparsityProfile(steps / m, params, target, pattern, requested=budget)
        gain = np.where(fits, step * off, -np.inf)
        best = len(gain) - 1 - int(np.argmax(gain[::-1])) if step > 0 else int(np.argmax(gain))
        steps[best] += step
        off[best] -= step


def split_block(scores: Floats, sizes: Ints, sparsity: float, lam: float, scale: Scale = "log") -> Floats:
    """Divide a block's budget among its linears: higher scores (n,) keep more, exactly at the block's sparsity.

    The same map as `ScoreBudget` inside the block; bounds max(0, s - 0.3) and max(s, min(0.95, s + 0.2)).
    """
    z = rescale(scores, scale)
    wish = sparsity - 2 * lam * (z - np.average(z, weights=sizes))
    lower, upper = bounds_of(sparsity)
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
    low, high = (
        float(wish.min() - upper),
        float(wish.max() - lower),
    )  # tau = low: all at upper; tau = high: all at lower
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


def bounds_of(sparsity: float, lower: float | None = None, upper: float | None = None) -> tuple[float, float]:
    """The least and the largest sparsity of a block; by default max(0, S - 0.3) and min(0.95, S + 0.2)."""
    return (
        max(0.0, sparsity - 0.3) if lower is None else lower,
        min(0.95, sparsity + 0.2) if upper is None else upper,
    )


def check_bounds(lower: float, upper: float, sparsity: float) -> None:
    """Raise ValueError where no profile between two bounds has a mean sparsity."""
    if not 0 <= lower <= upper <= 1:
        raise ValueError(f"lower={lower:g}, upper={upper:g}: bounds of sparsity must satisfy 0 <= lower <= upper <= 1")
    if not lower <= sparsity <= upper:
        raise ValueError(
            f"lower={lower:g}, upper={upper:g}: no profile between these bounds has mean sparsity={sparsity:g}; "
            "widen the bounds"
        )

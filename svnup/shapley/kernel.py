"""Regression estimates of Shapley values: paired KernelSHAP and leverage-score sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from svnup.shapley import Game, Ledger, describe
from svnup.shapley.stopping import Stopping, check_stop
from svnup.types import Bools, Floats, ShapleyValues

GROUPS = 10


@dataclass(frozen=True)
class Kernel:
    """Least squares of payoffs on membership, with the sum of the values fixed to v(full) - v(empty).

    Coalitions are drawn in complementary pairs, with replacement; within a size all are equally likely. The standard error is
    a jackknife over ten groups of pairs.

    Args:
        budget: the most evaluations.
        seed: of the sample.
        sampling: `kernel` draws the size s with probability proportional to 1 / (s (n - s)) and gives all coalitions one
            weight; `leverage` draws all sizes equally often and weighs by 1 / (s (n - s)).
        stop: {stderr: x} or {rank_tau: x} ends early, checked after each tenth of the sample.

    Source: Lundberg and Lee 2017 (arXiv 1705.07874); pairing and the constrained solution: Covert and Lee 2021
    (arXiv 2012.01536); leverage scores: Musco and Witter 2024 (arXiv 2410.01917).
    """

    budget: int
    seed: int = 0
    sampling: Literal["kernel", "leverage"] = "kernel"
    stop: dict[str, float] | None = None

    def __post_init__(self) -> None:
        check_stop(self.stop)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: choose 0 or more")

    def check(self, n_players: int) -> None:
        least = 2 + 2 * max(GROUPS, 2 * n_players)
        if self.budget < least:
            raise ValueError(
                f"budget={self.budget}: a regression on {n_players} players with a standard error needs "
                f"{max(GROUPS, 2 * n_players)} pairs of coalitions; the least budget is {least}"
            )

    def _pairs(self, n: int) -> Bools:
        """Coalitions and their complements, (n_pairs, 2, n)."""
        n_pairs = (self.budget - 2) // 2
        rng = np.random.default_rng(self.seed)
        sizes = np.arange(1, n)
        chance = 1 / (sizes * (n - sizes)) if self.sampling == "kernel" else np.ones(n - 1)
        drawn = rng.choice(sizes, n_pairs, p=chance / chance.sum()) if n > 1 else np.ones(n_pairs, dtype=np.int64)
        ranks = rng.random((n_pairs, n)).argsort(axis=1).argsort(axis=1)
        coalitions = ranks < drawn[:, None]
        return np.stack([coalitions, ~coalitions], axis=1)

    def plan(self, n_players: int) -> Bools:
        ends = np.stack([np.zeros(n_players, dtype=bool), np.ones(n_players, dtype=bool)])
        return np.unique(np.concatenate([ends, self._pairs(n_players).reshape(-1, n_players)]), axis=0)

    def estimate(self, game: Game) -> ShapleyValues:
        n = game.n_players
        self.check(n)
        ledger = Ledger(game)
        ends = np.stack([np.zeros(n, dtype=bool), np.ones(n, dtype=bool)])
        pairs = self._pairs(n)
        first = max(GROUPS, 2 * n)
        step = max(1, (len(pairs) - first) // 10)
        rounds = [*range(first, len(pairs), step), len(pairs)] if self.stop is not None else [len(pairs)]
        stopping, payoffs = Stopping(self.stop), np.zeros((0, 2))
        for end in rounds:
            asked = pairs[len(payoffs) : end].reshape(-1, n)
            known = ledger(np.concatenate([ends, asked]))
            payoffs = np.concatenate([payoffs, known[2:].reshape(-1, 2)])
            values, stderr = self._fit(pairs[:end], payoffs, known[0], known[1])
            if stopping.enough(values, stderr):
                break
        return ledger.report(describe(self), values, known[1], stderr, stopping.reason)

    def _fit(self, pairs: Bools, payoffs: Floats, v_empty: float, v_full: float) -> tuple[Floats, Floats]:
        n = pairs.shape[-1]
        sizes = pairs.sum(axis=-1)
        weights = 1 / (sizes * (n - sizes)) if self.sampling == "leverage" and n > 1 else np.ones(sizes.shape)
        groups = np.arange(len(pairs)) % GROUPS

        def solve(chosen: Bools) -> Floats:
            x = pairs[chosen].reshape(-1, n).astype(np.float64)
            return constrained_least_squares(
                x, payoffs[chosen].reshape(-1) - v_empty, weights[chosen].reshape(-1), v_full - v_empty
            )

        values = solve(np.ones(len(pairs), dtype=bool))
        left_out = np.array([solve(groups != group) for group in range(GROUPS)])
        spread = ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0)
        return values, np.sqrt((GROUPS - 1) / GROUPS * spread)


def constrained_least_squares(x: Floats, y: Floats, weights: Floats, total: float) -> Floats:
    """Minimise sum_i weights_i (y_i - x_i phi)^2 over phi with sum phi = total; of several minima the one of least norm.

    phi is total / n in each entry plus the solution among vectors whose entries sum to 0.

    Args:
        x: (m, n).
        y: (m,).
        weights: (m,).
        total: the sum of phi.

    Returns:
        phi, float64 (n,).
    """
    n = x.shape[1]
    even = np.full(n, total / n)
    centre = np.eye(n) - 1 / n
    root = np.sqrt(weights)[:, None]
    rest, *_ = np.linalg.lstsq(root * (x @ centre), root[:, 0] * (y - x @ even), rcond=1e-10)
    out: Floats = even + centre @ rest
    return out

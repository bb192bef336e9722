"""Permutation sampling of Shapley values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svnup.shapley import Game, Ledger, describe
from svnup.shapley.stopping import Stopping, check_stop
from svnup.types import Bools, Floats, Ints, ShapleyValues

ROUNDS = 10


@dataclass(frozen=True)
class Permutation:
    """Mean marginal contribution over random orders of the players.

    An order costs n - 1 evaluations besides the empty and the full coalition.

    Args:
        budget: the most evaluations.
        seed: of the orders.
        antithetic: follow each order by its reverse; a pair is one independent sample of the standard error.
        truncation: a fraction t: an order ends at the first coalition whose payoff is within t * |v(full) - v(empty)| of
            v(full), and the players after it contribute 0. This saves evaluations and biases the values; prefixes are shared
            less, since orders then grow step by step.
        stop: {stderr: x} or {rank_tau: x} ends early, checked after each tenth of the samples.

    Source: Castro, Gomez, Tejada 2009; antithetic pairs: Mitchell et al. 2022 (arXiv 2104.12199); truncation: Ghorbani
    and Zou 2019 (arXiv 1904.02868).
    """

    budget: int
    seed: int = 0
    antithetic: bool = True
    truncation: float | None = None
    stop: dict[str, float] | None = None

    def __post_init__(self) -> None:
        check_stop(self.stop)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: choose 0 or more")
        if self.truncation is not None and not 0 < self.truncation < 1:
            raise ValueError(f"truncation={self.truncation}: a fraction of v(full) - v(empty) in (0, 1), such as 0.01, or null")

    def check(self, n_players: int) -> None:
        least = 2 + 2 * self._orders_per_sample * max(1, n_players - 1)
        if self.budget < least:
            raise ValueError(
                f"budget={self.budget}: a standard error needs two samples of {self._orders_per_sample} orders of "
                f"{n_players} players; the least budget is {least}"
            )

    @property
    def _orders_per_sample(self) -> int:
        return 2 if self.antithetic else 1

    def _orders(self, n: int) -> Ints:
        """Orders of the players, (n_samples, orders per sample, n)."""
        n_samples = (self.budget - 2) // (self._orders_per_sample * max(1, n - 1))
        rng = np.random.default_rng(self.seed)
        forward = np.array([rng.permutation(n) for _ in range(n_samples)])
        return np.stack([forward, forward[:, ::-1]], axis=1) if self.antithetic else forward[:, None]

    def _chains(self, orders: Ints) -> Bools:
        """For each order its n + 1 coalitions from the empty to the full one, bool (..., n + 1, n)."""
        n = orders.shape[-1]
        rank = np.argsort(orders, axis=-1)
        return rank[..., None, :] < np.arange(n + 1)[:, None]

    def plan(self, n_players: int) -> Bools:
        return np.unique(self._chains(self._orders(n_players)).reshape(-1, n_players), axis=0)

    def estimate(self, game: Game) -> ShapleyValues:
        n = game.n_players
        self.check(n)
        ledger = Ledger(game)
        orders = self._orders(n)
        # Without a stopping rule, one call: the more coalitions at a time, the more prefixes are shared.
        n_rounds = min(ROUNDS, len(orders) // 2) if self.stop is not None else 1
        stopping, samples = Stopping(self.stop), np.zeros((0, n))
        for chunk in np.array_split(orders, n_rounds):
            payoffs = self._payoffs(ledger, self._chains(chunk))
            marginals = np.empty(chunk.shape)
            np.put_along_axis(marginals, chunk, np.diff(payoffs, axis=-1), axis=-1)
            samples = np.concatenate([samples, marginals.mean(axis=1)])
            values, stderr = samples.mean(axis=0), samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
            if stopping.enough(values, stderr):
                break
        return ledger.report(describe(self), values, payoffs[0, 0, -1], stderr, stopping.reason)

    def _payoffs(self, ledger: Ledger, chains: Bools) -> Floats:
        """Payoffs along chains (..., n + 1, n) -> (..., n + 1); a truncated chain keeps the payoff of the full coalition."""
        n = chains.shape[-1]
        if self.truncation is None:
            return ledger(chains.reshape(-1, n)).reshape(chains.shape[:-1])
        flat = chains.reshape(-1, n + 1, n)
        ends = ledger(flat[0, [0, n]])
        payoffs = np.full(flat.shape[:2], ends[1])
        payoffs[:, 0] = ends[0]
        going = np.ones(len(flat), dtype=bool)
        for length in range(1, n):
            if going.any():
                payoffs[going, length] = ledger(flat[going, length])
                going &= np.abs(ends[1] - payoffs[:, length]) > self.truncation * abs(ends[1] - ends[0])
        return payoffs.reshape(chains.shape[:-1])

"""Permutation sampling of Shapley values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svnup.shapley import Game, Ledger, describe
from svnup.types import Bools, Ints, ShapleyValues


@dataclass(frozen=True)
class Permutation:
    """Mean marginal contribution over random orders of the players, with at most `budget` evaluations.

    An order costs n - 1 evaluations besides the empty and the full coalition. With `antithetic` each order is followed by
    its reverse, and the pair counts as one independent sample of the standard error.

    Source: Castro, Gomez, Tejada 2009; antithetic pairs: Mitchell et al. 2022 (arXiv 2104.12199).
    """

    budget: int
    seed: int = 0
    antithetic: bool = True

    def check(self, n_players: int) -> None:
        least = 2 + 2 * self._orders_per_sample * (n_players - 1)
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
        """Per order the n + 1 growing coalitions from nobody to everybody, bool (..., n + 1, n)."""
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
        chains = self._chains(orders)
        payoffs = ledger(chains.reshape(-1, n)).reshape(chains.shape[:-1])
        marginals = np.empty(orders.shape)
        np.put_along_axis(marginals, orders, np.diff(payoffs, axis=-1), axis=-1)
        samples = marginals.mean(axis=1)
        stderr = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
        return ledger.report(describe(self), samples.mean(axis=0), payoffs[0, 0, -1], stderr)

"""Exact Shapley values by enumeration."""

from __future__ import annotations

from dataclasses import dataclass

from svnup.shapley import MAX_PLAYERS, Game, Ledger, all_coalitions, describe, exact_values
from svnup.types import Bools, ShapleyValues


@dataclass(frozen=True)
class Exact:
    """Exact values, phi_l = sum over Q without l of |Q|! (n-|Q|-1)! / n! [v(Q + l) - v(Q)].

    Cost: 2^n evaluations and 2^n - 1 block-forwards.

    Source: Shapley 1953; arXiv 2505.01731 takes blocks as players.
    """

    def check(self, n_players: int) -> None:
        if n_players > MAX_PLAYERS:
            n, w = n_players, 5
            windows = (n - w + 2) * 2 ** (w - 1)
            raise ValueError(
                f"shapley=exact: needs 2^{n} = {2**n:.2g} evaluations for {n} blocks (at most {MAX_PLAYERS} blocks): choose "
                f"shapley=sliding_window (w={w}: {windows} evaluations) or shapley=permutation (a budget from {4 * n - 2})"
            )

    def plan(self, n_players: int) -> Bools:
        return all_coalitions(n_players)

    def estimate(self, game: Game) -> ShapleyValues:
        self.check(game.n_players)
        ledger = Ledger(game)
        payoffs = ledger(self.plan(game.n_players))
        return ledger.report(describe(self), exact_values(payoffs), payoffs[-1])

"""Aumann-Shapley values on block gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from svnup.shapley import Game, Ledger, describe
from svnup.types import Bools, Floats, ShapleyValues


class GatedGame(Game, Protocol):
    """A game whose players can be present in degrees."""

    def gate_gradient(self, gate: float) -> Floats:
        """Derivative of the payoff by each player's degree of presence where all degrees are `gate`, (n_players,)."""
        ...


@dataclass(frozen=True)
class Gates:
    """Aumann-Shapley values: the integral over t in [0, 1] of dv / dg_l where every gate g is t.

    A gate scales a block's residual update. The cost is `nodes` backward passes for any number of blocks; each is a forward
    pass, the recomputation of each block and its backward, about 4 forward passes. The empty and the full coalition are
    evaluated for the efficiency gap, which here is the error of the quadrature.

    Args:
        nodes: number of Gauss-Legendre nodes.

    Source: Aumann and Shapley 1974; for gates on network units: Integrated gradients, Sundararajan et al. 2017
    (arXiv 1703.01365).
    """

    nodes: int = 8
    gated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise ValueError(f"nodes={self.nodes}: choose at least 1, such as 8")

    def check(self, n_players: int) -> None: ...

    def plan(self, n_players: int) -> Bools:
        return np.ones((1, n_players), dtype=bool)

    def estimate(self, game: GatedGame) -> ShapleyValues:
        ledger = Ledger(game)
        points, weights = np.polynomial.legendre.leggauss(self.nodes)
        gradients = [game.gate_gradient(float(point + 1) / 2) for point in points]
        values = (weights[:, None] / 2 * np.array(gradients)).sum(axis=0)
        v_full = ledger(self.plan(game.n_players))[0]
        return ledger.report(describe(self), values, v_full, n_backward=self.nodes)

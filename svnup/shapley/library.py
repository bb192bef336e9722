"""Approximators of the library shapiq (an optional extra: pip install 'svnup[shapiq]')."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np

from svnup.shapley import Game, Ledger, describe
from svnup.types import Bools, ShapleyValues


@dataclass(frozen=True)
class Shapiq:
    """Shapley values by an approximator of shapiq.

    Args:
        approximator: name of its class (KernelSHAP, SVARM, StratifiedSamplingSV, ...).
        budget: the most evaluations.
        seed: of its sample.

    Raises:
        ValueError: shapiq is not installed, or has no such approximator.

    Source: Muschalik et al. 2024 (shapiq).
    """

    approximator: str
    budget: int
    seed: int = 0

    def _class(self) -> Any:
        try:
            from shapiq import approximator
        except ImportError:
            raise ValueError(
                f"approximator={self.approximator}: shapiq is not installed; pip install 'svnup[shapiq]'"
            ) from None
        found = getattr(approximator, self.approximator, None)
        if not inspect.isclass(found):
            names = [name for name, value in vars(approximator).items() if inspect.isclass(value)]
            raise ValueError(
                f"approximator={self.approximator}: shapiq has no such class; choose among {', '.join(sorted(names))}"
            )
        return found

    def check(self, n_players: int) -> None:
        self._class()
        if self.budget < 2 * n_players:
            raise ValueError(f"budget={self.budget}: choose at least {2 * n_players}, twice the number of players")

    def plan(self, n_players: int) -> Bools:
        """The coalitions that it evaluates on a game of zeros; an adaptive approximator evaluates others on a real game."""
        asked: list[Bools] = []

        def zeros(coalitions: Bools) -> Any:
            asked.append(np.asarray(coalitions, dtype=bool).reshape(-1, n_players))
            return np.zeros(len(asked[-1]))

        self._approximate(zeros, n_players)
        return np.unique(np.concatenate([*asked, np.ones((1, n_players), dtype=bool)]), axis=0)

    def _approximate(self, game: Any, n: int) -> Any:
        found = self._class()
        options: dict[str, Any] = {"n": n, "random_state": self.seed}
        if "index" in inspect.signature(found).parameters:
            options["index"] = "SV"
        if "max_order" in inspect.signature(found).parameters:
            options["max_order"] = 1
        return found(**options).approximate(self.budget, game)

    def estimate(self, game: Game) -> ShapleyValues:
        n = game.n_players
        self.check(n)
        ledger = Ledger(game)
        v_full = ledger(np.ones((1, n), dtype=bool))[0]
        found = self._approximate(lambda rows: ledger(np.asarray(rows, dtype=bool).reshape(-1, n)), n)
        values = np.array([found[(player,)] for player in range(n)])
        return ledger.report(describe(self), values, v_full)

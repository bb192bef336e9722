"""Shapley values of any game on a bool matrix: pure numpy on a callable, one file per estimator."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from svnup.types import Bools, Cost, Floats, Ints, ShapleyValues

MAX_PLAYERS = 20  # whose coalitions are enumerated


class Game(Protocol):
    """A cooperative game: payoffs of coalitions, bool (m, n_players) to float64 (m,).

    Optional attributes that estimators use where they exist: `v_empty` (the payoff of nobody as a reference point),
    `n_evaluations` and `n_block_forwards` (the work done so far), `absent_costs` (an absent player costs a block-forward too).
    """

    n_players: int

    def __call__(self, coalitions: Bools) -> Floats: ...


class Estimator(Protocol):
    """A way to estimate the Shapley values of a game; a frozen dataclass of its options."""

    def check(self, n_players: int) -> None:
        """Raise ValueError where the method cannot work with so many players, naming the option and the way out."""
        ...

    def plan(self, n_players: int) -> Bools:
        """The coalitions it evaluates, bool (m, n_players), known before the first is: for plans, shards and costs."""
        ...

    def estimate(self, game: Game) -> ShapleyValues: ...


def all_coalitions(n: int) -> Bools:
    """All coalitions of n players, bool (2^n, n), in lexicographic order (the first player is the most significant bit)."""
    return (np.arange(2**n)[:, None] >> np.arange(n)[::-1] & 1).astype(bool)


def branch_points(ordered: Bools | Ints) -> np.ndarray:
    """For distinct rows, those that begin alike together: the index at which each departs from the one before (or 0)."""
    departs = np.argmax(ordered[1:] != ordered[:-1], axis=1)
    return np.concatenate([np.zeros(min(1, len(ordered))), departs]).astype(np.int64)


def block_forwards(coalitions: Bools, absent_costs: bool = False) -> int:
    """Block-forwards of one depth-first walk over shared prefixes: a present block costs one, an absent one nothing
    (or one as well, where absent means pruned)."""
    ordered = np.unique(coalitions, axis=0)
    fresh = np.arange(ordered.shape[1]) >= branch_points(ordered)[:, None]
    return int((fresh if absent_costs else fresh & ordered).sum())


class Ledger:
    """A game as an estimator sees it: passes coalitions on and keeps the books, so that every method reports cost alike.

    The full cost is that of the same calls on a game that knows nothing yet, whatever a memo saved this time.
    """

    def __init__(self, game: Game) -> None:
        self.game, self.n_players = game, game.n_players
        self._asked = np.zeros((0, game.n_players), dtype=bool)
        self._forwards = 0
        self._start = time.perf_counter()
        self._before = self._work()

    def _work(self) -> tuple[int, int] | None:
        work = tuple(getattr(self.game, name, None) for name in ("n_evaluations", "n_block_forwards"))
        return None if None in work else work  # type: ignore[return-value]

    def __call__(self, coalitions: Bools) -> Floats:
        payoffs = self.game(coalitions)
        known = len(self._asked)
        union, first = np.unique(np.concatenate([self._asked, coalitions]), axis=0, return_index=True)
        if (first >= known).any():
            self._forwards += block_forwards(union[first >= known], getattr(self.game, "absent_costs", False))
        self._asked = union
        return payoffs

    def report(
        self,
        method: str,
        values: Floats,
        v_full: float | None = None,
        stderr: Floats | None = None,
        stopped: str | None = None,
        n_backward: int = 0,
    ) -> ShapleyValues:
        """Values with their cost. What the method did not ask of nobody and of all is asked last, as a reference that is no
        part of its cost."""
        seconds = time.perf_counter() - self._start
        full = (len(self._asked), self._forwards)
        after = self._work()
        new = full
        if after is not None and self._before is not None:
            new = (after[0] - self._before[0], after[1] - self._before[1])
        cost = Cost(*full, *new, seconds, n_backward)
        v_empty = getattr(self.game, "v_empty", None)
        if v_empty is None:
            v_empty = self.game(np.zeros((1, self.n_players), dtype=bool))[0]
        if v_full is None:
            v_full = self.game(np.ones((1, self.n_players), dtype=bool))[0]
        return ShapleyValues(
            values, method, cost=cost, stderr=stderr, v_empty=float(v_empty), v_full=float(v_full), stopped=stopped
        )


def exact_values(payoffs: Floats) -> Floats:
    """Shapley values (n,) from the payoffs (2^n,) of all coalitions in lexicographic order (Shapley 1953)."""
    n = int(payoffs.size).bit_length() - 1
    sizes = all_coalitions(n).sum(axis=1)
    weight = _coalition_weights(n)
    cube, size_cube = payoffs.reshape((2,) * n), sizes.reshape((2,) * n)
    values = np.empty(n)
    for player in range(n):
        without, with_player = np.take(cube, 0, axis=player), np.take(cube, 1, axis=player)
        values[player] = (weight[np.take(size_cube, 0, axis=player)] * (with_player - without)).sum()
    return values


def _coalition_weights(n: int) -> Floats:
    """|Q|! (n - |Q| - 1)! / n! for |Q| = 0..n-1."""
    weights = np.empty(n)
    weights[0] = 1 / n
    for size in range(1, n):
        weights[size] = weights[size - 1] * size / (n - size)
    return weights


def describe(estimator: Any) -> str:
    """A method and its options in one line, as results name it."""
    options = ", ".join(f"{k}={v}" for k, v in vars(estimator).items() if not k.startswith("_"))
    return f"{type(estimator).__name__}({options})"

"""Shapley values of any cooperative game, in pure numpy: one file per estimator."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np

from svnup.types import Bools, Cost, Floats, Ints, ShapleyValues

MAX_PLAYERS = 20  # of a game whose coalitions are enumerated


class Game(Protocol):
    """A cooperative game: maps coalitions, bool (m, n_players), to payoffs, float64 (m,).

    Estimators use these attributes if a game has them: `v_empty`, the payoff of the empty coalition; `n_evaluations` and
    `n_block_forwards`, the work done so far; `absent_costs`, whether an absent player costs a block-forward too;
    `forwards_each`, the block-forwards of each coalition where coalitions share none.
    """

    n_players: int

    def __call__(self, coalitions: Bools) -> Floats: ...


class Estimator(Protocol):
    """Estimates the Shapley values of a game; a frozen dataclass of its options."""

    def check(self, n_players: int) -> None:
        """Raise ValueError if the method does not work with this number of players; it names the option and the fix."""
        ...

    def plan(self, n_players: int) -> Bools:
        """The coalitions that it evaluates, bool (m, n_players), for plans, shards and costs."""
        ...

    def estimate(self, game: Game) -> ShapleyValues:
        """The values of the players and what they cost; raises ValueError as `check`."""
        ...


def all_coalitions(n: int) -> Bools:
    """All coalitions of n players, bool (2^n, n), in lexicographic order (the first player is the most significant bit)."""
    return (np.arange(2**n)[:, None] >> np.arange(n)[::-1] & 1).astype(bool)


def branch_points(ordered: Bools | Ints) -> np.ndarray:
    """The first index at which each row differs from the one before, int64 (m,); 0 for the first row.

    Args:
        ordered: distinct rows (m, n), in an order that keeps rows with a common prefix together.
    """
    departs = np.argmax(ordered[1:] != ordered[:-1], axis=1)
    return np.concatenate([np.zeros(min(1, len(ordered))), departs]).astype(np.int64)


def block_forwards(coalitions: Bools, absent_costs: bool = False) -> int:
    """Block-forwards of a depth-first walk over shared prefixes.

    Args:
        coalitions: bool (m, n).
        absent_costs: whether an absent block costs a block-forward like a present one, as a pruned replacement does.
    """
    ordered = np.unique(coalitions, axis=0)
    fresh = np.arange(ordered.shape[1]) >= branch_points(ordered)[:, None]
    return int((fresh if absent_costs else fresh & ordered).sum())


class Ledger:
    """A game that counts what an estimator asks of it, so that all methods report their cost in the same way.

    The full cost is that of the same calls on a game with an empty memo.
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
            self._forwards += self._cost(union[first >= known])
        self._asked = union
        return payoffs

    def _cost(self, coalitions: Bools) -> int:
        each = getattr(self.game, "forwards_each", None)
        if each is not None:
            return len(coalitions) * int(each)
        return block_forwards(coalitions, getattr(self.game, "absent_costs", False))

    def report(
        self,
        method: str,
        values: Floats,
        v_full: float | None = None,
        stderr: Floats | None = None,
        stopped: str | None = None,
        n_backward: int = 0,
    ) -> ShapleyValues:
        """The values with their cost.

        Payoffs of the empty and the full coalition that the method did not ask for are evaluated last and are not counted.

        Args:
            method: the name and options of the method.
            values: Shapley values, float64 (n_players,).
            v_full: payoff of the full coalition; None evaluates it.
            stderr: standard errors, float64 (n_players,).
            stopped: why a converging method stopped.
            n_backward: backward passes that it took.
        """
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
    """Exact Shapley values, float64 (n,).

    Args:
        payoffs: of all coalitions in lexicographic order, float64 (2^n,).

    Source: Shapley 1953.
    """
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
    """The weights |Q|! (n - |Q| - 1)! / n! for |Q| = 0..n-1."""
    weights = np.empty(n)
    weights[0] = 1 / n
    for size in range(1, n):
        weights[size] = weights[size - 1] * size / (n - size)
    return weights


def describe(estimator: Any) -> str:
    """The name and options of an estimator in one line, as results have it."""
    options = ", ".join(f"{k}={v}" for k, v in vars(estimator).items() if not k.startswith("_"))
    return f"{type(estimator).__name__}({options})"

"""Sliding-window Shapley values (SWSV)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from svnup.shapley import MAX_PLAYERS, Game, Ledger, all_coalitions, describe, exact_values
from svnup.types import Bools, Ints, ShapleyValues


@dataclass(frozen=True)
class SlidingWindow:
    """Exact Shapley values of the game of each window of neighbouring blocks, averaged over windows.

    window=1 is leave-one-out, window=n is exact. With present context and stride 1 it takes (n-w+2) 2^(w-1) evaluations and
    2^(w-1) - 1 + 2^(w-2) (n-w+1)(n-w+2) block-forwards.

    Args:
        window: number of blocks w of a window.
        context: whether the blocks outside a window are present or absent.
        aggregation: `mean` over the windows that contain a block (fewer at the edges), or the window `centred` on it.
        stride: blocks between the starts of windows; one window ends at the last block in any case.

    Source: the sliding-window approximation of arXiv 2505.01731 by its abstract; its window size and aggregation are not
    public, so these options and defaults are ours.
    """

    window: int = 5
    context: Literal["present", "absent"] = "present"
    aggregation: Literal["mean", "centred"] = "mean"
    stride: int = 1

    def check(self, n_players: int) -> None:
        if not 1 <= self.window <= n_players:
            raise ValueError(f"window={self.window}: the game has {n_players} players; choose 1 to {n_players}")
        if self.window > MAX_PLAYERS:
            raise ValueError(f"window={self.window}: takes 2^{self.window} evaluations a window; choose at most {MAX_PLAYERS}")
        if not 1 <= self.stride <= self.window:
            raise ValueError(f"stride={self.stride}: choose 1 to window={self.window}, so that windows cover every block")

    def _starts(self, n: int) -> Ints:
        last = n - self.window
        return np.unique([*range(0, last, self.stride), last])

    def _coalitions(self, n: int) -> Bools:
        """The 2^w coalitions of each window, bool (n_windows, 2^w, n)."""
        starts = self._starts(n)
        coalitions = np.full((len(starts), 2**self.window, n), self.context == "present")
        for one, start in zip(coalitions, starts, strict=True):
            one[:, start : start + self.window] = all_coalitions(self.window)
        return coalitions

    def plan(self, n_players: int) -> Bools:
        return np.unique(self._coalitions(n_players).reshape(-1, n_players), axis=0)

    def estimate(self, game: Game) -> ShapleyValues:
        n = game.n_players
        self.check(n)
        ledger = Ledger(game)
        payoffs = ledger(self._coalitions(n).reshape(-1, n))
        v_full = payoffs[2**self.window - 1] if self.context == "present" else None  # in no window with absent context
        local = np.array([exact_values(v) for v in payoffs.reshape(-1, 2**self.window)])
        return ledger.report(describe(self), self._aggregate(local, n), v_full)

    def _aggregate(self, local: np.ndarray, n: int) -> np.ndarray:
        """Values of windows (n_windows, w) to values of blocks (n,)."""
        starts = self._starts(n)
        if self.aggregation == "centred":
            centres = starts + (self.window - 1) / 2
            nearest = [int(np.argmin(np.where(self._covers(starts, b), np.abs(centres - b), np.inf))) for b in range(n)]
            return np.array([local[a, b - starts[a]] for b, a in enumerate(nearest)])
        total, count = np.zeros(n), np.zeros(n)
        for start, values in zip(starts, local, strict=True):
            total[start : start + self.window] += values
            count[start : start + self.window] += 1
        return total / count

    def _covers(self, starts: Ints, block: int) -> Bools:
        return (starts <= block) & (block < starts + self.window)

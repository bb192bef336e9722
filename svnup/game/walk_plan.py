"""The order in which coalitions are walked, so that the blocks of a shared prefix run once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svnup.shapley import branch_points
from svnup.types import Bools, Ints


@dataclass(frozen=True)
class WalkPlan:
    """A depth-first walk over distinct coalitions, and what it costs.

    Attributes:
        resume: for each coalition the depth from which it is computed: where it differs from the one before, or earlier if the
            hidden states there were dropped.
        kept: for each coalition a bit mask; bit d says that the hidden states at depth d are kept after it.
        n_evaluations: number of coalitions.
        n_block_forwards: block-forwards of the walk.
        peak_states: the most different hidden states held at a time.
    """

    resume: list[int]
    kept: list[int]
    n_evaluations: int
    n_block_forwards: int
    peak_states: int

    @classmethod
    def of(cls, coalitions: Bools | Ints, absent_costs: bool | Bools = False, max_states: int | None = None) -> WalkPlan:
        """Plan a walk.

        Args:
            coalitions: (m, n_players), distinct and in lexicographic order. If all absent players cost, integers may stand for
                versions of a block, in any order that keeps rows with a common prefix together.
            absent_costs: whether absent players are run too: all of them, or each, bool (n_players,).
            max_states: the most hidden states to hold; None is no limit.
        """
        starts = branch_points(coalitions).tolist()
        kept = [0] * len(coalitions)
        for i in range(len(coalitions) - 2, -1, -1):
            kept[i] = kept[i + 1] & ((1 << starts[i + 1]) - 1) | 1 << starts[i + 1]
        costs = np.where(absent_costs, 1, coalitions)
        peak, held, resume, forwards = 0, 1, [], 0
        for i, start in enumerate(starts):
            depth = max(d for d in range(start + 1) if held >> d & 1)
            resume.append(depth)
            forwards += int(costs[i, depth:].sum())
            # Depth 0 is the embedding, which is always kept. A state that was dropped is kept again only if the walk passes it.
            kept[i] = (kept[i] & (held | ~((1 << depth + 1) - 1))) | 1
            while max_states is not None and _n_states(costs[i], kept[i]) > max_states - 1 and kept[i] > 1:
                lowest = (kept[i] & ~1) & -(kept[i] & ~1)
                kept[i] &= ~lowest
            held = kept[i]
            peak = max(peak, _n_states(costs[i], held))
        return cls(resume, kept, len(coalitions), forwards, peak + 1)


def _n_states(row: Bools | Ints, kept: int) -> int:
    """Number of different hidden states at the kept depths of a coalition: a skipped block does not change them."""
    depths: Ints = np.concatenate([[0], np.cumsum(row)])
    return len({int(depths[d]) for d in range(len(depths)) if kept >> d & 1})

"""The order in which coalitions are walked, so that the blocks that they begin with in common run once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svnup.shapley import branch_points
from svnup.types import Bools, Ints


@dataclass(frozen=True)
class WalkPlan:
    """A depth-first walk over distinct coalitions in lexicographic order, and what it costs. `absent_costs` says whether absent
    players are run, too, all or each (n_players,); where all are, any whole numbers may stand for what a block is, and any
    order will do in which those with a common prefix are together.

    `resume` is the depth from which each coalition is computed, where it leaves the one before unless those states had to be
    dropped; bit d of `kept` says that the hidden states at depth d stay after that coalition; `peak_states` is the largest
    number of different hidden states held at a time.
    """

    resume: list[int]
    kept: list[int]
    n_evaluations: int
    n_block_forwards: int
    peak_states: int

    @classmethod
    def of(cls, coalitions: Bools | Ints, absent_costs: bool | Bools = False, max_states: int | None = None) -> WalkPlan:
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
            # Depth 0 is the embedding, which is always at hand. What was dropped earlier only comes back if passed again.
            kept[i] = (kept[i] & (held | ~((1 << depth + 1) - 1))) | 1
            while max_states is not None and _n_states(costs[i], kept[i]) > max_states - 1 and kept[i] > 1:
                lowest = (kept[i] & ~1) & -(kept[i] & ~1)
                kept[i] &= ~lowest
            held = kept[i]
            peak = max(peak, _n_states(costs[i], held))
        return cls(resume, kept, len(coalitions), forwards, peak + 1)


def _n_states(row: Bools | Ints, kept: int) -> int:
    """Different hidden states among the kept depths of a coalition: a skipped block hands on the same one."""
    depths: Ints = np.concatenate([[0], np.cumsum(row)])
    return len({int(depths[d]) for d in range(len(depths)) if kept >> d & 1})

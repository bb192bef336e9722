"""The order in which coalitions are walked, so that the blocks of a shared prefix run once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svnup.shapley import branch_points
from svnup.types import Bools, Ints


@dataclass(frozen=True)
class WalkPlan:
    """A walk over distinct coalitions, and what it costs: depth first from group to group, breadth first inside a group.

    A block is run for all coalitions of a group before the next block is. Groups of one are a depth-first walk, with the fewest
    hidden states. Larger ones are for models whose blocks have to be loaded to the device: once for a group.

    Attributes:
        groups: the coalitions of each group, a slice of rows.
        resume: for each group the depth from which it is computed: where its coalitions first differ from one another or from
            those before, or earlier if the hidden states there were dropped.
        kept: for each group a bit mask; bit d says that the hidden states of its last coalition at depth d are kept after it.
        n_evaluations: number of coalitions.
        n_block_forwards: block-forwards of the walk.
        n_loads: loads of a block (or sublayer) to the device, if there is one at a time.
        peak_states: the most different hidden states held at a time, without those that a block is reading.
        together: coalitions of a group, at most.
    """

    groups: list[slice]
    resume: list[int]
    kept: list[int]
    n_evaluations: int
    n_block_forwards: int
    n_loads: int
    peak_states: int
    together: int = 1

    @property
    def order(self) -> str:
        """The order of the walk in words."""
        return "depth first" if self.together == 1 else f"breadth first in groups of {self.together}"

    @classmethod
    def of(
        cls,
        coalitions: Bools | Ints,
        absent_costs: bool | Bools = False,
        max_states: int | None = None,
        together: int = 1,
    ) -> WalkPlan:
        """Plan a walk.

        Args:
            coalitions: (m, n_players), distinct and in lexicographic order. If all absent players cost, integers may stand for
                versions of a block, in any order that keeps rows with a common prefix together.
            absent_costs: whether absent players are run too: all of them, or each, bool (n_players,).
            max_states: the most hidden states to hold beside those of a group of several; None is no limit.
            together: coalitions of a group.
        """
        branches, n = branch_points(coalitions).tolist(), len(coalitions)
        groups = [slice(i, min(i + together, n)) for i in range(0, n, together)]
        starts = [min(branches[group]) for group in groups]
        kept = [0] * len(groups)
        for i in range(len(groups) - 2, -1, -1):
            kept[i] = kept[i + 1] & ((1 << starts[i + 1]) - 1) | 1 << starts[i + 1]
        costs = np.where(absent_costs, 1, coalitions)
        peak, held, resume, forwards, loads = 0, 1, [], 0, 0
        for i, (group, start) in enumerate(zip(groups, starts, strict=True)):
            depth = max(d for d in range(start + 1) if held >> d & 1)
            resume.append(depth)
            first, *others = range(group.start, group.stop)
            forwards += int(costs[first, depth:].sum()) + sum(int(costs[row, branches[row] :].sum()) for row in others)
            loads += int(costs[group, depth:].any(0).sum())
            last = costs[group.stop - 1]
            # Depth 0 is the embedding, which is always kept. A state that was dropped is kept again only if the walk passes it.
            kept[i] = (kept[i] & (held | ~((1 << depth + 1) - 1))) | 1
            while max_states is not None and _n_states(last, kept[i]) > max_states - 1 and kept[i] > 1:
                lowest = (kept[i] & ~1) & -(kept[i] & ~1)
                kept[i] &= ~lowest
            held = kept[i]
            peak = max(peak, _n_states(last, held) + len(others))
        return cls(groups, resume, kept, n, forwards, loads, peak + 1, together)


def _n_states(row: Bools | Ints, kept: int) -> int:
    """Number of different hidden states at the kept depths of a coalition: a skipped block does not change them."""
    depths: Ints = np.concatenate([[0], np.cumsum(row)])
    return len({int(depths[d]) for d in range(len(depths)) if kept >> d & 1})

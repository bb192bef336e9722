"""The game of experts: those of one block are players, and the payoff is how well the model works with some of them."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from svnup.game.coalition_game import TOGETHER, CoalitionGame, Payoff, max_states
from svnup.model.language_model import LanguageModel, MicroBatch
from svnup.model.linears import rerouted, without_experts
from svnup.progress import stage
from svnup.types import Bools

Absence = Literal["spread", "drop"]


class ExpertGame(CoalitionGame):
    """A cooperative game on the experts of one block; all other blocks are whole.

    Payoffs are those of `svnup.game.layer_game.LayerGame`. The hidden states that enter the block are computed once. A
    coalition costs the block and those behind it, of which coalitions share nothing.

    Args:
        lm: the model.
        tokens: payoff text, int64 (n_seq, seq_len).
        block: index of the block.
        entering: the text as it enters the block; None computes it.
        payoff: what a coalition is paid.
        absence: `spread`: the weight of a token's routes to absent experts goes to the present ones among those that it is
            routed to, in proportion to their weights; where there are none, its experts give nothing. `drop`: it is lost.
        cache_dir: the folder of the memo; None keeps it in memory.
        weights: fingerprint of the model, where it is known.

    Attributes:
        experts: names of the players in the block.
        forwards_each: block-forwards of one coalition.
        n_block_forwards: block-forwards of coalitions. What leads to the block is not counted, nor is the one forward of the
            full coalition that `kl` and `recip_ppl` need.

    Raises:
        ValueError: the block has no experts, its experts take no routes, or a loss is not finite.

    Source: our choice; arXiv 2505.01731 takes blocks as players.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokens: np.ndarray | Tensor,
        block: int,
        entering: list[MicroBatch] | None = None,
        *,
        payoff: Payoff = "neg_nll",
        absence: Absence = "spread",
        cache_dir: str | Path | None = None,
        weights: str | None = None,
    ) -> None:
        self.experts = lm.experts(block)
        if not self.experts:
            raise ValueError(f"block {block} of {type(lm.model).__name__} has no experts; choose a block that has some")
        self.block, self.absence = block, absence
        self.forwards_each = lm.n_blocks - block
        self._given = entering
        super().__init__(
            lm,
            torch.as_tensor(tokens),
            len(self.experts),
            payoff,
            "none",
            cache_dir,
            weights,
            experts_of=block,
            absence=absence,
        )

    @staticmethod
    def _name(coalition: Bools) -> str:
        """One hexadecimal digit for four experts: there may be hundreds, and claims are files of this name."""
        return np.packbits(coalition).tobytes().hex()

    @torch.inference_mode()
    def _walk(self, coalitions: Bools) -> int:
        together = 1
        if self.lm.offloaded:  # so that a block is loaded once for a group
            together = min(TOGETHER, max(1, max_states(self.lm, self._entering) // 2))
        with stage("coalitions", len(coalitions), "coalitions") as advance:
            for start in range(0, len(coalitions), together):
                rows = coalitions[start : start + together]
                states = [self._run_own(row) for row in rows]
                for index in range(self.block + 1, self.lm.n_blocks):
                    states = [self._run(index, one) for one in states]
                for row, one in zip(rows, states, strict=True):
                    self._memo.add(self._name(row), self._payoff_of(one, self._name(row)))
                    advance(1)
        return len(coalitions) * self.forwards_each

    def _run_own(self, present: Bools) -> list[MicroBatch]:
        change, states = without_experts(torch.from_numpy(present), self.absence == "spread"), self._entering
        with rerouted(self.lm.blocks[self.block], self.experts, change):
            return self._run(self.block, states)

    def _run(self, index: int, states: list[MicroBatch]) -> list[MicroBatch]:
        return [self.lm.run_block(index, batch) for batch in states]

    @cached_property
    def _entering(self) -> list[MicroBatch]:
        if self._given is not None:
            return self._given
        states = self._batches
        for index in range(self.block):
            states = self._run(index, states)
        return states

    @cached_property
    def _states_of_all(self) -> list[MicroBatch]:
        with torch.inference_mode():
            states = self._entering
            for index in range(self.block, self.lm.n_blocks):
                states = self._run(index, states)
            return states

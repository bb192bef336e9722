"""Weights pruned in advance: what a profile makes of each linear layer, without a calibration pass of its own."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from svnup.model.language_model import LanguageModel, matrix
from svnup.progress import stage
from svnup.pruning.walk import Inputs, Pruner
from svnup.types import Ints, SparsityProfile


class PrunedInAdvance:
    """Pruned weights of every linear layer at any sparsity, by statistics of the dense model that are taken once.

    `prune_model` takes the statistics of a block behind blocks that are pruned already; here they are the dense model's, so
    that a profile is put together in the time that its matrices take. Matrices are kept, the last used ones, in at most
    `max_bytes`.

    Args:
        tokens: calibration text, int64 (n_seq, seq_len), unused where the pruner needs no inputs.

    Raises:
        ValueError: the model is offloaded, or a matrix cannot be pruned.

    Source: the database of levels of EvoPress (arXiv 2410.14649); ours makes a level when it is asked for.
    """

    def __init__(self, lm: LanguageModel, pruner: Pruner, tokens: Ints, max_bytes: int = 2**32) -> None:
        if lm.offloaded:
            raise ValueError("offload: pruned weights beside the dense ones need both in memory; use offload=none")
        self._lm, self._pruner, self._max_bytes, self._bytes = lm, pruner, max_bytes, 0
        self._inputs: list[Inputs] = []
        self._kept: OrderedDict[tuple[int, str, float], Tensor] = OrderedDict()
        if not pruner.needs_inputs:
            return
        with torch.inference_mode(), stage("statistics", lm.n_blocks, "blocks") as advance:
            for visit in lm.walk(tokens):
                inputs = Inputs(visit.linears, pruner, n_first=0)
                inputs.collect(visit, advance=True)
                self._inputs.append(inputs)
                advance(1)

    @torch.inference_mode()
    def weight(self, index: int, name: str, sparsity: float) -> Tensor:
        """The weights of a linear layer of block `index` at a sparsity, in the shape of its parameter."""
        key = (index, name, round(sparsity, 9))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        linear = self._lm.linears(index)[name]
        stats = self._inputs[index].stats(name) if self._pruner.needs_inputs else None
        try:
            pruned = self._pruner.prune(matrix(linear), stats, sparsity)
        except ValueError as error:
            raise ValueError(f"stage trial: block {index}, {name}: {error}") from error
        self._kept[key] = pruned = pruned if matrix(linear) is linear.weight else pruned.T
        self._bytes += pruned.numel() * pruned.element_size()
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= gone.numel() * gone.element_size()
        return pruned

    def block(self, index: int, profile: SparsityProfile) -> dict[str, Tensor]:
        """The weights of a block by parameter name, as a profile of blocks or of their linear layers asks."""
        names = self._lm.linears(index)
        return {f"{name}.weight": self.weight(index, name, profile.of(index, name)) for name in names}

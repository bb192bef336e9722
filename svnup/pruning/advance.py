"""Weights pruned in advance: what a profile makes of each linear layer, without a calibration pass of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from svnup.model.language_model import LanguageModel
from svnup.model.linears import by_parameter, is_transposed, matrix
from svnup.progress import stage
from svnup.pruning.walk import Inputs, Pruner
from svnup.types import Ints, SparsityProfile

MAX_BYTES = 2**32  # of matrices that are kept


class PrunedInAdvance:
    """Pruned weights of every linear layer at any sparsity, by statistics that are taken once.

    `prune_model` takes the statistics of a block behind blocks that are pruned already; here they are the dense model's, or
    those behind blocks that are pruned by a profile `behind`, so that another profile is put together in the time that its
    matrices take. Matrices are kept, the last used ones, in at most `max_bytes`.

    Args:
        tokens: calibration text, int64 (n_seq, seq_len), unused where the pruner needs no inputs.
        behind: a profile of blocks that is divided among their linear layers, or of these; None: no block is pruned.

    Raises:
        ValueError: the model is offloaded, or a matrix cannot be pruned.

    Source: the database of levels of EvoPress (arXiv 2410.14649); ours makes a level when it is asked for.
    """

    def __init__(
        self,
        lm: LanguageModel,
        pruner: Pruner,
        tokens: Ints,
        max_bytes: int = MAX_BYTES,
        behind: SparsityProfile | None = None,
    ) -> None:
        _refuse_offload(lm)
        self._lm, self._pruner, self._max_bytes, self._bytes = lm, pruner, max_bytes, 0
        self._inputs: list[Inputs] = []
        self._kept: OrderedDict[tuple[int, str, float], Tensor] = OrderedDict()
        if pruner.needs_inputs:
            self._inputs += (inputs for _, inputs in _inputs(lm, pruner, tokens, behind) if inputs is not None)

    @torch.inference_mode()
    def weight(self, index: int, name: str, sparsity: float) -> Tensor:
        """The weights of a linear layer of block `index` at a sparsity, in the shape of its parameter."""
        key = (index, name, round(sparsity, 9))
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        inputs = self._inputs[index] if self._pruner.needs_inputs else None
        self._kept[key] = pruned = _pruned(self._lm, self._pruner, index, name, inputs, sparsity)
        self._bytes += pruned.numel() * pruned.element_size()
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self._bytes -= gone.numel() * gone.element_size()
        return pruned

    def block(self, index: int, profile: SparsityProfile) -> dict[str, Tensor]:
        """The weights of a block by parameter name, as a profile of blocks or of their linear layers asks."""
        linears = self._lm.linears(index)
        return by_parameter(linears, {name: self.weight(index, name, profile.of(index, name)) for name in linears})


def pruned_in_passing(
    lm: LanguageModel, pruner: Pruner, tokens: Ints
) -> Iterator[tuple[int, Callable[[SparsityProfile], dict[str, Tensor]]]]:
    """The same weights, block after block, for profiles that are known before: a block's index and what gives its weights by a
    profile. Statistics are held of one block at a time, and no weights.

    Args and Raises: as for `PrunedInAdvance`.
    """
    _refuse_offload(lm)
    for index, inputs in _inputs(lm, pruner, tokens):
        yield index, partial(_pruned_block, lm, pruner, index, inputs)


def _inputs(
    lm: LanguageModel, pruner: Pruner, tokens: Ints, behind: SparsityProfile | None = None
) -> Iterator[tuple[int, Inputs | None]]:
    """What the linear layers of each block read, in the dense model or behind blocks that are pruned by a profile; None where
    the pruner needs no inputs."""
    with torch.inference_mode(), stage("statistics", lm.n_blocks, "blocks") as advance:
        if not pruner.needs_inputs:
            yield from ((index, None) for index in range(lm.n_blocks))
            return
        for visit in lm.walk(tokens):
            inputs = Inputs(visit.linears, pruner, n_first=0)
            inputs.collect(visit, advance=behind is None)
            if behind is not None:
                weights = _pruned_block(lm, pruner, visit.index, inputs, behind)
                for batch in visit.batches:
                    out = lm.run_block(visit.index, batch, weights=weights)
                    batch.hidden, batch.state = out.hidden, out.state
                visit.advanced = True
                lm.n_block_runs += bool(visit.batches)
            yield visit.index, inputs
            advance(1)


def _pruned_block(
    lm: LanguageModel, pruner: Pruner, index: int, inputs: Inputs | None, profile: SparsityProfile
) -> dict[str, Tensor]:
    linears = lm.linears(index)
    return by_parameter(linears, {n: _pruned(lm, pruner, index, n, inputs, profile.of(index, n)) for n in linears})


def _pruned(lm: LanguageModel, pruner: Pruner, index: int, name: str, inputs: Inputs | None, sparsity: float) -> Tensor:
    """The weights of one linear layer, in the shape of its parameter."""
    linear = lm.linears(index)[name]
    try:
        pruned = pruner.prune(matrix(linear), None if inputs is None else inputs.stats(name), sparsity)
    except ValueError as error:
        raise ValueError(f"stage trial: block {index}, {name}: {error}") from error
    return pruned.T if is_transposed(linear) else pruned


def _refuse_offload(lm: LanguageModel) -> None:
    if lm.offloaded:
        raise ValueError("offload: pruned weights beside the dense ones need both in memory; use offload=none")

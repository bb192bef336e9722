"""What sparsity costs each linear layer where it stands: Aumann-Shapley values between two profiles of a pruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from svnup.model.language_model import LanguageModel, MicroBatch
from svnup.model.linears import by_linear
from svnup.progress import stage
from svnup.types import Ints, SelectionLoss

Weights = dict[str, Tensor]  # of a block, by parameter name
Versions = Callable[[int], Weights]  # of a block by its index


def marginal_values(
    lm: LanguageModel,
    denser: Versions,
    sparser: Versions,
    tokens: Ints,
    kind: SelectionLoss = "nll",
    nodes: int = 1,
) -> dict[tuple[int, str], float]:
    """Aumann-Shapley values of the linear layers, in nats per token, by block index and name.

    The game: a present layer has the weights of `denser(block)`, an absent one those of `sparser(block)`, and the payoff is
    minus the loss. A layer that is present to a degree t has the weights in between; its value is the integral over t from 0
    to 1 of the payoff's derivative by its degree where all degrees are t, by `nodes` Gauss-Legendre nodes: one forward and one
    backward pass each, in which every block's forward is repeated. Values of groups of layers are their sums. Where the
    payoff is quadratic in the degrees one node is exact, and the values are the Shapley values.

    Args:
        tokens: payoff text, int64 (n_seq, seq_len).
        kind: the loss: `nll` of the next token, or `kl`, KL(dense || pruned) of the predictions.

    Raises:
        ValueError: a loss or a value is not finite, or blocks leave more for later ones than hidden states.

    Source: Aumann and Shapley 1974; the derivative along the diagonal, as in Integrated gradients (arXiv 1703.01365).
    """
    if lm.writers:
        raise ValueError(
            f"stage margins: block {min(lm.writers)} leaves more for later blocks than hidden states, whose part in a value no "
            "backward pass here sees; use allocator=shapley_rounds"
        )
    points, shares = np.polynomial.legendre.leggauss(nodes)
    values = {(index, name): 0.0 for index in range(lm.n_blocks) for name in lm.linears(index)}
    with torch.no_grad():
        batches = list(lm.micro_batches(tokens))
    n_targets = tokens[:, 1:].size
    with stage("marginal values", nodes * len(tokens), "sequences") as advance:
        for degree, share in zip((points + 1) / 2, shares / 2, strict=True):
            between = _Between(lm, denser, sparser, float(degree))
            for batch in batches:
                for index, slopes in between.slopes(batch, kind):
                    for name, slope in slopes.items():
                        values[index, name] -= float(share) * slope / n_targets
                advance(len(batch.tokens))
    if not np.isfinite(list(values.values())).all():
        raise ValueError("stage margins: a marginal value is not finite; try model.dtype=float32")
    return values


class _Between:
    """The model with all linear layers at one degree between two versions of their weights."""

    def __init__(self, lm: LanguageModel, denser: Versions, sparser: Versions, degree: float) -> None:
        self._lm, self._denser, self._sparser = lm, denser, sparser
        with torch.no_grad():
            self._weights = [_between(sparser(index), denser(index), degree) for index in range(lm.n_blocks)]

    def slopes(self, batch: MicroBatch, kind: SelectionLoss) -> Iterator[tuple[int, dict[str, float]]]:
        """By block, last first, the derivative of the summed loss of a micro-batch by the degree of each linear layer."""
        lm = self._lm
        states = [batch]
        with torch.no_grad():
            for index in range(lm.n_blocks):
                states.append(lm.run_block(index, states[-1], weights=self._weights[index]))
        slope = self._slope_of_head(states.pop(), batch, kind)
        for index in reversed(range(lm.n_blocks)):
            with torch.enable_grad():
                entering = states.pop()
                hidden = entering.hidden.detach().requires_grad_()
                leaves = {name: w.detach().requires_grad_() for name, w in self._weights[index].items()}
                out = lm.run_block(index, replace(entering, hidden=hidden), weights=leaves).hidden
                slope, *gradients = torch.autograd.grad(out, [hidden, *leaves.values()], slope)
            with torch.no_grad():
                present, absent = self._denser(index), self._sparser(index)
                products = {
                    n: g.float() * (present[n].float() - absent[n].float()) for n, g in zip(leaves, gradients, strict=True)
                }
            yield index, {n: float(p.double().sum()) for n, p in by_linear(lm.linears(index), products).items()}

    def _slope_of_head(self, last: MicroBatch, batch: MicroBatch, kind: SelectionLoss) -> Tensor:
        """Derivative of the summed loss by the hidden states after the last block; a sequence at a time through the head."""
        lm, slopes = self._lm, list[Tensor]()
        dense = self._dense(batch) if kind == "kl" else last
        for tokens, hidden, reference in zip(batch.tokens.split(1), last.hidden.split(1), dense.hidden.split(1), strict=True):
            with torch.enable_grad():
                one = MicroBatch(tokens, hidden.detach().requires_grad_(), [])
                loss = lm.token_kl(one, MicroBatch(tokens, reference, [])) if kind == "kl" else lm.token_nll(one)
                if not loss.isfinite().all():
                    raise ValueError("stage margins: the loss is not finite; try model.dtype=float32")
                slopes += torch.autograd.grad(loss.sum(), one.hidden)
        return torch.cat(slopes)

    @torch.no_grad()
    def _dense(self, batch: MicroBatch) -> MicroBatch:
        return self._lm.run_blocks(batch)


def _between(absent: Weights, present: Weights, degree: float) -> Weights:
    return {name: torch.lerp(absent[name].float(), w.float(), degree).to(w.dtype) for name, w in present.items()}

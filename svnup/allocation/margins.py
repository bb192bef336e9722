"""What sparsity costs each linear layer where it stands: Aumann-Shapley values between two profiles of a pruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from svnup.game.coalition_game import max_states
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
    n_targets, together = tokens[:, 1:].size, _together(lm, batches)
    with stage("marginal values", nodes * lm.n_blocks * -(-len(batches) // together), "blocks") as advance:
        for degree, share in zip((points + 1) / 2, shares / 2, strict=True):
            between = _Between(lm, denser, sparser, float(degree))
            for first in range(0, len(batches), together):
                for index, of_batches in between.slopes(batches[first : first + together], kind):
                    for slopes in of_batches:
                        for name, slope in slopes.items():
                            values[index, name] -= float(share) * slope / n_targets
                    advance(1)
    if not np.isfinite(list(values.values())).all():
        raise ValueError("stage margins: a marginal value is not finite; try model.dtype=float32")
    return values


def _together(lm: LanguageModel, batches: list[MicroBatch]) -> int:
    """How many micro-batches go through the model together: as many as fit with their hidden states at every depth."""
    groups = -(-(lm.n_blocks + 1) // max_states(lm, batches))
    return max(1, len(batches) // groups)


class _Between:
    """The model with all linear layers at one degree between two versions of their weights.

    Micro-batches go through it block by block, so that both versions of a block are asked for twice, on the way there and on
    the way back, and held for one block at a time.
    """

    def __init__(self, lm: LanguageModel, denser: Versions, sparser: Versions, degree: float) -> None:
        self._lm, self._denser, self._sparser, self._degree = lm, denser, sparser, degree

    def slopes(self, batches: list[MicroBatch], kind: SelectionLoss) -> Iterator[tuple[int, list[dict[str, float]]]]:
        """By block, last first, for each micro-batch the derivative of its summed loss by the degree of each linear layer."""
        lm, states = self._lm, [batches]
        with torch.no_grad():
            for index in range(lm.n_blocks):
                weights = self._between(self._denser(index), self._sparser(index))
                states.append([lm.run_block(index, batch, weights=weights) for batch in states[-1]])
        slopes = [self._slope_of_head(*both, kind) for both in zip(states.pop(), batches, strict=True)]
        for index in reversed(range(lm.n_blocks)):
            present, absent, found = self._denser(index), self._sparser(index), []
            with torch.no_grad():
                weights = self._between(present, absent)
                differences = {n: w.float() - absent[n].float() for n, w in present.items()}
            for i, entering in enumerate(states.pop()):
                with torch.enable_grad():
                    hidden = entering.hidden.detach().requires_grad_()
                    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
                    out = lm.run_block(index, replace(entering, hidden=hidden), weights=leaves).hidden
                    slopes[i], *gradients = torch.autograd.grad(out, [hidden, *leaves.values()], slopes[i])
                with torch.no_grad():
                    products = {n: g.float() * differences[n] for n, g in zip(leaves, gradients, strict=True)}
                found.append({n: float(p.double().sum()) for n, p in by_linear(lm.linears(index), products).items()})
            yield index, found

    def _between(self, present: Weights, absent: Weights) -> Weights:
        return {n: torch.lerp(absent[n].float(), w.float(), self._degree).to(w.dtype) for n, w in present.items()}

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

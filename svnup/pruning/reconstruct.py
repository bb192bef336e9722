"""Local reconstruction: the kept weights of a pruned block are refitted to what the dense model's block gives."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from svnup.memory import synchronize
from svnup.model.language_model import LanguageModel, MicroBatch, Visit
from svnup.types import RecoveredBlock

logger = logging.getLogger(__name__)
WARMUP = 0.1  # of the steps: the rate rises from 0, and falls to 0 afterwards


@dataclass(frozen=True)
class Reconstruct:
    """Refit the kept weights of each pruned block, before the next one is pruned, so that it gives what the dense model's
    block gives.

    AdamW without weight decay minimises the mean squared error of the block's outputs, a micro-batch a step, in the order of
    the text; the rate rises linearly over the first tenth of the steps and falls linearly to 0. What is trained are float32
    copies of the matrices of the block's linear layers, with the zeros of its mask; the block runs in the dtype of the model.
    A block whose error on the calibration text is no lower afterwards keeps its pruned weights, with a warning; one that
    nothing was pruned of is left alone.

    Args:
        lr: the highest rate.
        epochs: passes over the calibration text.
        batch_tokens: tokens of a step, which has at least one sequence.
        inputs: what the block reads while it is refitted: `pruned`, the outputs of the pruned and refitted blocks before it,
            which it will read; `dense`, those of the dense model. The targets are the outputs of the dense model's block on
            the same text either way.

    Source: arXiv 2510.14444, and its released code for the optimizer, the schedule, the loss and both kinds of inputs. There
    the rate and the number of passes are searched for each model, biases and norms are trained too, a step has two sequences,
    and a worse block is taken. Ours are the defaults, the choice of what is trained, and the comparison at the end.
    """

    lr: float = 1e-3
    epochs: int = 4
    batch_tokens: int = 2048
    inputs: Literal["pruned", "dense"] = "pruned"

    def __post_init__(self) -> None:
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr={self.lr:g}: a rate of AdamW; choose one above 0, such as 1e-4")
        for name in ("epochs", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more")

    @property
    def n_passes(self) -> int:
        return 3 * self.epochs + 3  # of the dense model, and of the errors before and after

    def beside(self, lm: LanguageModel, tokens: np.ndarray | Tensor) -> Reconstruction:
        return Reconstruction(self, lm, tokens)


class Reconstruction:
    """Refits the blocks of a model by the hidden states of the dense model, which it keeps beside the walk that prunes it.

    For each visit in turn: `advance` while the block is dense, then `refit` once it is pruned.
    """

    def __init__(self, options: Reconstruct, lm: LanguageModel, tokens: np.ndarray | Tensor) -> None:
        self._options, self._lm = options, lm
        self._inputs: list[MicroBatch] = []
        self._outputs = lm.entering(tokens, options.batch_tokens)
        self._change = 0.0

    def advance(self, visit: Visit) -> None:
        """Run the visited block, which is dense, on the dense model's hidden states."""
        self._change = 0.0
        self._inputs = list(map(self._copied, self._outputs)) if self._options.inputs == "dense" else []
        for batch in self._outputs:
            before, out = batch.hidden, self._lm.run_block(visit.index, batch)
            self._change += _squares(out.hidden, before)
            batch.hidden, batch.state = out.hidden, out.state

    def _copied(self, batch: MicroBatch) -> MicroBatch:
        return self._lm.offload_states(MicroBatch(batch.tokens, batch.hidden, batch.calls, batch.state))

    def refit(self, visit: Visit) -> RecoveredBlock:
        """Refit the visited block, which is pruned, to the dense outputs; its inputs stay where they are."""
        start = time.perf_counter()
        inputs = visit.batches if self._options.inputs == "pruned" else self._inputs
        pairs = list(zip(inputs, self._outputs, strict=True))
        parameters = self._lm.linear_parameters(visit.index)
        pruned = {name: p.detach().clone() for name, p in parameters.items()}
        before, n_steps = self._error(visit, pairs), self._options.epochs * len(pairs)
        if not before > 0:  # there is nothing to recover, or an overflow, which is nan
            return RecoveredBlock(visit.index, before, before, 0, time.perf_counter() - start, False)
        refitted = self._refitted(visit, pairs, pruned)
        for name, p in parameters.items():
            p.copy_(refitted[name])
        after, taken = self._error(visit, pairs), True
        if not after < before:  # nan is not
            logger.warning(
                "block %d: recovery.lr=%g changes its relative error from %.4g to %.4g, so that the pruned weights stay; "
                "choose a smaller one",
                visit.index,
                self._options.lr,
                before,
                after,
            )
            after, taken = before, False
            for name, p in parameters.items():
                p.copy_(pruned[name])
        synchronize()
        return RecoveredBlock(visit.index, before, after, n_steps, time.perf_counter() - start, taken)

    def _error(self, visit: Visit, pairs: list[tuple[MicroBatch, MicroBatch]]) -> float:
        """Squared error of the outputs, relative to what the dense block adds to its inputs, if that is anything."""
        found = sum(_squares(self._lm.run_block(visit.index, x).hidden, y.hidden) for x, y in pairs)
        return found / (self._change or 1.0)

    def _refitted(
        self, visit: Visit, pairs: list[tuple[MicroBatch, MicroBatch]], pruned: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        options, n_steps = self._options, self._options.epochs * len(pairs)
        kept = {name: w != 0 for name, w in pruned.items()}
        weights = {name: w.to(torch.float32, copy=True).requires_grad_() for name, w in pruned.items()}
        optimizer = torch.optim.AdamW(weights.values(), lr=options.lr, weight_decay=0.0)
        # AdamW does not mind the scale of the loss; with this one gradients of float16 neither vanish nor overflow.
        n_entries = sum(y.hidden.numel() for _, y in pairs)
        scale = ((self._change or 1.0) / n_entries) ** 0.5 * (n_entries / len(pairs)) ** 0.5
        for step in range(n_steps):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * _rate(step, n_steps)
            x, y = pairs[step % len(pairs)]
            with torch.enable_grad():
                own = {name: (w * kept[name]).to(pruned[name].dtype) for name, w in weights.items()}
                out = self._lm.run_block(visit.index, x, weights=own).hidden
                loss = (out.float() - y.hidden.float()).square().sum() / scale
                gradients = torch.autograd.grad(loss, [*weights.values()], allow_unused=True, materialize_grads=True)
            for w, gradient in zip(weights.values(), gradients, strict=True):
                w.grad = gradient
            optimizer.step()
        return {name: w.detach() * kept[name] for name, w in weights.items()}


def _rate(step: int, n_steps: int) -> float:
    """The share of the highest rate: linear from 0 over the first tenth of the steps, then linear to 0."""
    n_warmup = int(WARMUP * n_steps)
    return step / n_warmup if step < n_warmup else (n_steps - step) / (n_steps - n_warmup)


def _squares(x: Tensor, y: Tensor) -> float:
    return float((x.float() - y.to(x.device).float()).square().double().sum())

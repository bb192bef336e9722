"""What a block is worth to a real model: games beside measured sensitivity.

For each game, on the same tokens: the values of the blocks by -NLL, by -KL from the dense model and by reciprocal perplexity,
their standard errors over sequences, and how they agree with what was measured: the loss that is added when one block is 0.1
sparser and all others are at the target. Weights are pruned in advance, by statistics of the dense model. Writes
results/tables/real_model.md as it goes; every loss is kept in the cache as it comes, so that a killed run goes on.

    python -m experiments.real_model.run [--datasets FOLDER] [--sparsity 0.6] [--n-seq 4] [--windows 1,3,5] [--games REGEX]
        [--quick]
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.study import add_real_model, built_in, made_by, parse, parser, publish, real_model, spearman, table, text
from svnup.allocation import Budget
from svnup.allocation.margins import marginal_values
from svnup.data import C4, tokens_sha256
from svnup.game.walk_plan import WalkPlan
from svnup.memo import Memo
from svnup.model.language_model import LanguageModel, MicroBatch
from svnup.pruning.advance import PrunedInAdvance
from svnup.pruning.wanda import Wanda
from svnup.scoring import Context
from svnup.scoring.published import BlockInfluence
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import Bools, Floats, Ints

SENSITIVITY = 0.1  # of sparsity
LOSSES = ("nll", "kl")
Versions = Callable[[int], Any]  # of a block by its index: weights to run it with, {} for its own, None to skip it


@dataclass(frozen=True)
class Variant:
    """A game of the blocks: what a present and an absent one is, and where the blocks outside the window are."""

    name: str
    present: Versions
    absent: Versions
    window: int
    context: str = "present"


class Losses:
    """NLL and KL from the dense model of each sequence, for the model in which every block has a version of its own."""

    def __init__(self, lm: LanguageModel, tokens: Ints, cache: Path) -> None:
        self.lm, self.tokens = lm, tokens
        identity = f"{lm.fingerprint()} {tokens_sha256(tokens)}"
        self._memo = Memo(cache / "real_model" / hashlib.sha256(identity.encode()).hexdigest()[:32], lm.device.type)
        with torch.inference_mode():
            self._batches = list(lm.micro_batches(tokens))
            self._dense: list[MicroBatch] | None = None

    @torch.inference_mode()
    def __call__(self, name: str, rows: Ints, versions: list[Versions]) -> dict[str, Floats]:
        """By loss, float64 (m, n_seq): row i of `rows` (m, n_blocks) has the number of each block's version."""
        rows, back = np.unique(rows, axis=0, return_inverse=True)
        names = [f"{name} {''.join(map(str, row))}" for row in rows]
        todo = [i for i, one in enumerate(names) if f"{one} {len(self.tokens) - 1} kl" not in self._memo.values]
        costs = all(version(0) is not None for version in versions)
        steps = (
            WalkPlan.of(rows[todo].astype(np.int64) if costs else rows[todo].astype(bool), absent_costs=costs) if todo else None
        )
        stack = {0: self._batches}
        for i, start, kept in zip(todo, steps.resume, steps.kept, strict=True) if steps else []:
            states = stack[start]
            stack = {depth: s for depth, s in stack.items() if kept >> depth & 1}
            for index in range(start, self.lm.n_blocks):
                states = self._step(index, versions[rows[i, index]](index), states)
                if kept >> (index + 1) & 1:
                    stack[index + 1] = states
            self._keep(names[i], states)
            print(f"{names[i]}: {self._memo.values[f'{names[i]} 0 nll']:.4f}", flush=True)
        read = {
            loss: [[self._memo.values[f"{n} {s} {loss}"] for s in range(len(self.tokens))] for n in names] for loss in LOSSES
        }
        return {loss: np.array(values)[back.reshape(-1)] for loss, values in read.items()}

    def _step(self, index: int, weights: dict[str, Tensor] | None, states: list[MicroBatch]) -> list[MicroBatch]:
        if weights is None:
            return states
        return [self.lm.run_block(index, batch, weights=weights or None) for batch in states]

    def _keep(self, name: str, states: list[MicroBatch]) -> None:
        if self._dense is None:
            self._dense = self._batches
            for index in range(self.lm.n_blocks):
                self._dense = self._step(index, {}, self._dense)

        def mean(losses: Iterable[Tensor]) -> list[float]:
            return torch.cat([one.double().mean(1).cpu() for one in losses]).tolist()

        found = {"nll": mean(map(self.lm.token_nll, states)), "kl": mean(map(self.lm.token_kl, states, self._dense))}
        for loss in LOSSES:
            for sequence, value in enumerate(found[loss]):
                self._memo.add(f"{name} {sequence} {loss}", value)


class Tabulated:
    """A game whose payoffs of asked coalitions are known."""

    def __init__(self, coalitions: Bools, payoffs: Floats) -> None:
        self.n_players = coalitions.shape[1]
        self._known = {row.tobytes(): float(v) for row, v in zip(coalitions, payoffs, strict=True)}
        self.n_evaluations = self.n_block_forwards = 0
        self.v_empty, self.absent_costs = 0.0, False

    def __call__(self, coalitions: Bools) -> Floats:
        return np.array([self._known[row.tobytes()] for row in coalitions])


def values_by_sequence(variant: Variant, losses: Losses) -> dict[str, Floats]:
    """By payoff, the values of the blocks on each sequence, (n_seq, n_blocks); of reciprocal perplexity by the jackknife."""
    context: Any = variant.context
    estimator = SlidingWindow(variant.window, context=context)
    everyone_too = np.ones((1, losses.lm.n_blocks), dtype=bool)
    plan = np.unique(np.vstack([estimator.plan(losses.lm.n_blocks), everyone_too]), axis=0)
    found = losses(variant.name, plan.astype(np.int64), [variant.absent, variant.present])
    full = found["nll"][plan.all(1)][0]

    def of(payoffs: Floats) -> Floats:
        return estimator.estimate(Tabulated(plan, payoffs)).values

    n_seq = len(losses.tokens)
    out = {f"neg_{loss}" if loss == "nll" else loss: np.array([of(-v) for v in found[loss].T]) for loss in LOSSES}
    nll = found["nll"]
    whole = of(np.exp(full.mean() - nll.mean(1)))
    rest = [np.delete(np.arange(n_seq), s) for s in range(n_seq)]
    without = [of(np.exp(full[r].mean() - nll[:, r].mean(1))) for r in rest] if n_seq > 1 else [whole]
    pseudo = [n_seq * whole - (n_seq - 1) * v for v in without]  # jackknife: their mean and spread are those of the values
    return out | {"recip_ppl": np.array(pseudo)}


def log_correlation(a: Floats, b: Floats) -> float:
    """Pearson's of the logarithms, since budgets go by these; what is not positive counts as the least positive one."""
    return float(np.corrcoef(np.log(np.maximum(a, a[a > 0].min())), np.log(np.maximum(b, b[b > 0].min())))[0, 1])


def study(lm: LanguageModel, calibration: Ints, tokens: Ints, options: argparse.Namespace) -> None:
    pruner, target = Wanda(), options.sparsity
    advance = PrunedInAdvance(lm, pruner, calibration)
    losses = Losses(lm, tokens, options.cache)

    def at(sparsity: float) -> Versions:
        profile = Budget(lm.block_params, min(sparsity, 0.99)).uniform()
        return partial(advance.block, profile=profile)

    dense: Versions = lambda index: {}  # noqa: E731
    skipped: Versions = lambda index: None  # noqa: E731
    n = lm.n_blocks
    one_off = np.vstack([np.ones((1, n), dtype=np.int64), 1 - np.eye(n, dtype=np.int64)])
    sensitivity = losses(f"sparser {target:g}", one_off, [at(target + SENSITIVITY), at(target)])
    measured = {loss: (v[1:] - v[0]) for loss, v in sensitivity.items()}  # (n_blocks, n_seq)
    reference = measured["nll"].mean(1)

    rows: list[tuple[str, str, int, Floats]] = []  # game, payoff, coalitions, values by sequence
    influence = BlockInfluence().score(lm, Context(calibration, None, None)).values  # type: ignore[arg-type]
    rows.append(("block influence", "-", 0, influence[None]))
    denser, sparser = at(target - SENSITIVITY / 2), at(target + SENSITIVITY / 2)
    gates = [_of_blocks(lm, marginal_values(lm, denser, sparser, tokens[s : s + 1])) for s in range(len(tokens))]
    rows.append((f"Aumann-Shapley at the margin, ± {SENSITIVITY / 2:g}", "neg_nll", 0, np.array(gates)))
    variants = [
        *(Variant(f"skip, dense context, w={w}", dense, skipped, w) for w in options.windows),
        *(Variant(f"prune {target:g}, dense context, w={w}", dense, at(target), w) for w in options.windows),
        Variant(f"prune {target:g}, pruned context, w=1", dense, at(target), 1, "absent"),
        Variant(f"skip, pruned context {target:g}, w=1", at(target), skipped, 1),
        Variant(f"margin {target:g}, w=1", denser, sparser, 1),
        Variant(f"margin {target:g}, w=3", denser, sparser, 3),
    ]
    for variant in sorted((v for v in variants if re.search(options.games, v.name)), key=lambda v: v.window):
        found = values_by_sequence(variant, losses)
        rows += [(variant.name, payoff, variant.window, values) for payoff, values in found.items()]
        publish(options, "real_model", report(options, measured, rows, reference))


def _of_blocks(lm: LanguageModel, values: dict[tuple[int, str], float]) -> Floats:
    return np.array([sum(v for (block, _), v in values.items() if block == index) for index in range(lm.n_blocks)])


def report(
    options: argparse.Namespace, measured: dict[str, Floats], rows: list[tuple[str, str, int, Floats]], reference: Floats
) -> list[str]:
    n_seq = measured["nll"].shape[1]
    noise = measured["nll"].std(1, ddof=1) / np.sqrt(n_seq) if n_seq > 1 else np.full(len(reference), np.nan)
    lines = [
        "# Games on a real model, beside measured sensitivity",
        "",
        f"{made_by(options.command)}. Model {options.model_name}. Wanda at {100 * options.sparsity:g} %, "
        f"{options.n_calibration} x {options.seq_len} calibration tokens of C4, weights pruned in advance; all values and "
        f"losses on the same {n_seq} x {options.seq_len} tokens of selection text.",
        "",
        f"Measured sensitivity of a block: the NLL that is added when it is {SENSITIVITY:g} sparser and all others are at "
        f"{options.sparsity:g}. Over the blocks: {reference.min():.4f} to {reference.max():.4f} nats, median "
        f"{np.median(reference):.4f}; median standard error over sequences {np.median(noise):.4f}.",
        "",
        "Agreement of values with it: Spearman's rank correlation, and Pearson's of logarithms (what is not positive counts as "
        "the least positive value). The standard error is the median over blocks, of values over sequences, in shares of the "
        "spread (standard deviation) of values over blocks.",
        "",
    ]
    games = []
    for name, payoff, _, by_sequence in rows:
        values = by_sequence.mean(0)
        stderr = by_sequence.std(0, ddof=1) / np.sqrt(len(by_sequence)) if len(by_sequence) > 1 else np.array([np.nan])
        share = f"{np.median(stderr) / values.std():.2f}" if len(by_sequence) > 1 else "-"
        agreement = [f"{measure(values, reference):.2f}" for measure in (spearman, log_correlation)]
        games.append([name, payoff, *agreement, str((values <= 0).sum()), share])
    head = ["game", "payoff", "Spearman", "Pearson of logs", "negative values", "standard error / spread"]
    lines += table(head, games)
    by_block = {f"{name}, {payoff}": v.mean(0) for name, payoff, window, v in rows if window < 2 and payoff in ("-", "neg_nll")}
    blocks = [[str(i), f"{known:.4f}", *(f"{v[i]:.4f}" for v in by_block.values())] for i, known in enumerate(reference)]
    return [*lines, "", "## Values by block (windows of one, -NLL)", "", *table(["block", "sensitivity", *by_block], blocks)]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    add_real_model(made)
    made.add_argument("--sparsity", type=float, default=0.6)
    made.add_argument("--n-seq", type=int, default=4, help="sequences of the selection text")
    made.add_argument("--windows", type=lambda s: [int(w) for w in s.split(",")], default=[1, 3, 5])
    made.add_argument("--games", default="", metavar="REGEX", help="only those in whose names it is found")
    options = parse(made, argv)
    options.command = "make study NAME=real_model"
    if options.quick:
        options.model_name, options.seq_len, options.n_calibration, options.n_seq = "built in, 4 blocks", 32, 2, 2
        options.windows = [1, 3]
        lm = built_in(4)
        study(lm, text("calibration", 2, 32), text("selection", 2, 32), options)
        return
    options.seq_len, options.n_calibration = 512, 16
    lm = real_model(options)
    source = partial(C4, seq_len=options.seq_len, seed=0, datasets_dir=options.datasets)
    calibration = source(n_seq=options.n_calibration, role="calibration").tokens(lm.tokenizer)
    study(lm, calibration, source(n_seq=options.n_seq, role="selection").tokens(lm.tokenizer), options)


if __name__ == "__main__":
    main()

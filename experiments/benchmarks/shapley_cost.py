"""What Shapley values cost: svnup against the straightforward way, side by side in one run.

The straightforward way evaluates every coalition by one whole forward of the model with absent blocks as identity, each window
on its own; the de-duplicated way evaluates each distinct coalition once. Same batch, dtype, threads and micro-batches for all.
Prints evaluations, block-forwards, the median wall time of the repeats and its ratio to svnup's, and svnup's wall time over
its floor (block-forwards x time of one block + evaluations x time of one head pass, measured in the same run).

    python -m experiments.benchmarks.shapley_cost [--repeats 5] [--output results/benchmarks/shapley_cost.md]
    python -m experiments.benchmarks.shapley_cost --blocks 5 --seq-len 32 --repeats 1      # in seconds: does it still run?
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from experiments.study import built_in, text
from svnup.allocation import Budget
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.walk import pruned_weights
from svnup.results.provenance import hardware
from svnup.shapley import Estimator, Game, block_forwards
from svnup.shapley.exact import Exact
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import Bools, Floats

BATCH = 8  # sequences of 256 tokens: svnup's own micro-batch on a CPU


@contextmanager
def identity_blocks(lm: LanguageModel, present: Bools) -> Iterator[None]:
    """The absent blocks hand on what they are given."""
    absent = [block for block, here in zip(lm.blocks, present, strict=True) if not here]
    saved = [block.forward for block in absent]
    try:
        for block in absent:
            block.forward = lambda hidden, *args, **kwargs: hidden
        yield
    finally:
        for block, forward in zip(absent, saved, strict=True):
            block.forward = forward


class Straightforward:
    """The layer game by whole forwards, in the order asked, nothing shared and nothing remembered."""

    def __init__(self, lm: LanguageModel, tokens: torch.Tensor) -> None:
        self.lm, self.tokens, self.n_players = lm, tokens, lm.n_blocks

    @torch.inference_mode()
    def __call__(self, coalitions: Bools) -> Floats:
        return np.array([self._value(row) for row in coalitions])

    def _value(self, present: Bools) -> float:
        losses = []
        with identity_blocks(self.lm, present):
            for batch in self.tokens.split(BATCH):
                logits = self.lm.model(batch, use_cache=False).logits[:, :-1].float()
                loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
                losses.append(loss.view(len(batch), -1).double().mean(1))
        return -float(torch.cat(losses).mean())


class Deduplicated(Straightforward):
    """The same, each distinct coalition once."""

    def __call__(self, coalitions: Bools) -> Floats:
        rows, back = np.unique(coalitions, axis=0, return_inverse=True)
        return super().__call__(rows)[back.reshape(-1)]


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def unit_times(lm: LanguageModel, tokens: torch.Tensor, repeats: int) -> tuple[float, float]:
    """Seconds of one block-forward and of one head pass on the whole payoff batch, the mean over blocks of medians."""
    batches = list(lm.micro_batches(tokens))

    def run(index: int) -> None:
        for batch in batches:
            lm.run_block(index, batch)

    block = [statistics.median(timed(partial(run, index)) for _ in range(repeats)) for index in range(lm.n_blocks)]
    head = statistics.median(timed(lambda: [lm.token_nll(b) for b in batches]) for _ in range(3 * repeats))
    return statistics.mean(block), head


def compare(
    lm: LanguageModel, name: str, estimator: Estimator, tokens: torch.Tensor, repeats: int, deduplicated: bool
) -> list[str]:
    plan = estimator.plan(lm.n_blocks)
    asked = np.concatenate(_recorded(estimator, lm.n_blocks))
    ways: dict[str, tuple[Callable[[], Game], int, int]] = {
        "svnup": (lambda: LayerGame(lm, tokens), len(plan), block_forwards(plan)),
        "straightforward": (lambda: Straightforward(lm, tokens), len(asked), int(asked.sum())),
    }
    if deduplicated:
        ways["de-duplicated"] = (lambda: Deduplicated(lm, tokens), len(plan), int(plan.sum()))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    values: dict[str, Floats] = {}
    floors = []
    for _ in range(repeats):  # the ways take turns, so that the machine's moods hit all of them
        for way, (make, _evaluations, _forwards) in ways.items():
            game = make()
            start = time.perf_counter()
            values[way] = estimator.estimate(game).values
            seconds[way].append(time.perf_counter() - start)
        block, head = unit_times(lm, tokens, 3)
        floors.append(ways["svnup"][2] * block + ways["svnup"][1] * head)
    ours = statistics.median(seconds["svnup"])
    lines = []
    for way, (_make, evaluations, forwards) in ways.items():
        taken = statistics.median(seconds[way])
        worst = float(np.abs(values[way] - values["svnup"]).max())
        floor = f"{ours / statistics.median(floors):.2f}" if way == "svnup" else "-"
        lines.append(
            f"| {name} | {way} | {evaluations} | {forwards} | {taken:.1f} | {taken / ours:.2f} | {floor} | {worst:.1e} |"
        )
    return lines


def pruned_game(lm: LanguageModel, tokens: torch.Tensor, repeats: int) -> list[str]:
    """The game in which absent means pruned: the count, and wall time over its floor."""
    uniform = Budget(lm.block_params, 0.7).uniform()
    replacements = pruned_weights(lm, uniform, Magnitude(), tokens)
    ratios = []
    for _ in range(repeats):
        game = LayerGame(lm, tokens, pruned=replacements)
        seconds = timed(partial(SlidingWindow(5).estimate, game))
        block, head = unit_times(lm, tokens, 3)
        ratios.append(seconds / (game.n_block_forwards * block + game.n_evaluations * head))
    return [
        f"Absent means pruned, sliding window w=5: {game.n_evaluations} evaluations, {game.n_block_forwards} block-forwards, "
        f"{statistics.median(ratios):.2f} times the floor."
    ]


def gates(lm: LanguageModel, tokens: torch.Tensor, repeats: int) -> list[str]:
    """Aumann-Shapley on gates, in forward passes of the whole model with its head."""
    game = LayerGame(lm, tokens)
    ratios = []
    for _ in range(repeats):
        forward = timed(lambda: lm.nll(tokens))
        ratios.append(timed(lambda: [game.gate_gradient(0.5) for _ in range(8)]) / forward)
    return [
        f"Gates with 8 nodes: {statistics.median(ratios):.1f} full forward passes (the same work for any number of blocks)."
    ]


def _recorded(estimator: Estimator, n: int) -> list[Bools]:
    """The coalitions as the estimator asks for them, repetitions included."""
    asked: list[Bools] = []

    class Recorder:
        n_players, v_empty = n, 0.0

        def __call__(self, coalitions: Bools) -> Floats:
            asked.append(coalitions)
            return np.zeros(len(coalitions))

    estimator.estimate(Recorder())
    return asked


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exact-n-seq", type=int, default=1, help="payoff sequences of the exact comparison")
    parser.add_argument("--window-n-seq", type=int, default=8, help="payoff sequences of the window comparison")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--blocks", type=int, help="of the built-in model, at least 5; all by default")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    lm = built_in(options.blocks)
    few, many = (torch.as_tensor(text("payoff", n, options.seq_len)) for n in (options.exact_n_seq, options.window_n_seq))
    machine = hardware()
    lines = [
        f"# Cost of Shapley values on the built-in model, {lm.n_blocks} blocks",
        "",
        f"Made by `make benchmarks`: median of {options.repeats}, ways taking turns. {machine.cpu}, "
        f"{machine.cores} cores, {machine.threads} threads, torch {torch.__version__}, float32. Payoff: sequences of "
        f"{options.seq_len} tokens, {options.exact_n_seq} for exact, {options.window_n_seq} for the window.",
        "",
        "| values | way | evaluations | block-forwards | seconds | times svnup | over floor | largest difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += compare(lm, "sliding window w=5", SlidingWindow(5), many, options.repeats, deduplicated=True)
    lines += compare(lm, "exact", Exact(), few, options.repeats, deduplicated=False)
    lines += ["", *pruned_game(lm, many, options.repeats), "", *gates(lm, many, options.repeats)]
    page = "\n".join(lines) + "\n"
    print(page)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

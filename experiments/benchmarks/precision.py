"""What the dtype of the weights does to Shapley values, masks and perplexity, and what the number of threads does.

Statistics, factorisations and losses are float32 whatever the weights are; so the rows say what weights, hidden states and
their products in another dtype change. All is compared with float64 weights on the same text: the largest difference of a
Shapley value and its rank correlation, the share of the weights that are pruned in one and kept in the other, and perplexity
before and after pruning. Below, float32 weights by one thread and by two. A model is written when it is measured.

    python -m experiments.benchmarks.precision [--output results/benchmarks/precision.md]
    python -m experiments.benchmarks.precision --model path/to/smollm2 --datasets DATASETS --seq-len 512 --n-test 8
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.study import made_by, spearman, table
from svnup.allocation import Budget
from svnup.data import C4, Docs, TokenSource, WikiText2
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.model.source import SHIPPED
from svnup.pruning import prune_model
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import Pruner
from svnup.pruning.wanda import Wanda
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import Floats, Ints

DTYPES = ("float64", "float32", "bfloat16", "float16")
PRUNERS: dict[str, Pruner] = {"Wanda": Wanda(), "SparseGPT": SparseGPT()}


@dataclass
class Measured:
    """What one dtype, or number of threads, makes of a model.

    Args:
        values: Shapley values, (n_blocks,), in units of the payoff; None where they were not asked for.
        losses: of windows in nats per token, by pruner; "" is the dense model.
        pruned: whether each weight is pruned, bool (n_weights,), by pruner.
        weights: the weights after pruning, (n_weights,), by pruner.
        seconds: that it took.
    """

    values: Floats | None
    losses: dict[str, Floats]
    pruned: dict[str, Tensor]
    weights: dict[str, Tensor]
    seconds: float

    def perplexity(self, name: str) -> float:
        return math.exp(float(self.losses[name].mean()))


@dataclass(frozen=True)
class Texts:
    """Tokens (n_seq, seq_len) of the game, of calibration and of perplexity."""

    payoff: Ints
    calibration: Ints
    test: Ints


def measure(model: str, dtype: str, texts: Texts, options: argparse.Namespace, values: bool = True) -> Measured:
    """Everything with weights of one dtype, each pruning in a model that is loaded anew."""
    start = time.process_time()

    def load() -> LanguageModel:
        return LanguageModel.load(model, dtype=dtype, device="cpu")

    lm = load()
    found = Measured(None, {"": lm.nll(texts.test)}, {}, {}, 0.0)
    if values and options.window:
        game = LayerGame(lm, texts.payoff, payoff="neg_nll")
        found.values = SlidingWindow(window=min(options.window, lm.n_blocks)).estimate(game).values
    for name, pruner in PRUNERS.items():
        lm = load()
        prune_model(lm, Budget(lm.block_params, options.sparsity, "unstructured").uniform(), pruner, texts.calibration)
        kept = [p.detach().flatten() for i in range(lm.n_blocks) for p in lm.linear_parameters(i).values()]
        found.weights[name] = torch.cat(kept)
        found.pruned[name] = found.weights[name] == 0
        found.losses[name] = lm.nll(texts.test)
    found.seconds = time.process_time() - start
    return found


def compared(name: str, one: Measured, reference: Measured) -> list[str]:
    """A line of the table of dtypes."""
    cells = [name]
    if one.values is None or reference.values is None:
        cells += ["", ""]
    else:
        largest = float(np.abs(one.values - reference.values).max() / np.abs(reference.values).max())
        cells += [f"{100 * largest:.3g} %", f"{spearman(one.values, reference.values):.3f}"]
    cells += [f"{100 * float((one.pruned[p] != reference.pruned[p]).double().mean()):.3g} %" for p in PRUNERS]
    for key in ("", *PRUNERS):
        change = 100 * (one.perplexity(key) / reference.perplexity(key) - 1)
        cells.append(f"{one.perplexity(key):.4f} ({change:+.3f} %)" if one is not reference else f"{one.perplexity(key):.4f}")
    return [*cells, f"{one.seconds:.0f}"]


def threads_compared(one: Measured, two: Measured) -> Iterator[list[str]]:
    """A line for each pruner of the table of threads."""
    for name in PRUNERS:
        other = float((one.weights[name] != two.weights[name]).double().mean())
        masks = float((one.pruned[name] != two.pruned[name]).double().mean())
        perplexities = [f"{found.perplexity(name):.6f}" for found in (one, two)]
        yield [name, f"{100 * other:.3g} %", f"{100 * masks:.3g} %", *perplexities]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def texts_of(tokenizer: Any, options: argparse.Namespace) -> Texts:
    """The built-in text for the built-in models; for others payoff and calibration of C4, and WikiText-2."""
    calibration: Callable[..., TokenSource] = Docs
    test: Callable[..., TokenSource] = Docs
    if options.datasets is not None:
        calibration, test = (
            partial(C4, datasets_dir=str(options.datasets)),
            partial(WikiText2, datasets_dir=str(options.datasets)),
        )
    length = {"seq_len": options.seq_len}
    return Texts(
        calibration(role="payoff", n_seq=options.n_payoff, **length).tokens(tokenizer),
        calibration(role="calibration", n_seq=options.n_calibration, **length).tokens(tokenizer),
        test(role="test", n_seq=options.n_test, **length).tokens(tokenizer),
    )


def lines_of(name: str, model: str, options: argparse.Namespace) -> list[str]:
    """The section of one model."""
    stored = LanguageModel.load(model, device="cpu")
    texts = texts_of(stored.tokenizer, options)
    with threads(1):
        found = {dtype: measure(model, dtype, texts, options) for dtype in options.dtypes}
    reference = found[options.dtypes[0]]
    head = ["weights", "largest change of a value", "rank correlation", *(f"other masks, {p}" for p in PRUNERS)]
    head += ["perplexity, dense", *PRUNERS, "s"]
    lines = [
        "",
        f"## {name}",
        "",
        f"Its checkpoint has {stored.dtype} weights.",
        "",
        *table(head, [compared(d, one, reference) for d, one in found.items()], "l" + "r" * 8),
    ]
    if "float32" in found and options.threads > 1:
        with threads(options.threads):
            more = measure(model, "float32", texts, options, values=False)
        same = np.array_equal(more.losses[""], found["float32"].losses[""])
        head = ["float32", "other weights", "other masks", "perplexity, one thread", f"{options.threads} threads"]
        dense = "the same, bit by bit" if same else f"{more.perplexity(''):.6f} for {found['float32'].perplexity(''):.6f}"
        lines += ["", f"By {options.threads} threads; the dense model's perplexity is {dense}:", ""]
        lines += table(head, threads_compared(found["float32"], more), "lrrrr")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder; without it the built-in models")
    parser.add_argument("--datasets", type=Path, help="a folder with local copies of C4 and WikiText-2, for a model of yours")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="the first is the reference")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--n-payoff", type=int, default=4, help="sequences of the game")
    parser.add_argument("--n-calibration", type=int, default=16)
    parser.add_argument("--n-test", type=int, default=16, help="windows of perplexity")
    parser.add_argument("--window", type=int, default=3, help="of the Shapley values; 0 for none")
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks/precision.md"))
    options = parser.parse_args(argv)
    models = {Path(options.model).name: options.model} if options.model else dict.fromkeys(SHIPPED)
    lines = ["# What the dtype of the weights changes", ""]
    lines.append(
        f"{made_by('python -m experiments.benchmarks.precision').removesuffix(', float32')}. Statistics, factorisations and "
        f"losses are float32 in every row. Values: windows of {options.window}, payoff -NLL on {options.n_payoff} sequences; "
        f"pruned at {100 * options.sparsity:g} % with the same budget for every block, by {options.n_calibration} sequences; "
        f"perplexity on {options.n_test} windows, all of {options.seq_len} tokens. Changes are those from {options.dtypes[0]} "
        "weights: of a value in percent of the largest one, of masks in percent of all weights. Seconds are those of the "
        "process by one thread."
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in models:
        lines += lines_of(name, models[name] or str(SHIPPED[name]), options)
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Whether the choice of a budget still matters once the kept weights of each block are refitted.

On the built-in model: the uniform budget and the default Shapley budget, with Wanda and SparseGPT at 60 and 70 %, pruned
without recovery and with `recovery=reconstruct`; perplexity on the test text, read once for each. Writes
results/tables/recovery.md. What was measured is kept in the cache: a killed run goes on where it was.

    python -m experiments.recovery.run [--cache results/cache] [--quick]
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.study import PRUNERS, Known, built_in, made_by, parse, parser, publish, table, text
from svnup.allocation import Budget
from svnup.allocation.maps import ScoreBudget
from svnup.evaluation import perplexity
from svnup.game import LayerGame
from svnup.pruning import prune_model
from svnup.pruning.reconstruct import Reconstruct
from svnup.pruning.walk import Pruner
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import ShapleyValues, SparsityProfile


@dataclass(frozen=True)
class Sizes:
    """How much is measured, on how much text; the defaults made the committed table."""

    n_blocks: int | None = None
    sparsities: tuple[float, ...] = (0.6, 0.7)
    n_payoff: int = 16
    n_calibration: int = 32
    n_test: int = 64
    seq_len: int = 256
    window: int = 5


QUICK = Sizes(n_blocks=3, sparsities=(0.6,), n_payoff=2, n_calibration=2, n_test=2, seq_len=32, window=2)
RATE = 3e-3  # of 3e-4, 1e-3 and 3e-3 the best with Wanda at 70 %, uniform, on 32 sequences of the selection text


class Bench:
    """The model, its texts, and what was measured once ever."""

    def __init__(self, cache: Path, sizes: Sizes) -> None:
        self.sizes, self.cache, self.known = sizes, cache, Known(cache, "recovery")
        self.calibration = text("calibration", sizes.n_calibration, sizes.seq_len)
        self.test = text("test", sizes.n_test, sizes.seq_len)
        self.lm = built_in(sizes.n_blocks)

    def values(self) -> ShapleyValues:
        payoff = text("payoff", self.sizes.n_payoff, self.sizes.seq_len)
        return SlidingWindow(self.sizes.window).estimate(LayerGame(self.lm, payoff, payoff="recip_ppl", cache_dir=self.cache))

    def measured(self, profile: SparsityProfile, pruner: Pruner, recovery: Reconstruct | None) -> dict[str, float]:
        """Perplexity of the pruned model on the test text; with a recovery its seconds and the blocks' mean errors, too."""
        shapes = [self.calibration.shape, self.test.shape]
        what = [self.lm.fingerprint(), np.round(profile.sparsity, 9).tolist(), repr(pruner), repr(recovery), shapes]
        found: dict[str, float] = self.known.measured(what, lambda: self._measure(profile, pruner, recovery))
        return found

    def _measure(self, profile: SparsityProfile, pruner: Pruner, recovery: Reconstruct | None) -> dict[str, Any]:
        lm = built_in(self.sizes.n_blocks)
        start = time.process_time()
        report = prune_model(lm, profile, pruner, self.calibration, recovery)
        found = {"ppl": perplexity(lm, self.test), "seconds": time.process_time() - start}
        if report.recovered is not None:
            found["before"], found["after"] = report.recovery_errors()
        return found


def main(argv: list[str] | None = None) -> None:
    options = parse(parser(__doc__), argv)
    sizes = QUICK if options.quick else Sizes()
    bench = Bench(options.cache, sizes)
    values, recovery, lines = bench.values(), Reconstruct(lr=RATE), []
    for sparsity in sizes.sparsities:
        budget = Budget(bench.lm.block_params, sparsity)
        profiles = [budget.uniform(), ScoreBudget(scale="log", lam=0.15).allocate(budget, values)]
        for name, pruner in PRUNERS.items():
            line = [name, f"{100 * sparsity:g} %"]
            for how in (None, recovery):
                uniform, shapley = (bench.measured(profile, pruner, how) for profile in profiles)
                change = 100 * (shapley["ppl"] / uniform["ppl"] - 1)
                line += [f"{uniform['ppl']:.2f}", f"{shapley['ppl']:.2f}", f"{change:+.1f} %"]
            line += [f"{uniform['before']:.2f} to {uniform['after']:.2f}", f"{uniform['seconds']:.0f}"]
            lines.append(line)
            print(*line, sep=" | ", flush=True)
    head = ["pruner", "zeros", "uniform", "shapley", "change", "uniform, refitted", "shapley, refitted", "change", "error", "s"]
    about = (
        f"{made_by('make study NAME=recovery')}. Built-in model; Shapley values by windows of {sizes.window}, payoff recip_ppl "
        f"on {sizes.n_payoff} sequences, scale log, lam 0.15; {recovery}. Pruned and refitted with {sizes.n_calibration} "
        f"calibration sequences, perplexity on {sizes.n_test} of the test text, read once for each; all sequences have "
        f"{sizes.seq_len} tokens. Error: mean over blocks of the squared error of their outputs against the dense model's, "
        "relative to what the dense block adds, uniform budget, before and after refitting. s: seconds of one core to prune, "
        "refit and evaluate it. One seed."
    )
    publish(options, "recovery", ["# Budgets before and after recovery", "", about, "", *table(head, lines, "lr" + "r" * 8)])


if __name__ == "__main__":
    main()

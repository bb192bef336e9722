"""How much payoff text Shapley values need: a study in a few lines, to copy where a new one begins.

On the built-in model: values by windows of 3 on 1 to 8 payoff sequences, three samples of each, against the values on 32 other
sequences; and what perplexity their budgets leave on the selection text, at 70 % with Wanda. Writes results/tables/template.md.
Payoffs and losses are kept in the cache as they come: a killed run goes on where it was.

    python -m experiments.template.run [--cache results/cache] [--quick]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.study import Known, built_in, made_by, mean_and_spread, parse, parser, publish, spearman, table, text
from svnup.allocation import Budget
from svnup.allocation.maps import ScoreBudget
from svnup.evaluation import perplexity
from svnup.game import LayerGame
from svnup.pruning.walk import temporarily_pruned
from svnup.pruning.wanda import Wanda
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import Ints, ShapleyValues, SparsityProfile


@dataclass(frozen=True)
class Sizes:
    """How much is measured, on how much text; the defaults made the committed table."""

    n_blocks: int | None = None
    n_payoff: tuple[int, ...] = (1, 2, 4, 8)
    n_samples: int = 3
    n_reference: int = 32
    n_calibration: int = 8
    n_selection: int = 24
    seq_len: int = 128


QUICK = Sizes(n_blocks=4, n_payoff=(1, 2), n_samples=2, n_reference=3, n_calibration=2, n_selection=2, seq_len=32)


class Bench:
    """The model, its texts, and perplexities that are measured once ever."""

    def __init__(self, cache: Path, sizes: Sizes) -> None:
        self.cache, self.known = cache, Known(cache, "template")
        self.lm = built_in(sizes.n_blocks)
        self.calibration = text("calibration", sizes.n_calibration, sizes.seq_len)
        self.selection = text("selection", sizes.n_selection, sizes.seq_len)

    def values(self, payoff: Ints) -> ShapleyValues:
        return SlidingWindow(3).estimate(LayerGame(self.lm, payoff, payoff="recip_ppl", cache_dir=self.cache))

    def perplexity(self, values: ShapleyValues | None) -> float:
        """On the selection text, pruned by the budget of the values; None: uniformly."""
        budget = Budget(self.lm.block_params, 0.7)
        profile = budget.uniform() if values is None else ScoreBudget(scale="log", lam=0.15).allocate(budget, values)
        what = [self.lm.fingerprint(), np.round(profile.sparsity, 9).tolist(), self.calibration.shape, self.selection.shape]
        return float(self.known.measured(what, lambda: self._measure(profile)))

    def _measure(self, profile: SparsityProfile) -> float:
        with temporarily_pruned(self.lm, profile, Wanda(), self.calibration):
            return perplexity(self.lm, self.selection)


def main(argv: list[str] | None = None) -> None:
    options = parse(parser(__doc__), argv)
    sizes = QUICK if options.quick else Sizes()
    bench = Bench(options.cache, sizes)
    payoff = text("payoff", sizes.n_samples * max(sizes.n_payoff) + sizes.n_reference, sizes.seq_len)
    reference = bench.values(payoff[-sizes.n_reference :])
    lines = [["uniform", "-", f"{bench.perplexity(None):.2f}"]]
    for n in sizes.n_payoff:
        samples = [bench.values(payoff[n * i : n * (i + 1)]) for i in range(sizes.n_samples)]
        agreement = mean_and_spread([spearman(values.values, reference.values) for values in samples])
        lines.append([str(n), agreement, mean_and_spread([bench.perplexity(values) for values in samples])])
        print(*lines[-1], sep=" | ", flush=True)
    lines.append([f"{sizes.n_reference}, the reference", "-", f"{bench.perplexity(reference):.2f}"])
    head = ["payoff sequences", "Spearman with the reference", "perplexity"]
    about = (
        f"{made_by('make study NAME=template')}. Built-in model, windows of 3, payoff recip_ppl, lam 0.15; Wanda at 70 % with "
        f"{sizes.n_calibration} calibration sequences, perplexity on {sizes.n_selection} of the selection text; all sequences "
        f"have {sizes.seq_len} tokens. Mean ± standard deviation over {sizes.n_samples} samples of the payoff text."
    )
    publish(options, "template", ["# How much payoff text Shapley values need", "", about, "", *table(head, lines, "lrr")])


if __name__ == "__main__":
    main()

"""Every estimator at several budgets against the exact values of the same game, on the built-in model.

Writes results/tables/estimators.md and docs/figures/estimators.png. Coalition values go to the cache as they come, so a killed
run goes on where it was. Errors are root mean squares over the blocks, divided by the standard deviation of the exact values
over the blocks; random estimators run with ten seeds (mean and standard deviation). Block 0 is worth ten times the others, so
the errors without it are printed too. Seconds are block-forwards x time of one block + evaluations x time of one head pass,
both measured in this run (values themselves are looked up in the exact table), and measured directly for gates.

    python -m experiments.estimators.run [--cache results/cache] [--n-seq 16] [--quick]
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.study import built_in, figure, made_by, mean_and_spread, parse, parser, publish, spearman, table, text
from svnup.allocation import Budget
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.pruning.walk import pruned_weights
from svnup.pruning.wanda import Wanda
from svnup.results.provenance import hardware
from svnup.shapley.exact import Exact
from svnup.shapley.gates import Gates
from svnup.shapley.kernel import Kernel
from svnup.shapley.permutation import Permutation
from svnup.shapley.sliding_window import SlidingWindow
from svnup.shapley.stopping import kendall_tau
from svnup.types import Bools, Floats, ShapleyValues


@dataclass(frozen=True)
class Sizes:
    """How much is tried, on how much text; the defaults made the committed table."""

    n_blocks: int | None = None
    n_seeds: int = 10
    budgets: tuple[int, ...] = (50, 144, 400, 1200)
    windows: tuple[int, ...] = (1, 2, 3, 5, 7, 9)
    n_payoff: int = 16
    n_calibration: int = 128
    seq_len: int = 256


QUICK = Sizes(n_blocks=6, n_seeds=2, budgets=(30, 40), windows=(1, 3, 5), n_payoff=2, n_calibration=2, seq_len=32)
VARIANTS = ("centred", "stride", "absent", "not antithetic", "truncated")  # in the table, not in the figure
MARKERS = {"exact": "o", "sliding window": "s", "gates": "*", "permutation": "^", "kernel": "D", "leverage": "v"}


class Capped:
    """The game with the loss capped at ln V, from the values of the uncapped one."""

    absent_costs, cap = False, "chance"

    def __init__(self, base: LayerGame) -> None:
        self.base, self.n_players, self.worst = base, base.n_players, -math.log(base.lm.vocab_size)

    def __call__(self, coalitions: Bools) -> Floats:
        return np.maximum(self.base(coalitions), self.worst)

    @property
    def v_empty(self) -> float:
        return max(self.base.v_empty, self.worst)


def estimators(skip: bool, sizes: Sizes) -> dict[str, list[Any]]:
    """By the name of a line of the table: one estimator, or one for each seed."""
    seeds, (*_, less, most) = range(sizes.n_seeds), sizes.budgets
    lines: dict[str, list[Any]] = {f"sliding window w={w}": [SlidingWindow(w)] for w in sizes.windows}
    lines["sliding window w=5, centred"] = [SlidingWindow(5, aggregation="centred")]
    lines["sliding window w=5, stride 3"] = [SlidingWindow(5, stride=3)]
    lines["sliding window w=5, context absent"] = [SlidingWindow(5, context="absent")]
    if skip:
        lines |= {f"gates, {nodes} nodes": [Gates(nodes)] for nodes in (2, 4, 8)}
    for budget in sizes.budgets:
        lines[f"permutation, budget {budget}"] = [Permutation(budget, seed) for seed in seeds]
        lines[f"kernel, budget {budget}"] = [Kernel(budget, seed) for seed in seeds]
        lines[f"leverage, budget {budget}"] = [Kernel(budget, seed, sampling="leverage") for seed in seeds]
    lines[f"permutation, budget {less}, not antithetic"] = [Permutation(less, seed, antithetic=False) for seed in seeds]
    lines[f"permutation, budget {most}, truncated 1 %"] = [Permutation(most, seed, truncation=0.01) for seed in seeds]
    return lines


def unit_times(lm: LanguageModel, tokens: torch.Tensor) -> tuple[float, float]:
    with torch.inference_mode():
        batches = list(lm.micro_batches(tokens))

        def median(work: Callable[[], object]) -> float:
            taken = []
            for _ in range(9):
                start = time.perf_counter()
                work()
                taken.append(time.perf_counter() - start)
            return statistics.median(taken)

        block = median(lambda: [lm.run_block(min(5, lm.n_blocks - 1), b) for b in batches])
        return block, median(lambda: [lm.token_nll(b) for b in batches])


def line(name: str, exact: ShapleyValues, found: list[ShapleyValues], seconds: list[float]) -> tuple[list[str], float, float]:
    error = [rms(v.values - exact.values) / exact.values.std() for v in found]
    rest = [rms((v.values - exact.values)[1:]) / exact.values[1:].std() for v in found]
    rho = [spearman(v.values, exact.values) for v in found]
    tau = [kendall_tau(v.values, exact.values) for v in found]
    cost = found[0].cost
    evaluations = np.mean([v.cost.n_evaluations for v in found])
    forwards = np.mean([v.cost.n_block_forwards for v in found])
    counts = [f"{evaluations:.0f}", f"{forwards:.0f}"]
    counts = counts if not cost.n_backward_passes else [f"{cost.n_backward_passes} backward", "-"]
    row = [name, *counts, f"{np.mean(seconds):.1f}", *(mean_and_spread(values, 3) for values in (error, rest, rho, tau))]
    return row, float(np.mean(seconds)), float(np.mean(error))


def rms(x: Floats) -> float:
    return float(np.sqrt(np.mean(x**2)))


def study(
    title: str, game: Any, units: tuple[float, float], sizes: Sizes
) -> tuple[list[str], dict[str, list[tuple[float, float]]]]:
    exact = Exact().estimate(game)
    print(f"{title}: exact values {np.round(exact.values, 4).tolist()}", flush=True)
    lines: list[list[str]] = []
    points: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, found: list[ShapleyValues]) -> None:
        seconds = [
            v.cost.seconds if v.cost.n_backward_passes else v.cost.n_block_forwards * units[0] + v.cost.n_evaluations * units[1]
            for v in found
        ]
        row, cost, error = line(name, exact, found, seconds)
        lines.append(row)
        if not any(variant in name for variant in VARIANTS):
            points.setdefault(name.split(",")[0].split(" w=")[0], []).append((cost, max(error, 1e-4)))

    add("exact", [exact])
    for name, several in estimators(not game.absent_costs and game.cap == "none", sizes).items():
        add(name, [estimator.estimate(game) for estimator in several])
    head = ["estimator", "evaluations", "block-forwards", "seconds", "error / spread", "without block 0", "Spearman", "Kendall"]
    known = f"Exact values: {', '.join(f'{v:.4f}' for v in exact.values)}."
    return [f"## {title}", "", known, "", *table(head, lines), ""], points


def draw(points: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.2 * len(points), 3.8), layout="constrained")
    for axes, (title, kinds) in zip(drawing.subplots(1, len(points), sharey=True), points.items(), strict=True):
        for colour, (kind, marker) in enumerate(MARKERS.items()):
            if dots := sorted(kinds.get(kind, [])):
                axes.plot(*zip(*dots, strict=True), marker=marker, linestyle=":", color=f"C{colour}", label=kind)
        axes.set(xscale="log", yscale="log", xlabel="seconds on two CPU cores", title=title)
        axes.title.set_fontsize(9)
        axes.grid(color="0.9")
    drawing.axes[0].set_ylabel("error / spread of the exact values")
    drawing.axes[0].legend(fontsize=8, loc="lower left")
    drawing.savefig(path, dpi=130, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--n-seq", type=int, metavar="N", help="payoff sequences (16)")
    options = parse(made, argv)
    sizes = QUICK if options.quick else Sizes()
    n_seq, seq_len = options.n_seq or sizes.n_payoff, sizes.seq_len
    lm = built_in(sizes.n_blocks)
    tokens = torch.as_tensor(text("payoff", n_seq, seq_len))
    uniform = Budget(lm.block_params, 0.7).uniform()
    pruned = pruned_weights(lm, uniform, Wanda(), text("calibration", sizes.n_calibration, seq_len))
    games: dict[str, Any] = {
        "skip, -NLL": LayerGame(lm, tokens, cache_dir=options.cache),
        "skip, -NLL capped at chance": Capped(LayerGame(lm, tokens, cache_dir=options.cache)),
        "prune (Wanda, 70 %), -NLL": LayerGame(lm, tokens, pruned=pruned, cache_dir=options.cache),
    }
    units, found, points = unit_times(lm, tokens), [], {}
    for title, game in games.items():
        lines, points[title] = study(title, game, units, sizes)
        found += lines
    threads = f"{hardware().threads} threads"
    head = [
        "# Estimators against exact Shapley values, built-in model",
        "",
        f"{made_by('make study NAME=estimators', threads)}; payoff text: {n_seq} sequences of {seq_len} tokens. "
        f"{sizes.n_seeds} seeds for the random estimators, mean ± standard deviation.",
        "",
    ]
    publish(options, "estimators", [*head, *found])
    draw(points, figure(options, "estimators"))


if __name__ == "__main__":
    main()

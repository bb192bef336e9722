"""Which experts of a mixture matter, and whether budgets for experts gain by knowing it.

On the built-in mixture: scores of the experts of each block (Shapley values, how often they are chosen, what the model loses
without one of them) beside measured sensitivity, the loss that is added when one expert is sparser and everything else is at
the target; then the perplexity of budgets by these scores, with Wanda and SparseGPT, on the test text, read once for the
amplitude with the least loss on the selection text. Writes results/tables/experts.md. What was measured is kept in the
cache: a killed run goes on where it was.

    python -m experiments.experts.run [--cache results/cache] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from experiments.study import PRUNERS, Known, built_in, made_by, mean_and_spread, parse, parser, publish, spearman, table, text
from svnup.allocation import Budget
from svnup.allocation.maps import GRID, ExpertBudget
from svnup.allocation.rounds import ShapleyMargins
from svnup.allocation.splits import UniformSplit
from svnup.allocation.trial import Trial
from svnup.data import Docs, Role
from svnup.evaluation import perplexity
from svnup.game import ExpertGame
from svnup.model.source import SHIPPED
from svnup.pruning.walk import temporarily_pruned
from svnup.scoring import Context
from svnup.scoring.experts import Frequency, Shapley
from svnup.types import ExpertScores, Floats, Ints, SparsityProfile

SENSITIVITY = 0.2  # of sparsity, of one expert
BUDGETS = ("Shapley, spread", "Shapley, drop", "without one", "share of weight")
MARGINS = "margins"


@dataclass(frozen=True)
class Sizes:
    """How much is measured, on how much text; the defaults made the committed table."""

    n_blocks: int | None = None
    sparsities: tuple[float, ...] = (0.6, 0.7)
    grid: tuple[float, ...] = GRID
    seeds: tuple[int, ...] = (0, 1)
    n_payoff: int = 16
    n_calibration: int = 32
    n_selection: int = 32
    n_test: int = 64
    seq_len: int = 256


QUICK = Sizes(2, (0.6,), (0.0, 0.2), (0,), n_payoff=2, n_calibration=2, n_selection=2, n_test=2, seq_len=32)


class Bench:
    """The model, its texts, and what was measured once ever."""

    def __init__(self, cache: Path, sizes: Sizes) -> None:
        self.sizes, self.cache, self.known = sizes, cache, Known(cache, "experts")
        self.source = partial(Docs, seq_len=sizes.seq_len)
        self.payoff = self.source(role="payoff", n_seq=sizes.n_payoff)
        self.lm = built_in(sizes.n_blocks, SHIPPED["svnup/tiny_moe"])
        self.dense = perplexity(self.lm, self.test)
        self.scores = self._scores()

    @property
    def test(self) -> Ints:
        return text("test", self.sizes.n_test, self.sizes.seq_len)

    def calibration(self, seed: int) -> Ints:
        return text("calibration", self.sizes.n_calibration, self.sizes.seq_len, seed)

    def _scores(self) -> dict[int, dict[str, ExpertScores]]:
        """By seed and name scores of all experts; how often they are chosen is of the calibration text of a seed."""
        out: dict[int, dict[str, ExpertScores]] = {}
        blocks = [index for index, _ in self.lm.budget_units("expert")]
        for seed in self.sizes.seeds:
            context = Context(self.calibration(seed), str(self.cache), None)  # type: ignore[arg-type]
            if not out:  # the others are the same for every seed
                found = {f"Shapley, {a}": Shapley(self.payoff, absence=a).score(self.lm, context) for a in ("spread", "drop")}
                found["without one"] = self._without_one(found["Shapley, spread"])
            scores = found | {f"share of {of}": Frequency(of).score(self.lm, context) for of in ("weight", "tokens")}
            out[seed] = {name: one.per_unit(len(blocks), blocks) for name, one in scores.items()}
        return out

    def _without_one(self, like: ExpertScores) -> ExpertScores:
        """What the model loses without one expert, in the game of `spread`, whose payoffs are known already."""
        tokens, values = self.payoff.tokens(self.lm.tokenizer), []
        for index in np.unique(like.blocks).tolist():
            game = ExpertGame(self.lm, tokens, index, payoff="recip_ppl", cache_dir=self.cache)
            everyone = np.ones((1, game.n_players), dtype=bool)
            values.append(game(everyone) - game(everyone & ~np.eye(game.n_players, dtype=bool)))
        return replace(like, values=np.concatenate(values), method="without one", stderr=None)

    def budget(self, sparsity: float) -> Budget:
        return Budget(self.lm.budget_params("expert"), sparsity)

    def trial(self, pruner: str, seed: int, role: Role) -> Trial:
        """Losses of profiles that are pruned with the calibration text of a seed, on the text of a role."""
        source = self.payoff if role == "payoff" else self.source(role=role, n_seq=self.sizes.n_selection)
        return Trial(self.lm, PRUNERS[pruner], UniformSplit(), self.calibration(seed), source, self.cache, payoff=self.payoff)

    def sensitivity(self, sparsity: float) -> Floats:
        """The NLL that each expert adds on payoff text when it alone is sparser, by weights pruned in advance."""
        budget, like = self.budget(sparsity), self.scores[self.sizes.seeds[0]]["Shapley, spread"]
        levels = sparsity + SENSITIVITY * np.vstack([np.zeros(budget.n_units), np.eye(budget.n_units)[like.units]])
        profiles = [SparsityProfile(row, budget.params, float(np.average(row, weights=budget.params))) for row in levels]
        losses = self.trial("wanda", 0, "payoff").losses([("", profile) for profile in profiles], in_advance=True)
        return np.array(losses[1:]) - losses[0]

    def chosen(self, scores: ExpertScores, pruner: str, sparsity: float, seed: int) -> tuple[float, SparsityProfile]:
        """The amplitude with the least loss on selection text, and its profile."""
        budget = self.budget(sparsity)
        tried = [(f"lam={lam:g}", ExpertBudget(lam=lam).allocate(budget, scores)) for lam in self.sizes.grid]
        best = int(np.argmin(self.trial(pruner, seed, "selection").losses(tried)))
        return self.sizes.grid[best], tried[best][1]

    def margins(self, pruner: str, sparsity: float, seed: int) -> SparsityProfile:
        """A budget for each expert of all blocks together, by values at the margin of the pruned model."""
        made = ShapleyMargins(self.payoff, granularity="expert")
        return made.allocate(self.budget(sparsity), None, self.trial(pruner, seed, "selection"))

    def tested(self, profile: SparsityProfile, pruner: str, seed: int) -> float:
        """Perplexity of the pruned model on the test text."""
        what = [self.lm.fingerprint(), np.round(profile.sparsity, 9).tolist(), pruner, seed, self.sizes.n_calibration]

        def measure() -> float:
            how, calibration = PRUNERS[pruner], self.calibration(seed)
            with temporarily_pruned(self.lm, UniformSplit().divide(self.lm, profile, how, calibration), how, calibration):
                return perplexity(self.lm, self.test)

        return float(self.known.measured([*what, list(self.test.shape)], measure))


def agreement(bench: Bench) -> Iterator[list[str]]:
    """Rank correlations of scores with measured sensitivity, means over the blocks."""
    measured = {sparsity: bench.sensitivity(sparsity) for sparsity in bench.sizes.sparsities}
    for name, scores in bench.scores[bench.sizes.seeds[0]].items():
        rows = [scores.blocks == block for block in np.unique(scores.blocks)]
        found = [[spearman(scores.values[row], losses[row]) for row in rows] for losses in measured.values()]
        yield [name, *(f"{np.mean(one):.2f}" for one in found), *(f"{min(one):.2f} to {max(one):.2f}" for one in found)]


def budgets(bench: Bench, pruner: str, sparsity: float) -> Iterator[list[str]]:
    """Perplexity of each kind of budget over the calibration seeds, and its change against the uniform one."""
    seeds = bench.sizes.seeds
    uniform = [bench.tested(bench.budget(sparsity).uniform(), pruner, seed) for seed in seeds]
    yield [pruner, f"{100 * sparsity:g} %", "uniform", mean_and_spread(uniform), "-", "-"]
    found: dict[str, list[tuple[float | None, float]]] = {}
    for seed in seeds:
        for name in BUDGETS:
            lam, profile = bench.chosen(bench.scores[seed][name], pruner, sparsity, seed)
            found.setdefault(name, []).append((lam, bench.tested(profile, pruner, seed)))
        found.setdefault(MARGINS, []).append((None, bench.tested(bench.margins(pruner, sparsity, seed), pruner, seed)))
    for name, runs in found.items():
        ppl = np.array([one for _, one in runs])
        change = 100 * (ppl / uniform - 1)
        lams = "-" if name == MARGINS else ", ".join(f"{lam:g}" for lam, _ in runs)
        yield [pruner, f"{100 * sparsity:g} %", name, mean_and_spread(ppl), f"{change.mean():+.1f} %", lams]


def main(argv: list[str] | None = None) -> None:
    options = parse(parser(__doc__), argv)
    sizes = QUICK if options.quick else Sizes()
    bench = Bench(options.cache, sizes)
    agree, lines = list(agreement(bench)), list[list[str]]()
    for sparsity in sizes.sparsities:
        for pruner in PRUNERS:
            for line in budgets(bench, pruner, sparsity):
                lines.append(line)
                print(*line, sep=" | ", flush=True)
            publish(options, "experts", report(options, bench, agree, lines))


def report(options: argparse.Namespace, bench: Bench, agree: list[list[str]], lines: list[list[str]]) -> list[str]:
    sizes, levels = bench.sizes, [f"{100 * sparsity:g} %" for sparsity in bench.sizes.sparsities]
    n_experts = len(bench.scores[sizes.seeds[0]]["Shapley, spread"].values)
    return [
        "# Experts of a mixture: what they are worth, and budgets by it",
        "",
        f"{made_by('make study NAME=experts', 'one thread')}. The built-in mixture, {bench.lm.n_blocks} blocks with "
        f"{n_experts} experts; dense perplexity {bench.dense:.2f}. Payoff recip_ppl on {sizes.n_payoff} sequences, calibration "
        f"{sizes.n_calibration}, selection {sizes.n_selection}, test {sizes.n_test}; all have {sizes.seq_len} tokens.",
        "",
        "## Agreement with measured sensitivity",
        "",
        f"Sensitivity: the NLL that is added on the payoff text when one expert is {SENSITIVITY:g} sparser and all else is at "
        "the target, Wanda, weights pruned in advance. Spearman's rank correlation with it inside a block: the mean over the "
        "blocks, and from the least to the greatest.",
        "",
        *table(["score", *levels, *(f"{level}, span" for level in levels)], agree, "l" + "r" * 2 * len(levels)),
        "",
        "## Budgets",
        "",
        f"Inside each block densities by a score of its experts, in the map of `shapley_experts`; {MARGINS}: "
        "`shapley_margins` with a budget for each expert of all blocks together. Perplexity on the test text, mean ± standard "
        f"deviation over calibration seeds {', '.join(map(str, sizes.seeds))}, and the mean change against the uniform "
        f"budget. Amplitude (lam): of {', '.join(f'{lam:g}' for lam in sizes.grid)} the one with the least loss on the "
        "selection text, for each seed.",
        "",
        *table(["pruner", "zeros", "score", "perplexity", "change", "amplitudes"], lines, "lrlrrl"),
    ]


if __name__ == "__main__":
    main()

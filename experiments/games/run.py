"""Which game, payoff, estimator and scale lead to the lowest loss after pruning, on the built-in model.

Screens all combinations at 70 % with Wanda on the selection text (lam 0.15), then runs the best five, the plain setting (skip,
-NLL, window of 5, log scale) and uniform with Wanda and SparseGPT at 50 to 80 % and three calibration seeds, still on the
selection text; last, the test text is read once, for uniform, the plain setting and the winner. Writes
results/tables/games.md and docs/figures/games.png. Coalition values and losses are kept in the cache as they come: a killed run
goes on where it was.

    python -m experiments.games.run [--cache results/cache] [--quick]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from experiments.study import PRUNERS, Known, built_in, figure, made_by, mean_and_spread, parse, parser, publish, table, text
from svnup.allocation import Budget
from svnup.allocation.maps import ScoreBudget
from svnup.data import Role
from svnup.evaluation import perplexity
from svnup.game.coalition_game import Payoff
from svnup.game.layer_game import LayerGame
from svnup.pruning.walk import pruned_weights, temporarily_pruned
from svnup.shapley import Estimator
from svnup.shapley.exact import Exact
from svnup.shapley.gates import Gates
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import BlockScores, Bools, Floats, Ints, Players, SparsityProfile

Scale = Literal["log", "rank", "clip", "raw"]
Absence = Literal["skip", "prune"]
Setting = tuple[Absence, Players, str, str]  # the payoff, of PAYOFFS or TRANSFORMED, and the estimator
Choice = tuple[Setting | None, Scale]  # None: uniform, whatever the scale
Losses = dict[tuple[Setting | None, Scale, str, float], list[float]]  # by choice, pruner and sparsity: one per seed
Tests = dict[Choice, dict[str, list[float]]]  # perplexities by choice and pruner: one per seed
PLAIN: Setting = ("skip", "block", "neg_nll", "w=5")
UNIFORM: Choice = (None, "log")
ESTIMATORS: dict[str, Estimator | Gates] = {
    "w=1": SlidingWindow(1),
    "w=3": SlidingWindow(3),
    "w=5": SlidingWindow(5),
    "w=8": SlidingWindow(8),
    "w=5, context absent": SlidingWindow(5, context="absent"),
    "gates": Gates(8),
    "exact": Exact(),
}
PAYOFFS: dict[str, Payoff] = {"neg_nll": "neg_nll", "kl": "kl", "accuracy": "accuracy"}
# Payoffs that follow from -NLL (m,) without another evaluation, given its worst by chance and that of all players.
TRANSFORMED: dict[str, Callable[[Floats, float, float], Floats]] = {
    "neg_nll, capped": lambda v, chance, full: np.maximum(v, chance),
    "neg_ppl": lambda v, chance, full: -np.exp(-v),
    "recip_ppl": lambda v, chance, full: np.exp(v - full),
}


@dataclass(frozen=True)
class Sizes:
    """How much is tried, on how much text; the defaults made the committed table."""

    n_blocks: int | None = None
    payoffs: tuple[str, ...] = ("neg_nll", "neg_nll, capped", "neg_ppl", "recip_ppl")
    estimators: tuple[str, ...] = tuple(ESTIMATORS)
    payoffs_of_sublayers: tuple[str, ...] = ("neg_nll", "recip_ppl")
    estimators_of_sublayers: tuple[str, ...] = ("w=1", "w=3", "w=5")
    more_payoffs: tuple[str, ...] = ("kl", "accuracy")
    more_estimators: tuple[str, ...] = ("w=1", "w=5")
    scales: tuple[Scale, ...] = ("log", "rank", "clip", "raw")
    sparsities: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)  # of the finals, which are decided at 0.6 and 0.7
    n_finalists: int = 5
    n_shown: int = 20
    n_seeds: int = 3
    n_calibration: int = 32
    n_payoff: int = 16
    n_selection: int = 48
    n_test: int | None = None
    seq_len: int = 256


QUICK = Sizes(
    n_blocks=5,
    payoffs=("neg_nll", "recip_ppl"),
    estimators=("w=5", "gates"),
    payoffs_of_sublayers=("neg_nll",),
    estimators_of_sublayers=("w=1",),
    more_payoffs=("accuracy",),
    more_estimators=("w=1",),
    scales=("log", "rank"),
    sparsities=(0.6, 0.7),
    n_finalists=1,
    n_shown=3,
    n_seeds=2,
    n_calibration=2,
    n_payoff=4,
    n_selection=2,
    n_test=2,
    seq_len=32,
)


@dataclass
class OfNLL:
    """Another payoff of a game of -NLL, without evaluating anything again."""

    base: LayerGame
    payoff: Callable[[Floats], Floats]

    def __post_init__(self) -> None:
        self.n_players, self.absent_costs = self.base.n_players, self.base.absent_costs

    def __call__(self, coalitions: Bools) -> Floats:
        return self.payoff(self.base(coalitions))

    @property
    def v_empty(self) -> float:
        return float(self.payoff(np.array([self.base.v_empty]))[0])


def settings(sizes: Sizes) -> Iterator[Setting]:
    absences: tuple[Absence, ...] = ("skip", "prune")
    for absence in absences:
        for payoff in sizes.payoffs:
            for estimator in sizes.estimators:
                if estimator != "gates" or (absence == "skip" and payoff == "neg_nll"):
                    yield absence, "block", payoff, estimator
        for payoff in sizes.payoffs_of_sublayers:
            for estimator in sizes.estimators_of_sublayers:
                yield absence, "sublayer", payoff, estimator
        for payoff in sizes.more_payoffs:
            for estimator in sizes.more_estimators:
                yield absence, "block", payoff, estimator


class Bench:
    """The model, its texts, and losses and values that are computed once ever."""

    def __init__(self, cache: Path, sizes: Sizes) -> None:
        self.cache, self.sizes = cache, sizes
        self.lm = built_in(sizes.n_blocks)
        self.payoff_tokens = torch.as_tensor(self.text("payoff", sizes.n_payoff))
        self.selection = self.text("selection", sizes.n_selection)
        self.weights = self.lm.fingerprint()
        self.known = Known(self.cache, "games_study")
        self.games: dict[Any, LayerGame] = {}

    def text(self, role: Role, n_seq: int | None, seed: int = 0) -> Ints:
        return text(role, n_seq, self.sizes.seq_len, seed)

    def calibration(self, seed: int) -> Ints:
        return self.text("calibration", self.sizes.n_calibration, seed)

    def game(self, absence: Absence, players: Players, payoff: Payoff, pruner: str, sparsity: float, seed: int) -> LayerGame:
        where = (pruner, sparsity, seed) if absence == "prune" else None
        key = (players, payoff, where)
        if key not in self.games:
            replacements = None
            if absence == "prune":
                uniform = Budget(self.lm.block_params, sparsity).uniform()
                replacements = pruned_weights(self.lm, uniform, PRUNERS[pruner], self.calibration(seed))
            self.games[key] = LayerGame(
                self.lm, self.payoff_tokens, payoff=payoff, players=players, pruned=replacements, cache_dir=self.cache
            )
        return self.games[key]

    def values(self, setting: Setting, pruner: str, sparsity: float, seed: int) -> Floats:
        absence, players, payoff, estimator = setting
        where = [pruner, sparsity, seed] if absence == "prune" else []

        def compute() -> list[float]:
            game: Any = self.game(absence, players, PAYOFFS.get(payoff, "neg_nll"), pruner, sparsity, seed)
            if (transform := TRANSFORMED.get(payoff)) is not None:
                chance, full = -math.log(self.lm.vocab_size), float(game(np.ones((1, game.n_players), dtype=bool))[0])
                game = OfNLL(game, lambda v: transform(v, chance, full))
            values: list[float] = ESTIMATORS[estimator].estimate(game).per_unit(self.lm.n_blocks).values.tolist()
            return values

        return np.array(self.known.measured([self.weights, "values", setting, where], compute))

    def profile(self, setting: Setting | None, scale: Scale, pruner: str, sparsity: float, seed: int) -> SparsityProfile | None:
        """None where the scale cannot be applied: the logarithm of values none of which is positive."""
        params = self.lm.block_params
        if setting is None:
            return Budget(params, sparsity).uniform()
        scores = BlockScores(self.values(setting, pruner, sparsity, seed), "study")
        try:
            return ScoreBudget(scale=scale).allocate(Budget(params, sparsity), scores)
        except ValueError:
            return None

    def loss(self, profile: SparsityProfile, pruner: str, seed: int, role: Role = "selection") -> float:
        """NLL on the selection text (or perplexity on the test text) of the model pruned to a profile."""

        def compute() -> float:
            with temporarily_pruned(self.lm, profile, PRUNERS[pruner], self.calibration(seed)):
                if role == "test":
                    return perplexity(self.lm, self.text("test", self.sizes.n_test))
                return float(self.lm.nll(self.selection).mean())

        what = [self.weights, "loss", np.round(profile.sparsity, 9).tolist(), pruner, seed, role]
        return float(self.known.measured(what, compute))


def name(setting: Setting | None, scale: Scale) -> str:
    return "uniform" if setting is None else f"{', '.join(setting)}; {scale}"


def screen(bench: Bench) -> list[tuple[float, Setting | None, Scale]]:
    """Every setting and scale by its loss, and uniform among them."""
    found: list[tuple[float, Setting | None, Scale]] = []
    uniform = bench.profile(*UNIFORM, "wanda", 0.7, 0)
    assert uniform is not None
    found.append((bench.loss(uniform, "wanda", 0), *UNIFORM))
    todo = [(setting, scale) for setting in settings(bench.sizes) for scale in bench.sizes.scales]
    for index, (setting, scale) in enumerate(todo):
        profile = bench.profile(setting, scale, "wanda", 0.7, 0)
        if profile is not None:
            found.append((bench.loss(profile, "wanda", 0), setting, scale))
            print(f"{index + 1}/{len(todo)} {name(setting, scale)}: {found[-1][0]:.4f}", flush=True)
    return sorted(found, key=lambda entry: entry[0])


def finals(bench: Bench, chosen: list[Choice]) -> Losses:
    losses: Losses = {}
    for pruner in PRUNERS:
        for sparsity in bench.sizes.sparsities:
            for setting, scale in chosen:
                cell = losses[setting, scale, pruner, sparsity] = []
                for seed in range(bench.sizes.n_seeds):
                    profile = bench.profile(setting, scale, pruner, sparsity, seed)
                    cell.append(math.nan if profile is None else bench.loss(profile, pruner, seed))
                print(f"{pruner} {sparsity} {name(setting, scale)}: {np.mean(cell):.4f}", flush=True)
    return losses


def report(
    sizes: Sizes, screened: list[tuple[float, Setting | None, Scale]], losses: Losses, chosen: list[Choice], tests: Tests
) -> list[str]:
    uniform = next(loss for loss, setting, _ in screened if setting is None)
    better = sum(loss < uniform for loss, *_ in screened)
    length = sizes.seq_len
    lines = [
        "# Games, payoffs, estimators and scales: which budget prunes best",
        "",
        f"{made_by('make study NAME=games')}. Built-in model, lam 0.15, {sizes.n_calibration} x {length} calibration tokens, "
        f"payoff text of {sizes.n_payoff} x {length} tokens, selection text of {sizes.n_selection} x {length}.",
        "",
        "## Screen: perplexity on the selection text, Wanda, 70 %, seed 0",
        "",
        f"{better} of {len(screened) - 1} settings beat uniform.",
        "",
    ]
    plain = next(i for i, (_, setting, scale) in enumerate(screened) if setting == PLAIN and scale == "log")
    uniform_at = next(i for i, (_, setting, _) in enumerate(screened) if setting is None)
    ranked = []
    for i in sorted({*range(sizes.n_shown), plain, uniform_at, len(screened) - 1}):
        loss, setting, scale = screened[i]
        change = f"{100 * math.expm1(loss - uniform):+.1f} %"
        ranked.append([str(i + 1), name(setting, scale), f"{math.exp(loss):.2f}", change])
    lines += table(["rank", "absence, players, payoff, estimator; scale", "perplexity", "vs uniform"], ranked)
    kinds: list[tuple[str, tuple[float, Setting | None, Scale]]] = []
    for position in range(4):
        for kind in sorted({setting[position] for _, setting, _ in screened if setting}):
            kinds.append((kind, next(e for e in screened if e[1] and e[1][position] == kind)))
    kinds += [(scale, next(e for e in screened if e[1] and e[2] == scale)) for scale in sizes.scales]
    best = [[kind, name(setting, scale), f"{math.exp(loss):.2f}"] for kind, (loss, setting, scale) in kinds]
    lines += ["", "The best of each kind:", "", *table(["what", "best setting", "perplexity"], best)]
    lines += [
        "",
        f"## Best {sizes.n_finalists}, plain setting and uniform: perplexity on the selection text, mean ± sd over "
        f"{sizes.n_seeds} calibration seeds",
        "",
    ]
    columns = [(pruner, sparsity) for pruner in PRUNERS for sparsity in sizes.sparsities]
    shown = [[name(*one), *(mean_and_spread(np.exp(losses[*one, *column])) for column in columns)] for one in chosen]
    lines += table(["setting", *(f"{pruner} {100 * s:.0f} %" for pruner, s in columns)], shown)
    lines += ["", f"## Test text, read once: perplexity at 70 %, mean ± sd over {sizes.n_seeds} calibration seeds", ""]
    shown = [[name(*one), *(mean_and_spread(by_pruner[p]) for p in PRUNERS)] for one, by_pruner in tests.items()]
    return [*lines, *table(["setting", *PRUNERS], shown)]


def draw(losses: Losses, chosen: list[Choice], sparsities: tuple[float, ...], path: Path) -> None:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.5, 4), layout="constrained")
    for axes, pruner in zip(drawing.subplots(1, 2), PRUNERS, strict=True):
        for marker, choice in zip("osd^v<>", chosen, strict=False):
            change = [
                100 * math.expm1(np.mean(losses[*choice, pruner, s]) - np.mean(losses[*UNIFORM, pruner, s])) for s in sparsities
            ]
            axes.plot([100 * s for s in sparsities], change, marker=marker, label=name(*choice))
        axes.set(xlabel="sparsity (%)", ylabel="perplexity against uniform (%)", title=pruner)
        axes.grid(color="0.9")
    drawing.axes[0].legend(fontsize=6)
    drawing.savefig(path, dpi=130, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    options = parse(parser(__doc__), argv)
    sizes = QUICK if options.quick else Sizes()
    bench = Bench(options.cache, sizes)
    screened = screen(bench)
    best: list[Choice] = []
    seen: set[float] = set()
    for loss, setting, scale in screened:  # the same budget under two names, such as capped and not, counts once
        if setting is not None and round(loss, 9) not in seen and len(best) < sizes.n_finalists:
            best.append((setting, scale))
            seen.add(round(loss, 9))
    plain: Choice = (PLAIN, "log")
    chosen = [UNIFORM, *dict.fromkeys([plain, *best])]
    losses = finals(bench, chosen)
    mean = {choice: np.mean([losses[*choice, p, s] for p in PRUNERS for s in (0.6, 0.7)]) for choice in chosen[1:]}
    winner = min(mean, key=lambda choice: mean[choice])
    tests: Tests = {}
    for choice in dict.fromkeys([UNIFORM, plain, winner]):
        for pruner in PRUNERS:
            for seed in range(sizes.n_seeds):
                profile = bench.profile(*choice, pruner, 0.7, seed)
                assert profile is not None
                value = bench.loss(profile, pruner, seed, role="test")
                tests.setdefault(choice, {}).setdefault(pruner, []).append(value)
    publish(options, "games", report(sizes, screened, losses, chosen, tests))
    draw(losses, chosen, sizes.sparsities, figure(options, "games"))


if __name__ == "__main__":
    main()

"""Which game, payoff, estimator and scale lead to the lowest loss after pruning, on the built-in model.

Screens all combinations at 70 % with Wanda on the selection text (lam 0.15), then runs the best five, the plain setting (skip,
-NLL, window of 5, log scale) and uniform with Wanda and SparseGPT at 50 to 80 % and three calibration seeds, still on the
selection text; last, the test text is read once, for uniform, the plain setting and the winner. Writes
results/tables/games.md and docs/figures/games.png. Coalition values and losses are kept in the cache as they come: a killed run
goes on where it was.

    python experiments/games/run.py [--cache results/cache]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from svnup import NUMBERS_VERSION
from svnup.allocation import ScoreBudget, Uniform
from svnup.data import Docs
from svnup.evaluation import perplexity
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.model import BUILT_IN_FOLDER
from svnup.provenance import hardware
from svnup.pruning import pruned_weights, temporarily_pruned
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.wanda import Wanda
from svnup.shapley import Estimator
from svnup.shapley.exact import Exact
from svnup.shapley.gates import Gates
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import Bools, Floats, SparsityProfile

SCALES = ("log", "rank", "clip", "raw")
PRUNERS = {"wanda": Wanda(), "sparsegpt": SparseGPT()}
PLAIN = ("skip", "block", "neg_nll", "w=5")
ESTIMATORS: dict[str, Estimator] = {
    "w=1": SlidingWindow(1),
    "w=3": SlidingWindow(3),
    "w=5": SlidingWindow(5),
    "w=8": SlidingWindow(8),
    "w=5, context absent": SlidingWindow(5, context="absent"),
    "gates": Gates(8),
    "exact": Exact(),
}
Setting = tuple[str, str, str, str]  # absence, players, payoff, estimator


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


def settings() -> Iterator[Setting]:
    for absence in ("skip", "prune"):
        for payoff in ("neg_nll", "neg_nll, capped", "neg_ppl", "recip_ppl"):
            for estimator in ESTIMATORS:
                if estimator != "gates" or (absence == "skip" and payoff == "neg_nll"):
                    yield absence, "block", payoff, estimator
        for payoff in ("neg_nll", "recip_ppl"):
            for estimator in ("w=1", "w=3", "w=5"):
                yield absence, "sublayer", payoff, estimator
        for payoff in ("kl", "accuracy"):
            for estimator in ("w=1", "w=5"):
                yield absence, "block", payoff, estimator


class Bench:
    """The model, its texts, and losses and values that are computed once ever."""

    def __init__(self, cache: str) -> None:
        self.cache = Path(cache)
        self.lm = LanguageModel.load(str(BUILT_IN_FOLDER), dtype="float32", device="cpu")
        self.payoff_tokens = torch.as_tensor(self.text("payoff", 16))
        self.selection = self.text("selection", 48)
        self.weights = self.lm.fingerprint()
        self.path = self.cache / "games_study.jsonl"
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.known: dict[str, Any] = {}
        for entry in lines:
            try:
                key, value = json.loads(entry)
                self.known[key] = value
            except ValueError:
                continue  # torn by a kill: computed again
        self.games: dict[Any, LayerGame] = {}

    def text(self, role: Any, n_seq: int | None, seed: int = 0) -> Any:
        return Docs(n_seq=n_seq, seq_len=256, role=role, seed=seed).tokens(self.lm.tokenizer)

    def remembered(self, what: list[Any], compute: Callable[[], Any]) -> Any:
        key = hashlib.sha256(json.dumps([NUMBERS_VERSION, self.weights, *what]).encode()).hexdigest()[:24]
        if key not in self.known:
            self.known[key] = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps([key, self.known[key]]) + "\n")
        return self.known[key]

    def game(self, absence: str, players: str, payoff: str, pruner: str, sparsity: float, seed: int) -> LayerGame:
        where = (pruner, sparsity, seed) if absence == "prune" else None
        key = (players, payoff, where)
        if key not in self.games:
            stand_ins = None
            if absence == "prune":
                uniform = Uniform().allocate(None, self.lm.block_params, sparsity)
                stand_ins = pruned_weights(self.lm, uniform, PRUNERS[pruner], self.text("calibration", 32, seed))
            self.games[key] = LayerGame(
                self.lm, self.payoff_tokens, payoff=payoff, players=players, pruned=stand_ins, cache_dir=self.cache
            )  # type: ignore[arg-type]
        return self.games[key]

    def values(self, setting: Setting, pruner: str, sparsity: float, seed: int) -> Floats:
        absence, players, payoff, estimator = setting
        where = [pruner, sparsity, seed] if absence == "prune" else []

        def compute() -> list[float]:
            raw = payoff if payoff in ("kl", "accuracy") else "neg_nll"
            game: Any = self.game(absence, players, raw, pruner, sparsity, seed)
            if payoff != raw:
                chance, full = -math.log(self.lm.vocab_size), game(np.ones((1, game.n_players), dtype=bool))[0]
                transforms: dict[str, Callable[[Floats], Floats]] = {
                    "neg_nll, capped": lambda v: np.maximum(v, chance),
                    "neg_ppl": lambda v: -np.exp(-v),
                    "recip_ppl": lambda v: np.exp(v - full),
                }
                game = OfNLL(game, transforms[payoff])
            return ESTIMATORS[estimator].estimate(game).per_block(self.lm.n_blocks).values.tolist()

        return np.array(self.remembered(["values", setting, where], compute))

    def profile(self, setting: Setting | None, scale: str, pruner: str, sparsity: float, seed: int) -> SparsityProfile | None:
        """None where the scale cannot be applied: the logarithm of values none of which is positive."""
        from svnup.types import BlockScores

        params = self.lm.block_params
        if setting is None:
            return Uniform().allocate(None, params, sparsity)
        scores = BlockScores(self.values(setting, pruner, sparsity, seed), "study")
        try:
            return ScoreBudget(scale=scale).allocate(scores, params, sparsity)  # type: ignore[arg-type]
        except ValueError:
            return None

    def loss(self, profile: SparsityProfile, pruner: str, seed: int, role: str = "selection") -> float:
        """NLL on the selection text (or perplexity on the test text) of the model pruned to a profile."""

        def compute() -> float:
            with temporarily_pruned(self.lm, profile, PRUNERS[pruner], self.text("calibration", 32, seed)):
                if role == "test":
                    return perplexity(self.lm, self.text("test", None))
                return float(self.lm.nll(self.selection).mean())

        return self.remembered(["loss", np.round(profile.sparsity, 9).tolist(), pruner, seed, role], compute)


def name(setting: Setting | None, scale: str) -> str:
    return "uniform" if setting is None else f"{', '.join(setting)}; {scale}"


def screen(bench: Bench) -> list[tuple[float, Setting | None, str]]:
    found: list[tuple[float, Setting | None, str]] = []
    uniform = bench.profile(None, "log", "wanda", 0.7, 0)
    assert uniform is not None
    found.append((bench.loss(uniform, "wanda", 0), None, ""))
    todo = [(setting, scale) for setting in settings() for scale in SCALES]
    for index, (setting, scale) in enumerate(todo):
        profile = bench.profile(setting, scale, "wanda", 0.7, 0)
        if profile is not None:
            found.append((bench.loss(profile, "wanda", 0), setting, scale))
            print(f"{index + 1}/{len(todo)} {name(setting, scale)}: {found[-1][0]:.4f}", flush=True)
    return sorted(found, key=lambda entry: entry[0])


def finals(bench: Bench, chosen: list[tuple[Setting | None, str]]) -> dict[Any, list[float]]:
    losses: dict[Any, list[float]] = {}
    for pruner in PRUNERS:
        for sparsity in (0.7, 0.6, 0.8, 0.5):
            for setting, scale in chosen:
                for seed in range(3):
                    profile = bench.profile(setting, scale, pruner, sparsity, seed)
                    value = math.nan if profile is None else bench.loss(profile, pruner, seed)
                    losses.setdefault((setting, scale, pruner, sparsity), []).append(value)
                print(
                    f"{pruner} {sparsity} {name(setting, scale)}: {np.mean(losses[setting, scale, pruner, sparsity]):.4f}",
                    flush=True,
                )
    return losses


def report(bench: Bench, screened: list[Any], losses: dict[Any, list[float]], chosen: list[Any], tests: dict[Any, Any]) -> str:
    machine = hardware()
    uniform = next(loss for loss, setting, _ in screened if setting is None)
    better = sum(loss < uniform for loss, *_ in screened)
    text = [
        "# Games, payoffs, estimators and scales: which budget prunes best",
        "",
        f"Made by `make study NAME=games`. {machine['cpu']}, {machine['cores']} cores, torch {torch.__version__}, float32. "
        "Built-in model, lam 0.15, 32 x 256 calibration tokens, payoff text of 16 x 256 tokens, selection text of 48 x 256.",
        "",
        "## Screen: perplexity on the selection text, Wanda, 70 %, seed 0",
        "",
        f"{better} of {len(screened) - 1} settings beat uniform.",
        "",
        "| rank | absence, players, payoff, estimator; scale | perplexity | vs uniform |",
        "| --- | --- | --- | --- |",
    ]
    plain = next(i for i, (_, setting, scale) in enumerate(screened) if setting == PLAIN and scale == "log")
    uniform_at = next(i for i, (_, setting, _) in enumerate(screened) if setting is None)
    for i in sorted({*range(20), plain, uniform_at, len(screened) - 1}):
        loss, setting, scale = screened[i]
        text.append(f"| {i + 1} | {name(setting, scale)} | {math.exp(loss):.2f} | {100 * math.expm1(loss - uniform):+.1f} % |")
    text += ["", "The best of each kind:", "", "| what | best setting | perplexity |", "| --- | --- | --- |"]
    for position in range(4):
        for kind in sorted({setting[position] for _, setting, _ in screened if setting}):
            loss, setting, scale = next(e for e in screened if e[1] and e[1][position] == kind)
            text.append(f"| {kind} | {name(setting, scale)} | {math.exp(loss):.2f} |")
    for scale in SCALES:
        loss, setting, _ = next(e for e in screened if e[2] == scale)
        text.append(f"| {scale} | {name(setting, scale)} | {math.exp(loss):.2f} |")
    text += [
        "",
        "## Best five, plain setting and uniform: perplexity on the selection text, mean ± sd over 3 calibration seeds",
        "",
    ]
    columns = [(pruner, sparsity) for pruner in PRUNERS for sparsity in (0.5, 0.6, 0.7, 0.8)]
    text.append("| setting | " + " | ".join(f"{pruner} {100 * s:.0f} %" for pruner, s in columns) + " |")
    text.append("| --- |" + " --- |" * len(columns))
    for setting, scale in chosen:
        cells = [np.exp(losses[setting, scale, *column]) for column in columns]
        shown = [f"{c.mean():.2f} ± {c.std(ddof=1):.2f}" for c in cells]
        text.append(f"| {name(setting, scale)} | " + " | ".join(shown) + " |")
    text += ["", "## Test text, read once: perplexity at 70 %, mean ± sd over 3 calibration seeds", ""]
    text += ["| setting | wanda | sparsegpt |", "| --- | --- | --- |"]
    for (setting, scale), cells in tests.items():
        shown = [f"{np.mean(cells[p]):.2f} ± {np.std(cells[p], ddof=1):.2f}" for p in PRUNERS]
        text.append(f"| {name(setting, scale)} | " + " | ".join(shown) + " |")
    return "\n".join(text) + "\n"


def draw(losses: dict[Any, list[float]], chosen: list[Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4), layout="constrained")
    for axes, pruner in zip(figure.subplots(1, 2), PRUNERS, strict=True):
        for marker, (setting, scale) in zip("osd^v<>", chosen, strict=False):
            levels = [0.5, 0.6, 0.7, 0.8]
            change = [
                100 * math.expm1(np.mean(losses[setting, scale, pruner, s]) - np.mean(losses[None, "", pruner, s]))
                for s in levels
            ]
            axes.plot([100 * s for s in levels], change, marker=marker, label=name(setting, scale))
        axes.set(xlabel="sparsity (%)", ylabel="perplexity against uniform (%)", title=pruner)
        axes.grid(color="0.9")
    figure.axes[0].legend(fontsize=6)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="results/cache")
    bench = Bench(parser.parse_args().cache)
    screened = screen(bench)
    best: list[tuple[Setting | None, str]] = []
    seen: set[float] = set()
    for loss, setting, scale in screened:  # the same budget under two names, such as capped and not, counts once
        if setting is not None and round(loss, 9) not in seen and len(best) < 5:
            best.append((setting, scale))
            seen.add(round(loss, 9))
    chosen = [(None, ""), *dict.fromkeys([(PLAIN, "log"), *best])]
    losses = finals(bench, chosen)
    mean = {entry: np.mean([losses[*entry, p, s] for p in PRUNERS for s in (0.6, 0.7)]) for entry in chosen[1:]}
    winner = min(mean, key=lambda entry: mean[entry])
    tests: dict[Any, dict[str, list[float]]] = {}
    for setting, scale in dict.fromkeys([(None, ""), (PLAIN, "log"), winner]):
        for pruner in PRUNERS:
            for seed in range(3):
                profile = bench.profile(setting, scale, pruner, 0.7, seed)
                assert profile is not None
                value = bench.loss(profile, pruner, seed, role="test")
                tests.setdefault((setting, scale), {}).setdefault(pruner, []).append(value)
    Path("results/tables").mkdir(parents=True, exist_ok=True)
    Path("results/tables/games.md").write_text(report(bench, screened, losses, chosen, tests), encoding="utf-8")
    draw(losses, chosen, Path("docs/figures/games.png"))


if __name__ == "__main__":
    main()

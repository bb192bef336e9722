"""What a better Shapley budget could be made of: each idea against the default, on the selection text alone.

Every candidate is tuned alike: its amplitude is that of seven (0 is uniform) with the least loss on the same text. On the
built-in model at 70 % with Wanda and SparseGPT, one calibration seed. Writes results/tables/budgets.md.

    python experiments/leaderboard/budgets.py [--cache results/cache]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from run import N_CALIBRATION, N_PAYOFF, N_SELECTION, Bench, Cell, start

from svnup.allocation import GRID, bounds_of, to_budget
from svnup.game import LayerGame
from svnup.pipeline import held_out_loss, stand_ins
from svnup.provenance import hardware
from svnup.pruning import pruned_weights, temporarily_pruned
from svnup.scoring import Context
from svnup.shapley import Game, all_coalitions, exact_values
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import BlockScores, Floats, SparsityProfile

PRUNERS = ("wanda", "sparsegpt")
EXACT, SUBLAYERS = "shapley=exact", ("allocator.granularity=sublayer", "shapley.game.players=sublayer")
# Ideas that the command knows already, as its overrides.
OPTIONS: dict[str, tuple[str, ...]] = {
    "default: recip_ppl, blocks skipped, w=5, log scale": (),
    "scale: rank": ("allocator.scale=rank",),
    "scale: clip": ("allocator.scale=clip",),
    "scale: raw": ("allocator.scale=raw",),
    "windows of 1 (leave one out)": ("shapley=leave_one_out",),
    "windows of 3": ("shapley.window=3",),
    "windows of 8": ("shapley.window=8",),
    "exact values": (EXACT,),
    "-NLL": ("shapley.game.payoff=neg_nll",),
    "-NLL capped at chance": ("shapley.game.payoff=neg_nll", "shapley.game.cap=chance"),
    "-NLL capped at chance, exact values": ("shapley.game.payoff=neg_nll", "shapley.game.cap=chance", EXACT),
    "absent is pruned, others dense": ("shapley.game.absence=prune",),
    "absent is pruned, others dense, exact values": ("shapley.game.absence=prune", EXACT),
    "absent is pruned, others pruned": ("shapley.game.absence=prune", "shapley.context=absent"),
    "players and budgets per sublayer": SUBLAYERS,
    "players and budgets per sublayer, windows of 1": (*SUBLAYERS, "shapley=leave_one_out"),
    "wider bounds: 0.2 to 0.95": ("allocator.lower=0.2", "allocator.upper=0.95"),
    "blocks divided among linears by error": ("split=error",),
    "blocks divided among linears by outliers": ("split=outliers",),
    "blocks divided among linears by their Shapley values": ("split=shapley",),
}


def widening(game: Game) -> Floats:
    """Values from windows of 3 blocks at the bottom to 8 at the top, the others present, averaged."""
    n = game.n_players
    total, count = np.zeros(n), np.zeros(n)
    for first in range(n - 2):
        width = min(3 + round(5 * first / (n - 3)), n - first)
        rows = np.ones((2**width, n), dtype=bool)
        rows[:, first : first + width] = all_coalitions(width)
        total[first : first + width] += exact_values(game(rows))
        count[first : first + width] += 1
    return total / count


def near_full(share: float) -> Callable[[Game], Floats]:
    """The binomial semivalue: the mean marginal where every other block is present with probability `share`."""

    def values(game: Game) -> Floats:
        n = game.n_players
        rows = all_coalitions(n)
        payoffs, out = game(rows), np.empty(n)
        for player in range(n):
            without = np.flatnonzero(~rows[:, player])
            others = rows[without].sum(axis=1)
            weights = share**others * (1 - share) ** (n - 1 - others)
            out[player] = weights @ (payoffs[without + (1 << n - 1 - player)] - payoffs[without])
        return out

    return values


# Ideas that take another value than the command has: of the default game.
SEMIVALUES: dict[str, Callable[[Game], Floats]] = {
    "windows that widen with depth, 3 to 8": widening,
    "binomial semivalue, 0.8 present": near_full(0.8),
    "binomial semivalue, 0.95 present": near_full(0.95),
}
POWERS = (0.25, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", default="results/cache")
    start()
    torch.set_num_threads(1)
    bench = Bench(parser.parse_args().cache)
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for pruner in PRUNERS:
        cell = ("tiny", pruner, 0.7)
        for name, options in OPTIONS.items():
            keep(found, pruner, name, tuned(bench, cell, *options))
        for name, values in SEMIVALUES.items():
            keep(found, pruner, name, tuned(bench, cell, scores=lambda game, values=values: values(game)))
        for power in POWERS:
            keep(found, pruner, f"scale: power {power}", tuned(bench, cell, "allocator.scale=raw", scores=powered(power)))
        for round_, entry in enumerate(rounds(bench, cell), start=2):
            keep(found, pruner, f"round {round_}: values of the pruned model correct the default budget", entry)
    Path("results/tables").mkdir(parents=True, exist_ok=True)
    Path("results/tables/budgets.md").write_text(report(found), encoding="utf-8")


def keep(found: dict[str, dict[str, tuple[float, str]]], pruner: str, name: str, entry: tuple[float, str]) -> None:
    found.setdefault(name, {})[pruner] = entry
    print(f"{pruner} {name}: {math.exp(entry[0]):.2f} ({entry[1]})", flush=True)


def powered(power: float) -> Callable[[Game], Floats]:
    return lambda game: np.maximum(SlidingWindow().estimate(game).values, 0.0) ** power


def tuned(bench: Bench, cell: Cell, *options: str, scores: Callable[[Game], Floats] | None = None) -> tuple[float, str]:
    """The least loss over the grid of amplitudes, and which it was."""
    job = bench.job(cell, "shapley", 0, "allocator.lam=auto", *options)
    lm, tokens = bench.model(job, cell[0]), job.tokens()
    assert job.shapley is not None
    if scores is None:
        values = job.shapley.score(lm, Context(tokens, job.cache_dir, stand_ins(job, lm)))
    else:
        values = BlockScores(scores(job.shapley.play(lm, stand_ins(job, lm), job.cache_dir)), "study")  # type: ignore[assignment]
    params = lm.sublayer_params if job.granularity == "sublayer" else lm.block_params
    loss = held_out_loss(job, lm, tokens)
    job.allocator.allocate(values.per_part(len(params)), params, job.sparsity, job.pattern, loss)
    curve = loss.to_dict()
    assert curve is not None
    best = min(curve["curve"], key=lambda call: math.inf if call["loss"] is None else call["loss"])
    return best["loss"], best["label"]


def rounds(bench: Bench, cell: Cell, n: int = 3, delta: float = 0.1) -> list[tuple[float, str]]:
    """Budgets corrected by Shapley values of the pruned model, n - 1 times, from the tuned default on.

    The game: a block that is present has `delta` less sparsity than its budget, an absent one that much more; payoff -NLL,
    windows of 5. Its values are what a little sparsity costs each block where it stands. The correction is linear in the
    centred logarithm of the value per weight, with as many amplitudes tried as for every budget, 0 (no correction) among them.
    """
    job = bench.job(cell, "shapley", 0, "allocator.lam=auto")
    lm, tokens = bench.model(job, cell[0]), job.tokens()
    assert job.shapley is not None
    loss = held_out_loss(job, lm, tokens)
    values = job.shapley.score(lm, Context(tokens, job.cache_dir, stand_ins(job, lm)))
    profile = job.allocator.allocate(values, lm.block_params, job.sparsity, job.pattern, loss)
    text, params = torch.as_tensor(job.shapley.game.data.tokens(lm.tokenizer)), lm.block_params
    found = []

    def shifted(by: float) -> SparsityProfile:
        sparsity = np.clip(profile.sparsity + by, 0, 0.99)
        return SparsityProfile(sparsity, params, float(np.average(sparsity, weights=params)))

    for _ in range(n - 1):
        what = ["round", *cell, np.round(profile.sparsity, 9).tolist(), delta, N_CALIBRATION, N_PAYOFF]
        local = bench.remembered(what)
        if local is None:
            sparser = pruned_weights(lm, shifted(delta), job.pruner, tokens)
            with temporarily_pruned(lm, shifted(-delta), job.pruner, tokens):
                local = SlidingWindow().estimate(LayerGame(lm, text, pruned=sparser)).values.tolist()
            bench.remember(what, local)
        per_weight = np.array(local) / params
        z = np.log(np.maximum(per_weight, 1e-3 * per_weight.max()))
        z -= np.average(z, weights=params)
        tried = []
        for lam in GRID:
            wish = profile.sparsity - 0.4 * lam * z
            candidate = to_budget(wish, params, job.sparsity, job.pattern, bounds_of(job.sparsity))
            tried.append((loss(candidate), f"step={0.4 * lam:g}", candidate))
        least, label, profile = min(tried, key=lambda entry: entry[0])
        found.append((least, label))
    return found


def report(found: dict[str, dict[str, tuple[float, str]]]) -> str:
    machine = hardware()
    default = next(iter(found.values()))
    text = [
        "# Ideas for a better Shapley budget",
        "",
        f"Made by `make study NAME=budgets`. {machine['cpu']}, one thread, torch {torch.__version__}, float32. Built-in "
        f"model, 70 %, {N_CALIBRATION} x 256 calibration tokens, payoff text {N_PAYOFF} x 256; perplexity on selection text "
        f"({N_SELECTION} x 256), on which the amplitude of each was chosen from seven.",
        "",
        "| idea | " + " | ".join(f"{p} | vs default | chosen" for p in PRUNERS) + " |",
        "| --- |" + " ---: | ---: | --- |" * len(PRUNERS),
    ]
    for name, losses in sorted(found.items(), key=lambda item: sum(loss for loss, _ in item[1].values())):
        cells = [
            f"{math.exp(losses[p][0]):.2f} | {100 * math.expm1(losses[p][0] - default[p][0]):+.1f} % | {losses[p][1]}"
            for p in PRUNERS
        ]
        text.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()

"""What a better Shapley budget could be made of: each idea against the default, on the selection text alone.

Every candidate is tuned alike: its amplitude is that of seven (0 is uniform) with the least loss on the same text; rounds try
three and then two steps each. On the built-in model at 70 % with Wanda and SparseGPT, one calibration seed. Writes
results/tables/budgets.md.

    python -m experiments.leaderboard.budgets [--cache results/cache] [--workers 2] [--quick]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from experiments.leaderboard import run
from experiments.leaderboard.run import OF_SUBLAYERS, Bench, Cell, Sizes, workers
from experiments.study import made_by, parse, parser, publish, table
from svnup.pipeline import replacements, trial_of
from svnup.results.row import Tuning
from svnup.scoring import Context
from svnup.shapley import Game, all_coalitions, exact_values
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import BlockScores, Floats

FULL = Sizes(pruners=("wanda", "sparsegpt"), n_calibration=24, n_selection=32, n_payoff=12)
QUICK = replace(run.QUICK, n_selection=2)
EXACT = "shapley=exact"
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
    "players and budgets per sublayer": OF_SUBLAYERS,
    "players and budgets per sublayer, windows of 1": (*OF_SUBLAYERS, "shapley=leave_one_out"),
    "wider bounds: 0.2 to 0.95": ("allocator.lower=0.2", "allocator.upper=0.95"),
    "blocks divided among linears by error": ("split=error",),
    "blocks divided among linears by outliers": ("split=outliers",),
    "blocks divided among linears by their Shapley values": ("split=shapley",),
}


def widening(game: Game) -> Floats:
    """Values from windows that end at each block, of 3 blocks at the bottom to 8 at the top, the others present, averaged."""
    n = game.n_players
    total, count = np.zeros(n), np.zeros(n)
    for end in range(3, n + 1):
        first = end - (3 + round(5 * (end - 3) / (n - 3)))
        rows = np.ones((2 ** (end - first), n), dtype=bool)
        rows[:, first:end] = all_coalitions(end - first)
        total[first:end] += exact_values(game(rows))
        count[first:end] += 1
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


Idea = Callable[[Bench, Cell], tuple[float, str]]  # measures it in a cell: the least loss, and what was chosen for it


def ideas() -> dict[str, Idea]:
    out: dict[str, Idea] = {name: tuned(*options) for name, options in OPTIONS.items()}
    out |= {name: tuned(scores=values) for name, values in SEMIVALUES.items()}
    out |= {f"scale: power {power}": tuned("allocator.scale=raw", scores=powered(power)) for power in POWERS}
    for n in (2, 3, 5):
        name = f"{n} rounds: values of the pruned model correct the budget"
        out[name] = tuned(f"allocator.rounds={n}", allocator="shapley_rounds")
    out["players and budgets per sublayer, 3 rounds, the first to 0.3"] = tuned(
        *OF_SUBLAYERS, "allocator.lam=0.3", allocator="shapley_rounds"
    )
    return out


QUICK_IDEAS = (
    "default: recip_ppl, blocks skipped, w=5, log scale",
    "windows of 1 (leave one out)",
    "scale: power 0.25",
    "2 rounds: values of the pruned model correct the budget",
)


def measure(cache: Path, sizes: Sizes, task: tuple[str, str]) -> tuple[str, str, tuple[float, str]]:
    pruner, name = task
    torch.set_num_threads(1)
    bench = _benches.setdefault((cache, sizes), Bench(cache, sizes))
    found = ideas()[name](bench, ("tiny", pruner, 0.7))
    print(f"{pruner} {name}: {math.exp(found[0]):.2f} ({found[1]})", flush=True)
    return pruner, name, found


_benches: dict[tuple[Path, Sizes], Bench] = {}  # of a worker: its model stays loaded


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: this one alone")
    options = parse(made, argv)
    sizes = QUICK if options.quick else FULL
    found: dict[str, dict[str, tuple[float, str]]] = {name: {} for name in (QUICK_IDEAS if options.quick else ideas())}
    tasks = [(pruner, name) for name in found for pruner in sizes.pruners]
    with workers(options.workers) as each:
        for pruner, name, entry in each(partial(measure, options.cache, sizes), tasks):
            found[name][pruner] = entry
            if len(found[name]) == len(sizes.pruners):
                publish(options, "budgets", report(found, sizes))


def powered(power: float) -> Callable[[Game], Floats]:
    return lambda game: np.maximum(SlidingWindow().estimate(game).values, 0.0) ** power


def tuned(*options: str, scores: Callable[[Game], Floats] | None = None, allocator: str = "shapley") -> Idea:
    """An allocator with these overrides, or with other scores of the blocks: of all that it tries the least loss is chosen."""

    def idea(bench: Bench, cell: Cell) -> tuple[float, str]:
        job = bench.job(cell, allocator, 0, *(["allocator.lam=auto"] if allocator == "shapley" else []), *options)
        lm, tokens = bench.model(job, cell[0]), job.tokens()
        assert job.shapley is not None
        values: BlockScores
        if scores is None:
            values = job.shapley.score(lm, Context(tokens, job.cache_dir, replacements(job, lm)))
        else:
            values = BlockScores(scores(job.shapley.build_game(lm, replacements(job, lm), job.cache_dir)), "study")
        budget, trial = job.budget(lm), trial_of(job, lm, tokens)
        job.allocator.allocate(budget, values.per_unit(budget.n_units), trial)
        best = min(Tuning.from_dict(trial.to_dict()).curve, key=lambda tried: math.inf if tried.loss is None else tried.loss)
        assert best.loss is not None
        return best.loss, best.label

    return idea


def report(found: dict[str, dict[str, tuple[float, str]]], sizes: Sizes) -> list[str]:
    default = next(iter(found.values()))
    whole = {name: losses for name, losses in found.items() if len(losses) == len(sizes.pruners)}
    left = [name for name in found if name not in whole]
    length = sizes.seq_len
    text = [
        "# Ideas for a better Shapley budget",
        "",
        f"{made_by('make study NAME=budgets', 'one thread')}. Built-in "
        f"model, 70 %, {sizes.n_calibration} x {length} calibration tokens, payoff text {sizes.n_payoff} x {length}; "
        f"perplexity on selection text ({sizes.n_selection} x {length}), on which the amplitude of each was chosen from seven; "
        "of rounds from three, then for each further round one of two steps.",
        "",
    ]
    lines = []
    for name, losses in sorted(whole.items(), key=lambda item: sum(loss for loss, _ in item[1].values())):
        lines.append([name])
        for pruner in sizes.pruners:
            loss, chosen = losses[pruner]
            lines[-1] += [f"{math.exp(loss):.2f}", f"{100 * math.expm1(loss - default[pruner][0]):+.1f} %", chosen]
    head = ["idea", *(title for pruner in sizes.pruners for title in (pruner, "vs default", "chosen"))]
    text += table(head, lines, "l" + "rrl" * len(sizes.pruners))
    text += ["", f"Not measured yet: {'; '.join(left)}."] if left else []
    return text


if __name__ == "__main__":
    main()

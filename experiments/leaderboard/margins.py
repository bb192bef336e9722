"""Values at the margin of the pruned model beside the other budgets, on the selection text alone.

`shapley_margins` won on a real model (docs/real_model.md); here it is held against uniform, `block_influence`, `shapley` and
`shapley_sublayers` on the two built-in models, with the leaderboard's texts and one calibration seed: per block, for attention
and MLP apart and per linear layer, and the last with other steps and numbers of rounds. Writes results/tables/margins.md after
every measurement; what is measured is kept in the cache, and a killed run goes on.

    python -m experiments.leaderboard.margins [--cache results/cache] [--quick]
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.leaderboard import run
from experiments.leaderboard.run import MODELS, OF_SUBLAYERS, Bench, Cell, Sizes, allocation_cost
from experiments.study import made_by, parse, parser, publish, table
from svnup.pipeline import replacements, trial_of
from svnup.results.row import Tuning
from svnup.scoring import Context

FULL = Sizes(pruners=("wanda", "sparsegpt"))
QUICK = replace(run.QUICK, n_selection=2)
AUTO = "allocator.lam=auto"
BASELINE = "shapley, lam=auto"
OF_BASELINE = {"uniform": "lam=0", "shapley, lam=0.15": "lam=0.15"}  # what it tries: uniform and the default amplitude
LINEARS = ("allocator.granularity=linear",)
Settings = dict[str, tuple[str, tuple[str, ...]]]  # by name: the allocator, and its options
FIRST: Settings = {  # measured in this order, so that a part of it already answers the question
    BASELINE: ("shapley", (AUTO,)),
    "shapley_margins": ("shapley_margins", ("allocator.granularity=block",)),
    "shapley_margins, linear layers": ("shapley_margins", LINEARS),
}
SECOND: Settings = {
    "shapley_sublayers, lam=auto": ("shapley", (*OF_SUBLAYERS, AUTO)),
    "shapley_margins, attention and MLP": ("shapley_margins", ("allocator.granularity=sublayer",)),
    "block_influence, lam=auto": ("block_influence", (AUTO,)),
}
VARIANTS: Settings = {
    f"shapley_margins, linear layers, {option}": ("shapley_margins", (*LINEARS, f"allocator.{option}"))
    for option in ("step=0.03", "step=0.08", "rounds=4", "rounds=10")
}
QUICK_SETTINGS = (BASELINE, "shapley_margins, linear layers")


@dataclass(frozen=True)
class Found:
    """The least loss on the selection text in nats per token, what has it, and what finding it took.

    Prunings are those of the whole model, trials the losses of weights pruned in advance; cost in forward passes of the model
    over the calibration text, seconds of one core with what other settings had left in the cache.
    """

    loss: float
    chosen: str
    n_prunings: int
    n_trials: int
    cost: float
    seconds: float
    tried: dict[str, float]  # losses on the whole selection text, by label


def measure(bench: Bench, cell: Cell, allocator: str, options: tuple[str, ...]) -> Found:
    """From the cache where it is there."""
    job = bench.job(cell, allocator, bench.sizes.seeds[0], *options)
    lm, tokens = bench.model(job, cell[0]), job.tokens()
    what = ["margins", job.key, lm.fingerprint()]
    if (known := bench.known.get(what)) is not None:
        return Found(**known)
    began = time.process_time()
    budget, trial = job.budget(lm), trial_of(job, lm, tokens)
    scores = job.scorer.score(lm, Context(tokens, job.cache_dir, replacements(job, lm))) if job.scorer is not None else None
    job.allocator.allocate(budget, scores.per_unit(budget.n_units) if scores is not None else None, trial)
    tuning = Tuning.from_dict(trial.to_dict())
    seconds = time.process_time() - began
    tried = {one.label: one.loss for one in tuning.curve if one.on_all and one.loss is not None}
    chosen = min(tried, key=lambda label: tried[label])
    n_trials = sum(one.trial for one in tuning.curve)
    found: dict[str, Any] = {
        "loss": tried[chosen],
        "chosen": chosen,
        "n_prunings": len(tuning.curve) - n_trials,
        "n_trials": n_trials,
        "cost": allocation_cost(job, cell[1], scores, tuning, lm.n_blocks, bench.sizes),
        "seconds": seconds,
        "tried": tried,
    }
    bench.known.add(what, found)
    return Found(**found)


def report(found: dict[tuple[str, Cell], Found], names: list[str], cells: list[Cell], sizes: Sizes) -> list[str]:
    """A table of perplexities and one of costs; what is not measured yet is a dash, and said."""
    length = sizes.seq_len
    text = [
        "# Values at the margin on the built-in models",
        "",
        f"{made_by('make study NAME=margins', 'one thread')}. Perplexity "
        f"on the selection text ({sizes.n_selection} x {length}), on which each setting chose, and its change against "
        f"`{BASELINE}`; calibration {sizes.n_calibration} x {length}, payoff text {sizes.n_payoff} x {length}, seed "
        f"{sizes.seeds[0]}. No test text is read. It is one seed, and the text that was chosen on: what is within a percent "
        "is level.",
        "",
    ]
    rows: dict[str, dict[Cell, tuple[float, str]]] = {}
    for name in names:
        there = {cell: f for cell in cells if (f := found.get((name, cell))) is not None}
        if name == BASELINE:
            rows |= {one: {cell: (f.tried[label], "") for cell, f in there.items()} for one, label in OF_BASELINE.items()}
        rows[name] = {cell: (f.loss, f.chosen) for cell, f in there.items()}
    lines = []
    for name, row in rows.items():
        lines.append(shown := [name])
        for cell in cells:
            if cell not in row:
                shown.append("-")
                continue
            loss, chosen = row[cell]
            base = rows[BASELINE].get(cell) if name != BASELINE else None
            change = f", {100 * math.expm1(loss - base[0]):+.1f} %" if base else ""
            shown.append(f"{math.exp(loss):.2f}{change}" + (f" ({chosen})" if chosen else ""))
    text += table(["setting", *(f"{m}, {p}, {100 * s:.0f} %" for m, p, s in cells)], lines, "l" + "r" * len(cells))
    text += [
        "",
        "## What it takes",
        "",
        "Prunings of the whole model, trials by weights that are pruned in advance, cost in forward passes of the model over "
        "the calibration text (a backward pass counts as two, and repeats each forward); seconds of one core are the most of "
        "any cell, on a machine that others used too: what another setting had left in the cache took no time.",
        "",
    ]
    lines = []
    for name in names:
        there = {cell: f for cell in cells if (f := found.get((name, cell))) is not None}
        if not there:
            continue
        shown = [span(map(round, of)) for of in zip(*((f.n_prunings, f.n_trials, f.cost) for f in there.values()), strict=True)]
        for pruner in sizes.pruners:
            most = max((f.seconds for cell, f in there.items() if cell[1] == pruner), default=None)
            shown.append("-" if most is None else f"{most:.0f}")
        lines.append([name, *shown])
    head = ["setting", "prunings", "trials", "cost", *(f"{p}: s" for p in sizes.pruners)]
    text += table(head, lines, "l" + "r" * (len(head) - 1))
    left = sum((name, cell) not in found for name in names for cell in cells)
    text += ["", f"Not measured yet (-): {left} of {len(names) * len(cells)}."] if left else []
    return text


def span(counts: Iterable[int]) -> str:
    low, high = min(found := [*counts]), max(found)
    return f"{low}" if low == high else f"{low} to {high}"


def main(argv: list[str] | None = None) -> None:
    options = parse(parser(__doc__), argv)
    sizes = QUICK if options.quick else FULL
    pairs = [[(model, pruner, sparsity) for model in MODELS] for sparsity in sizes.sparsities for pruner in sizes.pruners]
    cells = [cell for pair in pairs for cell in pair]
    settings = {name: FIRST[name] for name in QUICK_SETTINGS} if options.quick else FIRST | SECOND | VARIANTS
    torch.set_num_threads(1)
    bench, found = Bench(options.cache, sizes), dict[tuple[str, Cell], Found]()
    order = [(part, cell) for pair in pairs for part in (FIRST, SECOND) for cell in pair] + [(VARIANTS, c) for c in cells]
    for part, cell in order:
        for name in part:
            if name in settings:
                found[name, cell] = measure(bench, cell, *settings[name])
                print(f"{' '.join(map(str, cell))} {name}: {math.exp(found[name, cell].loss):.2f}", flush=True)
                publish(options, "margins", report(found, [*settings], cells, sizes))


if __name__ == "__main__":
    main()

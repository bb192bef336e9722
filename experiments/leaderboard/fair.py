"""The leaderboard on even terms: finer budgets, eight trials and the same bounds for all.

In `run.py` attention and MLP have budgets of their own for Shapley values alone, and amplitudes end at 0.3. Here every score
that parts have gets both; each allocator has eight trials on the selection text, uniform among them, listed in `ROWS`;
sparsities lie within S - 0.5 and min(0.95, S + 0.35) wherever an allocator takes bounds. A knob is chosen once per model,
pruner and sparsity with the first calibration seed; ALPS prunes by the budgets that were chosen with SparseGPT. `STAGES` are
run one after the other; results/tables/leaderboard_fair.md and .csv are written after every row, and say what has not been
run. What is measured is kept in the cache, and a killed run goes on.

    python -m experiments.leaderboard.fair [--cache results/cache] [--stages 3] [--quick]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from experiments.leaderboard import run
from experiments.leaderboard.run import MODELS, OF_SUBLAYERS, Bench, Cell, Sizes, allocation_cost, score_cost
from experiments.study import interval, made_by, mean_and_spread, parse, parser, publish, segment_means, table, table_file
from svnup.allocation import Budget
from svnup.allocation.maps import Tuned
from svnup.config import Job
from svnup.language_model import LanguageModel
from svnup.pipeline import replacements, trial_of
from svnup.results.row import Tuning
from svnup.scoring import Context
from svnup.types import BlockScores, Floats, Granularity, SparsityProfile

AMPLITUDES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.45)
SUBLAYERS = ("allocator.granularity=sublayer",)
CHOSEN_WITH = {"alps": "sparsegpt"}  # for ALPS a pruning takes minutes
SEGMENTS = 16  # contiguous parts of the test text, by which intervals are resampled


@dataclass(frozen=True)
class Row:
    """An allocator as the command knows it, and what is tried of it beside uniform: values of its knob, with further options.

    Without values it chooses by itself. `bounded`: it takes bounds. `parts`: what has a budget, where no option says so.
    """

    allocator: str
    options: tuple[str, ...] = ()
    tries: tuple[tuple[tuple[str, ...], tuple[float, ...]], ...] = ()
    knob: str = "lam"
    bounded: bool = True
    parts: Granularity | None = None

    def overrides(self, sparsity: float) -> list[str]:
        lower, upper = max(0.0, sparsity - 0.5), min(0.95, sparsity + 0.35)
        bounds = [f"allocator.lower={lower:g}", f"allocator.upper={upper:g}"]
        tuned = [f"allocator.{self.knob}=auto"] if self.tries else []  # so that the job has selection text
        return [*self.options, *(bounds if self.bounded else []), *tuned]


SEVEN = (((), AMPLITUDES),)
ROWS: dict[str, Row] = {
    "uniform": Row("uniform", bounded=False),
    "shapley": Row("shapley", tries=SEVEN),
    "shapley_margins": Row("shapley_margins", ("allocator.granularity=block",)),
    "shapley_margins_sublayers": Row("shapley_margins", SUBLAYERS),
    "shapley_margins_linears": Row("shapley_margins", ("allocator.granularity=linear",)),
    "block_influence": Row("block_influence", tries=SEVEN),
    "block_influence_sublayers": Row("block_influence", SUBLAYERS, SEVEN),
    "leave_one_out": Row("leave_one_out", tries=SEVEN),
    "leave_one_out_sublayers": Row("leave_one_out", OF_SUBLAYERS, SEVEN),
    "shapley_sublayers": Row("shapley", OF_SUBLAYERS, SEVEN),
    "owl": Row(
        "owl", tries=((("allocator.scorer.m=5",), (0.02, 0.08, 0.15, 0.3)), (("allocator.scorer.m=7",), (0.02, 0.08, 0.15)))
    ),
    "dlp": Row("dlp", tries=SEVEN),
    "alpha_pruning": Row("alpha_pruning", tries=(((), (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)),), knob="epsilon", bounded=False),
    "atp": Row("atp", tries=(((), (0.002, 0.004, 0.007, 0.01, 0.014, 0.018, 0.024)),), knob="beta", bounded=False),
    "shapley_rounds": Row("shapley_rounds"),
    "shapley_rounds_sublayers": Row("shapley_rounds", OF_SUBLAYERS),
    "curves": Row("curves"),
    "curves_sublayers": Row("curves", parts="sublayer"),
}
CURVES = ("curves", "curves_sublayers")
MAIN = tuple(name for name in ROWS if name not in CURVES)
ALPS = ("uniform", "block_influence", "shapley", "shapley_sublayers", "shapley_margins", "shapley_margins_linears")


@dataclass(frozen=True)
class Stage:
    """Rows in cells with seeds, as indices of `Sizes.seeds`."""

    rows: tuple[str, ...]
    pruners: tuple[str, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)

    def tasks(self, models: tuple[str, ...]) -> Iterator[tuple[Cell, str, int]]:
        for sparsity in self.sparsities:
            for pruner in self.pruners:
                for model in models:
                    for seed in self.seeds:
                        yield from (((model, pruner, sparsity), name, seed) for name in self.rows)


WITH_INPUTS = ("wanda", "sparsegpt")
STAGES = (
    Stage(MAIN, WITH_INPUTS, (0.7,)),
    Stage(MAIN, WITH_INPUTS, (0.6,)),
    Stage(MAIN, WITH_INPUTS, (0.7, 0.6), (1, 2)),
    Stage(ALPS, ("alps",), (0.7, 0.6)),
    Stage(CURVES, WITH_INPUTS, (0.7, 0.6), (0, 1, 2)),
    Stage((*MAIN, *CURVES), ("magnitude",), (0.7, 0.6)),
)
QUICK_STAGES = (
    Stage(("uniform", "block_influence_sublayers", "shapley_margins_linears", "owl"), ("sparsegpt",), (0.7,), (0, 1)),
    Stage(("uniform", "owl"), ("alps",), (0.7,)),
    Stage(("uniform", "curves_sublayers"), ("magnitude",), (0.7,)),
)


@dataclass(frozen=True)
class Choice:
    """What the selection text chose: prunings of the whole model and trials by weights pruned in advance; cost in forward
    passes of the model over the calibration text."""

    label: str
    profile: dict[str, Any]
    n_prunings: int
    n_trials: int
    cost: float


@dataclass(frozen=True)
class Result:
    """A row in a cell: test NLL in nats by seed and window, of the seeds that were run."""

    losses: dict[int, list[float]]
    choice: Choice

    @property
    def perplexities(self) -> Floats:
        return np.array([math.exp(np.mean(losses)) for losses in self.losses.values()])


Board = dict[tuple[Cell, str], Result]


def scored(bench: Bench, job: Job, lm: LanguageModel, n_units: int) -> tuple[BlockScores | None, float]:
    """The scores of a job's parts, where its allocator goes by scores, and what they cost."""
    if job.scorer is None:
        return None, 0.0
    found = job.scorer.score(lm, Context(job.tokens(), job.cache_dir, replacements(job, lm)))
    return found.per_unit(n_units), score_cost(job, found, lm.n_blocks, bench.sizes)


def profiles(bench: Bench, cell: Cell, row: Row, seed: int) -> tuple[dict[str, SparsityProfile], float]:
    """What is tried with a calibration seed, uniform first, and the cost of its scores."""
    made, cost, sparsity = dict[str, SparsityProfile](), 0.0, cell[2]
    for extra, values in row.tries:
        job = bench.job(cell, row.allocator, seed, *row.overrides(sparsity), *extra)
        lm = bench.model(job, cell[0])
        params = lm.budget_params(job.granularity)
        if not made:
            made["uniform"] = Budget(params, sparsity).uniform()
        scores, taken = scored(bench, job, lm, len(params))
        cost += taken
        assert isinstance(job.allocator, Tuned)
        said = "".join(f"{option.rpartition('.')[2]}, " for option in extra)
        for value in values:
            allocator = replace(job.allocator.allocator, **{row.knob: value})
            made[f"{said}{row.knob}={value:g}"] = allocator.allocate(Budget(params, sparsity), scores)
    return made, cost


def choose(bench: Bench, cell: Cell, row: Row) -> Choice:
    """By the least loss on the selection text, with the first seed; from the cache where it is there."""
    cell = (cell[0], CHOSEN_WITH.get(cell[1], cell[1]), cell[2])
    seed = bench.sizes.seeds[0]
    job = bench.job(cell, row.allocator, seed, *row.overrides(cell[2]))
    lm = bench.model(job, cell[0])
    what = ["fair", repr(row), job.key, lm.fingerprint()]
    if (known := bench.known.get(what)) is not None:
        return Choice(**known)
    trial = trial_of(job, lm, job.tokens())
    label = "-"
    if row.tries:
        tried, cost = profiles(bench, cell, row, seed)
        losses = trial.losses([*tried.items()])
        label = [*tried][int(np.argmin(losses))]
        profile = tried[label]
    else:
        params = lm.budget_params(row.parts or job.granularity)
        scores, cost = scored(bench, job, lm, len(params))
        profile = job.allocator.allocate(Budget(params, job.sparsity, job.pattern), scores, trial)
    tuning = Tuning.from_dict(trial.to_dict() or {})
    if not row.tries and tuning.curve:
        whole = [tried for tried in tuning.curve if tried.on_all and not tried.label.startswith("layer ")]
        label = min(whole, key=lambda tried: math.inf if tried.loss is None else tried.loss).label
    n_trials = sum(tried.trial for tried in tuning.curve)
    found_it: dict[str, Any] = {
        "label": label,
        "profile": profile.to_dict(),
        "n_prunings": len(tuning.curve) - n_trials,
        "n_trials": n_trials,
        "cost": cost + allocation_cost(job, cell[1], None, tuning, lm.n_blocks, bench.sizes),
    }
    bench.known.add(what, found_it)
    return Choice(**found_it)


def read(bench: Bench, cell: Cell, row: Row, seed: int) -> tuple[Choice, list[float]]:
    """The choice, and the NLL of each test window with a calibration seed: scores are taken anew with each."""
    choice = choose(bench, cell, row)
    profile = SparsityProfile.from_dict(choice.profile)
    if row.tries and seed != bench.sizes.seeds[0]:
        profile = profiles(bench, (cell[0], CHOSEN_WITH.get(cell[1], cell[1]), cell[2]), row, seed)[0][choice.label]
    job = bench.job(cell, "uniform", seed)
    lm = bench.model(job, cell[0])
    return choice, bench.read(job, lm, job.split.divide(lm, profile, job.pruner, job.tokens()))


# -- what the numbers say


def against(mine: Result, theirs: Result) -> tuple[float, float, float]:
    """Perplexity against another's in percent, on the seeds that both have, and the 95 % interval of a paired bootstrap over
    contiguous segments of the test text: neighbouring windows are not independent. It says nothing of other calibration."""
    seeds = [seed for seed in mine.losses if seed in theirs.losses]
    apart = np.mean([np.subtract(mine.losses[seed], theirs.losses[seed]) for seed in seeds], axis=0)
    parts = segment_means(apart, min(SEGMENTS, len(apart)))
    drawn = np.random.default_rng(0).integers(len(parts), size=(4000, len(parts)))
    low, high = interval(parts[drawn].mean(axis=1))
    return tuple(100 * math.expm1(x) for x in (apart.mean(), low, high))  # type: ignore[return-value]


def compared(board: Board, model: str, sparsity: float, pruners: list[str]) -> list[str]:
    """Of one model at one sparsity, every row that was run there; the lowest of each pruner is bold."""
    cells = {p: (model, p, sparsity) for p in pruners}
    lines = []
    least = {p: min(r.perplexities.mean() for (c, _), r in board.items() if c == cell) for p, cell in cells.items()}
    for name in ROWS:
        if not any((cell, name) in board for cell in cells.values()):
            continue
        lines.append(shown := [name])
        for pruner, cell in cells.items():
            if (result := board.get((cell, name))) is None:
                shown += ["-", "-", "-", "-"]
                continue
            found = result.perplexities
            ppl = mean_and_spread(found)
            change = "{:+.1f} % [{:+.1f}, {:+.1f}]".format(*against(result, board[cell, "uniform"]))
            shown.append(f"**{ppl}**" if found.mean() == least[pruner] else ppl)
            shown += ["" if name == "uniform" else change, result.choice.label, f"{result.choice.cost:.0f}"]
    head = ["allocator", *(title for pruner in pruners for title in (pruner, "vs uniform", "chosen", "cost"))]
    return table(head, lines, "l" + "rrlr" * len(pruners))


def listed(row: Row) -> str:
    """What is tried of a row, in words."""
    if not row.tries:
        return "-" if row == ROWS["uniform"] else "chooses by itself"
    return "; ".join(
        "".join(f"{option.rpartition('.')[2]}: " for option in extra) + ", ".join(f"{value:g}" for value in values)
        for extra, values in row.tries
    )


def report(board: Board, stages: tuple[Stage, ...], models: tuple[str, ...], sizes: Sizes) -> list[str]:
    length = sizes.seq_len
    text = [
        "# The leaderboard on even terms",
        "",
        f"{made_by('make study NAME=fair', 'one thread')}. Calibration "
        f"{sizes.n_calibration} x {length} tokens; selection text {sizes.n_selection} x {length}, payoff text {sizes.n_payoff} "
        f"x {length}; perplexity on the first {sizes.n_test} windows of {length} tokens of the test text, mean ± standard "
        "deviation where more than one calibration seed was run.",
        "",
        "Each allocator has eight trials at most on the selection text, uniform among them, with the first seed (curves: as "
        "many as they have points); sparsities lie within S - 0.5 and min(0.95, S + 0.35). ALPS prunes by the budgets that "
        "were chosen with SparseGPT. 'vs uniform': relative change of perplexity, with the 95 % interval of a paired bootstrap "
        f"over {SEGMENTS} contiguous segments of the test text, not corrected for the number of rows; other calibration texts "
        "are not in it. Cost: of the allocation, in forward passes of the whole model over the calibration text (ALPS: with "
        "SparseGPT). Bold: the lowest.",
    ]
    for sparsity in sizes.sparsities:
        for model in models:
            pruners = [p for p in ("magnitude", *WITH_INPUTS, "alps") if ((model, p, sparsity), "uniform") in board]
            if pruners:
                text += ["", f"## {model}, {100 * sparsity:.0f} %", "", *compared(board, model, sparsity, pruners)]
    tried = []
    for name in (name for name in ROWS if any(name in stage.rows for stage in stages)):
        options = ", ".join(f"`{o}`" for o in (f"allocator={ROWS[name].allocator}", *ROWS[name].options))
        parts = "" if ROWS[name].parts is None else f", budgets per {ROWS[name].parts}"
        tried.append([name, f"{options}{parts}", listed(ROWS[name])])
    text += ["", "## What is tried", "", *table(["row", "options", "values beside uniform"], tried)]
    run_so_far = []
    for number, stage in enumerate(stages, 1):
        tasks = [*stage.tasks(models)]
        done = sum((r := board.get((cell, name))) is not None and sizes.seeds[seed] in r.losses for cell, name, seed in tasks)
        seeds = ", ".join(str(sizes.seeds[seed]) for seed in stage.seeds)
        levels = ", ".join(f"{100 * s:.0f} %" for s in stage.sparsities)
        who = f"the {len(stage.rows)} rows but for curves" if stage.rows == MAIN else ", ".join(stage.rows)
        run_so_far.append([str(number), who, ", ".join(stage.pruners), levels, seeds, f"{done} of {len(tasks)}"])
    head = ["stage", "rows", "pruners", "sparsities", "seeds", "run"]
    return [*text, "", "## What has been run", "", *table(head, run_so_far)]


def csv(board: Board) -> str:
    lines = ["model,pruner,sparsity,allocator,seed,ppl,chosen,n_prunings,n_trials,cost"]
    for (cell, name), result in board.items():
        c = result.choice
        for seed, ppl in zip(result.losses, result.perplexities, strict=True):
            lines.append(
                f'{",".join(map(str, cell))},{name},{seed},{ppl:.6g},"{c.label}",{c.n_prunings},{c.n_trials},{c.cost:.4g}'
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--stages", type=int, metavar="N", help="the first N stages (all)")
    options = parse(made, argv)
    sizes = replace(run.QUICK, n_selection=2) if options.quick else run.FULL
    stages, models = (QUICK_STAGES, MODELS[:1]) if options.quick else (STAGES, MODELS)
    torch.set_num_threads(1)
    bench, board = Bench(options.cache, sizes), Board()
    for stage in stages[: options.stages]:
        for cell, name, index in stage.tasks(models):
            seed = sizes.seeds[index]
            choice, losses = read(bench, cell, ROWS[name], seed)
            known = board.get((cell, name))
            board[cell, name] = Result((known.losses if known else {}) | {seed: losses}, choice)
            shown = f"{math.exp(np.mean(losses)):.2f} ({choice.label})"
            print(f"{' '.join(map(str, cell))} seed {seed} {name}: {shown}", flush=True)
            publish(options, "leaderboard_fair", report(board, stages, models, sizes))
            table_file(options, "leaderboard_fair.csv").write_text(csv(board), encoding="utf-8")


if __name__ == "__main__":
    main()

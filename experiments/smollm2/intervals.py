"""Which differences in the table of a real model are more than chance: paired intervals over segments of its test text.

Reads the files of `FILES` in results/tables alone, and writes smollm2_intervals.md there, in seconds:

    python -m experiments.smollm2.intervals

The losses of two budgets are compared window by window, in runs of the same calibration seed on the same machine. Neighbouring
windows are alike, so the test text is cut into 16 contiguous segments; segments and, where there are several, calibration seeds
are drawn again 20,000 times (bootstrap): runs of one seed on several machines are no further samples, and are averaged. What is
said of several cells is corrected for their number by Holm's method.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.leaderboard.comparisons import holm
from experiments.study import interval, segment_means, table
from svnup.types import Floats

TABLES = Path(__file__).parents[2] / "results" / "tables"
N_SEGMENTS, N_DRAWS, SEED = 16, 20_000, 0
UNIFORM = "uniform"
Cell = tuple[str, str]  # pruner, sparsity
Board = dict[Cell, dict[str, dict[str, Floats]]]  # losses of the windows in nats per token, by allocator and run
BOTH = ("CPU 0", "GPU 0")
BLOCK, FINER, OTHERS, ALL = (
    "One budget a block: each of ours against the best other",
    "Finer budgets: each of ours against the best other",
    "Values at the margin per linear layer against every other budget",
    "Every budget against uniform",
)
LINEARS = ("shapleymarginslinears", "marginsandinfluencelinears")
# A run is called by its machine and its seed; those on an Intel CPU are of versions 3 and 4 of the numbers. An H100 and an H200
# round alike: what both ran is equal in every window, and one run.
FILES = (
    ("CPU", "smollm2_windows.csv"),
    ("CPU, version 4,", "smollm2_v4_windows.csv"),
    ("CPU, EPYC,", "smollm2_epyc_windows.csv"),
    ("GPU", "smollm2_h100_windows.csv"),
    ("GPU", "smollm2_h200_windows.csv"),
)


@dataclass(frozen=True)
class Change:
    """Perplexity of one budget against another's in percent, with its 95 % interval and the two-sided p-value."""

    cell: Cell
    name: str
    other: str
    mean: float
    low: float
    high: float
    p: float
    n_runs: int
    n_seeds: int


def read(tables: Path) -> Board:
    """The board of the files that `run.py` writes: a line a run, of which the columns w0, w1, ... are windows.

    Not the runs that chose an option: there are others with the value that they chose. A budget is called by its method alone
    where its options are those of all runs of the method.
    """
    board: Board = {}
    lines: list[dict[str, str]] = []
    for machine, name in FILES:
        if (tables / name).is_file():
            with (tables / name).open(encoding="utf-8", newline="") as file:
                found = [line for line in csv.DictReader(file) if "=auto" not in line["allocator"]]
                lines += [line | {"seed": f"{machine} {line['seed']}"} for line in found]
    labels = {line["allocator"] for line in lines}
    methods = [label.partition(" ")[0] for label in labels]
    usual = {label for label in labels if methods.count(label.partition(" ")[0]) == 1}
    for line in lines:
        losses = np.array([float(value) for name, value in line.items() if name[0] == "w" and name[1:].isdigit()])
        name = line["allocator"].partition(" ")[0] if line["allocator"] in usual else line["allocator"]
        runs = board.setdefault((line["pruner"], line["sparsity"]), {}).setdefault(name, {})
        runs[line["seed"]] = losses
    return dict(sorted(board.items(), key=lambda item: (item[0][1], item[0][0])))


def change(cell: Cell, name: str, other: str, runs: dict[str, dict[str, Floats]]) -> Change:
    """The change of perplexity over the runs that both have."""
    shared = sorted(runs[name].keys() & runs[other].keys())
    by_seed = defaultdict(list)
    for run in shared:
        by_seed[run.rpartition(" ")[2]].append(runs[name][run] - runs[other][run])
    difference = np.array([np.mean(of_seed, axis=0) for of_seed in by_seed.values()])  # (seeds, windows)
    segments = segment_means(difference, N_SEGMENTS)
    sizes = np.array([len(part) for part in np.array_split(difference[0], N_SEGMENTS)])
    rng = np.random.default_rng(SEED)
    chosen = rng.integers(N_SEGMENTS, size=(N_DRAWS, N_SEGMENTS))
    drawn = rng.integers(len(by_seed), size=(N_DRAWS, len(by_seed)))
    weights = sizes[chosen] / sizes[chosen].sum(axis=1, keepdims=True)
    means = (segments[drawn[:, :, None], chosen[:, None, :]].mean(axis=1) * weights).sum(axis=1)
    low, high = interval(means)
    beyond = 2 * min(float((means >= 0).mean()), float((means <= 0).mean()))
    mean, low, high = (100 * math.expm1(float(value)) for value in (difference.mean(), low, high))
    return Change(cell, name, other, mean, low, high, max(beyond, 1 / N_DRAWS), len(shared), len(by_seed))


def called(cell: Cell) -> str:
    """'wanda, 60 %'"""
    return f"{cell[0]}, {100 * float(cell[1]):.0f} %"


def method(name: str) -> str:
    return name.partition(" (")[0]


def is_ours(name: str) -> bool:
    return method(name).startswith(("shapley", "marginsandinfluence"))


def is_finer(name: str) -> bool:
    """Whether attention and MLP, or linear layers, have budgets of their own."""
    return method(name).endswith(("sublayers", "linears"))


def best(runs: dict[str, dict[str, Floats]], names: list[str]) -> str | None:
    """The budget that loses least beside the uniform one, in the runs that both have.

    Of those with at least half as many such runs as the one with the most, which is not the uniform one: a single run is no
    match for several.
    """
    counts = {name: len(runs[name].keys() & runs[UNIFORM].keys()) for name in names}
    most = max((n for name, n in counts.items() if name != UNIFORM), default=0)
    names = [name for name in names if 2 * counts[name] >= most]

    def beside_uniform(name: str) -> float:
        shared = runs[name].keys() & runs[UNIFORM].keys()
        return float(np.mean([runs[name][run].mean() - runs[UNIFORM][run].mean() for run in shared])) if shared else math.inf

    return min(names, key=beside_uniform, default=None)


def questions(board: Board) -> dict[str, list[Change]]:
    """What is asked of every cell that has the budgets for it."""
    asked: dict[str, list[Change]] = {title: [] for title in (BLOCK, FINER, OTHERS, ALL)}
    for cell, runs in board.items():
        if UNIFORM not in runs:
            continue
        fair = [name for name in runs if not method(name).startswith("search")]
        fair = [name for name in fair if "values on" not in name]  # not by a text that is near the test text
        rival = best(runs, [name for name in fair if not is_ours(name)])
        assert rival is not None
        for name in runs:
            if is_ours(name) and name in fair and runs[name].keys() & runs[rival].keys():
                asked[FINER if is_finer(name) else BLOCK].append(change(cell, name, rival, runs))
            if method(name) in LINEARS and "refresh" not in name:
                known = (UNIFORM, *LINEARS[LINEARS.index(method(name)) :])
                shared = [other for other in fair if method(other) not in known and runs[name].keys() & runs[other].keys()]
                asked[OTHERS] += [change(cell, name, other, runs) for other in shared]
            if name != UNIFORM and runs[name].keys() & runs[UNIFORM].keys():
                asked[ALL].append(change(cell, name, UNIFORM, runs))
    return {title: found for title, found in asked.items() if found}


def moved_by_rounding(board: Board) -> list[tuple[Cell, str, float, float]]:
    """The perplexities of the runs of seed 0 on both machines: cell, budget, CPU, GPU."""
    return [
        (cell, name, math.exp(of_budget[BOTH[0]].mean()), math.exp(of_budget[BOTH[1]].mean()))
        for cell, runs in board.items()
        for name, of_budget in runs.items()
        if set(BOTH) <= of_budget.keys()
    ]


def report(board: Board) -> str:
    text = [
        "# Which differences in the table of a real model are more than chance",
        "",
        "Made by `python -m experiments.smollm2.intervals` from `smollm2_windows.csv` and `smollm2_v4_windows.csv` (Intel CPU, "
        "versions 3 and 4 of the numbers), `smollm2_epyc_windows.csv` (AMD CPU), and `smollm2_h100_windows.csv` and "
        "`smollm2_h200_windows.csv` (GPUs; what both ran is equal in every window, and counts once): "
        f"change of WikiText-2 perplexity, 95 % interval by {N_DRAWS:,} bootstrap draws of {N_SEGMENTS} contiguous segments of "
        "the text and of the calibration seeds, where both budgets have several; runs of one seed on several machines, which "
        "round otherwise, are averaged. P-value corrected for all lines of a question by Holm's method. Minus: the first is "
        "lower.",
        "",
        "The best other of a cell is the budget of no Shapley values and no search that came out lowest beside uniform on the "
        "same text, which is hard on ours, of those with at least half as many runs as the one with the most: one that "
        "has fewer may be lower. An interval of one run says nothing about another calibration text, nor about rounding.",
    ]
    for question, found in questions(board).items():
        lines = []
        for one, p in zip(found, holm([one.p for one in found]), strict=True):
            shown = "under 0.001" if p < 0.001 else f"{p:.3f}"
            interval = f"[{one.low:+.1f}, {one.high:+.1f}]"
            counts = [str(one.n_runs), str(one.n_seeds)]
            lines.append([called(one.cell), one.name, one.other, *counts, f"{one.mean:+.1f} %", interval, shown])
        head = ["cell", "budget", "against", "runs", "seeds", "change", "95 % interval", "p, corrected"]
        text += ["", f"## {question}", "", *table(head, lines, "lllrrrrr")]
    if moved := moved_by_rounding(board):
        lines = [
            [called(cell), name, f"{cpu:.2f}", f"{gpu:.2f}", f"{100 * (gpu / cpu - 1):+.1f} %"]
            for cell, name, cpu, gpu in moved
        ]
        spread = {
            cell: 100 * math.sqrt(np.mean([math.log(gpu / cpu) ** 2 for of, _, cpu, gpu in moved if of == cell]))
            for cell in dict.fromkeys(cell for cell, *_ in moved)
        }
        words = "; ".join(f"{called(of)}: {size:.1f} %" for of, size in spread.items())
        text += [
            "",
            "## What rounding alone moves",
            "",
            "The same job, with the same texts and seed, on a CPU and on a GPU: float32 both, in another order of sums. With "
            f"SparseGPT the Hessian is summed otherwise, too: CHANGELOG, Numbers, version 4. Root mean square: {words}.",
            "",
            *table(["cell", "budget", "CPU", "GPU", "change"], lines, "llrrr"),
        ]
    return "\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=TABLES, metavar="DIR", help="where smollm2_windows.csv is")
    tables = parser.parse_args(argv).tables
    (tables / "smollm2_intervals.md").write_text(report(read(tables)), encoding="utf-8")


if __name__ == "__main__":
    main()

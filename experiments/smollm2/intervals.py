"""Which differences in the table of a real model are more than chance: paired intervals over segments of its test text.

Reads results/tables/smollm2_windows.csv alone and writes results/tables/smollm2_intervals.md, in seconds:

    python -m experiments.smollm2.intervals

The losses of two budgets are compared window by window. Neighbouring windows are alike, so the test text is cut into 16
contiguous segments; segments and, where there are several, calibration seeds are drawn again 20,000 times (bootstrap). What is
said of several cells is corrected for their number by Holm's method.
"""

from __future__ import annotations

import argparse
import csv
import math
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
Board = dict[Cell, dict[str, dict[str, Floats]]]  # losses of the windows in nats per token, by allocator and seed


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
    n_seeds: int


def read(path: Path) -> Board:
    """The board of the file that `run.py` writes: a line a run, of which the columns w0, w1, ... are windows.

    A budget is called by its method alone where its options are those of all runs of the method.
    """
    board: Board = {}
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
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
    """The change of perplexity over the seeds that both have."""
    seeds = sorted(runs[name].keys() & runs[other].keys())
    difference = np.array([runs[name][seed] - runs[other][seed] for seed in seeds])  # (seeds, windows)
    segments = segment_means(difference, N_SEGMENTS)
    sizes = np.array([len(part) for part in np.array_split(difference[0], N_SEGMENTS)])
    rng = np.random.default_rng(SEED)
    chosen = rng.integers(N_SEGMENTS, size=(N_DRAWS, N_SEGMENTS))
    drawn = rng.integers(len(seeds), size=(N_DRAWS, len(seeds)))
    weights = sizes[chosen] / sizes[chosen].sum(axis=1, keepdims=True)
    means = (segments[drawn[:, :, None], chosen[:, None, :]].mean(axis=1) * weights).sum(axis=1)
    low, high = interval(means)
    beyond = 2 * min(float((means >= 0).mean()), float((means <= 0).mean()))
    mean, low, high = (100 * math.expm1(float(value)) for value in (difference.mean(), low, high))
    return Change(cell, name, other, mean, low, high, max(beyond, 1 / N_DRAWS), len(seeds))


def loss(runs: dict[str, Floats]) -> float:
    """Mean loss of a budget over its seeds and windows."""
    return float(np.mean([losses.mean() for losses in runs.values()]))


def is_ours(name: str) -> bool:
    return name.startswith("shapley")


def is_finer(name: str) -> bool:
    """Whether attention and MLP, or linear layers, have budgets of their own."""
    return "sublayers" in name or "linears" in name


def best(runs: dict[str, dict[str, Floats]], names: list[str]) -> str | None:
    return min(names, key=lambda name: loss(runs[name]), default=None)


def questions(board: Board) -> dict[str, list[Change]]:
    """What is asked of every cell that has the budgets for it."""
    asked: dict[str, list[Change]] = {}
    for cell, runs in board.items():
        coarse = [name for name in runs if not is_finer(name)]
        for title, ours, others in (
            ("The best Shapley budget per block against the best other per block", filter(is_ours, coarse), coarse),
            ("The best Shapley budget of all against the best other of all", filter(is_ours, runs), list(runs)),
        ):
            mine, rival = best(runs, list(ours)), best(runs, [name for name in others if not is_ours(name)])
            if mine is not None and rival is not None:
                asked.setdefault(title, []).append(change(cell, mine, rival, runs))
        for name in runs:
            if name != UNIFORM and UNIFORM in runs:
                asked.setdefault("Every budget against uniform", []).append(change(cell, name, UNIFORM, runs))
    return asked


def report(board: Board) -> str:
    text = [
        "# Which differences in the table of a real model are more than chance",
        "",
        "Made by `python -m experiments.smollm2.intervals` from `smollm2_windows.csv`: change of WikiText-2 perplexity, 95 % "
        f"interval by {N_DRAWS:,} bootstrap draws of {N_SEGMENTS} contiguous segments of the text (and of seeds, "
        "where there are several), p-value corrected for all lines of a question by Holm's method. Minus: the first is lower.",
        "",
        "The rival of a cell is the one that came out lowest on the same text, which is hard on ours. With one seed it "
        "says nothing about another calibration text.",
    ]
    for question, found in questions(board).items():
        lines = []
        for one, p in zip(found, holm([one.p for one in found]), strict=True):
            cell = f"{one.cell[0]}, {100 * float(one.cell[1]):.0f} %"
            shown = "under 0.001" if p < 0.001 else f"{p:.3f}"
            interval = f"[{one.low:+.1f}, {one.high:+.1f}]"
            lines.append([cell, one.name, one.other, str(one.n_seeds), f"{one.mean:+.1f} %", interval, shown])
        head = ["cell", "budget", "against", "seeds", "change", "95 % interval", "p, corrected"]
        text += ["", f"## {question}", "", *table(head, lines, "lllrrrr")]
    return "\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, default=TABLES, metavar="DIR", help="where smollm2_windows.csv is")
    tables = parser.parse_args(argv).tables
    (tables / "smollm2_intervals.md").write_text(report(read(tables / "smollm2_windows.csv")), encoding="utf-8")


if __name__ == "__main__":
    main()

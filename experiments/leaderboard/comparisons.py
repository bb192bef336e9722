"""Which differences between allocators on the leaderboard are more than chance: paired intervals over the calibration seeds.

Reads results/tables/leaderboard.csv alone and writes results/tables/comparisons.md, in a second:

    python -m experiments.leaderboard.comparisons

The change of perplexity is taken per seed, as a log ratio; its mean has a Student interval of two degrees of freedom. What is
said of all cells at once is corrected for their number by Holm's method (Holm 1979). Magnitude reads no calibration text: it
has neither an interval nor a test.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.study import table

TABLES = Path(__file__).parents[2] / "results" / "tables"
T_95 = 4.3027  # Student's factor of a 95 % interval with two degrees of freedom: of three seeds
SEARCH, CONTROLS, UNIFORM = "search", ("random", "reversed"), "uniform"
SHAPLEY, ROUNDS, SUBLAYERS, INFLUENCE = "shapley", "shapley_rounds", "shapley_sublayers", "block_influence"
Cell = tuple[str, str, str]  # model, pruner, sparsity
Board = dict[Cell, dict[str, list[float]]]  # perplexities by seed


@dataclass(frozen=True)
class Change:
    """Perplexity of `name` against that of `other` in percent: of the geometric means over seeds, with its 95 % interval and
    the two-sided p-value; both are nan where the seeds change nothing."""

    name: str
    other: str
    mean: float
    low: float
    high: float
    p: float


def read(path: Path = TABLES / "leaderboard.csv") -> Board:
    board: Board = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            cell = (line["model"], line["pruner"], line["sparsity"])
            board.setdefault(cell, {}).setdefault(line["allocator"], []).append(float(line["ppl"]))
    order = {name: i for i, name in enumerate(("tiny", "tiny_opt", "magnitude", "wanda", "sparsegpt"))}
    return dict(sorted(board.items(), key=lambda item: (order[item[0][0]], float(item[0][2]), order[item[0][1]])))


def change(board: Board, cell: Cell, name: str, other: str) -> Change:
    """Three seeds are taken for granted: the p-value is that of Student's distribution with two degrees of freedom."""
    logs = [math.log(a / b) for a, b in zip(board[cell][name], board[cell][other], strict=True)]
    assert len(logs) == 3
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    percent = 100 * math.expm1(mean)
    if cell[1] == "magnitude" or error == 0:  # or both are the same budget
        return Change(name, other, percent, math.nan, math.nan, math.nan)
    t = abs(mean) / error
    low, high = (100 * math.expm1(mean + side * T_95 * error) for side in (-1, 1))
    return Change(name, other, percent, low, high, 1 - t / math.sqrt(t * t + 2))


def best_rival(board: Board, cell: Cell, name: str, without: Sequence[str] = ()) -> str:
    """The lowest mean of the others, but for the controls and `without`."""
    others = [a for a in board[cell] if a not in (name, *CONTROLS, *without)]
    return min(others, key=lambda a: statistics.fmean(board[cell][a]))


def holm(ps: Sequence[float]) -> list[float]:
    """P-values corrected for their number, by Holm's step-down method; nan stays nan and does not count."""
    out, largest = list(ps), 0.0
    tested = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    for rank, i in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * ps[i]))
        out[i] = largest
    return out


def questions(board: Board) -> dict[str, list[tuple[Cell, Change]]]:
    """What is asked of each cell that has the allocators for it."""
    rivals = {
        f"{SUBLAYERS} against the best of all others": (SUBLAYERS, ()),
        f"{ROUNDS} against the best other with one budget a block": (ROUNDS, (SUBLAYERS,)),
        f"{ROUNDS} against the best other with one budget a block, but for search": (ROUNDS, (SUBLAYERS, SEARCH)),
    }
    asked = {
        question: [(cell, change(board, cell, name, best_rival(board, cell, name, without))) for cell in board]
        for question, (name, without) in rivals.items()
    }
    pairs = [(INFLUENCE, SHAPLEY), ("leave_one_out", SHAPLEY), (SHAPLEY, UNIFORM), (ROUNDS, UNIFORM), (SUBLAYERS, UNIFORM)]
    pairs += [(name, SEARCH) for name in (SHAPLEY, ROUNDS, SUBLAYERS)]
    for name, other in pairs:
        there = [cell for cell in board if other in board[cell]]
        asked[f"{name} against {other}"] = [(cell, change(board, cell, name, other)) for cell in there]
    return asked


def report(board: Board) -> str:
    text = [
        "# Which differences on the leaderboard are more than chance",
        "",
        "Made by `make study NAME=comparisons` from `leaderboard.csv`: change of perplexity on test text (geometric mean over "
        f"the three calibration seeds), 95 % interval of paired seeds (Student, two degrees of freedom: {T_95:.2f} standard "
        "errors), p-value corrected for all cells of the question by Holm's method. A minus: the first is lower.",
        "",
        "Magnitude reads no calibration text, and where two budgets are the same there is nothing to test: -. The seeds change "
        "the calibration text alone: what another model, another payoff text or another test text would change is in no "
        "interval, and the windows of one test text are not independent.",
    ]
    for question, found in questions(board).items():
        corrected = holm([asked.p for _, asked in found])
        lines = []
        for ((model, pruner, sparsity), asked), p in zip(found, corrected, strict=True):
            interval = "-" if math.isnan(asked.p) else f"[{asked.low:+.2f}, {asked.high:+.2f}]"
            cell = f"{model}, {pruner}, {100 * float(sparsity):.0f} %"
            shown = "-" if math.isnan(p) else "under 0.001" if p < 0.001 else f"{p:.3f}"
            lines.append([cell, asked.other, f"{asked.mean:+.2f} %", interval, shown])
        head = ["cell", "against", "change", "95 % interval", "p, corrected"]
        text += ["", f"## {question}", "", *table(head, lines, "llrrr")]
        lower = sum(asked.mean < 0 for _, asked in found)
        tested = [(asked, p) for (_, asked), p in zip(found, corrected, strict=True) if not math.isnan(p)]
        alone = sum(asked.high < 0 for asked, _ in tested)
        sure = sum(asked.mean < 0 and p < 0.05 for asked, p in tested)
        worse = sum(asked.mean > 0 and p < 0.05 for asked, p in tested)
        text += [
            "",
            f"Lower in {lower} of {len(found)} cells; of the {len(tested)} that can be tested the interval is below zero in "
            f"{alone}, corrected for their number in {sure}, and above zero, corrected, in {worse}.",
        ]
    return "\n".join(text) + "\n"


def main(argv: list[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    (TABLES / "comparisons.md").write_text(report(read()), encoding="utf-8")


if __name__ == "__main__":
    main()

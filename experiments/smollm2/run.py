"""The table of a real model, stage by stage: `make table NAME=smollm2`.

Every stage is a list of sweeps of `experiment=smollm2`; the sixth has an experiment and a table of its own. A finished job is
not run again, so that a killed table goes on where it was. The table is written anew after every sweep.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from svnup.cli import results as results_cli
from svnup.naming import allocator_name
from svnup.reports.grid import Cell, Grid
from svnup.reports.tables import describe
from svnup.results.select import newest, runs_of
from svnup.results.store import load

Sweep = list[str]  # overrides of experiment=smollm2
ZERO_SHOT = 6  # the stage with a table of its own

SPARSITY, PRUNER, ALLOCATOR = (f"hydra.sweeper.params.{axis}" for axis in ("sparsity", "pruner", "allocator"))
SUBLAYERS = ["allocator.granularity=sublayer", "shapley.game.players=sublayer"]
RECOMMENDED = [f"{ALLOCATOR}=shapley", "shapley.window=1", "shapley.game.absence=prune"]
BUDGETS: dict[str, Sweep] = {  # what `--best` may name, besides allocators
    "recommended": RECOMMENDED,
    "block_influence_sublayers": [f"{ALLOCATOR}=block_influence", "allocator.granularity=sublayer"],
    "leave_one_out_sublayers": [f"{ALLOCATOR}=leave_one_out", *SUBLAYERS],
    "shapley_sublayers": [*RECOMMENDED, *SUBLAYERS],
    "shapley_margins": [f"{ALLOCATOR}=shapley_margins", "allocator.granularity=block"],
    "shapley_margins_sublayers": [f"{ALLOCATOR}=shapley_margins", "allocator.granularity=sublayer"],
    "shapley_margins_linears": [f"{ALLOCATOR}=shapley_margins", "allocator.granularity=linear"],
    "margins_and_influence": [f"{ALLOCATOR}=margins_and_influence", "allocator.granularity=block"],
    "margins_and_influence_linears": [f"{ALLOCATOR}=margins_and_influence", "allocator.granularity=linear"],
}
KNOBS = {"owl": "lam", "alpha_pruning": "epsilon", "dlp": "lam", "atp": "beta", "block_influence": "lam", "shapley": "lam"}


def budget(name: str) -> Sweep:
    return BUDGETS.get(name, [f"{ALLOCATOR}={name}"])


def sweeps(stage: int, best: list[str], results: Path) -> Iterator[Sweep]:
    """The sweeps of a stage; those of the second look at the results of the first ones that they yield."""
    if stage == 1:  # every budget with the options that were published for it
        yield []
        yield from BUDGETS.values()
    if stage == 2:  # knobs, chosen at 60 % with Wanda on selection text and used everywhere; ++: of no other allocator
        for allocator, knob in KNOBS.items():
            yield [f"{SPARSITY}=0.6", f"{PRUNER}=wanda", *budget(allocator), f"++allocator.{knob}=auto"]
            if (value := chosen(results, allocator, knob)) is not None:
                yield [*budget(allocator), f"++allocator.{knob}={value}"]
    if stage == 3:
        for name in ("uniform", *best):
            yield [*budget(name), "+hydra.sweeper.params.seed='1,2'"]
    if stage == 4:
        for name in dict.fromkeys(("uniform", "block_influence", *best[:1])):
            yield [f"{SPARSITY}=0.6", f"{PRUNER}=alps", *budget(name)]
    if stage == 5:
        for name in ("uniform", *best):
            yield [f"{SPARSITY}=0.5", *budget(name)]
    if stage == ZERO_SHOT:
        for name in ("uniform", *best):
            yield budget(name)


def chosen(results: Path, allocator: str, knob: str) -> str | None:
    """The value of a knob with the least loss of a finished run that tried its values at 60 % with Wanda."""
    for row in load(results):
        tuned = row.config["allocator"].get(knob) == "auto" and row.config["sparsity"] == 0.6
        if (
            tuned
            and row.status == "finished"
            and row.tuning
            and allocator_name(row.config["allocator"]) == allocator.replace("_", "")
        ):
            tried = [(one.loss, one.label) for one in row.tuning.curve if one.loss is not None]
            return min(tried, key=lambda one: one[0])[1].partition("=")[2] if tried else None
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default="1", help="such as 1 or 1,2: the order in which they are run")
    best = "shapley_margins_linears,shapley_margins,block_influence"
    parser.add_argument("--best", default=best, help=f"budgets that stages 3 to 6 go on with ({best})")
    parser.add_argument("--datasets", type=Path, help="a folder with local copies of data sets, organisation/name")
    parser.add_argument("--results", type=Path, default=Path("results/smollm2"))
    parser.add_argument("--cache", type=Path, default=Path("results/cache"))
    parser.add_argument("--output", type=Path, default=Path("results/tables/smollm2.md"))
    parser.add_argument("overrides", nargs="*", help="for every job, such as dataset.n_seq=2")
    options = parser.parse_args(argv)
    stages, best = [int(stage) for stage in options.stages.split(",")], options.best.split(",")
    if wrong := [stage for stage in stages if stage not in range(1, ZERO_SHOT + 1)]:
        parser.error(f"--stages {wrong[0]}: choose among 1 to {ZERO_SHOT}")
    where = [f"cache_dir={options.cache}"]
    where += [f"datasets_dir={options.datasets.absolute()}"] if options.datasets is not None else []
    failed = False
    for stage in stages:
        own = "_zero_shot" if stage == ZERO_SHOT else ""
        results, output = (path.with_name(f"{path.stem}{own}{path.suffix}") for path in (options.results, options.output))
        for sweep in sweeps(stage, best, results):
            experiment = [f"experiment=smollm2{own}", f"results_dir={results}"]
            command = [sys.executable, "-m", "svnup", "-m", *experiment, *sweep, *where, *options.overrides]
            code = subprocess.run(command, check=False).returncode
            if code not in (0, 1):  # 1: a job failed, which its line of the table says
                return code
            failed = failed or code == 1
            write_table(results, output, options.overrides)
    return int(failed)


def write_table(results: Path, output: Path, overrides: Sequence[str] = ()) -> None:
    """Write the table of all runs so far, and the losses of their windows beside it (`intervals.py` compares them)."""
    title, command = "SmolLM2-135M-Instruct, 4 bits", "make table NAME=smollm2"
    if output.name == "smollm2_zero_shot.md":
        title, command = f"{title}, zero-shot accuracy", f"{command} STAGES={ZERO_SHOT}"
    elif output.name != "smollm2.md":
        command = " ".join(["python experiments/smollm2/run.py --output", f"results/tables/{output.name}", *overrides])
    options = ["--format", "markdown", "--output", str(output), "--title", title, "--command", command]
    results_cli.main(["table", str(results), *options])
    write_windows(results, output.with_name(f"{output.stem}_windows.csv"))
    write_trials(results, output.with_name(f"{output.stem}_trials.md"), command)


def write_windows(results: Path, output: Path) -> None:
    """A line a finished run with the loss of each window of its test text, in nats per token."""
    lines = []
    for run in newest(runs_of(load(results))):
        metric = run.metrics.get("wikitext2/ppl")
        if run.row.status == "finished" and metric is not None and metric.window_nll is not None:
            told = describe(run.row)  # the pruner with its recovery
            what = {name: told[name] for name in ("pruner", "sparsity", "seed", "allocator")}
            lines.append(what | {f"w{i}": f"{loss:.6f}" for i, loss in enumerate(metric.window_nll)})
    lines.sort(key=lambda line: [line[name] for name in ("sparsity", "pruner", "allocator", "seed")])
    if lines:
        with output.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)


def write_trials(results: Path, output: Path, command: str) -> None:
    """What choosing a knob and searching tried: a line a finished run, with the loss of each trial on selection text."""
    rows = []
    for run in newest(runs_of(load(results))):
        tuning, options = run.row.tuning, run.row.config["allocator"]
        searched = "generations" in options
        metric = run.metrics.get("wikitext2/ppl")
        if run.row.status != "finished" or tuning is None or metric is None or not (searched or "auto" in options.values()):
            continue
        losses = [(one.label, one.loss) for one in tuning.curve if one.loss is not None and one.n_seq is None]
        if searched:  # the least so far, every fifth generation
            reached = [(int(label.split()[1]), loss) for label, loss in losses if label.startswith("generation")]
            last = max((number for number, _ in reached), default=0)
            steps = [n for n in range(5, last + 1, 5) if any(number <= n for number, _ in reached)]
            losses = [(f"generation {n}", min(loss for number, loss in reached if number <= n)) for n in steps]
        tried = ", ".join(f"{label}: {loss:.4f}" for label, loss in losses)
        told = describe(run.row)
        loss = f"{tuning.kind}{', weights in advance' * (searched and options['trial'])}"
        cells = [str(told[name]) for name in ("allocator", "pruner", "sparsity", "seed")]
        cells += [loss, tried, f"{tuning.n_full_evaluations:.0f}", f"{metric.value:.2f}"]
        rows.append([Cell(text) for text in cells])
    if rows:
        head = ("allocator", "pruner", "sparsity", "seed", "loss", "tried", "evaluations", "wikitext2/ppl")
        about = (
            f"Made by `{command}`. Losses on the selection text, in nats per token; evaluations: in units of one "
            "pass over the whole selection text; perplexity on the test text, which chose nothing."
        )
        title = "What choosing a knob and searching tried"
        grid = Grid([(name,) for name in head], sorted(rows, key=lambda r: [c.text for c in r]), title, about, align="llrrllrr")
        output.write_text(grid.render("markdown"), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())

"""The stages of the table of a real model: every job of them composes, and knobs go from the cell where they are chosen to the
others."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from rows import run as row
from rows import write

from svnup import config

SCRIPT = Path(__file__).parent.parent / "experiments" / "smollm2" / "run.py"
ON_TINY = ["model=tiny", "model.seq_len=64"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("smollm2_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def axes(sweep: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """What a sweep of the experiment varies, and what it sets for all of its jobs."""
    given = {o.get_key_element(): o for o in OverridesParser.create().parse_overrides(sweep)}
    prefix = "hydra.sweeper.params."
    varied = {k.lstrip("+").removeprefix(prefix): str(o.value()).split(",") for k, o in given.items() if prefix in k}
    return varied, [o for o in sweep if prefix not in o]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2, 3, 4, 5, 6])
def test_every_job_of_a_stage_is_accepted(script, tmp_path, stage):
    config.register()
    experiment = "experiment=smollm2_zero_shot" if stage == script.ZERO_SHOT else "experiment=smollm2"
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        seen = set()
        for sweep in script.sweeps(stage, ["owl", "shapley_sublayers"], tmp_path):
            varied, fixed = axes(sweep)
            allocators = varied.get("allocator", ["uniform", "curves", "leave_one_out"])
            for allocator in allocators:
                for pruner in varied.get("pruner", ["sparsegpt"]):
                    options = [f"{k}={v[-1]}" for k, v in varied.items() if k in ("sparsity", "seed")]
                    given = [f"allocator={allocator}", f"pruner={pruner}", *options, *fixed]
                    seen.add(config.build(compose("config", overrides=[experiment, *ON_TINY, *given])).key)
        assert len(seen) == {1: 12, 2: 6, 3: 3, 4: 3, 5: 3, 6: 3}[stage]


def test_a_knob_is_chosen_where_it_was_tried_and_used_everywhere(script, tmp_path):
    tried = [{"label": "lam=0", "loss": 5.0}, {"label": "lam=0.1", "loss": 4.5}, {"label": "lam=0.2", "loss": None}]
    options = {"allocator": "owl", "sparsity": 0.6, "allocator__lam": "auto"}
    assert script.chosen(tmp_path, "owl", "lam") is None
    done = row(30.0, **options)
    write(tmp_path, type(done)(**vars(done) | {"tuning": {"curve": tried}}), row(31.0, allocator="owl", sparsity=0.6))
    assert script.chosen(tmp_path, "owl", "lam") == "0.1"
    assert script.chosen(tmp_path, "dlp", "lam") is None
    sweeps = list(script.sweeps(2, [], tmp_path))
    assert ["hydra.sweeper.params.allocator=owl", "++allocator.lam=0.1"] in sweeps


def test_the_table_is_written_after_every_sweep_and_stops_at_a_mistake(script, tmp_path, monkeypatch):
    commands, tables, codes = [], [], iter([0, 1, 2])

    class Done:
        def __init__(self, command, check):
            commands.append(command)
            self.returncode = next(codes)

    monkeypatch.setattr(script.subprocess, "run", Done)
    monkeypatch.setattr(script, "write_table", lambda results, output, overrides: tables.append((output, overrides)))
    output = tmp_path / "t.md"
    assert script.main(["--datasets", str(tmp_path), "--output", str(output), "dataset.n_seq=2"]) == 2
    assert tables == [(output, ["dataset.n_seq=2"])] * 2
    assert len(commands) == 3
    for command in commands:
        assert command[1:5] == ["-m", "svnup", "-m", "experiment=smollm2"]
        assert f"datasets_dir={tmp_path}" in command
        assert command[-1] == "dataset.n_seq=2"
    with pytest.raises(SystemExit):
        script.main(["--stages", "7"])


def test_zero_shot_accuracy_has_a_table_and_results_of_its_own(script, tmp_path, monkeypatch):
    commands, tables = [], []

    class Done:
        returncode = 0

        def __init__(self, command, check):
            commands.append(command)

    monkeypatch.setattr(script.subprocess, "run", Done)
    monkeypatch.setattr(script, "write_table", lambda results, output, overrides: tables.append((results, output)))
    given = ["--stages", "6", "--best", "owl", "--results", str(tmp_path / "runs"), "--output", str(tmp_path / "smollm2.md")]
    assert script.main(given) == 0
    assert tables == [(tmp_path / "runs_zero_shot", tmp_path / "smollm2_zero_shot.md")] * 2
    assert [command[4:6] for command in commands] == [
        ["experiment=smollm2_zero_shot", f"results_dir={tmp_path / 'runs_zero_shot'}"]
    ] * 2


def board(shift, seeds=("0",), spread=0.1, n=128):
    """Windows of a uniform budget, a rival and a Shapley budget that is `shift` nats off the rival, with noise of their own."""
    rng = np.random.default_rng(3)
    base = 4 + rng.normal(size=n)
    noise = {name: {seed: spread * rng.normal(size=n) for seed in seeds} for name in ("uniform", "owl", "shapley")}
    means = {"uniform": 0.3, "owl": 0.0, "shapley": shift}
    return {("wanda", "0.6"): {k: {s: base + means[k] + noise[k][s] for s in seeds} for k in means}}


@pytest.mark.parametrize("seeds", [("0",), ("0", "1", "2")])
def test_a_difference_is_found_where_there_is_one_and_not_where_there_is_none(seeds):
    from experiments.smollm2.intervals import questions

    title = "One budget a block: each of ours against the best other"
    (found,) = questions(board(-0.05, seeds))[title]
    assert (found.name, found.other, found.n_runs) == ("shapley", "owl", len(seeds))
    assert found.low < 100 * np.expm1(-0.05) < found.high < 0
    assert found.p < 0.01
    (none,) = questions(board(0.0, seeds))[title]
    assert none.low < 0 < none.high
    assert none.p > 0.05


def test_values_at_the_margin_per_linear_layer_are_asked_about_beside_every_budget():
    from experiments.smollm2.intervals import OTHERS, questions

    (cell, runs) = next(iter(board(-0.05, ("CPU 0", "CPU 1", "GPU 1")).items()))
    runs["shapleymarginslinears"] = {run: losses - 0.1 for run, losses in runs["owl"].items()}
    runs["owl (raw, lam=0.3)"] = {"CPU 1": runs["owl"]["CPU 1"] - 0.2}  # the lowest of all
    runs["shapleymargins (values on textfile x)"] = runs["owl"]
    runs["searchlinears (generations=50)"] = runs["owl"]
    beside = {one.other: one for one in questions({cell: runs})[OTHERS]}
    assert beside.keys() == {"owl", "owl (raw, lam=0.3)", "shapley"}
    assert [(one.n_runs, one.n_seeds) for one in (beside["owl"], beside["owl (raw, lam=0.3)"])] == [(3, 2), (1, 1)]
    assert beside["owl (raw, lam=0.3)"].low > 0 > beside["owl"].high


def test_runs_of_one_seed_on_several_machines_are_no_further_samples():
    from experiments.smollm2.intervals import change

    (_, runs) = next(iter(board(-0.05, ("CPU 0", "CPU 1")).items()))
    again = {name: of_runs | {f"GPU {n}": of_runs[f"CPU {n}"] for n in (0, 1)} for name, of_runs in runs.items()}
    one, two = (change(("wanda", "0.6"), "shapley", "owl", some) for some in (runs, again))
    assert (one.low, one.high, one.p) == (two.low, two.high, two.p)
    assert (one.n_runs, two.n_runs, two.n_seeds) == (2, 4, 2)


def test_the_best_other_has_as_many_runs_as_most_and_did_not_search():
    from experiments.smollm2.intervals import questions

    (cell, runs) = next(iter(board(-0.05, ("0", "1", "2")).items()))
    runs["curves"] = {"0": runs["owl"]["0"] - 0.3}  # lower, in one run of three
    runs["searchlinears (generations=50)"] = {seed: losses - 0.4 for seed, losses in runs["owl"].items()}
    (one,) = questions({cell: runs})["One budget a block: each of ours against the best other"]
    assert one.other == "owl"
    runs["curves"]["1"] = runs["owl"]["1"] - 0.3
    (one,) = questions({cell: runs})["One budget a block: each of ours against the best other"]
    assert (one.other, one.n_runs) == ("curves", 2)


def test_what_was_tried_is_listed(script, tmp_path):
    tried = [{"label": "lam=0", "loss": 5.0}, {"label": "lam=0.1", "loss": 4.5}, {"label": "lam=0.2", "loss": None}]
    searched = [{"label": "uniform", "loss": 2.0, "trial": True}]
    searched += [{"label": f"generation {n}", "loss": loss} for n, loss in ((4, 1.6), (5, 1.8), (6, 1.5), (10, 1.7))]
    searched += [{"label": "generation 5", "loss": 0.1, "n_seq": 4}]
    knob = row(allocator="owl", allocator__lam="auto", metrics={"wikitext2/ppl": 30.0})
    search = row(allocator="uniform", allocator__generations=10, allocator__trial=True, metrics={"wikitext2/ppl": 31.0})
    rows = [
        replace(one, tuning={"curve": curve, "kind": kind, "n_full_evaluations": 7.2})
        for one, curve, kind in ((knob, tried, "nll"), (search, searched, "kl"))
    ]
    write(tmp_path, *rows, row(32.0, allocator="shapley"))
    script.write_trials(tmp_path, tmp_path / "trials.md", "make it")
    lines = [line for line in (tmp_path / "trials.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    of_knob, of_search = (line.strip("| ").split(" | ")[-4:] for line in lines)
    assert of_knob == ["nll", "lam=0: 5.0000, lam=0.1: 4.5000", "7", "30.00"]
    assert of_search == ["kl, weights in advance", "generation 5: 1.6000, generation 10: 1.5000", "7", "31.00"]


def test_an_h100_and_an_h200_round_alike():
    """What both ran counts once in the intervals, which is right only as long as every window is equal."""
    tables = SCRIPT.parents[2] / "results" / "tables"
    runs = {}
    for gpu in ("h100", "h200"):
        with (tables / f"smollm2_{gpu}_windows.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        runs[gpu] = {tuple(line[k] for k in ("pruner", "sparsity", "seed", "allocator")): line for line in lines}
    both = runs["h100"].keys() & runs["h200"].keys()
    assert len(both) > 50
    assert all(runs["h100"][run] == runs["h200"][run] for run in both)


def test_windows_are_written_and_read_back_with_budgets_told_apart(script, tmp_path):
    from experiments.smollm2.intervals import read, report

    rows = [row(30.0, allocator="owl", sparsity=0.6), row(31.0, allocator="owl", sparsity=0.6, allocator__lam=0.2)]
    rows += [row(33.0, allocator="uniform", sparsity=0.6), row(29.0, allocator="shapley", sparsity=0.6)]
    rows += [row(28.0, allocator="owl", sparsity=0.6, allocator__lam="auto")]  # there is one with what it chose
    losses = np.linspace(3, 4, 32)
    for i, one in enumerate(rows):
        (metric,) = one.metrics.values()
        one.metrics["wikitext2/ppl"] = replace(metric, window_nll=tuple((losses + i / 10).tolist()))
    write(tmp_path, *rows)
    script.write_windows(tmp_path, tmp_path / "smollm2_windows.csv")
    ((cell, runs),) = read(tmp_path).items()
    assert cell == ("wanda", "0.6")
    assert sorted(name.partition(" ")[0] for name in runs) == ["owl", "owl", "shapley", "uniform"]
    assert [name for name in runs if "lam=0.2" in name]
    assert np.allclose(runs["uniform"]["CPU 0"], losses + 0.2, atol=1e-6)
    assert "| wanda, 60 % | shapley | owl" in report(read(tmp_path))
    (tmp_path / "smollm2_h100_windows.csv").write_bytes((tmp_path / "smollm2_windows.csv").read_bytes())
    assert "| wanda, 60 % | uniform | 40.45 | 40.45 | +0.0 % |" in report(read(tmp_path))

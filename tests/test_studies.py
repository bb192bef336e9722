"""Every study and benchmark, run through its main in seconds; what the numbers are worth is not the matter here."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from experiments import study

ROOT = Path(__file__).parent.parent
STUDIES = {  # module: arguments, and the files that it writes
    "estimators.run": ([], ["results/tables/estimators.md", "docs/figures/estimators.png"]),
    "experts.run": ([], ["results/tables/experts.md"]),
    "finetuning.run": ([], ["results/tables/finetuning.md"]),
    "games.run": ([], ["results/tables/games.md", "docs/figures/games.png"]),
    "pruners.run": ([], ["results/tables/pruners.md"]),
    "real_model.run": ([], ["results/tables/real_model.md"]),
    "real_model.trials": ([], ["results/tables/trials.md"]),
    "real_model.transfer": ([], ["results/tables/transfer.md"]),
    "recovery.run": ([], ["results/tables/recovery.md"]),
    "template.run": ([], ["results/tables/template.md"]),
    "leaderboard.budgets": (["--workers", "0"], ["results/tables/budgets.md"]),
    "leaderboard.fair": ([], ["results/tables/leaderboard_fair.md", "results/tables/leaderboard_fair.csv"]),
    "leaderboard.margins": ([], ["results/tables/margins.md"]),
    "leaderboard.run": (
        ["--workers", "0"],
        [
            *("results/tables/leaderboard.md", "results/tables/leaderboard.csv"),
            *("docs/figures/leaderboard.png", "docs/figures/profiles.png"),
        ],
    ),
}
BENCHMARKS = {
    "benchmarks.shapley_cost": ["--blocks", "5", "--seq-len", "32", "--repeats", "1", "--window-n-seq", "2"],
    "benchmarks.pruning_cost": [
        "--shapes",
        "64x96",
        "--n-tokens",
        "256",
        "--widths",
        "192,64",
        "--job-tokens",
        "64",
        "--repeats",
        "1",
    ],
    "benchmarks.offload": ["--blocks", "3", "--width", "64"],
    "benchmarks.scale": ["--only", "tiny"],
    "benchmarks.gpu_plan": [],
    "benchmarks.precision": [
        *("--model", str(ROOT / "svnup" / "assets" / "tiny"), "--dtypes", "float32", "--window", "1"),
        *("--n-payoff", "1", "--n-calibration", "1", "--n-test", "1", "--seq-len", "32"),
    ],
}
OTHERS = {"benchmarks.gpu", "leaderboard.comparisons", "families.run", "smollm2.run", "smollm2.intervals", "smollm2.windows"}


def test_no_script_is_forgotten():
    found = {p.relative_to(ROOT / "experiments") for p in (ROOT / "experiments").rglob("*.py")} - {Path("study.py")}
    assert {".".join(p.with_suffix("").parts) for p in found} == STUDIES.keys() | BENCHMARKS.keys() | OTHERS


def test_make_finds_the_studies_by_what_their_tables_say():
    """It is told before anything is installed, and by name."""
    done = subprocess.run(["make", "-s", "study", "NAME=estimator"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    names = done.stderr.splitlines()[0].removeprefix("NAME=estimator: choose ").split()
    modules = {folder if name == "run" else name for folder, name in (module.split(".") for module in STUDIES)}
    assert names == sorted(modules | {"comparisons"})


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "template.run" else pytest.mark.slow) for n in STUDIES])
def test_a_quick_run_writes_what_the_study_writes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, files = STUDIES[name]
    import_module(f"experiments.{name}").main(["--quick", *arguments])
    there = {p.relative_to(tmp_path / "results" / "quick").as_posix() for p in tmp_path.rglob("*.*") if "cache" not in p.parts}
    assert there == set(files), "and nothing beside, least of all where the committed tables are"
    for file in there:
        path = tmp_path / "results" / "quick" / file
        if path.suffix == ".md":
            text = path.read_text(encoding="utf-8")
            assert "these numbers say nothing" in text
            assert "nan" not in text
            rows = [line.count("|") for line in text.splitlines() if line.startswith("|")]
            assert len(rows) > 3
        else:
            assert path.stat().st_size > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_in_seconds(name, tmp_path):
    page = tmp_path / "page.md"
    import_module(f"experiments.{name}").main([*BENCHMARKS[name], "--output", str(page)])
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert sum(line.startswith("|") for line in lines) >= 4


@pytest.mark.parametrize("name", sorted(OTHERS))
def test_the_other_scripts_say_what_they_take(name, monkeypatch, capsys):
    if name == "tracking.dashboard":
        pytest.importorskip("wandb_workspaces")
    module = import_module(f"experiments.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0
    assert "usage:" in capsys.readouterr().out


# -- what studies share


def test_what_was_measured_is_known_to_the_next_process_but_for_a_torn_line(tmp_path):
    known = study.Known(tmp_path, "mine")
    assert known.get(["loss", 1]) is None
    assert known.measured(["loss", 1], lambda: [2.5]) == [2.5]
    known.add(["loss", 2], {"a": 1})
    (file,) = (tmp_path / "mine").iterdir()
    (tmp_path / "mine.jsonl").write_text(file.read_text().replace("2.5", "3.5"))  # one file, as earlier versions had
    file.write_text(file.read_text().rstrip()[:-3])
    again = study.Known(tmp_path, "mine")
    assert again.measured(["loss", 1], lambda: pytest.fail("it is known")) == [2.5]
    assert again.get(["loss", 2]) == {"a": 1}
    (tmp_path / "mine.jsonl").unlink()
    assert study.Known(tmp_path, "mine").get(["loss", 2]) is None, "its line is torn"


def test_a_table_is_aligned_as_asked():
    lines = study.table(
        ["what", "how much"], [["a|b", study.mean_and_spread([1.0, 3.0])], ["c", study.mean_and_spread([2.0])]], "lr"
    )
    assert lines == ["| what | how much |", "| --- | ---: |", "| a\\|b | 2.00 ± 1.41 |", "| c | 2.00 |"]
    assert study.table(["a", "b"], [])[1] == "| --- | --- |"


def test_ranks_agree_as_far_as_their_differences_say():
    values, other = np.array([3.0, 1.0, 2.0, 10.0]), np.array([30.0, 20.0, 10.0, 40.0])
    assert study.spearman(values, other) == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum d^2 / (n (n^2 - 1))
    assert study.spearman(values, -values) == pytest.approx(-1)


# -- the benchmark for a GPU


def lines_of(folder: Path) -> dict[str, dict]:
    found = [json.loads(line) for line in (folder / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["stage"]: line for line in found}


def gpu_options(folder, **given):
    return argparse.Namespace(device="cpu", shape="tiny", output=folder, until=float("inf"), stages="", **given)


@pytest.fixture
def gpu():
    return import_module("experiments.benchmarks.gpu")


@pytest.mark.slow
def test_each_stage_on_a_model_says_its_seconds_and_its_peak(gpu, tmp_path):
    gpu.model(gpu.Results(tmp_path, "now", "cpu"), gpu_options(tmp_path, part="7B"))
    whole = lines_of(tmp_path)
    lines = {stage.removeprefix("7B "): line for stage, line in whole.items()}
    common = "Shapley values, windows of 3, 4 sequences"
    usual = "Shapley values, windows of 5, 16 sequences"
    assert [*lines] == ["model", "perplexity", common, "values at the margin, 8 sequences", "Wanda", "SparseGPT"]
    gpu.model(gpu.Results(tmp_path, "now", "cpu"), gpu_options(tmp_path, part="values"))
    added = {stage.removeprefix("7B "): line for stage, line in lines_of(tmp_path).items() if stage not in whole}
    assert [*added] == ["model, drawn anew", usual]
    for line in (lines | added).values():
        assert line["status"] == "done", line
        assert 0 < line["seconds"] < 60
        assert line["peak_memory_bytes"] > 1e6
    assert 200 < lines["perplexity"]["perplexity"] < 400, "of 256 tokens by a random model"
    assert lines["Wanda"]["sparsity"] == lines["SparseGPT"]["sparsity"] == 0.5
    reading, pruning = (lines["SparseGPT"][key] for key in ("reads text in, s", "selects and updates in, s"))
    assert lines["SparseGPT"]["128 sequences (calculated), s"] == pytest.approx(8 * reading + pruning)
    values = lines[common]
    assert (values["evaluations"], values["block-forwards"]) == (20, 43)  # (n-w+2) 2^(w-1), and the walk's own count
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert all(f"| {stage} | done |" in page for stage in whole)


@pytest.mark.slow
def test_offloaded_blocks_are_timed_beside_blocks_on_the_device(gpu, tmp_path, monkeypatch):
    """On a CPU nothing is brought anywhere, but the script's way through it is the same."""
    monkeypatch.setattr("svnup.model.language_model.LanguageModel._move", lambda lm, *_: lm)
    gpu.model(gpu.Results(tmp_path, "now", "cpu"), gpu_options(tmp_path, part="70B"))
    lines = lines_of(tmp_path)
    assert all(line["status"] == "done" for line in lines.values()), lines
    both = [lines[f"70B {name}"]["perplexity"] for name in ("perplexity", "perplexity, blocks on the device")]
    assert len(both) == 2
    assert all(200 < one < 400 for one in both)


@pytest.mark.slow
def test_the_rates_of_a_device(gpu, tmp_path):
    gpu.rates(gpu.Results(tmp_path, "now", "cpu"), gpu_options(tmp_path))
    lines = lines_of(tmp_path)
    assert len(lines) == 7
    assert all(line["status"] == "done" for line in lines.values()), lines
    units = ("TFLOP/s", "GB/s", "microseconds each")
    assert all(line[unit] > 0 for line in lines.values() for unit in units if unit in line)


def test_the_page_says_the_aims_and_from_how_much_text_they_are_calculated(gpu):
    file = ROOT / "results" / "benchmarks" / "gpu.jsonl"
    assert (ROOT / "results" / "benchmarks" / "gpu.md").read_text("utf-8") == gpu.rendered(file)
    assert [*gpu.runs_of(file)] == ["h200", "h100"], "the newest first"
    committed = gpu.lines_of(file, "h100")
    how = {what.split(",")[0]: how for what, _, _, how in gpu.aims(committed)}
    assert how == {
        "values by windows of 5": "calculated from windows of 3, 4 sequences",
        "Wanda": "measured",
        "SparseGPT": "calculated from 64 sequences",
        "perplexity": "calculated from 16 windows",
    }
    usual = {"status": "done", "values, s": 200.0, "sequences": 16}
    whole = committed | {"7B Shapley values, windows of 5, 16 sequences": usual, "13B model": {"status": "done"}}
    assert gpu.aims(whole)[0][1:] == (200.0, 360, "measured")
    assert "Not tried in this run: 13B." in gpu.summary(committed)
    assert not any("Not tried" in line for line in gpu.summary(whole))
    assert gpu.summary({"machine": {"shape": "tiny"}}) == []


PRODUCTS = "X^T X of 64 inputs in bfloat16"


@pytest.mark.slow
def test_the_column_kernels_are_timed_and_compared(gpu, tmp_path):
    import torch

    gpu.kernel(gpu.Results(tmp_path, "now", "cpu"), gpu_options(tmp_path))
    lines = lines_of(tmp_path)
    assert [*lines] == ["columns 64 x 128, unstructured", "columns 64 x 128, 2:4", "k-th score of 64 rows of 64", PRODUCTS]
    *columns, score, products = lines.values()
    assert all(line["by"] == "torch" and line["triton"] == "not here" for line in columns)
    assert score["equal"]
    assert score["by"] == "numpy"
    assert products["largest difference"] < 1e-5
    ours = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert gpu.compared(ours, ours) == {"rows of other masks": 0, "largest difference": 0.0}
    with pytest.raises(ValueError, match="the kernels disagree"):
        gpu.compared((ours[0] * 1.01, ours[1]), ours)
    with pytest.raises(ValueError, match="the kernels disagree"):
        gpu.compared((ours[0].flip(1), ours[1]), ours)


@pytest.mark.slow
def test_what_fails_does_not_stop_what_follows_and_what_does_not_fit_is_skipped(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("svnup.pruning.wanda.Wanda.prune", lambda *_: 1 / 0)
    gpu.model(gpu.Results(tmp_path, "now", "cpu"), gpu_options(tmp_path, part="13B"))
    lines = lines_of(tmp_path)
    failed = {stage.removeprefix("13B "): line["why"] for stage, line in lines.items() if line["status"] == "failed"}
    by_wanda = ("values at the margin, 8 sequences", "Wanda")
    assert failed == dict.fromkeys(by_wanda, "ZeroDivisionError: division by zero")
    assert {line["status"] for line in lines.values()} == {"done", "failed"}
    assert gpu.main(["--device", "cpu", "--shape", "tiny", "--seconds", "1", "--output", str(tmp_path / "late")]) == 1
    assert {line["status"] for line in lines_of(tmp_path / "late").values()} == {"skipped"}


def test_a_process_that_is_killed_leaves_what_it_had(gpu, tmp_path):
    results = gpu.Results(tmp_path, "now", "cpu")
    gpu.Results(tmp_path, "before", "cpu").add("Wanda", "done", seconds=1.0)
    results.add("perplexity", "done", seconds=2.0)
    results.add("SparseGPT", "started")
    gpu.close(results, "model", "out of time")
    assert results.lines()["SparseGPT"]["status"] == "out of time"
    page = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "| perplexity | done | 2 |" in page
    assert "| SparseGPT | out of time |" in page
    assert page.index("SparseGPT") < page.index("| Wanda | done | 1 |"), "which an earlier run measured"


@pytest.mark.slow
def test_the_whole_benchmark_on_a_cpu(gpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it finds the repository by itself
    for part in gpu.PARTS:  # however busy this machine is
        monkeypatch.setitem(gpu.PARTS, part, 600)
    assert gpu.main(["--device", "cpu", "--shape", "tiny", "--output", "out", "--seconds", "2400"]) == 0
    lines = lines_of(tmp_path / "out")
    assert [*lines][:2] == ["machine", "tests"]
    assert lines["tests"]["passed"] + lines["tests"]["skipped"] > 50
    assert all(line["status"] == "done" for line in lines.values())


@pytest.mark.slow
def test_the_benchmark_and_the_tests_that_it_runs_need_torch_and_transformers_alone():
    """A machine that is lent for minutes has no time to install anything."""
    unwanted = ["hydra", "omegaconf", "datasets", "lm_eval", "shapiq", "matplotlib", "wandb"]
    code = f"import sys, experiments.benchmarks.gpu, test_gpu; print(*sorted(set({unwanted}) & set(sys.modules)))"
    python_path = {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | python_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []

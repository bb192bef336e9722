"""Whole jobs as users start them: through the command, in a process of its own where that matters, else through its main()."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from cli import HERE, RANDOM, SMALL_W2, Done, command, forked, memo_lines, only_row, process, rows, run_folder
from transformers import AutoModelForCausalLM

from svnup.data import Docs
from svnup.files import unsealed
from svnup.memo import Memo

JOB = SMALL_W2
N_EVALUATIONS, N_FORWARDS = 6, 7  # (n - w + 2) 2^(w-1) and 2^(w-1) - 1 + 2^(w-2) (n - w + 1)(n - w + 2), n = 3, w = 2


pytestmark = pytest.mark.usefixtures("own_place")


# -- one job, and the same again


class Twice(NamedTuple):
    folder: Path
    first: Done
    raw: bytes  # result.json, after the first
    second: Done
    imports: set[str]  # modules that the first imported


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> Twice:
    """The job run by `python -m svnup`, then again by the console script."""
    folder = tmp_path_factory.mktemp("twice")
    first = process(*JOB, *HERE, cwd=folder, PYTHONPROFILEIMPORTTIME="1")
    assert first.code == 0, first.err
    lines = first.err.splitlines(keepends=True)
    imports = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    first = first._replace(err="".join(line for line in lines if not line.startswith("import time:")))
    raw = (run_folder(folder / "results") / "result.json").read_bytes()
    return Twice(folder, first, raw, process(*JOB, *HERE, cwd=folder, module=False), imports)


@pytest.fixture
def finished(twice, tmp_path) -> dict[str, Any]:
    """A copy of that job's results and cache in the working directory; its result."""
    shutil.copytree(twice.folder, tmp_path, dirs_exist_ok=True)
    return json.loads(twice.raw)


@pytest.mark.slow
def test_result_json_holds_everything(twice):
    row = json.loads(twice.raw)
    run = run_folder(twice.folder / "results")
    assert (row["schema_version"], row["status"], row["error"]) == (1, "finished", None)
    assert row["config_key"] == run.name
    assert (row["config"]["sparsity"], row["config"]["model"]["hidden_size"]) == (0.7, 32)
    for metrics in (row["metrics"], row["dense"]):
        assert set(metrics) == {"docs/ppl"}
        assert 1000 < metrics["docs/ppl"]["value"] < 5000  # random weights: about the vocabulary of 2,048
        protocol = metrics["docs/ppl"]["protocol"]
        assert (protocol["dataset"], protocol["role"]) == ("docs", "test")
        assert (protocol["seq_len"], protocol["n_windows"], protocol["n_tokens"]) == (32, 4, 128)
        assert len(protocol["text"]) == 64
    assert row["metrics"]["docs/ppl"]["value"] != row["dense"]["docs/ppl"]["value"]
    assert (row["sparsity"]["target"], row["sparsity"]["pattern"]) == (0.7, "unstructured")
    assert 0.7 - 21 / 30720 <= row["sparsity"]["actual"] <= 0.7  # at most one weight less in each of 21 matrices
    profile = row["profile"]
    assert np.average(profile["sparsity"], weights=profile["params"]) == pytest.approx(0.7, abs=1e-9)
    assert profile["params"] == [4 * 32 * 32 + 3 * 32 * 64] * 3
    assert profile["actual"] == pytest.approx(profile["sparsity"], abs=1e-3)
    shapley = row["shapley"]
    assert len(shapley["values"]) == 3
    assert shapley["stderr"] is None
    gap = sum(shapley["values"]) - (shapley["v_full"] - shapley["v_empty"])
    assert shapley["efficiency_gap"] == pytest.approx(gap, abs=1e-12)
    assert (shapley["n_evaluations"], shapley["n_block_forwards"]) == (N_EVALUATIONS, N_FORWARDS)
    assert shapley["n_new_evaluations"] == N_EVALUATIONS
    assert shapley["seconds"] > 0
    order = np.argsort(shapley["values"])
    assert (np.diff(np.array(profile["sparsity"])[order]) <= 1e-12).all(), "a block that is worth more keeps more"
    pruning = row["pruning"]
    assert len(pruning["per_linear"]) == 21
    assert {p["block"] for p in pruning["per_linear"]} == {0, 1, 2}
    zeros = sum(p["n_zeros"] for p in pruning["per_linear"])
    assert row["sparsity"]["actual"] == zeros / sum(p["size"] for p in pruning["per_linear"])
    assert pruning["seconds"]["total"] > 0
    assert pruning["peak_memory_bytes"] > 10**6
    made = row["provenance"]
    assert {"git", "dirty", "versions", "hardware", "overrides", "command", "seed"} <= set(made)
    assert made["overrides"] == [*JOB, *HERE]
    assert made["command"] == " ".join(["python -m svnup", *JOB, *HERE])
    assert made["seed"] == 0
    assert {"python", "svnup", "torch", "transformers"} <= set(made["versions"])
    assert made["hardware"]["cores"] >= 1


@pytest.mark.slow
def test_files_of_a_run_folder(twice):
    folder = twice.folder
    row, run = json.loads(twice.raw), run_folder(folder / "results")
    assert {p.name for p in run.iterdir()} == {
        "result.json",
        "shapley.json",
        "profile.json",
        "config.yaml",
        "svnup.log",
        "figures",
    }
    assert json.loads((run / "shapley.json").read_text()) == row["shapley"]
    assert unsealed(json.loads((run / "profile.json").read_text())) == row["profile"]
    assert "pruned: docs/ppl" in (run / "svnup.log").read_text()
    for name in ("shapley.png", "profile.png"):
        data = (run / "figures" / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert len(data) > 5000
    assert {p.name for p in folder.iterdir()} == {"results", "cache"}
    assert {p.name for p in (folder / "results").iterdir()} == {"runs"}


@pytest.mark.slow
def test_what_the_command_prints(twice):
    first, row = twice.first, json.loads(twice.raw)
    ppl, dense = (row[k]["docs/ppl"]["value"] for k in ("metrics", "dense"))
    assert f"docs/ppl {ppl:.2f}  (dense {dense:.2f})" in first.out
    for value, share in zip(row["shapley"]["values"], row["profile"]["sparsity"], strict=True):
        assert f"{value:.4f}     {share:.3f}" in first.out
    assert row["config_key"] in first.out
    assert "\r" not in first.err, "no progress display in a log"
    assert "\x1b" not in first.out + first.err
    assert "Traceback" not in first.err


@pytest.mark.slow
def test_what_a_job_does_not_need_is_not_imported(twice):
    assert {"svnup.pipeline", "torch", "matplotlib"} <= twice.imports
    assert {"wandb", "lm_eval", "datasets"} & twice.imports == set()
    assert not list(twice.folder.rglob("*wandb*"))


@pytest.mark.slow
def test_a_finished_job_is_not_run_again(twice):
    folder, first, raw, second, _ = twice
    assert second.code == 0
    assert "already finished" in second.out
    assert "force=true" in second.out
    assert "already finished" not in first.out
    metric = f"docs/ppl {json.loads(raw)['metrics']['docs/ppl']['value']:.2f}"
    assert metric in second.out
    assert (run_folder(folder / "results") / "result.json").read_bytes() == raw
    assert len(memo_lines(folder / "cache")) == N_EVALUATIONS + 1  # and the payoff of nobody


@pytest.mark.slow
def test_force_redoes_it_from_the_memo(finished):
    before = (run_folder() / "result.json").stat().st_mtime_ns
    done = command(*JOB, *HERE, "force=true")
    assert done.code == 0, done.err
    assert "already finished" not in done.out
    row = only_row()
    assert (run_folder() / "result.json").stat().st_mtime_ns > before
    assert (row["metrics"], row["dense"], row["profile"]) == (finished["metrics"], finished["dense"], finished["profile"])
    assert row["shapley"]["values"] == finished["shapley"]["values"]
    assert (row["shapley"]["n_evaluations"], row["shapley"]["n_block_forwards"]) == (N_EVALUATIONS, N_FORWARDS)
    assert (row["shapley"]["n_new_evaluations"], row["shapley"]["n_new_block_forwards"]) == (0, 0)
    assert len(memo_lines(Path("cache"))) == N_EVALUATIONS + 1


@pytest.mark.slow
def test_without_the_run_folder_the_memo_still_has_the_values(finished):
    shutil.rmtree("results")
    assert command(*JOB, *HERE).code == 0
    row = only_row()
    assert row["shapley"]["values"] == finished["shapley"]["values"]
    assert row["shapley"]["n_new_evaluations"] == 0
    assert row["metrics"] == finished["metrics"]


@pytest.mark.slow
def test_without_a_cache_the_numbers_are_the_same_again(finished):
    shutil.rmtree("results")
    shutil.rmtree("cache")
    assert command(*JOB, *HERE).code == 0
    row = only_row()
    assert row["shapley"]["n_new_evaluations"] == N_EVALUATIONS
    assert row["shapley"]["values"] == finished["shapley"]["values"]
    assert row["metrics"] == finished["metrics"]


@pytest.mark.slow
def test_a_torn_result_is_no_result(finished):
    path = run_folder() / "result.json"
    path.write_text(path.read_text()[:200])
    done = command(*JOB, *HERE)
    assert done.code == 0
    assert "already finished" not in done.out
    assert only_row()["metrics"] == finished["metrics"]


@pytest.mark.slow
def test_the_stored_config_repeats_the_job(finished, tmp_path):
    """config.yaml of a run is a whole configuration: started from it, the job finds itself finished."""
    (tmp_path / "again").mkdir()
    shutil.copy(run_folder() / "config.yaml", tmp_path / "again" / "stored.yaml")
    done = command(f"--config-path={tmp_path / 'again'}", "--config-name=stored")
    assert done.code == 0, done.err
    assert "already finished" in done.out
    assert finished["config_key"] in done.out


# -- inputs that change


def text(n: int, word: str) -> str:
    return " ".join(f"{word} number {i} returns the sum of its values." for i in range(n))


def test_a_changed_text_file_runs_again_and_says_so(tmp_path):
    args = [*JOB, *HERE, "allocator=uniform", "dataset=text_file", "dataset.path=mine.txt"]
    (tmp_path / "mine.txt").write_text(text(60, "Function"))
    assert command(*args).code == 0
    first = only_row()
    assert "already finished" in command(*args).out
    (tmp_path / "mine.txt").write_text(text(60, "Parameter"))
    done = command(*args)
    assert done.code == 0
    assert "changed" in done.out
    assert "already finished" not in done.out
    second = only_row()
    assert second["config_key"] == first["config_key"]
    assert second["fingerprints"]["dataset"] != first["fingerprints"]["dataset"]
    assert second["metrics"] != first["metrics"]
    assert "already finished" in command(*args).out


def test_a_changed_profile_file_runs_again(tmp_path):
    def write(sparsity: list[float]) -> None:
        (tmp_path / "p.json").write_text(json.dumps({"sparsity": sparsity, "params": [10240] * 3, "target": 0.7}))

    args = [*JOB, *HERE, "allocator=from_file", "allocator.path=p.json"]
    write([0.6, 0.7, 0.8])
    assert command(*args).code == 0
    first = only_row()
    assert first["profile"]["sparsity"] == [0.6, 0.7, 0.8]
    assert first["shapley"] is None
    write([0.8, 0.7, 0.6])
    done = command(*args)
    assert "changed" in done.out
    assert only_row()["profile"]["sparsity"] == [0.8, 0.7, 0.6]


# -- other jobs


@pytest.mark.slow
def test_a_profile_from_a_file_gives_the_metrics_of_the_run_that_wrote_it(finished):
    shutil.copy(run_folder() / "profile.json", "mine.json")
    args = ["results_dir=other", "cache_dir=cache", "allocator=from_file", "allocator.path=mine.json"]
    assert command(*JOB, *args).code == 0
    row = only_row("other")
    assert row["metrics"] == finished["metrics"]
    assert row["sparsity"] == finished["sparsity"]
    assert row["profile"] == finished["profile"]


@pytest.mark.slow
def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path):
    done = command("dry_run=true", *HERE)
    assert done.code == 0, done.err
    plan = dict(re.findall(r"^  (\S.*?) {2,}([\d,]+)$", done.out, re.MULTILINE))
    assert plan["shapley evaluations"] == "144"
    assert plan["shapley block forwards"] == "591"
    assert plan["blocks"] == "12"
    amounts = {line.split()[0]: line.split()[1:3] for line in done.out.splitlines() if "FLOP " in line}
    of_token, of_head = 2 * 5_308_416 + 2 * 12 * 192 * 256, 2 * 192 * 2048  # operations: two per weight, and half of all pairs
    passes = float(amounts["passes"][0]) * 1e9
    assert amounts["passes"][1] == "GFLOP"
    assert passes == pytest.approx((2 - 1 / 12) * 128 * 256 * of_token, rel=0.01)
    scores = float(amounts["scores"][0]) * 1e12  # with the values of the full coalition, by which the payoff divides
    assert scores == pytest.approx(16 * 256 * ((591 / 12 + 1) * of_token + 145 * of_head), rel=0.01)
    assert "memory at the peak, about: " in done.out
    done = command("dry_run=true", "shapley=exact", *HERE)
    assert "4,096" in done.out
    assert "4,095" in done.out
    assert command("dry_run=true", "shapley=permutation", "shapley.budget=90", *HERE).code == 0
    assert command("dry_run=true", "allocator=uniform", *HERE).code == 0
    assert list(tmp_path.iterdir()) == []


def test_no_evaluation():
    assert command(*[a for a in JOB if not a.startswith("evaluation")], *HERE, "evaluation=none", "allocator=uniform").code == 0
    row = only_row()
    assert (row["metrics"], row["dense"]) == ({}, {})
    assert row["sparsity"]["actual"] == pytest.approx(0.7, abs=1e-3)
    assert not (run_folder() / "figures").exists()


@pytest.mark.parametrize("estimator", [["shapley=exact"], ["shapley=permutation", "shapley.budget=14"]])
def test_other_estimators(estimator):
    job = [a for a in JOB if not a.startswith("shapley.window")]
    assert command(*job, *HERE, *estimator).code == 0
    shapley = only_row()["shapley"]
    assert shapley["efficiency_gap"] == pytest.approx(0, abs=1e-9)
    assert (shapley["stderr"] is None) == (estimator == ["shapley=exact"])
    assert shapley["n_evaluations"] <= (8 if estimator == ["shapley=exact"] else 14)


def test_results_and_cache_default_to_results_and_the_user_s_cache(tmp_path):
    assert command(*JOB).code == 0
    assert len(rows(tmp_path / "results")) == 1
    assert len(memo_lines(tmp_path / "xdg" / "svnup")) == N_EVALUATIONS + 1


# -- sweeps


@pytest.mark.slow
def test_a_sweep_finishes_every_job_and_plays_the_game_once():
    done = command("-m", *JOB, *HERE, "allocator=uniform,shapley", "pruner=wanda,sparsegpt,magnitude,none")
    assert done.code == 0, done.err
    found = {
        (r["config"]["allocator"]["_target_"].rsplit(".")[-1], r["config"]["pruner"]["_target_"].rsplit(".")[-1]): r
        for r in rows()
    }
    pruners = ("Wanda", "SparseGPT", "Magnitude", "Nothing")
    assert set(found) == {(a, p) for a in ("Uniform", "ScoreBudget") for p in pruners}
    assert {r["status"] for r in found.values()} == {"finished"}
    played = [found["ScoreBudget", p]["shapley"] for p in pruners]
    assert sorted(s["n_new_evaluations"] for s in played) == [0, 0, 0, N_EVALUATIONS]
    assert {s["n_evaluations"] for s in played} == {N_EVALUATIONS}
    assert len({tuple(s["values"]) for s in played}) == 1
    assert len(memo_lines(Path("cache"))) == N_EVALUATIONS + 1
    assert len(list(Path("cache/dense").iterdir())) == 1
    dense = {r["dense"]["docs/ppl"]["value"] for r in found.values()}
    assert len(dense) == 1
    for (allocator, pruner), row in found.items():
        kept = pruner == "Nothing"
        assert row["sparsity"]["actual"] == (0 if kept else pytest.approx(0.7, abs=1e-3))
        assert (row["metrics"]["docs/ppl"]["value"] in dense) == kept
        assert (row["shapley"] is None) == (allocator == "Uniform")
    assert len({r["metrics"]["docs/ppl"]["value"] for r in found.values()}) == 7


@pytest.mark.slow
def test_a_failing_job_does_not_stop_a_sweep(tmp_path):
    """One whose configuration is wrong, and one whose text is too short; each is told in its line."""
    (tmp_path / "good.txt").write_text(text(60, "Function"))
    (tmp_path / "short.txt").write_text("too short")
    args = ["allocator=uniform", "dataset=text_file", "dataset.path=short.txt,good.txt", "sparsity=0.5,1.5,0.6"]
    done = command("-m", *JOB, *HERE, *args)
    assert done.code == 1
    assert {(r["config"]["dataset"]["path"], r["config"]["sparsity"]) for r in rows()} == {("good.txt", 0.5), ("good.txt", 0.6)}
    told = [line for line in done.err.splitlines() if line.startswith("svnup: ")]
    assert sum(line.startswith("svnup: sparsity=1.5: ") for line in told) == 2
    assert sum("dataset.n_seq=4" in line for line in told) == 2
    assert len(told) == 4
    assert "Traceback" not in done.err
    again = command("-m", *JOB, *HERE, *args)
    assert again.code == 1
    assert again.out.count("already finished") == 2


def test_a_crash_is_recorded_and_does_not_stop_a_sweep(monkeypatch):
    from svnup import pipeline

    run = pipeline.run

    def crash(job: Any, *args: Any) -> Any:
        if job.sparsity == 0.5:
            raise RuntimeError("the machine is on fire")
        return run(job, *args)

    monkeypatch.setattr(pipeline, "run", crash)
    done = command("-m", *JOB, *HERE, "allocator=uniform", "sparsity=0.5,0.6")
    assert (done.code, done.err.count("RuntimeError: the machine is on fire")) == (1, 1)
    assert "Traceback" in done.err
    status = {r["config"]["sparsity"]: (r["status"], r["error"]) for r in rows()}
    assert status == {0.5: ("failed", "RuntimeError: the machine is on fire"), 0.6: ("finished", None)}
    monkeypatch.setattr(pipeline, "run", run)
    done = command(*JOB, *HERE, "allocator=uniform", "sparsity=0.5")
    assert done.code == 0
    assert "already finished" not in done.out, "a failed run is run again"
    assert {r["status"] for r in rows()} == {"finished"}


# -- saved models


@pytest.mark.parametrize(
    ("family", "pruner"),
    [
        ("llama", "sparsegpt"),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [("llama", "wanda"), ("opt", "wanda"), ("opt", "magnitude")]),
    ],
)
def test_a_saved_model_is_the_pruned_model(family, pruner):
    """Reloaded by transformers alone it gives the logits of the pruned model, and evaluated as a model the same perplexity."""
    import svnup.pruning.magnitude
    import svnup.pruning.sparsegpt
    import svnup.pruning.wanda
    from svnup.model.source import Random
    from svnup.pruning import prune_model
    from svnup.types import SparsityProfile

    scale = "allocator.scale=clip"  # values of random weights may all be negative, which the log scale refuses
    done = command(*JOB, *HERE, f"model.model_type={family}", f"pruner={pruner}", scale, "save_model=true")
    assert done.code == 0, done.err
    row, run = only_row(), run_folder()
    beside = json.loads((run / "model" / "profile.json").read_text())
    assert {k: beside[k] for k in ("sparsity", "params", "target", "pattern")}.items() <= row["profile"].items()
    assert not list(run.rglob("*.bin"))

    shape = {key.partition(".")[2]: int(value) for key, value in (word.split("=") for word in RANDOM[1:])}
    lm = Random(model_type=family, device="cpu", **shape).load()
    source = Docs(n_seq=4, seq_len=32, seed=0, role="calibration")
    make = {
        "wanda": svnup.pruning.wanda.Wanda,
        "sparsegpt": svnup.pruning.sparsegpt.SparseGPT,
        "magnitude": svnup.pruning.magnitude.Magnitude,
    }[pruner]
    ids = torch.arange(5, 69).view(2, 32)
    with torch.inference_mode():
        dense = lm.model(ids).logits
        prune_model(lm, SparsityProfile.from_dict(row["profile"]), make(), source.tokens(lm.tokenizer))
        pruned = lm.model(ids).logits
        saved = AutoModelForCausalLM.from_pretrained(run / "model").eval()(ids).logits
    assert torch.equal(saved, pruned)
    assert not torch.allclose(saved, dense)

    args = ["model=tiny", f"model.pretrained_model_name_or_path={run}/model", "model.seq_len=32", "evaluation.n_seq=4"]
    done = command(*args, "pruner=none", "allocator=uniform", "results_dir=again", "cache_dir=cache")
    assert done.code == 0, done.err
    again = only_row("again")
    assert again["metrics"]["docs/ppl"]["value"] == row["metrics"]["docs/ppl"]["value"]
    assert again["sparsity"]["actual"] == row["sparsity"]["actual"]


@pytest.mark.slow
def test_every_group_of_a_saved_n_m_model_has_exactly_n_zeros():
    done = command(
        "-m", *JOB, *HERE, "pattern='2:4','4:8'", "sparsity=0.5", "allocator=uniform", "pruner=magnitude,wanda,sparsegpt",
        "save_model=true",
    )  # fmt: skip
    assert done.code == 0, done.err
    seen = set()
    for row in rows():
        model = AutoModelForCausalLM.from_pretrained(Path("results/runs") / row["config_key"] / "model")
        linears = {k: w for k, w in model.named_parameters() if ".layers." in k and w.ndim == 2}
        assert len(linears) == 21
        n, m = map(int, row["config"]["pattern"].split(":"))
        for name, weight in linears.items():
            zeros = (weight.view(weight.shape[0], -1, m) == 0).sum(-1)
            assert (zeros == n).all(), name
        assert row["sparsity"] == {"target": 0.5, "actual": 0.5, "pattern": f"{n}:{m}"}
        assert (model.get_input_embeddings().weight != 0).all()
        seen.add((row["config"]["pruner"]["_target_"], m))
    assert len(seen) == 6


@pytest.mark.slow
def test_every_group_of_a_mixed_model_has_the_n_of_its_block():
    args = ["pattern='mixed:8'", "allocator=uniform,shapley", "pruner=wanda,sparsegpt", "allocator.scale=rank"]
    for allocator in ("uniform", "shapley"):
        args[1] = f"allocator={allocator}"
        done = command("-m", *JOB, *HERE, *(args if allocator == "shapley" else args[:3]), "save_model=true")
        assert done.code == 0, done.err
    found = rows()
    assert len(found) == 4
    for row in found:
        model = AutoModelForCausalLM.from_pretrained(Path("results/runs") / row["config_key"] / "model")
        profile, uniform = row["profile"], row["shapley"] is None
        steps = [round(8 * s) for s in profile["sparsity"]]
        assert [8 * s for s in profile["sparsity"]] == steps
        assert profile["pattern"] == "mixed:8"
        assert np.mean(profile["requested"]) == pytest.approx(0.7, abs=1e-9)
        assert abs(np.mean(profile["sparsity"]) - 0.7) <= 0.5 / 8 / 3 + 1e-9
        assert profile["actual"] == profile["sparsity"]
        assert (np.ptp(profile["requested"]) < 1e-9) == uniform
        assert row["sparsity"] == {"target": 0.7, "actual": pytest.approx(sum(steps) / 24), "pattern": "mixed:8"}
        if not uniform:
            assert len(set(steps)) > 1
        for index, n in enumerate(steps):
            linears = {k: w for k, w in model.model.layers[index].named_parameters() if w.ndim == 2}
            assert len(linears) == 7
            assert all(((w.view(w.shape[0], -1, 8) == 0).sum(-1) == n).all() for w in linears.values())
    shutil.copy(run_folder_of(found, "ScoreBudget") / "profile.json", "mine.json")
    done = command(
        *JOB, "pattern='mixed:8'", "allocator=from_file", "allocator.path=mine.json", "results_dir=other", "cache_dir=cache"
    )
    assert done.code == 0, done.err
    (like,) = [r for r in found if r["shapley"] is not None and "Wanda" in r["config"]["pruner"]["_target_"]]
    assert only_row("other")["metrics"] == like["metrics"]
    assert only_row("other")["profile"] == like["profile"]


def run_folder_of(found: list[dict[str, Any]], allocator: str) -> Path:
    row = next(r for r in found if r["config"]["allocator"]["_target_"].endswith(allocator))
    return Path("results/runs") / row["config_key"]


@pytest.mark.slow
@pytest.mark.parametrize("split", ["error", "outliers", "shapley"])
def test_a_block_divided_among_its_linears_and_its_profile_fed_back(split):
    # a larger amplitude, so that linears of random weights differ, and a threshold that they reach
    more = ["split.lam=0.1", *(["split.threshold=2"] if split == "outliers" else [])]
    done = command(*JOB, *HERE, "allocator.scale=rank", f"split={split}", *more)
    assert done.code == 0, done.err
    row = only_row()
    profile = row["profile"]
    for index, shares in enumerate(profile["linears"]):
        assert len(shares) == 7
        spread = [s["sparsity"] for s in shares.values()]
        assert np.ptp(spread) > 0.01
        mean = np.average(spread, weights=[s["size"] for s in shares.values()])
        assert mean == pytest.approx(profile["sparsity"][index], abs=1e-9)
    for p in row["pruning"]["per_linear"]:
        asked = profile["linears"][p["block"]][p["name"]]["sparsity"]
        assert p["n_zeros"] == int(asked * p["size"] + 1e-6)
    shutil.copy(run_folder() / "profile.json", "mine.json")
    assert command(*JOB, "results_dir=other", "cache_dir=cache", "allocator=from_file", "allocator.path=mine.json").code == 0
    assert only_row("other")["metrics"] == row["metrics"]
    assert only_row("other")["profile"] == profile
    done = command(*JOB, "results_dir=plain", "cache_dir=cache", "allocator.scale=rank")
    assert done.code == 0
    plain = only_row("plain")
    assert plain["profile"]["sparsity"] == profile["sparsity"]
    assert plain["metrics"] != row["metrics"]
    assert "linears" not in plain["profile"]


@pytest.mark.slow
def test_asking_a_finished_job_for_its_model_writes_it(finished):
    done = command(*JOB, *HERE, "save_model=true")
    assert done.code == 0, done.err
    assert (run_folder() / "model" / "config.json").is_file()
    assert only_row()["metrics"] == finished["metrics"]


# -- what only a process of its own can show


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(tmp_path, monkeypatch):
    """SIGKILL in the middle of the coalitions, and a line torn by it: the values are those of a run that was left alone."""
    job = [a for a in JOB if "layers" not in a and "window" not in a]
    job += ["model.num_hidden_layers=5", "shapley=exact"]
    add, added = Memo.add, []

    def die(self, name, value):
        if len(added) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        added.append(name)
        add(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(Memo, "add", die)
        assert forked(lambda: command(*job, *HERE)) == -signal.SIGKILL
    assert len(memo_lines(tmp_path / "cache")) == 12
    assert only_row()["status"] == "running"
    (memo,) = (tmp_path / "cache").glob("games/*/*.jsonl")
    with memo.open("a") as file:
        file.write('{"coalition": "11')

    done = command(*job, *HERE)
    assert done.code == 0, done.err
    assert "1 damaged line" in done.err
    resumed = only_row()
    assert resumed["status"] == "finished"
    known = resumed["shapley"]["n_evaluations"] - resumed["shapley"]["n_new_evaluations"]
    assert resumed["shapley"]["n_evaluations"] == 32
    assert known == 12

    assert command(*job, "results_dir=other", "cache_dir=fresh").code == 0
    alone = only_row("other")
    assert alone["shapley"]["n_new_evaluations"] == 32
    assert alone["shapley"]["n_block_forwards"] == 31
    assert resumed["shapley"]["values"] == alone["shapley"]["values"]
    assert resumed["metrics"] == alone["metrics"]


class Help(NamedTuple):
    done: subprocess.CompletedProcess[str]
    seconds: float


@pytest.fixture(scope="module")
def help_of_the_command(tmp_path_factory) -> Help:
    """`svnup --help` with a last line that names the heavy modules it imported, and the processor time it took."""
    code = (
        "import sys\nfrom svnup.cli.run import main\nsys.argv = ['svnup', '--help']\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = ('torch', 'transformers', 'datasets', 'wandb', 'matplotlib', 'pandas')\n"
        "    print('HEAVY', [m for m in heavy if m in sys.modules])\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    folder = tmp_path_factory.mktemp("help")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert list(folder.iterdir()) == []
    return Help(done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def test_help_is_quick_and_light(help_of_the_command):
    """Names every group, and imports nothing heavy: that is what keeps it under 3 seconds."""
    shown = help_of_the_command.done.stdout
    assert "HEAVY []" in shown
    assert help_of_the_command.seconds < 3
    for group in ("allocator", "dataset", "evaluation", "experiment", "model", "pruner", "shapley", "tracker"):
        assert f"\n{group}: " in shown
    assert "sparsity=0.7" in shown


def test_help_lists_only_options(help_of_the_command):
    assert "_game" not in help_of_the_command.done.stdout
    assert "_hub" not in help_of_the_command.done.stdout


# -- several processes on one game


@pytest.mark.slow
def test_shards_fill_the_cache_and_the_job_evaluates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = [a for a in JOB if "window" not in a] + ["shapley=exact", "allocator.scale=rank"]
    assert command("-m", *job, *HERE, "shapley.shard=0/3,1/3,2/3").code == 0
    assert not (tmp_path / "results" / "runs").exists(), "a shard is no result"
    assert len({line["coalition"] for line in memo_lines(tmp_path / "cache")}) == len(memo_lines(tmp_path / "cache")) == 8
    assert command(*job, *HERE).code == 0
    merged = json.loads((run_folder() / "result.json").read_text())["shapley"]
    assert (merged["n_evaluations"], merged["n_new_evaluations"]) == (8, 0)
    assert command(*job, "results_dir=alone", "cache_dir=fresh").code == 0
    alone = json.loads((run_folder("alone") / "result.json").read_text())["shapley"]
    assert merged["values"] == alone["values"]
    assert alone["n_new_evaluations"] == 8


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "given",
    [
        ["shapley=gates"],
        ["shapley=kernel", "shapley.budget=40", "shapley.stop={stderr: 1000}"],
        ["shapley=leave_one_out"],
        ["shapley.window=2", "shapley.game.absence=prune"],
        ["shapley.window=2", "shapley.game.absence=prune", "+pruner@shapley.game.pruner=magnitude"],
        ["shapley.window=2", "shapley.game.players=sublayer", "shapley.game.payoff=kl"],
        ["shapley.window=2", "shapley.game.payoff=accuracy", "shapley.game.cap=chance", "shapley.game.data.n_seq=4"],
    ],
    ids=" ".join,
)
def test_estimators_and_games_through_the_command(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = [a for a in JOB if "window" not in a]
    done = command(*job, *HERE, *given, "allocator.scale=rank")
    assert done.code == 0, done.err
    row = json.loads((run_folder() / "result.json").read_text())
    assert len(row["shapley"]["values"]) == (6 if "players=sublayer" in " ".join(given) else 3)
    assert len(row["profile"]["sparsity"]) == 3
    assert row["sparsity"]["actual"] == pytest.approx(0.7, abs=2e-3)
    assert row["shapley"]["kinds"] == ["cpu/float32"]
    assert ("standard error" in (row["shapley"]["stopped"] or "")) == any("stop" in g for g in given)

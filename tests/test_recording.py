"""What a run leaves behind: whole files in the right order, the truth about a failure, and a command that runs it again."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import last_row

from svnup import pipeline
from svnup.allocation import Budget
from svnup.outside import code_hash
from svnup.pruning import prune_model
from svnup.pruning import walk as pruning
from svnup.pruning.wanda import Wanda
from svnup.reports import figures as plots
from svnup.results.store import PROGRESS, RunFolder, load


def folder():
    (path,) = Path("results/runs").iterdir()
    return RunFolder(path)


# -- failures


@pytest.mark.thinned(3)
@pytest.mark.parametrize("error", [OSError("the disk is gone"), ValueError("n=3: too many; take 2")], ids=["crash", "mistake"])
@pytest.mark.parametrize("sweep", [False, True], ids=["alone", "sweep"])
def test_a_failed_run_keeps_its_traceback_and_its_error(error, sweep, svnup, monkeypatch):
    mark = "0123456789abcdef-mark"
    monkeypatch.setenv("SOME_TOKEN", mark)

    def break_off(*_):
        raise type(error)(f"{error} {mark}")

    monkeypatch.setattr(pipeline, "prune_model", break_off)
    code, err = None, ""
    if isinstance(error, OSError) and not sweep:
        with pytest.raises(OSError, match="the disk is gone"):
            svnup("allocator=uniform")
    else:
        code, _, err = svnup("allocator=uniform", *(["-m"] if sweep else []))
    assert code == (1 if sweep else 2 if isinstance(error, ValueError) else None)
    assert mark not in err
    row, log = folder().read(), (folder().path / "svnup.log").read_text()
    assert (row.status, row.error) == ("failed", f"{type(error).__name__}: {error} [SOME_TOKEN]")
    assert "in break_off" in log, "the traceback"
    assert f"{type(error).__name__}: {error} [SOME_TOKEN]" in log
    assert "dense: docs/ppl" in log, "and what went before"


def test_what_fails_behind_the_result_does_not_spoil_it(svnup, monkeypatch):
    def no_figures(*_):
        raise RuntimeError("no ink")

    with monkeypatch.context() as patch:
        patch.setattr(plots, "figures", no_figures)
        with pytest.raises(RuntimeError, match="no ink"):
            svnup()
    row = folder().read()
    assert (row.status, row.error) == ("finished", None)
    assert "no ink" in (folder().path / "svnup.log").read_text()
    code, out, _ = svnup()
    assert (code, "already finished" in out) == (0, True)
    assert {path.stem for path in (folder().path / "figures").iterdir()} == {"shapley", "profile"}


# -- the result comes last


def test_a_run_that_is_killed_before_its_result_is_not_finished(svnup, monkeypatch):
    """Who finds a finished result finds its figures and parts."""
    written = []
    write = RunFolder._write

    def note(self, name, text):
        status = json.loads(text)["status"] if name == "result.json" else ""
        assert status != "finished" or len(list((self.path / "figures").glob("*.png"))) == 2
        if name != PROGRESS:  # which comes and goes
            written.append(f"{name} {status}".strip())
        write(self, name, text)

    monkeypatch.setattr(RunFolder, "_write", note)
    assert svnup()[0] == 0
    assert written == ["result.json running", "config.yaml", "profile.json", "shapley.json", "result.json finished"]


def test_the_next_run_completes_what_is_missing_and_computes_nothing(svnup, monkeypatch):
    assert svnup()[0] == 0
    parts = ["profile.json", "shapley.json", "figures/profile.png", "figures/shapley.png"]
    before = {name: (folder().path / name).read_bytes() for name in ["result.json", *parts]}
    for name in parts:
        (folder().path / name).unlink()
    monkeypatch.setattr(pipeline, "run", None)
    for _ in range(2):
        code, out, err = svnup()
        assert (code, "already finished" in out) == (0, True), err
        assert {name: (folder().path / name).read_bytes() for name in before} == before
    monkeypatch.setattr(plots, "figures", None)
    assert svnup()[0] == 0, "what is there is not drawn again"


def test_a_model_whose_profile_is_not_there_yet_is_not_saved(svnup):
    assert svnup("allocator=uniform", "save_model=true")[0] == 0
    (folder().path / "model" / "profile.json").unlink()
    code, out, _ = svnup("allocator=uniform", "save_model=true")
    assert (code, "already finished" in out) == (0, False)
    assert (folder().path / "model" / "profile.json").is_file()


# -- what is saved


@pytest.mark.slow
def test_a_model_in_another_form_goes_beside_the_first(svnup):
    job = ["allocator=uniform", "pruner=magnitude", "save_model=true"]
    assert svnup(*job, "save_format=bitmask")[0] == 0
    first = {path: path.stat() for path in (folder().path / "model").iterdir()}
    code, out, err = svnup(*job)
    assert code == 0, err
    assert f"model stays as it is; the dense model goes to {folder().path / 'model_dense'}" in out
    assert folder().models() == {"bitmask": folder().path / "model", "dense": folder().path / "model_dense"}
    assert {path: path.stat() for path in (folder().path / "model").iterdir()} == first
    code, out, _ = svnup(*job[:-1], "force=true")
    assert (code, folder().models()) == (0, {})
    assert "removed, since the model is pruned anew: model, model_dense in " in out


# -- numbers that are none


def test_an_error_that_is_not_finite_is_null_with_its_reason(svnup, monkeypatch):
    monkeypatch.setattr(pruning, "_error", lambda *_: float("nan"))
    code, _, err = svnup("allocator=uniform")
    assert code == 0, err
    row = last_row()
    assert (row["status"], row["metrics"]["docs/ppl"]["value"] > 1) == ("finished", True)
    assert [linear["error"] for linear in row["pruning"]["per_linear"]] == [None] * 21
    assert row["not_finite"]["pruning.per_linear.20.error"] == "nan"
    assert len(row["not_finite"]) == 21
    assert load("results")[0].not_finite == row["not_finite"]


@pytest.mark.parametrize("factor", [1.0, 2.0**90])
def test_errors_of_large_weights_are_those_of_small_ones(factor, random_model):
    """Squares of these are beyond float32; the ratio is not."""
    lm = random_model(2)
    with torch.no_grad():
        lm.blocks[1].mlp.down_proj.weight.mul_(factor)
    tokens = np.random.default_rng(3).integers(5, 2000, size=(2, 16))
    profile = Budget(lm.block_params, 0.5).uniform()
    errors = {(r.block, r.name): r.error for r in prune_model(lm, profile, Wanda(), tokens).per_linear}
    assert errors[1, "mlp.down_proj"] == pytest.approx(0.0556, rel=0.5)
    assert all(0 < error < 1 for error in errors.values())


@pytest.mark.parametrize("given", ["allocator.lam=inf", "sparsity=nan", "model.dense_ppl=[{ppl:nan}]"])
def test_a_number_that_is_none_is_refused_by_its_key(given, svnup):
    code, _, err = svnup(given)
    assert (code, err.count("\n")) == (2, 1)
    assert given.partition("=")[0] in err
    assert "finite number" in err


# -- places


def test_the_home_folder_is_the_home_folder_everywhere(svnup, monkeypatch, tmp_path, capsys):
    from svnup.cli.results import main

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    places = ["results_dir='~/of results'", "cache_dir='~/kept'"]
    assert svnup(*places)[0] == 0
    assert svnup(*places, "allocator=uniform", "-m")[0] == 0
    assert (tmp_path / "home" / "kept" / "dense").is_dir()
    assert {path.name for path in (tmp_path / "home" / "of results").iterdir()} == {"runs", "sweeps"}
    assert not list(tmp_path.glob("~*"))
    assert main(["list", "~/of results", "--output", "~/list.txt"]) == 0
    assert (tmp_path / "home" / "list.txt").is_file()
    assert main(["list", "~no-such-user/x"]) == 2
    assert "results_dir=~no-such-user/x: there is no home folder of that user here" in capsys.readouterr().err


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("key", "sweep"), [("results_dir", []), ("allocator.path", []), ("results_dir", ["-m"]), ("dataset.path", ["-m"])]
)
def test_a_home_of_nobody_is_one_line(key, sweep, svnup):
    group = {"allocator.path": ["allocator=from_file"], "dataset.path": ["dataset=text_file"]}.get(key, [])
    code, _, err = svnup(*group, f"{key}='~no-such-user/x'", *sweep)
    assert code == (1 if sweep and key != "results_dir" else 2)
    assert len(err.splitlines()) == 1
    assert f"{key}=~no-such-user/x: there is no home folder of that user here" in err


def test_a_result_with_the_key_of_another_place_is_no_result(svnup, capsys):
    from svnup.cli.results import main

    assert svnup("allocator=uniform")[0] == 0
    path = folder().path / "result.json"
    for key in ("../../elsewhere", "/tmp/x", "", "..", "a/b", "a b"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"config_key": key}))
        assert folder().read() is None
        assert main(["rerun", key or "a"]) == 2
    assert not Path("../elsewhere").exists()


# -- the command of the record


def in_a_shell(command):
    """What is pasted, by a shell, with this environment's commands."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "HYDRA_FULL_ERROR")}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A configuration folder and a package of the user's own, whose scores need a helper beside it."""
    code, conf = tmp_path / "their code", tmp_path / "their conf"
    for folder in (code, conf / "pruner", conf / "experiment"):
        folder.mkdir(parents=True)
    (code / "their_pruner.py").write_text(
        "from dataclasses import dataclass\nfrom svnup.pruning.magnitude import Magnitude\nfrom their_helper import LIMIT\n"
        "@dataclass(frozen=True)\nclass Theirs(Magnitude):\n    limit: float = LIMIT\n"
    )
    (code / "their_helper.py").write_text("LIMIT = 0.5\n")
    (conf / "pruner" / "theirs.yaml").write_text("_target_: their_pruner.Theirs\npattern: ${pattern}\n")
    (conf / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n"
        "  sweeper:\n    params:\n      pruner: theirs,wanda\nsparsity: 0.4\nallocator:\n  lam: 0.1\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(code))
    monkeypatch.syspath_prepend(str(code))
    yield conf
    code_hash.cache_clear()
    for name in ("their_pruner", "their_helper"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_command_of_a_run_is_what_was_typed(svnup, theirs):
    """Folder of the configuration, additions, deletions and quotes; one job of a sweep that the experiment asks for."""
    text = Path("a text's.txt")
    text.write_text("Some words of a small text that is one's own, again and again. " * 60)
    given = ["experiment=mine", "dataset=text_file", "dataset.path='a text\\'s.txt'", "dataset.n_seq=2", "++dataset.seed=4"]
    code, _, err = svnup(*given, "~selection.seed", "hydra.job.chdir=false", "--config-dir", str(theirs))
    assert code == 0, err
    rows = {row.config["pruner"]["_target_"]: row for row in load("results")}
    assert len(rows) == 2
    for pruner, row in rows.items():
        command = row.provenance.command
        words = shlex.split(command)
        assert (words[0].startswith("PYTHONPATH=")) == (pruner == "their_pruner.Theirs"), command
        kept = {"--config-dir", str(theirs), "++dataset.seed=4", "~selection.seed=null", "hydra.job.chdir=false"}
        assert kept | {"hydra.mode=RUN"} <= set(words)
    first = rows["their_pruner.Theirs"]
    told = first.provenance.outside["their_pruner"]
    assert (told.targets, told.version, told.git) == (("their_pruner.Theirs",), None, None)
    assert told.sha256 == code_hash("their_pruner")
    planned = in_a_shell(f"{first.provenance.command} results_dir=again dry_run=true")
    assert f"its folder would be runs/{first.config_key}\n" in planned

"""What docs/extending.md says, done: its files written, its commands typed, its Python run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cli import as_it_was, command
from pages import blocks, files

from svnup.cli.run import main
from svnup.data import Docs
from svnup.language_model import LanguageModel
from svnup.outside import code_hash

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = files(PAGE)
(COMMANDS,) = blocks(PAGE, "sh")
PYTHON = blocks(PAGE, "python")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The folder of the page, with its files."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_file_that_the_page_lists_is_in_it():
    listed = re.findall(r"^      ((?:code|conf)/[\w/]+\.\w+)", PAGE, re.MULTILINE)
    assert (set(listed), len(listed)) == (set(FILES), 6)


def test_help_and_errors_know_the_options_of_the_page(work, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["svnup", "--config-dir", "conf", "--help"])
    with as_it_was(), pytest.raises(SystemExit) as left:
        main()
    shown = capsys.readouterr().out
    assert left.value.code == 0
    groups = dict(re.findall(r"^(\w+): (.*)$", shown, re.MULTILINE))
    for group, own, usual in (("allocator", "slope", "uniform"), ("pruner", "peaks", "wanda"), ("experiment", "mine", "smoke")):
        assert {own, usual} <= set(groups[group].split(", "))
    done = command("--config-dir", "conf", "allocator=slope", "allocator.rse=0.2")
    assert (done.code, done.err) == (2, "svnup: allocator.rse=0.2: there is no such key; did you mean allocator.rise?\n")
    done = command("-cd", "conf", "pruner=null")
    assert done.code == 2
    assert "a group needs an option; choose among" in done.err
    assert "peaks" in done.err


def test_the_whole_job_from_python(work, capsys):
    (code,) = PYTHON
    exec(compile(code, "extending.md", "exec"), {})
    said = capsys.readouterr().out
    sparsity, dense, pruned, n = map(float, re.findall(r"\d+(?:\.\d+)?", said))
    assert (sparsity, n) == (60.0, 44)
    assert 5 < dense < pruned < 200
    again = LanguageModel.load("pruned", dtype="float32")
    weights = [linear.weight for i in range(again.n_blocks) for linear in again.linears(i).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.6, abs=1e-3)
    assert Docs(role="test", n_seq=8, seq_len=64).tokens(again.tokenizer).shape == (8, 64)


@pytest.mark.slow
def test_what_is_typed_runs_all_of_it(work):
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(work / "x"),
    }
    env.pop("PYTHONPATH", None)
    done = subprocess.run(["bash", "-e", "-c", COMMANDS], env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(path.read_text()) for path in Path("results/runs").glob("*/result.json")]
    found = {
        tuple(row["config"][group]["_target_"].rpartition(".")[2] for group in ("pruner", "allocator")): row for row in rows
    }
    assert set(found) == {(p, a) for p in ("Peaks", "Wanda") for a in ("ScoreBudget", "Slope", "Uniform")}
    assert len({row["metrics"]["docs/ppl"]["value"] for row in rows}) == 6
    assert all(row["sparsity"]["actual"] == pytest.approx(0.6, abs=1e-3) for row in rows)
    assert found["Wanda", "ScoreBudget"]["scores"]["method"] == "WeightNorm(power=2)"
    assert found["Wanda", "Slope"]["profile"]["sparsity"][0] == pytest.approx(0.55, abs=1e-3)
    assert found["Wanda", "Uniform"]["provenance"]["outside"] == {}
    sys.path.insert(0, str(work / "code"))
    try:
        assert found["Peaks", "Uniform"]["provenance"]["outside"]["my_methods"]["sha256"] == code_hash("my_methods")
    finally:
        sys.path.remove(str(work / "code"))
    assert "weightnorm" in done.stdout
    assert "peaks" in done.stdout

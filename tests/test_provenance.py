"""Where a number came from, and that no secret is written beside it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli import last_row

import svnup
from svnup.cli import run
from svnup.memory import Stages
from svnup.outside import code_hash
from svnup.results import provenance
from svnup.results.provenance import LONGEST_DIFF, Asked
from svnup.results.row import ResultRow
from svnup.results.store import RunFolder
from svnup.secrets import redact


def git(folder, *args):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(["git", *who, *args], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository with a committed package in it, which is taken for svnup's own checkout."""
    package = tmp_path / "svnup"
    (package / "results").mkdir(parents=True)
    (package / "types.py").write_text("a = 1\n")
    (package / "results" / "provenance.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "all")
    monkeypatch.setattr(provenance, "__file__", str(package / "results" / "provenance.py"))
    return package


def test_what_is_told():
    asked = Asked("svnup seed=3 'model.x=a b'", ["seed=3", "model.x=a b"], "a sweep")
    made = provenance.provenance(asked, {"seed": 3, "dataset": {"seed": 4, "a": {"seed": 0}}, "b": {}})
    assert (made.command, list(made.overrides), made.sweep) == (asked.command, asked.overrides, "a sweep")
    assert (made.code_sha256, made.outside) == (code_hash("svnup"), {})
    assert made.numbers == svnup.NUMBERS_VERSION
    assert (made.seed, made.seeds) == (3, {"seed": 3, "dataset.seed": 4, "dataset.a.seed": 0})
    assert made.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"svnup", "torch", "transformers", "numpy", "hydra-core", "wandb"} <= set(made.versions)
    assert made.hardware.cores == len(os.sched_getaffinity(0))
    assert made.hardware.memory_bytes > 2**28
    assert made.hardware.cpu
    assert made.cwd == str(Path.cwd())
    told = made.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert provenance.Provenance.from_dict(told) == made


def test_a_clean_checkout(checkout):
    made = provenance.provenance(Asked(), {})
    assert made.git == git(checkout, "rev-parse", "HEAD")
    assert (made.dirty, made.diff, made.diff_sha256, made.untracked) == (False, None, None, ())


def test_a_changed_checkout(checkout):
    (checkout / "types.py").write_text("a = 2\n")
    (checkout / "new.py").write_text("")
    made = provenance.provenance(Asked(), {})
    assert made.dirty is True
    assert made.diff.splitlines()[-2:] == ["-a = 1", "+a = 2"]
    assert made.untracked == ("new.py",)
    (checkout / "types.py").write_text("a = 3\n")
    assert provenance.provenance(Asked(), {}).diff_sha256 != made.diff_sha256


def test_a_long_difference_is_cut_and_says_so(checkout):
    (checkout / "types.py").write_text("a = 2\n" * LONGEST_DIFF)
    diff = provenance.provenance(Asked(), {}).diff
    assert len(diff) < LONGEST_DIFF + 100
    assert "[cut: 50,000 of " in diff.splitlines()[-1]


def test_no_secret_is_in_the_difference(checkout, monkeypatch):
    marks = ["0123456789abcdef" * 2 + c for c in "abcdef"]
    monkeypatch.setenv("SOME_TOKEN", marks[0])
    (checkout / "types.py").write_text(
        f"x = '{marks[0]}'\nWANDB_API_KEY = '{marks[1]}'\n\"hf_token\": \"{marks[2]}\"\nu = 'https://me:{marks[3]}@host/a'\n"
        f"y = hf_{marks[4]}\nexport PASSWORD={marks[5]}\n"
    )
    (checkout / ".env").write_text("old")
    git(checkout, "add", ".env")
    git(checkout, "commit", "-q", "-m", "env", ".env")
    (checkout / ".env").write_text("unseen")
    diff = provenance.provenance(Asked(), {}).diff
    assert [m for m in marks if m in diff] == []
    assert "unseen" not in diff
    for kept in ("+x = '[SOME_TOKEN]'", "+WANDB_API_KEY = '[redacted]'", "https://me:[redacted]@host/a", "PASSWORD=[redacted]"):
        assert kept in diff


def test_outside_a_checkout(tmp_path, monkeypatch):
    """Installed below another project's checkout, svnup does not take that project's commit for its own."""
    git(tmp_path, "init", "-q")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "lib" / "svnup" / "results" / "provenance.py"))
    (tmp_path / "lib" / "svnup").mkdir(parents=True)
    (tmp_path / "lib" / "svnup" / "types.py").write_text("")
    made = provenance.provenance(Asked(), {})
    assert (made.git, made.dirty, made.diff) == (None, None, None)


def test_only_variables_that_are_named_as_secrets_are_redacted(monkeypatch, tmp_path):
    secrets = {
        "A_TOKEN": "a" * 12,
        "DB_PASSWORD": 'pä"ss\\word1',
        "AWS_SECRET": "/wJalr+XUtnFEMI/K7MDENG",
        "GITHUB_PAT": "ghp_1234567",
    }
    others = {"SHORT_KEY": "model", "WORD_KEY": "magnitude", "KEY_PATH": "b" * 12, "SSH_KEY": str(tmp_path)}
    for name, value in (secrets | others).items():
        monkeypatch.setenv(name, value)
    assert redact(" ".join(secrets.values())) == "[A_TOKEN] [DB_PASSWORD] [AWS_SECRET] [GITHUB_PAT]"
    assert redact(" ".join(others.values())) == " ".join(others.values())
    written = redact(json.dumps([*secrets.values()]))
    assert json.loads(written) == [f"[{name}]" for name in secrets]


def test_stages_add_up():
    import torch

    ended = Stages()
    ended("one", torch.device("cpu"))
    ended("two", torch.device("cpu"))
    assert list(ended.done) == ["one", "two"]
    assert sum(stage["seconds"] for stage in ended.done.values()) <= ended.seconds
    assert ended.done["one"]["peak_memory_bytes"] <= ended.done["two"]["peak_memory_bytes"]


def test_a_run_tells_its_texts_and_its_stages(svnup):
    code, _, err = svnup()
    assert code == 0, err
    row = last_row()
    assert list(row["stages"]) == ["load", "dense", "scores", "allocation", "pruning", "evaluation"]
    assert 0 < sum(stage["seconds"] for stage in row["stages"].values()) <= row["seconds"]
    assert row["peak_memory_bytes"] >= row["stages"]["load"]["peak_memory_bytes"] > 10**7
    texts = row["provenance"]["texts"]
    assert set(texts) == {"dataset", "shapley.game.data", "evaluation.datasets.docs"} == set(row["fingerprints"]) - {"weights"}
    assert (texts["dataset"]["n_seq"], texts["dataset"]["seq_len"]) == (4, 32)
    assert texts["evaluation.datasets.docs"]["tokens_sha256"] == row["metrics"]["docs/ppl"]["protocol"]["tokens_sha256"]
    assert row["provenance"]["name"] == "random_llama_3x32 wanda shapley 0.7"
    assert row["provenance"]["seeds"]["shapley.game.data.seed"] == 0


def test_results_of_earlier_versions_stay_readable(svnup):
    assert svnup("allocator=uniform")[0] == 0
    row = last_row()
    del row["stages"]
    row["provenance"] = {
        k: row["provenance"][k] for k in ("command", "overrides", "seed", "git", "dirty", "versions", "hardware")
    }
    assert ResultRow.from_json(json.dumps(row)).stages is None


@pytest.mark.parametrize("wrong", [False, True])
def test_no_token_is_written_by_a_sweep(wrong, svnup, monkeypatch, tmp_path):
    """Hydra writes down the whole configuration of a sweep before its first job, and also where no job can be composed."""
    mark = "0123456789abcdef-mark"
    monkeypatch.setenv("FOO_TOKEN", mark)
    monkeypatch.setattr(run, "_run", lambda *_: None)
    given = [f"tracker.name={mark}", "+hydra.job.env_set.WANDB_API_KEY=abcdefabcdefabcdefabcdef"]
    code, _, err = svnup("allocator=uniform,nothing" if wrong else "allocator=uniform", "tracker=wandb", *given, "-m")
    assert code == (2 if wrong else 0), err
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert "multirun.yaml" in [p.name for p in written]
    for secret in (mark, "abcdefabcdef"):
        assert [p.name for p in written if secret in p.read_text(errors="replace")] == []


def test_no_token_of_the_environment_is_written_by_a_run(svnup, monkeypatch, tmp_path):
    """Even where a configuration names it."""
    mark = "0123456789abcdef-mark"
    monkeypatch.setenv("HF_TOKEN", mark)
    text = tmp_path / f"{mark}.txt"
    text.write_text("some words of a text " * 400)
    code, _, err = svnup("allocator=uniform", "dataset=text_file", f"dataset.path={text}", "dataset.n_seq=2")
    assert code == 0, err
    written = [p for p in tmp_path.glob("results/**/*") if p.is_file()]
    assert {"result.json", "config.yaml", "svnup.log"} <= {p.name for p in written}
    assert [p.name for p in written if mark.encode() in p.read_bytes()] == []
    assert "[HF_TOKEN].txt" in RunFolder(written[0].parent).path.joinpath("config.yaml").read_text()

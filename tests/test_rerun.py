"""A run is repeated from its result alone, and the verdict is about its numbers."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli import SMALL_W2, at_home, command, forked, last_row, results, run_folder

from svnup.cli.repeat import repeat
from svnup.config import build, register, stored
from svnup.files import unsealed
from svnup.rerun import Repeated, rerun
from svnup.results.provenance import Asked, provenance
from svnup.results.row import Measured, Profile, Provenance, ResultRow, Sparsity


def metric(value, **protocol):
    return Measured.from_dict({"value": value, "protocol": {"dataset": "docs", "seq_len": 8} | protocol})


def result(value=10.0, status="finished", key="abc123", **changes):
    made = provenance(Asked(), {"seed": 0})
    row = ResultRow(status, key, {}, made, {"weights": "w"}, {"docs/ppl": metric(value)}, {"docs/ppl": metric(5.0)})
    return replace(row, sparsity=Sparsity(0.5, 0.5), profile=Profile((0.25, 0.75), 0.5), **changes)


def verdicts(first, again):
    repeated = Repeated(first, again, Path("there"))
    return {name: verdict for name, (_, _, verdict) in repeated.verdicts().items()}, repeated.same


def test_equal_means_every_bit():
    found, same = verdicts(result(), result())
    assert (set(found.values()), same) == ({"equal"}, True)
    assert set(found) == {"docs/ppl", "dense docs/ppl", "sparsity", "profile"}
    found, same = verdicts(result(), result(10.0 + 2e-15))
    assert (found["docs/ppl"], same) == ("within 1 %", True)


@pytest.mark.parametrize(
    ("value", "verdict"), [(10.0999, "within 1 %"), (9.9001, "within 1 %"), (10.11, "different"), (None, "different")]
)
def test_one_percent(value, verdict):
    found, same = verdicts(result(), result(value))
    assert (found["docs/ppl"], same) == (verdict, verdict == "within 1 %")
    assert found["dense docs/ppl"] == "equal"


def test_what_only_one_has_is_different():
    for first, again in ((result(), replace(result(), metrics={})), (replace(result(), metrics={}), result())):
        found, same = verdicts(first, again)
        assert (found["docs/ppl"], same) == ("different", False)


def test_lists_are_judged_by_their_largest():
    def near(*sparsity):
        return verdicts(result(), replace(result(), profile=Profile(sparsity, 0.5)))[0]["profile"]

    assert near(0.2501, 0.7499) == "within 1 %"
    assert near(0.26, 0.74) == "different"
    assert near(0.25, 0.75, 0.75) == "different"


def test_the_same_number_under_another_protocol_is_not_the_same():
    found, same = verdicts(result(), replace(result(), metrics={"docs/ppl": metric(10.0, seq_len=9)}))
    assert (found["docs/ppl"], same) == ("other protocol", False)
    newer = replace(result(), metrics={"docs/ppl": metric(10.0, told_since="then")})
    assert verdicts(result(), newer)[1]


def test_differences_of_provenance():
    first = result()
    made = first.provenance.to_dict()
    made["versions"]["torch"] = "9.9"
    made["hardware"]["cpu"] = "Abacus 9000"
    made["git"] = "f00"
    made["environment"]["OMP_NUM_THREADS"] = "77"
    repeated = Repeated(
        first, replace(first, provenance=Provenance.from_dict(made), fingerprints={"weights": "v"}), Path("there")
    )
    assert set(repeated.differences()) == {
        *("versions.torch", "hardware.cpu", "git", "environment.OMP_NUM_THREADS", "inputs.weights")
    }
    assert repeated.differences()["hardware.cpu"] == (first.provenance.hardware.cpu, "Abacus 9000")
    assert "hardware.cpu: " in repeated.report()
    assert "same code, packages and machine" in Repeated(first, first, Path("there")).report()


def code(sha256="c0de", outside="0ff", **more):
    """A result of code with these hashes."""
    told = {
        "code_sha256": sha256,
        "outside": {"mine": {"sha256": outside, "version": None, "folder": "/a", "git": "f00"} | more},
    }
    return replace(result(), provenance=Provenance.from_dict(result().provenance.to_dict() | told))


@pytest.mark.parametrize(
    ("again", "differs"),
    [
        (code(folder="/b", git="ba7"), set()),
        (code(sha256="dec0de"), {"code_sha256"}),
        (code(outside="1ff"), {"outside.mine.sha256"}),
        (code(version="2"), {"outside.mine.version"}),
        (result(), {"code_sha256", "outside.mine.sha256"}),
    ],
    ids=["elsewhere", "ours edited", "theirs edited", "theirs of a version", "without it"],
)
def test_the_same_code_is_said_of_the_same_code_only(again, differs):
    """A wheel has no commit, and a commit says nothing of a tree that was edited or of the user's own code."""
    for first, second in ((code(), again), (again, code())):
        unlike = Repeated(first, second, Path("there"))
        assert set(unlike.differences()) == differs
        assert ("the same code" in unlike.report()) == (not differs)


def test_a_result_that_does_not_tell_its_code_is_not_said_to_have_the_same():
    older = result()
    told = {k: v for k, v in older.provenance.to_dict().items() if k not in ("code_sha256", "outside")}
    older = replace(older, provenance=Provenance.from_dict(told))
    said = Repeated(older, result(), Path("there")).report()
    assert "both have the same code, " not in said
    assert "whether both have the same code is not known" in said


def test_a_run_that_is_not_finished_has_nothing_to_compare(tmp_path):
    with pytest.raises(ValueError, match="abc123: this run is failed"):
        rerun(result(status="failed"), tmp_path / "there")
    assert not list(tmp_path.iterdir())


# -- by the command


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a finished run that reads a text by a relative path."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        at_home(patch, folder)
        Path("mine.txt").write_text("All the words of a small text of one's own, again and again. " * 200)
        options = ["dataset=text_file", "dataset.path=mine.txt", "dataset.n_seq=3", "tracker=wandb", "tracker.mode=offline"]
        done = command(*SMALL_W2, *options, "save_masks=true", "cache_dir=cache")
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def ran(first, own_place):
    """That folder's content in the working folder, as if the run had been made here; its result."""
    shutil.copytree(first, ".", dirs_exist_ok=True, ignore=shutil.ignore_patterns("wandb"))  # its links lead nowhere
    path = run_folder() / "result.json"
    row = unsealed(json.loads(path.read_text()))
    row["provenance"]["cwd"] = str(Path.cwd())
    path.write_text(json.dumps(row))
    return row


@pytest.fixture
def again_by_command(capfd):
    """`svnup-results rerun` in this process, with what the process prints that it starts: (exit code, output, errors)."""

    def again(*args):
        capfd.readouterr()
        code, out, err = results("rerun", *args)
        printed = capfd.readouterr()
        return code, out + printed.out, err + printed.err

    return again


@pytest.mark.slow
def test_a_run_repeats_from_its_result_alone(ran, again_by_command, monkeypatch, tmp_path):
    (folder,) = Path("results/runs").iterdir()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "logs" not in p.parts}
    kept = tmp_path / "elsewhere" / "kept"
    (kept / "runs" / "x").mkdir(parents=True)
    shutil.copy(folder / "result.json", kept / "runs" / "x")  # nothing else of it
    cached = set((tmp_path / "cache").rglob("*"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, out, err = again_by_command(ran["config_key"][:5], "--results-dir", "kept")
    assert code == 0, out + err
    assert "docs/ppl" in out
    assert f"{ran['metrics']['docs/ppl']['value']!r}" in out
    assert " 0 different" not in out
    (again,) = (tmp_path / "elsewhere" / "kept-rerun").glob("*/runs/*/result.json")
    row = json.loads(again.read_text())
    assert row["metrics"] == ran["metrics"]
    assert row["shapley"]["n_new_evaluations"] == row["shapley"]["n_evaluations"] > 0, "nothing comes from a cache"
    assert not list(again.parent.glob("masks*"))
    assert not list(again.parent.glob("wandb*"))
    assert set((tmp_path / "cache").rglob("*")) == cached
    assert {p.name for p in again.parents[2].iterdir()} == {"original.json", "runs"}
    monkeypatch.chdir(tmp_path)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and "logs" not in p.parts} == before


@pytest.fixture
def without_imports(monkeypatch):
    """The process of the repetition is a copy of this one, which has imported everything."""

    def run(arguments, *, env, check):
        *_, original, place, cache, trust = arguments

        def again():
            os.environ.clear()
            os.environ.update(env)
            sys.exit(repeat(Path(original), place, cache, trust == "True"))

        return SimpleNamespace(returncode=forked(again))

    monkeypatch.setattr("svnup.rerun.subprocess", SimpleNamespace(run=run))


@pytest.mark.slow
@pytest.mark.usefixtures("without_imports")
def test_another_number_is_exit_code_1_and_the_environment_is_as_it_was(ran, again_by_command, monkeypatch):
    (path,) = Path("results/runs").glob("*/result.json")
    ran["metrics"]["docs/ppl"]["value"] *= 1.02
    ran["provenance"]["versions"]["torch"] = "1.0"
    ran["provenance"]["environment"] = {"OMP_NUM_THREADS": "1"}
    path.write_text(json.dumps(ran))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "2")
    code, out, _ = again_by_command(ran["config_key"])
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.strip().startswith("docs/ppl ") and "different" in line]
    assert repr(ran["metrics"]["docs/ppl"]["value"]) in line
    assert "versions.torch: 1.0 -> " in out
    (again,) = Path("results-rerun").glob("*/runs/*/result.json")
    made = json.loads(again.read_text())["provenance"]
    assert made["environment"]["OMP_NUM_THREADS"] == "1"
    assert "MKL_NUM_THREADS" not in made["environment"]
    assert made["hardware"]["threads"] == ran["provenance"]["hardware"]["threads"]


@pytest.mark.usefixtures("without_imports")
def test_what_cannot_be_repeated_is_exit_code_2(ran, again_by_command):
    Path("mine.txt").unlink()
    code, _, err = again_by_command(ran["config_key"])
    assert code == 2
    assert "dataset.path=mine.txt: there is no such file" in err
    assert "Traceback" not in err
    code, _, err = again_by_command("zz")
    assert (code, err.count("\n")) == (2, 1)
    assert "zz: no run has a key with this prefix" in err


def test_a_configuration_of_an_earlier_version_builds_the_same_job(svnup):
    """It lacks keys that came later."""
    assert svnup("allocator=uniform")[0] == 0
    row = last_row()
    older = {k: v for k, v in row["config"].items() if k not in ("split", "save_masks", "offload", "selection")}
    register()
    assert build(stored(older)).key == build(stored(row["config"])).key == row["config_key"]
    job = build(stored(older, results_dir="there"))
    assert (job.results_dir, job.offload, job.save_masks) == ("there", "none", False)

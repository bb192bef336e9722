"""W&B offline with the real client: what a run logs is read back from its own .wandb file."""

import base64
import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli
import pytest
from cli import SMALL_W2, Done
from google.protobuf.message import DecodeError
from rows import run as made_up

from svnup.files import unsealed
from svnup.results.row import ResultRow
from svnup.results.store import RunFolder

JOB = SMALL_W2


@contextlib.contextmanager
def a_place(folder: Path) -> Iterator[pytest.MonkeyPatch]:
    """A working directory, W&B offline and homeless, and afterwards everything as it was."""
    with pytest.MonkeyPatch.context() as patch:
        cli.at_home(patch, folder)
        for name in [n for n in os.environ if n.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
            patch.setenv(name, str(folder / "home"))
        yield patch


def here(results: str = "results") -> list[str]:
    return [f"results_dir={Path.cwd() / results}", f"cache_dir={Path.cwd() / 'cache'}"]


def command(*args: str) -> Done:
    """The command's main() in this process, with results and cache in the working directory.

    Their paths are absolute: W&B's service, one for all jobs of this process, stays in the folder where it was started.
    """
    return cli.command(*args, *(() if any(a.startswith("results_dir=") for a in args) else here()))


# -- reading a .wandb file: LevelDB's log framing around protobuf records


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes() if path.exists() else b""
    at, parts = 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # what is left of a block is padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def nested(items: Any, into: dict[str, Any] | None = None) -> dict[str, Any]:
    """Items of a record, each a value under a key or a path of keys."""
    into = {} if into is None else into
    for item in items:
        *parents, last = [item.key] if item.key else item.nested_key
        node = into
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = json.loads(item.value_json)
    return into


class Logged:
    """One offline W&B run, as its file tells it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.id = folder.name.split("-", 3)[3]
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        self.exit_code = None
        self.run = None
        for record in records(folder / f"run-{self.id}.wandb"):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self._update(record.run.config)
            elif kind == "config":
                self._update(record.config)
            elif kind == "history":
                self.history.append(nested(record.history.item))
            elif kind == "summary":
                nested(record.summary.update, self.summary)
            elif kind == "artifact":
                self.artifacts.append(record.artifact)
            elif kind == "exit":
                self.exit_code = record.exit.exit_code

    def _update(self, config: Any) -> None:
        nested(config.update, self.config)

    @property
    def step(self) -> dict[str, Any]:
        """The one thing that was logged when the job had ended."""
        (step,) = [h for h in self.history if any("/" in key and not key.startswith("live/") for key in h)]
        return step

    def live(self, stage: str) -> list[dict[str, Any]]:
        """What was told of a stage while it lasted."""
        told = [
            {k.removeprefix(f"live/{stage}/"): v for k, v in h.items() if k.startswith(f"live/{stage}/")} for h in self.history
        ]
        return [one for one in told if one]

    def file(self, name: str) -> str:
        return (self.folder / "files" / name).read_text()

    def table(self, key: str) -> dict[str, Any]:
        return json.loads((self.folder / "files" / self.step[key]["path"]).read_text())

    def artifact(self, kind: str) -> Any:
        """The one artifact of a type that the run has made or used."""
        (found,) = [a for a in self.artifacts if a.type == kind]
        return found


def logged(results: Path) -> list[Logged]:
    """Every W&B run of a job below a results folder, without those of its stages."""
    return [run for run in all_logged(results) if run.run.job_type not in ("shapley", "score", "allocate")]


def all_logged(results: Path) -> list[Logged]:
    """Every offline run below a results folder, finished; W&B's service writes the last records shortly after `finish()`."""
    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(DecodeError):  # of a record that is half written
            runs = [Logged(p) for p in sorted(results.glob("runs/*/wandb/offline-run-*"))]
            if all(run.exit_code is not None for run in runs):
                return runs
        assert time.monotonic() < deadline, "the runs were not finished in time"
        time.sleep(0.05)


# -- one tracked job


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Iterator[tuple[Path, Logged, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("tracked")
    with a_place(folder):
        options = ["tracker.project=p1", "tracker.group=g1", "tracker.job_type=j1", "tracker.tags=[t1,t2]"]
        done = command(*JOB, "tracker=wandb", *options)
        assert done.code == 0, done.err
        (run,) = logged(folder / "results")
        (result,) = (folder / "results").glob("runs/*/result.json")
        yield folder, run, json.loads(result.read_text())


def test_config_is_the_resolved_one_with_its_key(tracked):
    _, run, row = tracked
    assert run.config["config_key"] == row["config_key"]
    for name in ("sparsity", "pattern", "seed"):
        assert run.config[name] == row["config"][name]
    for name in ("model", "dataset", "pruner", "allocator", "evaluation", "shapley"):
        assert run.config[name] == row["config"][name], name
    assert run.config["dataset"]["seq_len"] == 32  # ${model.seq_len}, resolved
    names = {"model": "random llama", "pruner": "wanda", "allocator": "shapley", "sparsity": "0.7"}
    assert run.config["names"] == names | {"setting": "random llama wanda shapley 0.7"}
    for name in ("command", "git", "dirty", "versions", "hardware", "seeds"):
        assert run.config["provenance"][name] == row["provenance"][name], name


def test_names_under_which_the_run_is_found(tracked):
    from svnup.reports.wandb import LONGEST

    _, run, _ = tracked
    assert (run.run.project, run.run.run_group, run.run.job_type) == ("p1", "g1", "j1")
    assert list(run.run.tags) == ["t1", "t2", "random llama", "wanda", "shapley", "0.7"]
    options = "model.seq_len=32 dataset.n_seq=4 evaluation.n_seq=4 shapley.game.data.n_seq=2 shapley.window=2"
    shape = "model.num_hidden_layers=3 model.hidden_size=32 model.intermediate_size=64 model.num_attention_heads=2"
    whole = f"random_llama_3x32 wanda shapley 0.7 {shape} {options}"
    assert run.run.display_name == f"{whole[: LONGEST - 8]}… {run.config['config_key'][:6]}"
    assert run.run.run_id == run.id


def test_metrics(tracked):
    _, run, row = tracked
    assert run.step["docs/ppl"] == row["metrics"]["docs/ppl"]["value"]
    assert run.step["dense/docs/ppl"] == row["dense"]["docs/ppl"]["value"]
    assert run.step["sparsity/actual"] == row["sparsity"]["actual"]
    assert run.step["sparsity/target"] == 0.7
    for name in ("v_empty", "v_full", "efficiency_gap", "n_evaluations", "n_block_forwards"):
        assert run.step[f"shapley/{name}"] == row["shapley"][name], name
    assert run.step["vs_dense/docs/ppl"] == row["metrics"]["docs/ppl"]["value"] / row["dense"]["docs/ppl"]["value"] - 1
    assert run.step["cost/seconds"] == row["seconds"]
    assert run.step["cost/peak_memory_gib"] == row["peak_memory_bytes"] / 2**30
    assert {k for k in run.step if k.endswith("_seconds")} == {f"cost/{stage}_seconds" for stage in row["stages"]}
    for name in ("docs/ppl", "dense/docs/ppl", "vs_dense/docs/ppl", "sparsity/actual", "cost/seconds"):
        assert isinstance(run.step[name], float), "columns of numbers sort"


def test_tables_and_charts_per_layer(tracked):
    _, run, row = tracked
    table = run.table("layers/shapley")
    assert table["columns"] == ["layer", "shapley", "stderr"]
    assert table["data"] == [[i, v, None] for i, v in enumerate(row["shapley"]["values"])]
    table = run.table("layers/sparsity")
    assert table["columns"] == ["layer", "sparsity"]
    assert table["data"] == [[i, s] for i, s in enumerate(row["profile"]["sparsity"])]
    for chart in ("shapley", "sparsity"):
        shown = run.config["_wandb"]["visualize"][f"charts/{chart}"]["panel_config"]
        assert shown["fieldSettings"] == {"label": "layer", "value": chart}
        assert run.step[f"charts/{chart}_table"]["path"] == run.step[f"layers/{chart}"]["path"]


def test_figures(tracked):
    folder, run, _ = tracked
    (own,) = (folder / "results").glob("runs/*/figures")
    for name in ("shapley", "profile"):
        image = run.step[f"figures/{name}"]
        assert image["_type"] == "image-file"
        assert (run.folder / "files" / image["path"]).read_bytes() == (own / f"{name}.png").read_bytes()


def content_is(artifact: Any, name: str, content: bytes) -> None:
    (entry,) = artifact.manifest.contents
    assert (entry.path, entry.size) == (name, len(content))
    assert entry.digest == base64.b64encode(hashlib.md5(content).digest()).decode()


def test_artifacts_tell_the_lineage(tracked):
    """values -> profile -> result: each run but the first uses what the one before it has made."""
    folder, run, row = tracked
    stages = {r.run.job_type: r for r in all_logged(folder / "results")}
    assert set(stages) == {"shapley", "allocate", "j1"}
    assert {r.run.run_group for r in stages.values()} == {"g1"}
    assert {r.exit_code for r in stages.values()} == {0}
    own = {name: [a for a in r.artifacts if a.type != "run_table"] for name, r in stages.items()}  # W&B keeps tables as those
    kinds = {name: {a.type: (a.name, a.use_after_commit) for a in made} for name, made in own.items()}
    values, profile = kinds["shapley"]["values"][0], kinds["allocate"]["profile"][0]
    assert kinds["shapley"] == {"values": (values, False)}
    assert kinds["allocate"] == {"values": (values, True), "profile": (profile, False)}
    assert kinds["j1"] == {"profile": (profile, True), "result": (f"result-{row['config_key']}", False)}
    assert profile == f"profile-{row['config_key']}"
    digests = {r.artifact(kind).digest for r, kind in ((stages["shapley"], "values"), (stages["allocate"], "values"))}
    assert len(digests) == 1, "the same content is the same version"
    content_is(run.artifact("profile"), "profile.json", json.dumps(row["profile"]).encode())
    (result,) = (folder / "results").glob("runs/*/result.json")
    content_is(run.artifact("result"), "result.json", ResultRow.from_json(result.read_text()).to_json().encode())


def test_stages_log_what_is_theirs(tracked):
    folder, _, row = tracked
    stages = {r.run.job_type: r for r in all_logged(folder / "results")}
    assert stages["shapley"].table("layers/shapley")["data"] == [[i, v, None] for i, v in enumerate(row["shapley"]["values"])]
    assert stages["shapley"].step["cost/scores_seconds"] == row["stages"]["scores"]["seconds"]
    assert stages["allocate"].table("layers/sparsity")["data"] == [[i, s] for i, s in enumerate(row["profile"]["sparsity"])]
    assert stages["shapley"].run.display_name == f"{stages['j1'].run.display_name} (shapley)"
    for stage in ("shapley", "allocate"):
        assert not [key for key in stages[stage].step if "ppl" in key]
        assert stages[stage].config["pruner"] == row["config"]["pruner"]


def test_an_offline_run_says_how_to_sync_it(tracked):
    folder, *_ = tracked
    (log,) = (folder / "results").glob("runs/*/svnup.log")
    (line,) = [line for line in log.read_text().splitlines() if "wandb sync" in line]
    named = line.partition("wandb sync ")[2].split()
    assert {Path(p) for p in named} == {r.folder for r in all_logged(folder / "results")}
    assert [p[-7:] for p in named[:2]] == ["-scores", "profile"], "what others come from goes first"


def test_the_run_was_finished(tracked):
    folder, run, _ = tracked
    assert run.exit_code == 0
    assert run.summary["status"] == "finished"
    assert "error" not in run.summary
    (log,) = (folder / "results").glob("runs/*/svnup.log")
    assert run.file("svnup.log") in log.read_text()
    assert "pruned:" in run.file("svnup.log")


def test_stages_are_told_while_they_last(tracked):
    _, run, row = tracked
    coalitions, pruning = run.live("coalitions"), run.live("pruning")
    assert row["shapley"]["n_evaluations"] in [one["done"] for one in coalitions if one["done"] == one["total"]]
    assert [one["done"] for one in pruning] == [1, 2, 3]
    assert pruning[0]["seconds_left"] > pruning[-1]["seconds_left"] == 0
    errors = {block: [x["error"] for x in row["pruning"]["per_linear"] if x["block"] == block] for block in range(3)}
    assert [one["error"] for one in pruning] == pytest.approx([sum(e) / len(e) for e in errors.values()])
    assert run.table("layers/error")["data"] == [[block, pytest.approx(sum(e) / len(e))] for block, e in errors.items()]
    assert not [key for key in run.summary if key.startswith("live/")]


def test_git_state_is_where_wandb_keeps_it(tracked):
    _, run, row = tracked
    if (commit := row["provenance"]["git"]) is None:
        pytest.skip("not in a checkout")
    assert run.run.git.commit == commit
    assert (run.folder / "files" / "diff.patch").is_file() == bool(row["provenance"]["diff"])


def test_standard_error_of_a_permutation_is_in_the_table(tmp_path):
    with a_place(tmp_path):
        job = [a for a in JOB if not a.startswith("shapley.window")]
        done = command(*job, "tracker=wandb", "shapley=permutation", "shapley.budget=14")
        assert done.code == 0, done.err
        (run,) = logged(tmp_path / "results")
        (result,) = (tmp_path / "results").glob("runs/*/shapley.json")
    stderr = json.loads(result.read_text())["stderr"]
    assert [line[2] for line in run.table("layers/shapley")["data"]] == stderr
    assert max(stderr) > 0


# -- ids, sweeps, failures


@pytest.mark.slow
def test_ids_belong_to_run_folders_and_force_gets_another(tmp_path):
    with a_place(tmp_path) as patch:
        sweep = ["-m", *JOB, "tracker=wandb", "allocator=uniform", "sparsity=0.5,0.6"]
        done = command(*sweep)
        assert done.code == 0, done.err
        first = logged(tmp_path / "results")
        assert len(first) == 2, "two jobs are two runs"
        assert {r.config["sparsity"] for r in first} == {0.5, 0.6}
        assert {r.exit_code for r in first} == {0}
        stored = {p.parent.name: json.loads(p.read_text())["id"] for p in (tmp_path / "results").glob("runs/*/wandb.json")}
        assert {r.config["config_key"]: r.id for r in first} == stored
        assert len(set(stored.values())) == 2

        assert command(*sweep).out.count("already finished") == 2
        assert len(logged(tmp_path / "results")) == 2, "what is skipped is not tracked"

        again = [a if a != "sparsity=0.5,0.6" else "sparsity=0.5" for a in sweep[1:]]
        assert command(*again, "force=true").code == 0
        ids = {r.id for r in logged(tmp_path / "results") if r.config["sparsity"] == 0.5}
        assert len(ids) == 2

        assert command(*again, *here("another")).code == 0
        (other,) = logged(tmp_path / "another")
        assert other.id not in ids | set(stored.values()), "two users of one project do not collide"
        assert other.config["config_key"] in stored

        # killed while it ran: the same run goes on
        (result,) = (tmp_path / "another").glob("runs/*/result.json")
        row = json.loads(result.read_text())
        result.write_text(json.dumps(row | {"status": "running"}))
        now = time.time
        patch.setattr(time, "time", lambda: now() + 5)  # its folder is named by the second
        assert command(*again, *here("another")).code == 0
        assert {r.id for r in logged(tmp_path / "another")} == {other.id}
        assert len(logged(tmp_path / "another")) == 2


def test_a_failed_job_finishes_its_run_too(tmp_path):
    from svnup import pipeline

    with a_place(tmp_path) as patch:
        run = pipeline.run

        def crash(job: Any, *args: Any) -> Any:
            if job.sparsity == 0.5:
                raise ValueError("stage pruning: no luck")
            return run(job, *args)

        patch.setattr(pipeline, "run", crash)
        done = command("-m", *JOB, "tracker=wandb", "allocator=uniform", "sparsity=0.5,0.6")
        assert done.code == 1
        assert "svnup: stage pruning: no luck" in done.err
        import wandb

        assert wandb.run is None, "nothing is left open"
        runs = {r.config["sparsity"]: r for r in logged(tmp_path / "results")}
    assert runs[0.5].exit_code == 1
    assert runs[0.6].exit_code == 0
    assert [h for h in runs[0.5].history if "docs/ppl" in h] == []
    assert runs[0.5].summary["error"] == "ValueError: stage pruning: no luck"
    assert (runs[0.5].summary["status"], runs[0.6].summary["status"]) == ("failed", "finished")
    assert "raise ValueError" in runs[0.5].file("svnup.log"), "with the traceback"
    assert runs[0.6].step["docs/ppl"] > 0


def test_a_failing_tracker_does_not_take_the_result_with_it(tmp_path):
    """W&B may refuse to log; what was measured stands all the same."""
    with a_place(tmp_path) as patch:
        import wandb

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no disk left")

        patch.setattr(wandb, "Table", refuse)
        with pytest.raises(RuntimeError, match="no disk left"):
            command(*JOB, "tracker=wandb", "allocator=uniform")
        (result,) = (tmp_path / "results").glob("runs/*/result.json")
        row = json.loads(result.read_text())
        assert (row["status"], row["error"]) == ("finished", None)
        assert row["metrics"]["docs/ppl"]["value"] > 1
        (run,) = logged(tmp_path / "results")
        assert run.exit_code == 1


def test_wandb_without_an_account_is_a_failure_that_says_so(tmp_path):
    with a_place(tmp_path) as patch:
        import wandb

        def refuse(**kwargs: Any) -> None:
            raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

        patch.setattr(wandb, "init", refuse)
        done = command(*JOB, "tracker=wandb", "allocator=uniform")
        assert done.code == 2
        assert "No API key" in done.err
        assert "wandb login" in done.err
        (result,) = (tmp_path / "results").glob("runs/*/result.json")
        assert json.loads(result.read_text())["status"] == "failed"


def test_a_missing_wandb_is_told_before_anything_runs(tmp_path, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    with a_place(tmp_path):
        done = command(*JOB, "tracker=wandb")
    assert done.code == 2
    assert "svnup: tracker=wandb: wandb is not installed" in done.err
    assert "pip install" in done.err
    assert list(tmp_path.iterdir()) == []


# -- groups, modes, uploads afterwards, agents, secrets


@pytest.mark.slow
def test_jobs_of_a_sweep_share_a_group(tmp_path):
    from svnup.cli.run import _sweep_name

    sweep = ["-m", *JOB, "tracker=wandb", "tracker.stages=false", "allocator=uniform"]
    with a_place(tmp_path):
        assert command(*sweep, "sparsity=0.5,0.6").code == 0
        runs = logged(tmp_path / "results")
    (group,) = {r.run.run_group for r in runs}
    assert len(runs) == 2
    assert re.fullmatch(r"sparsity=0\.5,0\.6 [0-9a-f]{6}", group)
    names = [_sweep_name(["model=tiny", f"sparsity=0.{n},0.9"]) for n in range(9)]
    assert len(set(names)) == 9
    assert len(_sweep_name([f"seed={','.join(map(str, range(99)))}"])) <= 120  # W&B takes 128
    (made,) = {json.loads(p.read_text())["provenance"]["sweep"] for p in (tmp_path / "results").glob("runs/*/result.json")}
    assert made == group


def plain(step: dict[str, Any]) -> dict[str, Any]:
    """What was logged, without W&B's own keys and where on the disk its media lie."""
    kept = {k: v for k, v in step.items() if not k.startswith("_")}
    return {k: {n: v[n] for n in ("sha256", "_type") if n in v} if isinstance(v, dict) else v for k, v in kept.items()}


@pytest.mark.slow
def test_finished_runs_are_uploaded_afterwards_once_each_with_the_same_records(tracked, tmp_path, capsys):
    folder, live, _ = tracked
    with a_place(tmp_path):
        results_cli = importlib.import_module("svnup.cli.results")
        shutil.copytree(folder / "results", "results", ignore=shutil.ignore_patterns("wandb*"))
        upload = ["wandb", "results", "--mode", "offline", "--group", "later"]
        assert results_cli.main(upload) == 0
        said = capsys.readouterr().out
        (line,) = said.splitlines()
        runs = {r.run.job_type: r for r in all_logged(Path("results"))}
        assert set(runs) == {"shapley", "allocate", "j1"}, "with the options of its own configuration"
        late = runs["j1"]
        assert f"{live.config['config_key']}  logged as {late.id}, offline; to upload it: wandb sync results/" in line
        assert plain(late.step) == plain(live.step)
        assert {k: v for k, v in late.config.items() if k != "_wandb"} == {
            k: v for k, v in live.config.items() if k != "_wandb"
        }
        assert (late.run.run_group, list(late.run.tags)) == ("later", list(live.run.tags))
        assert [a.digest for a in late.artifacts if a.type == "result"] == [live.artifact("result").digest]

        assert results_cli.main(upload) == 0
        assert f"is there already as {late.id}" in capsys.readouterr().out
        assert len(all_logged(Path("results"))) == 3
        assert results_cli.main([*upload, "--force"]) == 0
        assert late.id not in capsys.readouterr().out
        assert len({r.id for r in logged(Path("results"))}) == 2

        shutil.copytree(folder / "results", "tracked")
        assert results_cli.main(["wandb", "tracked", "--mode", "offline"]) == 0
        assert f"is there already as {live.id}; it was offline: wandb sync tracked/" in capsys.readouterr().out


def test_failed_runs_are_uploaded_too_and_what_is_passed_over_is_told(tmp_path, capsys):
    with a_place(tmp_path):
        results_cli = importlib.import_module("svnup.cli.results")
        failed = made_up(None, key="f0", status="failed")
        RunFolder.of("results", "f0").write(failed)
        (Path("results/runs/f0") / "svnup.log").write_text("so far so good\n")
        RunFolder.of("results", "r0").write(made_up(None, key="r0", status="running"))
        RunFolder.of("results", "t0").write(failed)
        Path("results/runs/t0/result.json").write_text("{")
        assert results_cli.main(["wandb", "results", "--mode", "offline"]) == 0
        told = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
        (run,) = all_logged(Path("results"))
        assert told["f0"].startswith(f"failed, logged as {run.id}, offline")
        assert told["r0"].startswith("passed over: it is running")
        assert told["t0"].startswith("passed over: its result.json cannot be read")
        assert (run.summary["status"], run.summary["error"]) == ("failed", "ValueError: no luck")
        assert run.exit_code == 1
        assert run.file("svnup.log") == "so far so good\n"
        assert results_cli.main(["wandb", "results", "--mode", "offline"]) == 0
        assert f"is there already as {run.id}" in capsys.readouterr().out


def test_names_tell_options_and_seeds_apart_and_runs_of_one_job_share_a_group():
    from svnup.reports.wandb import LONGEST, _title

    def named(*overrides: str, **options: Any) -> str:
        row = made_up(20.0, **options)
        return _title(replace(row, provenance=replace(row.provenance, name="tiny wanda shapley", overrides=overrides)))

    assert named("pruner=wanda", "pruner.damp=0.1", "seed=3") == "tiny wanda shapley seed=3 pruner.damp=0.1"
    assert (
        named("shapley.window=3", "tracker=wandb", "results_dir=x", allocator="shapley")
        == "tiny wanda shapley shapley.window=3"
    )
    assert named("shapley.window=3") == "tiny wanda shapley", "the uniform budget asks no game"
    long = [named(f"pruner.damp={'1' * 200}", key=key) for key in ("aaaaaa1", "bbbbbb1")]
    assert max(map(len, long)) <= LONGEST
    assert long[0] != long[1]


def interrupted_in(hides: bool, patch: pytest.MonkeyPatch) -> list[int]:
    """SIGTERM comes while code runs that turns what interrupts it into an error of its own, or goes on as if nothing were.

    Returns the steps that are done after it.
    """
    from svnup import pipeline
    from svnup.progress import stage

    steps: list[int] = []

    def run(*args: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException:
            if not hides:
                raise RuntimeError("half imported") from None
        with stage("prune", 2, "blocks") as advance:
            for step in range(2):
                steps.append(step)
                advance(1)

    patch.setattr(pipeline, "run", run)
    return steps


@pytest.mark.parametrize("hides", [False, True], ids=["another error", "no error"])
def test_no_library_hides_from_wandb_and_the_result_that_a_job_was_interrupted(tmp_path, hides):
    with a_place(tmp_path) as patch:
        steps = interrupted_in(hides, patch)
        done = command(*JOB, "tracker=wandb")
        assert not steps, "the stage does not begin"
        assert (done.code, "interrupted (SIGTERM)" in done.err) == (143, True), done.err
        (run,) = all_logged(Path("results"))
        assert (run.exit_code, run.summary["status"]) == (143, "interrupted")
        (path,) = Path("results/runs").glob("*/result.json")
        assert json.loads(path.read_text())["status"] == "interrupted"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_what_was_logged_can_be_read(tmp_path, number):
    """To the whole group, as a batch system sends it."""
    small = [a for a in cli.SMALL if not a.startswith("model.num_hidden_layers")]
    options = [*small, "model.num_hidden_layers=16", "shapley=exact", "tracker=wandb", *cli.HERE]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    home = {f"WANDB_{k}_DIR": str(tmp_path / "home") for k in ("CONFIG", "CACHE", "DATA", "ARTIFACT")}
    env = kept | home | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    code = (  # a shell lets what it runs in the background ignore SIGINT
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
        "; import svnup.reports.wandb as w; w.SECONDS = 0.0; from svnup.cli.run import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, *options]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 280
        while len(cli.memo_lines(tmp_path / "cache")) < 20:
            assert job.poll() is None, job.stderr.read()
            assert time.monotonic() < deadline, "nothing was played in time"
            time.sleep(0.2)
        os.killpg(job.pid, number)
        _, err = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
    assert job.returncode == 128 + number, err
    (run,) = all_logged(tmp_path / "results")
    assert run.exit_code == 128 + number
    assert run.summary["status"] == "interrupted"
    told = run.live("coalitions")
    assert 0 < len(told) <= told[-1]["done"] < told[-1]["total"]
    assert "blocks" in run.file("svnup.log")
    (mark,) = tmp_path.glob("results/runs/*/wandb.json")
    assert json.loads(mark.read_text())["ended"] == "interrupted"


def test_uploading_without_an_account_or_without_runs_is_a_mistake_in_one_line(tracked, tmp_path, capsys):
    folder, *_ = tracked
    with a_place(tmp_path) as patch:
        results_cli = importlib.import_module("svnup.cli.results")
        import wandb

        def refuse(**kwargs: Any) -> None:
            raise wandb.errors.UsageError("No API key configured.")

        patch.setattr(wandb, "init", refuse)
        shutil.copytree(folder / "results", "results", ignore=shutil.ignore_patterns("wandb*"))
        assert results_cli.main(["wandb", "results"]) == 2
        error = capsys.readouterr().err
        assert "No API key configured." in error
        assert "wandb login" in error
        assert error.count("\n") == 1
        (mark,) = Path("results").glob("runs/*/wandb.json")
        assert "logged" not in json.loads(mark.read_text())
        Path("empty").mkdir()
        assert results_cli.main(["wandb", "empty"]) == 2


def test_disabled_leaves_nothing_but_an_id(tmp_path):
    with a_place(tmp_path):
        done = command(*JOB, "tracker=wandb", "tracker.mode=disabled")
        assert done.code == 0, done.err
    assert "wandb sync" not in done.err
    assert not list(tmp_path.glob("results/runs/*/wandb"))
    (mark,) = tmp_path.glob("results/runs/*/wandb.json")
    assert set(json.loads(mark.read_text())) == {"id"}, "it may be uploaded later"


def in_a_process(folder: Path, *args: str, **env: str) -> str:
    """The command in a process of its own: W&B reads its variables once."""
    code = f"import sys; from svnup.cli.run import main; sys.argv = {['svnup', *args]!r}; sys.exit(main())"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    home = {f"WANDB_{k}_DIR": str(folder / "home") for k in ("CONFIG", "CACHE", "DATA", "ARTIFACT")}
    env = kept | home | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"} | env
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_an_agent_of_a_sweep_gets_its_run_and_no_key_is_written(tmp_path):
    """It has chosen the run's id, and waits for numbers also of a job that is finished already."""
    with a_place(tmp_path):
        assert command(*JOB, "allocator=uniform").code == 0
    key = "0123456789abcdef0123456789abcdef01234567"
    agent = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial1", "WANDB_API_KEY": key}
    options = ["allocator=uniform", "results_dir=results", "cache_dir=cache", f"+hydra.job.env_set.WANDB_API_KEY={key}"]
    said = in_a_process(tmp_path, *JOB, "tracker=wandb", *options, **agent)
    assert "already finished" in said
    (run,) = all_logged(tmp_path / "results")
    assert run.id == "trial1"
    (result,) = (tmp_path / "results").glob("runs/*/result.json")
    row = json.loads(result.read_text())
    assert run.step["docs/ppl"] == row["metrics"]["docs/ppl"]["value"]
    assert {a.type for a in run.artifacts if a.type != "run_table"} == {"profile", "result"}
    assert json.loads((result.parent / "wandb.json").read_text())["id"] == "trial1"

    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files)
    assert [str(p) for p in files if key.encode() in p.read_bytes()] == []
    assert key not in said


# -- what is not measured


def test_numbers_that_could_not_be_measured_are_absent_and_say_why(tracked):
    from svnup.reports.wandb import _numbers

    _, _, row = tracked
    metric = {"value": None, "protocol": {}, "reason": "it diverged"}
    metrics = {"docs/ppl": metric, "docs.selection/ppl": {"value": 2.0, "protocol": {}}}
    record = _numbers(ResultRow.from_dict(unsealed(row) | {"metrics": metrics}))
    assert "docs/ppl" not in record
    assert record["reason/docs/ppl"] == "it diverged"
    assert record["docs/selection/ppl"] == 2.0
    assert not [k for k in record if "." in k], "a dot makes a nested key"


def test_what_is_not_comparable_is_marked():
    """A dashboard has no other way to keep numbers under other protocols apart."""
    from svnup.reports.wandb import _numbers

    assert _numbers(made_up(20.0))["comparable"] == 1
    for odd in ({"complete": False}, {"role": "selection"}):
        assert _numbers(made_up(20.0, measured=odd))["comparable"] == 0
    assert _numbers(made_up(20.0, measured={"limit": 10, "complete": False}))["comparable"] == 0
    assert _numbers(made_up(20.0, fallback="damping 0.1 instead of 0.01"))["comparable"] == 0

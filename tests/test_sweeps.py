"""Sweeps as people run them: numbers and time left, what is finished, one summary, one plan."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
from cli import HERE, SMALL, SMALL_W2, command, results, rows
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from rows import run

from svnup import __version__, config
from svnup.cli import expand
from svnup.cli import results as results_cli
from svnup.cli.sweep import compose_all
from svnup.results.store import RunFolder
from svnup.results.sweeps import Sweep, SweepJob, newest_with, sweeps_of
from svnup.units import duration, scaled

JOB = [*SMALL_W2, *HERE, "pruner=magnitude"]


def sweep(*args: str):
    return command("-m", *JOB, *args)


def launcher():
    return Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_launcher.BasicLauncher"]


# -- the command


@pytest.fixture
def seven(own_place):
    """A sweep of two good jobs and one that is wrong, in an order in which the wrong one is the second."""
    return sweep("allocator=uniform", "sparsity=0.4,-3,0.6", "seed=7")


@pytest.mark.slow
def test_each_job_has_its_number_and_all_that_differs(seven):
    heads = [line for line in seven.out.splitlines() if line.startswith("job ")]
    assert [head.partition(" (")[0] for head in heads] == ["job 1 of 3: sparsity=0.4 seed=7", "job 3 of 3: sparsity=0.6 seed=7"]
    assert "left)" in heads[1], "one is done, so the time for the other can be told"
    assert "left)" not in heads[0]


@pytest.mark.slow
def test_a_wrong_job_is_told_first_and_again_at_the_end(seven):
    assert seven.code == 1
    assert seven.err.splitlines()[0].startswith("svnup: sparsity=-3")
    summary = seven.out.splitlines()[-2:]
    assert summary[0].startswith("sweep of 3 jobs, ")
    assert summary[0].endswith(": 2 done, 1 failed")
    assert summary[1].startswith("  failed: job 2, sparsity=-3 seed=7: sparsity=-3.0: ") or "job 2, sparsity=-3" in summary[1]


@pytest.mark.slow
def test_what_is_finished_is_not_launched(seven, monkeypatch):
    launched = []
    monkeypatch.setattr(launcher(), "launch", lambda self, jobs, initial_job_idx: launched.extend(jobs) or [])
    done = sweep("allocator=uniform", "sparsity=0.4,0.6", "seed=7")
    assert (done.code, launched) == (0, [])
    assert done.out.count("already finished, docs/ppl ") == 2
    assert done.out.splitlines()[-1].endswith(": 2 finished before")
    (newest,) = sweeps_of("results")[-1:]
    assert [state.state for state in newest.states("results")] == ["skipped", "skipped"]
    assert newest.ended is not None


def test_a_failure_is_told_with_its_line_and_its_log(own_place, monkeypatch):
    from svnup import pipeline

    real = pipeline.run

    def broken(job, *rest):
        if job.sparsity == 0.5:
            raise RuntimeError("two\nlines")
        return real(job, *rest)

    monkeypatch.setattr(pipeline, "run", broken)
    done = sweep("allocator=uniform", "sparsity=0.5,0.6")
    (row,) = [row for row in rows() if row["status"] == "failed"]
    log = Path("results/runs", row["config_key"], "svnup.log")
    assert done.out.splitlines()[-1] == f"  failed: job 1, sparsity=0.5 seed=0: RuntimeError: two lines; log: {log}"
    assert done.code == 1
    assert "the run failed" in log.read_text()


def test_an_interrupted_sweep_says_what_is_done(own_place, monkeypatch):
    from svnup import pipeline

    real = pipeline.run

    def stopped(job, *rest):
        if job.sparsity == 0.5:
            raise KeyboardInterrupt
        return real(job, *rest)

    monkeypatch.setattr(pipeline, "run", stopped)
    done = sweep("allocator=uniform", "sparsity=0.4,0.5,0.6")
    assert done.code == 130
    summary = done.out.splitlines()[-3:]
    assert summary[0].endswith(": 1 done, 1 interrupted, 1 missing")
    assert summary[2].startswith("  missing: job 3, sparsity=0.6")


def test_a_launcher_that_loses_jobs_is_told(own_place, monkeypatch):
    def lost(self, jobs, initial_job_idx):
        raise RuntimeError("the queue is gone")

    monkeypatch.setattr(launcher(), "launch", lost)
    with pytest.raises(RuntimeError, match="queue is gone"):
        sweep("allocator=uniform", "sparsity=0.4,0.5")


def test_another_sweeper_still_works(own_place):
    done = sweep("hydra/sweeper=basic", "allocator=uniform", "sparsity=0.4,0.5")
    assert (done.code, len(rows())) == (0, 2), done.err
    assert "sweep of" not in done.out


# -- one composition for many jobs


MASTERS = ["allocator=uniform", "sparsity=0.4"]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "jobs",
    [
        [["seed=0", "sparsity=0.5"], ["seed=1", "sparsity=0.5"]],
        [["pruner=wanda", "seed=0"], ["pruner=sparsegpt", "seed=0"], ["pruner=sparsegpt", "seed=3"]],
        [["seed=1", "pruner=sparsegpt", "pruner.block_size=64"], ["seed=2", "pruner=sparsegpt", "pruner.block_size=32"]],
        [["seed=1", "+dataset.datasets_dir=a", "sparsity=0.5"], ["seed=2", "+dataset.datasets_dir=b", "sparsity=0.6"]],
        [
            ["dataset.n_seq=3", "experiment=smoke"],
            ["dataset.n_seq=4", "experiment=smoke"],
            ["dataset.n_seq=4"],
        ],
        [["model=random", "model.seq_len=32"], ["model=random", "model.seq_len=16"], ["model=tiny", "model.seq_len=16"]],
        [["~selection.seed", "selection={n_seq: 3}"], ["~selection.seed", "selection={n_seq: 4}"]],
    ],
)
def test_jobs_are_composed_as_hydra_does_it(jobs):
    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        master = hydra.compose_config("config", MASTERS, run_mode=RunMode.MULTIRUN)
        loader = hydra.config_loader
        expected = []
        for job in jobs:
            cfg = loader.load_sweep_config(master, job)
            with open_dict(cfg):
                del cfg["hydra"]
            expected.append(OmegaConf.to_container(cfg))
        found = [OmegaConf.to_container(cfg) for cfg in compose_all(loader, master, jobs)]
    assert found == expected


# -- its plan


def test_one_plan_of_the_whole_sweep(own_place):
    args = ["allocator=uniform,shapley", "sparsity=0.4,0.6", "seed=0,1"]
    done = sweep(*args, "dry_run=true")
    assert done.code == 0, done.err
    assert not Path("results").exists(), "nothing is written"
    lines = [line.strip() for line in done.out.splitlines()]
    assert lines[0] == "plan of a sweep of 8 jobs (nothing is run, nothing written)"
    assert sum(line.startswith("job ") for line in lines) == 8
    assert "to run: 8 of 8 jobs" in lines
    game = next(line for line in lines if line.startswith("game of "))
    assert game.startswith("game of 4 jobs: 6 evaluations, 7 block-forwards, "), "one game, walked once"
    assert any(line.startswith("dense numbers of 8 jobs: 128 tokens") for line in lines)
    assert lines[-1].startswith("time of all jobs, one after the other")


def test_a_plan_tells_what_is_finished_and_what_is_wrong(own_place):
    assert sweep("allocator=uniform", "sparsity=0.4").code == 0
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    done = sweep("allocator=uniform", "sparsity=0.4,0.5,-3", "dry_run=true")
    assert done.code == 1
    assert "  job 1, sparsity=0.4 seed=0: finished\n" in done.out
    assert "  job 3, sparsity=-3: wrong\n" in done.out
    assert "to run: 1 of 3 jobs, 1 are finished" in done.out
    assert done.err.startswith("svnup: job 3, sparsity=-3: sparsity=-3: ")
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_games_that_overlap_are_counted_once():
    from svnup.machines import Machine
    from svnup.plan.stages import JobCounts
    from svnup.plan.sweep import _game, _shared

    def evaluations(jobs):
        return _game(jobs, [JobCounts(job, Machine()) for job in jobs]).counts["evaluations"]

    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra

        def job(*args):
            cfg = hydra.compose_config("config", [*SMALL, *args], run_mode=RunMode.RUN)
            with open_dict(cfg):
                del cfg["hydra"]
            return config.build(cfg)

        exact, one = job("shapley=exact"), job("shapley.window=1")
        shards = [job("shapley.window=2", f"shapley.shard={k}/3") for k in range(3)]
        alike = [job("shapley.window=2", f"pruner={name}", "compare_uniform=trial") for name in ("wanda", "magnitude")]
        pruned = [job("shapley.window=2", "shapley.game.absence=prune", f"pruner={name}") for name in ("wanda", "magnitude")]
    assert evaluations([exact, one]) == 2**3
    assert evaluations(shards) == 6
    assert _shared(alike[0])["game"] == _shared(alike[1])["game"], "a game without pruned blocks knows no pruner"
    assert _shared(pruned[0])["game"] != _shared(pruned[1])["game"]
    assert _shared(alike[0])["losses"] != _shared(alike[1])["losses"]


# -- how far a sweep is


@pytest.fixture
def told(tmp_path):
    """Writes a sweep whose jobs have these states, half a minute after it began."""

    def write(*statuses, **changes):
        jobs = []
        for number, status in enumerate(statuses, 1):
            left = None
            if status not in ("waiting", "missing"):
                row = run(
                    20.0,
                    key=f"key{number}",
                    seed=number,
                    status={"skipped": "finished", "done": "finished", "dead": "running"}.get(status, status),
                )
                process = {"host": socket.gethostname(), "pid": os.getpid() if status == "running" else 0}
                RunFolder.of(tmp_path, f"key{number}").write(replace(row, process=process))
                left = RunFolder.of(tmp_path, f"key{number}").written() if status == "skipped" else None
            jobs.append(SweepJob(number, f"seed={number}", f"key{number}", status == "skipped", left))
        facts = {"host": "elsewhere", "pid": 1, "began": time.time() - 30} | changes
        sweep = Sweep("abc", "svnup -m seed=1,2", n_jobs=len(jobs), jobs=tuple(jobs), **facts)
        sweep.write(tmp_path)
        return sweep

    return write


STATES = ["done", "skipped", "failed", "interrupted", "waiting", "done"]


def test_states_are_read_from_the_results(told, tmp_path):
    sweep = told(*STATES)
    states = sweep.states(tmp_path)
    assert [one.state for one in states] == STATES
    assert 14 < sweep.seconds_left(states, time.time()) < 20, "one of three, at two in thirty seconds"
    assert sweeps_of(tmp_path) == [sweep]
    assert newest_with(tmp_path, 2, "key2") == sweep
    assert newest_with(tmp_path, 2, "key1") is None


def test_a_running_sweep_is_shown(told, tmp_path):
    told("done", "running", "failed", "dead", "waiting", host=socket.gethostname(), pid=os.getpid())
    run_folder = RunFolder.of(tmp_path, "key2")
    (run_folder.path / ".claim").touch()
    RunFolder.of(tmp_path, "alone").write(run(20.0, key="alone"))
    with run_folder.telling() as tell:
        tell("coalitions", 7, 64, "coalitions", {})
        tell("coalitions", 8, 64, "coalitions", {})  # within two seconds: not written
        shown = results("status", str(tmp_path))
    first, counts, *jobs, others = shown.out.splitlines()
    assert first.startswith("sweep abc, runs since ")
    assert first.endswith(f" as process {os.getpid()} of {socket.gethostname()}: svnup -m seed=1,2")
    assert counts.startswith("  5 jobs: 1 done, 1 running, 1 failed, 1 dead, 1 waiting; about ")
    assert jobs[0].split(": ", 1)[1] == f"process {os.getpid()} of {socket.gethostname()}: coalitions, 7 of 64 coalitions"
    assert jobs[1].endswith("job 3, seed=3: ValueError: no luck")
    assert jobs[2].startswith("  dead        job 4, seed=4: its process is not there any more")
    assert others == "1 runs of no sweep: 1 done"
    assert run_folder.progress() is None, "it ends with the job"
    assert shown.code == 0


def test_the_folder_comes_first_and_what_was_written_before_goes_on_working(tmp_path):
    RunFolder.of(tmp_path, "key2").write(run(20.0, key="key2"))
    for args in (
        ["show", str(tmp_path), "no"],
        ["rerun", str(tmp_path), "no"],
        ["rerun", "no", "--results-dir", str(tmp_path)],
    ):
        done = results(*args)
        assert (done.code, done.err) == (2, "svnup-results: no: no run has a key with this prefix; there are: key2\n"), args


def test_versions_are_ours(capsys):
    assert command("--version").out == f"svnup {__version__}\n"
    for main in (results_cli.main, expand.main):
        with pytest.raises(SystemExit) as left:
            main(["--version"])
        assert (left.value.code, capsys.readouterr().out) == (0, f"svnup {__version__}\n")


def test_status_of_nothing(tmp_path):
    assert results("status", str(tmp_path)).out == f"{tmp_path}: no sweep and no run\n"
    assert results("status", str(tmp_path / "no")).code == 2


def test_stages_are_told_to_listeners():
    from svnup.progress import listening, stage

    heard = []
    with listening(lambda *told: heard.append(told[:4])), stage("walk", 3, "steps") as advance:
        advance(2)
        advance(1)
    with stage("walk", 3, "steps") as advance:
        advance(3)
    assert heard == [("walk", 0, 3, "steps"), ("walk", 2, 3, "steps"), ("walk", 3, 3, "steps")]


def test_nobody_begins_what_waits_in_a_sweep_that_is_over(told, tmp_path, nobody):
    for over in ({"ended": time.time()}, {"host": socket.gethostname(), "pid": nobody}):
        assert told("done", "waiting", **over).states(tmp_path)[1].state == "missing"


def test_an_earlier_result_is_not_of_this_sweep(told, tmp_path):
    sweep = told("failed")
    job = replace(sweep.jobs[0], left=RunFolder.of(tmp_path, "key1").written())
    assert replace(sweep, jobs=(job,)).states(tmp_path)[0].state == "waiting"


@pytest.mark.parametrize(
    "change", [{"began": float("nan")}, {"began": 1e300}, {"pid": "1"}, {"jobs": [{"number": 1, "differs": "", "key": "../x"}]}]
)
def test_a_sweep_of_a_stranger_is_passed_over(told, tmp_path, change):
    told("done")
    path = tmp_path / "sweeps" / "abc.json"
    data = {key: value for key, value in json.loads(path.read_text()).items() if key != "sha256"}
    path.write_text(json.dumps(data))
    assert len(sweeps_of(tmp_path)) == 1, "a file of ours without a checksum is read"
    path.write_text(json.dumps(data | change))
    assert sweeps_of(tmp_path) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": 5}', '{"jobs": [{}]}', "[" * 100_000])
def test_a_damaged_sweep_is_passed_over(told, tmp_path, text):
    told("done")
    (tmp_path / "sweeps" / "abc.json").write_text(text)
    assert sweeps_of(tmp_path) == []


def test_numbers_have_units_that_people_read():
    words = [duration(s) for s in (0.4, 59, 99, 100, 3000, 7200, 7500, 172_800, 200_000)]
    assert duration(float("inf")) == "for ever"
    assert [scaled(n, "B") for n in (0, 999, 1000, 45_670, 3.2e9, 4e21)] == [
        "0 B",
        "999 B",
        "1 kB",
        "45.7 kB",
        "3.2 GB",
        "4e+03 EB",
    ]
    assert words == ["0 s", "59 s", "99 s", "2 min", "50 min", "2 h", "2 h 5 min", "2 d", "2 d 8 h"]

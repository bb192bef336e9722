"""Launchers of sweeps: what they need, what the jobs get, and what is told of a job that ended without a result."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli import HERE, SMALL, command, process, rows
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hydra_plugins import svnup_slurm
from svnup import config
from svnup.config.messages import LAUNCHERS

JOB = [*SMALL, "allocator=uniform", "pruner=magnitude", *HERE]


def is_there(package: str) -> bool:
    return importlib.util.find_spec(f"hydra_plugins.{package}") is not None


@pytest.mark.parametrize(("name", "package"), [("joblib", "hydra_joblib_launcher"), ("ray_local", "hydra_ray_launcher")])
def test_a_launcher_that_is_not_installed_is_one_line_with_the_way_to_it(name, package, own_place):
    if is_there(package):
        pytest.skip(f"{package} is installed")
    done = command("-m", *JOB, f"hydra/launcher={name}")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert LAUNCHERS[name.removesuffix("_local")] in done.err
    assert not Path("results").exists()


def test_a_machine_without_slurm_is_one_line(own_place, monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = command("-m", *JOB, "hydra/launcher=slurm")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "srun" in done.err if importlib.util.find_spec("submitit") else "pip install 'svnup[slurm]'" in done.err


def preset(*overrides: str) -> dict[str, object]:
    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        composed = compose("config", overrides=list(overrides), return_hydra_config=True)
    return dict(OmegaConf.to_container(composed.hydra.launcher, resolve=False))


def test_gpus_are_asked_for_only_where_they_are_wanted():
    cpu, gpu = preset("hydra/launcher=slurm"), preset("hydra/launcher=slurm_gpu")
    assert cpu.keys() == gpu.keys()
    assert (cpu["gpus_per_node"], gpu["gpus_per_node"]) == (None, 1)
    page = (Path(config.CONF).parent / "docs" / "running.md").read_text()
    for key in ("timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node", "partition", "account", "additional_parameters"):
        assert key in cpu
        assert f"`{key}`" in page


def test_what_is_asked_for_reaches_sbatch(tmp_path, monkeypatch):
    """The preset, through submitit, as the file that sbatch reads."""
    pytest.importorskip("submitit")
    from submitit.slurm.slurm import SlurmExecutor

    monkeypatch.setattr(SlurmExecutor, "affinity", classmethod(lambda cls: 2))
    asked = []

    def taken(self, command):
        asked.append(Path(command[-1]).read_text())
        raise RuntimeError("enough")

    monkeypatch.setattr(SlurmExecutor, "_make_submission_command", lambda self, path: taken(self, ["sbatch", str(path)]))
    told = ["hydra/launcher=slurm_gpu", "hydra.launcher.mem_gb=3", "+hydra.launcher.additional_parameters.reservation=night"]
    given = preset(*told) | {"submitit_folder": str(tmp_path / "%j"), "name": "n"}
    given.pop("_target_")
    with pytest.raises(ValueError, match="Slurm takes no job: enough"):
        svnup_slurm.SlurmLauncher(**given)._submit([["a=1"], ["a=2"]], 0)
    for line in ("gpus-per-node=1", "mem=3GB", "cpus-per-task=8", "time=240", "reservation=night", "array=0-1%2"):
        assert f"#SBATCH --{line}\n" in asked[0]
    assert "partition" not in asked[0]
    assert asked[0].index("export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK") < asked[0].index("srun")


class Job(SimpleNamespace):
    """What the launcher sees of a job: its number in the queue, and a result once there is one."""

    def __init__(self, job_id: str, place: Path, result: tuple[str, object] | None) -> None:
        file = place / job_id
        super().__init__(job_id=job_id, paths=SimpleNamespace(result_pickle=file), result=result)
        if result is not None:
            file.touch()

    def _get_outcome_and_result(self) -> tuple[str, object]:
        return self.result


def test_every_job_is_waited_for_and_its_end_is_known(tmp_path, monkeypatch):
    trace = "Traceback (most recent call last):\n  ...\nsvnup.cli.run.JobFailed: sparsity=2: too much\n"
    ends = {"7_0": ("success", None), "7_1": ("error", trace), "7_2": None, "7_3": None}
    jobs = [Job(job_id, tmp_path, end) for job_id, end in ends.items()]
    asked = []

    def queue(array):
        asked.append(array)
        if len(asked) == 4:
            jobs[3].result = ("success", None)
            jobs[3].paths.result_pickle.touch()
        return [None, {"7_3"}, {"7_2", "7_3"}, {"7_3"}, set()][min(len(asked), 5) - 1]

    monkeypatch.setattr(svnup_slurm, "LOOK", 0)
    monkeypatch.setattr(svnup_slurm, "ASK", -1)
    monkeypatch.setattr(svnup_slurm, "_queue", queue)
    monkeypatch.setattr(svnup_slurm, "_state", lambda job_id: "OUT_OF_MEMORY")
    found = dict(svnup_slurm._ends(jobs, "7"))
    assert found == {0: None, 1: "sparsity=2: too much", 2: "OUT_OF_MEMORY in Slurm, without a result", 3: None}
    assert set(asked) == {"7"}
    assert len(asked) == 5, "Slurm did not answer, missed it, had it again, then missed it twice"


@pytest.mark.slow
def test_jobs_that_run_side_by_side_share_the_cores(tmp_path, monkeypatch):
    joblib = pytest.importorskip("joblib")
    if not is_there("hydra_joblib_launcher"):
        pytest.skip("hydra-joblib-launcher is not installed")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    told = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    call = [sys.executable, "-m", "svnup", "-m", *JOB, *launcher, "sparsity=0.5,0.6,2"]
    done = subprocess.run(call, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "svnup: sparsity=2: " in done.stderr
    assert "Traceback" not in done.stderr
    found = rows(tmp_path / "results")
    assert [row["status"] for row in found] == ["finished"] * 2
    assert {row["provenance"]["hardware"]["threads"] for row in found} == {max(1, joblib.cpu_count() // 2)}


@pytest.mark.slow
def test_a_sweep_by_ray(tmp_path):
    if not is_there("hydra_ray_launcher"):
        pytest.skip("hydra-ray-launcher is not installed: make test-ray")
    launcher = ["hydra/launcher=ray_local", "+hydra.launcher.ray.init.num_cpus=2"]
    done = process("-m", *JOB, *launcher, "sparsity=0.5,0.6,2", cwd=tmp_path, RAY_worker_niceness="0")
    assert done.code == 1, done.err
    assert "sparsity=2: " in done.out + done.err
    found = rows(tmp_path / "results")
    assert [row["status"] for row in found] == ["finished"] * 2
    assert {row["provenance"]["hardware"]["threads"] for row in found} == {1}

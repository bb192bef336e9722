"""The launcher of `hydra/launcher=slurm`. Hydra looks for launchers in this namespace alone, so it lies beside svnup."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf, open_dict

LOOK = 1.0  # seconds between two looks for results
ASK = 10.0  # seconds between two questions to Slurm; a job that is missing twice has ended


class SlurmLauncher(Launcher):
    """Submits the jobs of a sweep to Slurm as one array, by submitit, and waits until the last of them has ended.

    It has the keys of hydra-submitit-launcher. What differs: a job that fails is FAILED in Slurm's accounts, every job is
    waited for, whatever becomes of the others, and how one without a result ended (cancelled, out of memory, out of time) is
    told. Since it asks the queue, it needs no accounting.
    """

    def __init__(self, **params: Any) -> None:
        self.params = {k: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for k, v in params.items()}
        self.config: Any = None
        self.hydra_context: Any = None
        self.task_function: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    # -- where the sweep is started

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit jobs and return how they ended, in their order; what went wrong is told as soon as it is known.

        Raises ValueError where Slurm, or submitit, is not there, and where Slurm refuses the jobs.
        """
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        jobs = self._submit([list(o) for o in job_overrides], initial_job_idx)
        first, array = jobs[0].job_id, jobs[0].job_id.partition("_")[0]
        _tell(f"{len(jobs)} jobs are in the queue of Slurm, from {first} on; logs: {jobs[0].paths.folder.parent}")
        ends: dict[int, JobReturn] = {}
        try:
            for n, end in _ends(jobs, array):
                told = " ".join(o for o in filter_overrides(job_overrides[n]) if not all(o in job for job in job_overrides))
                ends[n] = JobReturn(overrides=job_overrides[n], status=JobStatus.COMPLETED)
                if end is not None:
                    told = f"job {jobs[n].job_id} ({told}): {end}; its log: {jobs[n].paths.stderr}"
                    ends[n] = JobReturn(overrides=job_overrides[n], status=JobStatus.FAILED, _return_value=_failed(told))
                    _tell(told)
        except BaseException:
            _tell(f"the jobs go on without this process; scancel {array} ends them")
            raise
        return [ends[n] for n in range(len(jobs))]

    def _submit(self, job_overrides: list[list[str]], initial_job_idx: int) -> list[Any]:
        try:
            import submitit
        except ImportError:
            raise ValueError("hydra/launcher=slurm: submitit is not installed; pip install 'svnup[slurm]'") from None
        keys = {
            "timeout_min",
            "cpus_per_task",
            "gpus_per_node",
            "tasks_per_node",
            "mem_gb",
            "nodes",
            "name",
            "stderr_to_stdout",
        }
        named = {k if k in keys else f"slurm_{k}": v for k, v in self.params.items()}
        folder, retries = named.pop("slurm_submitit_folder"), named.pop("slurm_max_num_timeout")
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=retries)
            executor.update_parameters(**named)
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            states = [Singleton.get_state()] * len(job_overrides)
            with contextlib.redirect_stderr(io.StringIO()):  # where submitit prints what the error says, too
                return list(executor.map_array(self, job_overrides, numbers, states))
        except (RuntimeError, NameError, submitit.core.utils.FailedJobError) as error:
            why = " ".join(str(error).split())
            way = "the keys of hydra.launcher say what a job asks for, docs/running.md what each means"
            raise ValueError(f"hydra/launcher=slurm: Slurm takes no job: {why}; {way}") from None

    # -- where a job runs

    def __call__(self, overrides: list[str], number: int, state: Any) -> None:
        """Run a job. Raises what it raises, so that submitit writes it down and the process ends with exit code 1."""
        import submitit

        from svnup import config
        from svnup.interruption import Stopped

        config.register()
        Singleton.set_state(state)
        setup_globals()
        sweep_config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(sweep_config):
            sweep_config.hydra.job.id = submitit.JobEnvironment().job_id
            sweep_config.hydra.job.num = number
        try:
            ended = run_job(
                hydra_context=self.hydra_context,
                task_function=self.task_function,
                config=sweep_config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )
        except Stopped as stop:  # by scancel or preemption: what is done is kept, and a job that is queued again goes on
            _tell(f"interrupted ({stop}); what is done is kept")
            raise SystemExit(stop.code) from None
        if ended.status is JobStatus.FAILED:
            raise ended._return_value

    def checkpoint(self, *args: Any) -> Any:
        """What submitit queues again when the time of a job is up: the same job, which goes on from what is done."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args)


def _ends(jobs: list[Any], array: str) -> Iterator[tuple[int, str | None]]:
    """Yield the number of each job as it ends, and what went wrong in it."""
    left, missed, asked = dict(enumerate(jobs)), set[int](), time.monotonic()
    while left:
        time.sleep(LOOK)
        queue: set[str] | None = None
        if time.monotonic() - asked > ASK:
            queue, asked = _queue(array), time.monotonic()
        for n, job in list(left.items()):
            if job.paths.result_pickle.exists():
                outcome, result = job._get_outcome_and_result()
                del left[n]
                yield n, None if outcome == "success" else _reason(result)
            elif queue is None:
                continue
            elif job.job_id in queue:
                missed.discard(n)
            elif n not in missed:  # its result may be on its way through a shared file system
                missed.add(n)
            else:
                del left[n]
                yield n, f"{_state(job.job_id)} in Slurm, without a result"


def _queue(array: str) -> set[str] | None:
    """Which jobs of an array are queued or running; None where Slurm does not answer."""
    done = subprocess.run(["squeue", "-h", "-r", "-j", array, "-o", "%i"], capture_output=True, text=True, check=False)
    if done.returncode and "Invalid job id" not in done.stderr:  # which it says of jobs that have long ended
        return None
    return set(done.stdout.split())


def _state(job_id: str) -> str:
    """The state of an ended job in Slurm's accounts, where it keeps any."""
    asked = ["sacct", "-X", "-n", "-P", "-o", "State", "-j", job_id]
    told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    return told.split(" by ")[0] or "ended"


def _reason(trace: str) -> str:
    """The last line of a traceback, without the name of our own error."""
    return re.sub(r"^[\w.]+\.JobFailed: ", "", trace.strip().splitlines()[-1])


def _failed(told: str) -> Exception:
    from svnup.cli.sweep import JobFailed

    return JobFailed(told)


def _tell(text: str) -> None:
    from svnup.cli.outcome import tell

    tell("svnup", text)
    sys.stderr.flush()

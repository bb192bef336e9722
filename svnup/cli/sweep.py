"""A sweep: what is finished is passed over before anything is launched, every job has its number, and the end is told once."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import shlex
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from svnup import config, distributed
from svnup.execute import finished, summary_of
from svnup.files import at_home, fault
from svnup.model.source import Model
from svnup.progress import say
from svnup.reports.status import of_run
from svnup.results.row import ResultRow
from svnup.results.store import RunFolder
from svnup.results.stored import plain
from svnup.results.sweeps import JobState, Sweep, SweepJob, in_words, newest_with
from svnup.secrets import redact, redact_code
from svnup.units import duration


class JobFailed(Exception):
    """A job of a sweep failed, and is reported; the other jobs have run."""


@dataclass(frozen=True)
class Planned:
    """A job of a sweep before it is launched.

    Args:
        entry: what the results folder is told of it.
        overrides: those of the job alone.
        results_dir: where its result goes.
        job: checked; None where it cannot be built here, which it is left to say itself.
        row: its result, where it need not run.
    """

    entry: SweepJob
    overrides: list[str]
    results_dir: str
    job: config.Job | None = None
    row: ResultRow | None = None

    def __str__(self) -> str:
        return f"job {self.entry.number}{f', {self.entry.differs}' if self.entry.differs else ''}"


def run(
    given: list[str], master: DictConfig, launcher: Launcher, loader: ConfigLoader, max_batch_size: int | None
) -> list[Sequence[JobReturn]]:
    """Run a sweep with any launcher: what is known of a job afterwards is what lies in the results folder.

    Args:
        given: overrides with the values to combine.
        master: the configuration that Hydra has made of the command.
        launcher: runs jobs, given by their overrides.
        loader: composes them.
        max_batch_size: how many the launcher gets at once; None for all.

    Returns:
        what the launcher returned, batch by batch.

    Raises:
        JobFailed: at the end, if a job is not finished then.
        ValueError: several processes were started for one job.
    """
    if (n := distributed.n_started()) > 1:
        raise ValueError(
            f"hydra.mode=MULTIRUN: the {n} processes of torchrun share one job; start the sweep without torchrun, as often as "
            "its jobs should run at once, or its jobs one by one"
        )
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(given)
    jobs: list[list[str]] = BasicSweeper.split_arguments(parsed, None)[0]
    dry = OmegaConf.select(master, "dry_run") is True
    if not dry:
        _write_down(master)
    planned = _plan(jobs, compose_all(loader, master, jobs))
    if dry:
        _tell_plan(planned)
        return []
    sweeps = _record(planned)
    returns: list[Sequence[JobReturn]] = []
    came: dict[int, JobReturn] = {}  # of each job, by its number
    stopped: Exception | None = None
    # Those that cannot be built come first: what is wrong with them is told at once, and not after hours.
    todo = sorted((one for one in planned if one.row is None), key=lambda one: one.job is not None)
    try:
        for batch in BasicSweeper.split_overrides_to_chunks(todo, max_batch_size) if todo else ():
            numbered = [[*one.overrides, f"hydra.sweep.subdir={one.entry.number}"] for one in batch]
            returns.append(launcher.launch(numbered, initial_job_idx=len(came)))
            came |= {one.entry.number: back for one, back in zip(batch, returns[-1], strict=True)}
    except Exception as error:
        stopped = error
    finally:
        undone = _sum_up(sweeps, planned, came, stopped)
    if stopped is not None and len(undone) == len(todo) and not any(state.row or state.job.ending for state in undone):
        raise stopped  # before any job had begun
    if undone:
        raise JobFailed(f"{len(undone)} of {len(planned)} jobs") from stopped
    return returns


def header(results_dir: str, number: str, key: str) -> str | None:
    """What a job of a sweep is told by: number, all that differs between the jobs, time left; None outside of sweeps."""
    if not number.isdigit() or (sweep := newest_with(results_dir, int(number), key)) is None:
        return None
    differs = next(job.differs for job in sweep.jobs if job.number == int(number))
    left = sweep.seconds_left(sweep.states(results_dir), time.time())
    return f"job {number} of {sweep.n_jobs}: {differs}" + (f" (about {duration(left)} left)" if left is not None else "")


# -- which jobs there are


def compose_all(loader: Any, master: DictConfig, jobs: list[list[str]]) -> list[DictConfig]:
    """The configuration of each job as Hydra composes it, without the part `hydra`.

    Jobs that differ in nothing but plain values (`seed=1`) share a composition, on which these are set: it takes far
    longer than all else that is done for a finished job. Raises what Hydra raises where a job cannot be composed.
    """
    common = set.intersection(*map(set, jobs)) if jobs else set()
    made: dict[tuple[str, ...], DictConfig] = {}

    @cache
    def options(key: str) -> list[str]:
        found: list[str] = loader.get_group_options(key, overrides=list(master.hydra.overrides.hydra))
        return found

    def composed(overrides: list[str]) -> DictConfig:
        if (key := tuple(overrides)) not in made:
            made[key] = loader.load_sweep_config(master, overrides)
            with open_dict(made[key]):
                del made[key]["hydra"]
        return made[key]

    out = []
    for overrides in jobs:
        parsed = OverridesParser.create().parse_overrides(overrides)
        simple = [_is_plain(override, options) for override in parsed]
        special = max((i for i, one in enumerate(parsed) if not simple[i] and not _is_group(one, options)), default=-1)
        first = next((i for i, text in enumerate(overrides) if simple[i] and i > special and text not in common), len(parsed))
        apart = [simple[i] and i >= first for i in range(len(parsed))]
        cfg = copy.deepcopy(composed([text for text, later in zip(overrides, apart, strict=True) if not later]))
        try:
            for override in (one for one, later in zip(parsed, apart, strict=True) if later):
                OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            cfg = composed(overrides)  # which says what is wrong as everywhere
        out.append(cfg)
    return out


def _is_group(override: Override, options: Callable[[str], list[str]]) -> bool:
    return bool(options(override.key_or_group)) and not isinstance(override.value(), dict)


def _is_plain(override: Override, options: Callable[[str], list[str]]) -> bool:
    """Whether an override sets a value that is there, and nothing else."""
    simple = override.type == OverrideType.CHANGE and override.package is None and not override.is_hydra_override()
    return simple and not _is_group(override, options)


def _plan(jobs: list[list[str]], configs: list[DictConfig]) -> list[Planned]:
    """What each job is, and whether it is finished."""
    from svnup.reports import figures

    common = set.intersection(*map(set, jobs)) if jobs else set()
    known: config.Texts = {}
    models: dict[str, Model] = {}  # of which each is hashed once
    planned = []
    for number, (overrides, cfg) in enumerate(zip(jobs, configs, strict=True), 1):
        job, row, wrong = None, None, None
        try:
            job = config.build(cfg, known)
            job = replace(job, model=models.setdefault(json.dumps(job.config["model"], sort_keys=True), job.model))
            row = finished(job, figures)
            if job.dry_run and row is None:
                job.check_shapes()
                job.check_texts()
        except (ValueError, OSError) as error:  # left to the job to say, unless it is not run
            job, wrong = None, fault(error) or str(error)
        folder = str(at_home("results_dir", str(cfg.results_dir))) if job is None else job.results_dir
        words = [redact_code(o) for o in overrides if o not in common]
        words += [] if job is None or any(word.startswith("seed=") for word in words) else [f"seed={job.seed}"]
        left = RunFolder.of(folder, job.key).written() if job is not None else None
        key = job.key if job is not None else None
        entry = SweepJob(number, " ".join(words), key, row is not None, left, error=wrong)
        planned.append(Planned(entry, overrides, folder, job, row))
        if row is not None and job is not None and not job.dry_run:
            place = RunFolder.of(folder, entry.key or "").path
            say(f"job {number} of {len(jobs)}: {entry.differs}: already finished, {summary_of(row)}: {place}\n")
    if any(one.row is not None and one.job is not None and not one.job.dry_run for one in planned):
        say("  (force=true runs finished jobs again)\n")
    return planned


def _tell_plan(planned: list[Planned]) -> None:
    """Print one plan of the whole sweep; raises JobFailed where a job is wrong."""
    from svnup.plan import plan_of_sweep, told_of_sweep, too_small

    machines = {one.job.hardware: None for one in planned if one.job is not None}
    if len(machines) > 1:
        raise ValueError(f"hardware={','.join(machines)}: a sweep is planned for one machine; choose one of them")
    once = {(one.job.key, one.job.shard): one.job for one in planned if one.job is not None and one.row is None}
    todo = [*once.values()]  # jobs of one key run once
    n_finished = sum(one.row is not None for one in planned)
    lines = [f"plan of a sweep of {len(planned)} jobs (nothing is run, nothing written)"]
    for one in planned:
        state = "finished" if one.row is not None else "wrong"
        if one.job is not None and one.row is None:
            state = f"runs/{one.job.key}" if one.job.shard is None else "to the cache"
        lines.append(f"  {one}: {state}")
    whole = plan_of_sweep(todo)
    lines.append(f"  to run: {len(todo)} of {len(planned)} jobs" + (f", {n_finished} are finished" if n_finished else ""))
    lines += told_of_sweep(whole)
    say("\n".join(lines) + "\n")
    wrong = [one for one in planned if one.entry.error is not None]
    for one in wrong:
        sys.stderr.write(redact(f"svnup: {one}: {plain(' '.join((one.entry.error or '').split()))}\n"))
    if wrong:
        raise JobFailed(f"{len(wrong)} of {len(planned)} jobs")
    if whole.largest is not None and (why := too_small(*whole.largest)) is not None:
        raise ValueError(why)


def _write_down(master: DictConfig) -> None:
    """Write multirun.yaml, as Hydra's sweeper does."""
    place = Path(str(master.hydra.sweep.dir))
    place.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(master, place / "multirun.yaml")


def _record(planned: list[Planned]) -> dict[str, Sweep]:
    """Write down the sweep in each results folder of its jobs; returns it by the folder."""
    name = hashlib.sha256(json.dumps([one.overrides for one in planned]).encode()).hexdigest()[:12]
    command = redact_code(shlex.join(["svnup", *sys.argv[1:]]))
    whole = Sweep(name, command, time.time(), socket.gethostname(), os.getpid(), len(planned), ())
    folders = dict.fromkeys(one.results_dir for one in planned)
    sweeps = {f: replace(whole, jobs=tuple(one.entry for one in planned if one.results_dir == f)) for f in folders}
    for folder, sweep in sweeps.items():
        with contextlib.suppress(OSError):  # which each job says of its own folder
            sweep.write(folder)
    return sweeps


# -- what became of them


def _sum_up(
    sweeps: dict[str, Sweep], planned: list[Planned], came: dict[int, JobReturn], stopped: Exception | None
) -> list[JobState]:
    """Tell how many jobs are done, and of each other one why not; returns the states of those that are not."""
    states: dict[int, JobState] = {}
    for folder, sweep in sweeps.items():
        jobs = tuple(_ended(job, came.get(job.number)) for job in sweep.jobs)
        over = replace(sweep, jobs=jobs, ended=time.time())
        with contextlib.suppress(OSError):
            over.write(folder)
        states |= {state.job.number: state for state in over.states(folder)}
    counts = Counter[str](states[one.entry.number].state for one in planned)
    undone = [one for one in planned if states[one.entry.number].state not in ("done", "skipped")]
    began = min((sweep.began for sweep in sweeps.values()), default=time.time())
    lines = [f"sweep of {len(planned)} jobs, {duration(time.time() - began)}: {in_words(counts)}"]
    for one in undone:
        state = states[one.entry.number]
        run = RunFolder.of(one.results_dir, one.entry.key or "")
        why = state.error if state.row is None else of_run(run, state.row, time.time())
        lines.append(f"  {state.state}: {one}: {why}")
    lines += [f"  the launcher ended early: {fault(stopped) or repr(stopped)}"] if stopped is not None else []
    say(redact("\n".join(map(plain, lines)) + "\n"))
    return [states[one.entry.number] for one in undone]


def _ended(job: SweepJob, came: JobReturn | None) -> SweepJob:
    """A job with what its process said at the end, if it did."""
    if came is None or came.status == JobStatus.UNKNOWN:
        return job
    if came.status == JobStatus.COMPLETED:
        return replace(job, ending="done", error=None)
    return replace(job, ending="failed", error=redact_code(str(came._return_value)))

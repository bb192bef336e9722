"""How far the sweeps and runs of a results folder are, as text."""

from __future__ import annotations

import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from svnup.results.row import ResultRow
from svnup.results.store import RunFolder, run_folders
from svnup.results.sweeps import JobState, Sweep, in_words, sweeps_of
from svnup.units import duration


def status(results_dir: str | Path) -> str:
    """Each sweep in a line, the oldest first, and below it each job that is neither done nor waits; then runs of no sweep."""
    now, folder = time.time(), Path(results_dir)
    sweeps = sweeps_of(folder)
    lines = [line for sweep in sweeps for line in _of_sweep(sweep, folder, now)]
    told = {job.key for sweep in sweeps for job in sweep.jobs}
    found = [(run, row) for run in run_folders(folder / "runs") if (row := run.read()) is not None]
    others = [(run, row) for run, row in found if row.config_key not in told]
    if others:
        lines.append(f"{len(others)} runs of no sweep: {in_words(Counter(row.status for _, row in others))}")
        undone = [(run, row) for run, row in others if row.status != "finished"]
        lines += [f"  {row.status:11} {row.config_key}: {of_run(run, row, now)}" for run, row in undone]
    return "\n".join(lines or [f"{folder}: no sweep and no run"]) + "\n"


def _of_sweep(sweep: Sweep, folder: Path, now: float) -> list[str]:
    states = sweep.states(folder)
    left = sweep.seconds_left(states, now)
    began = datetime.fromtimestamp(sweep.began).isoformat(" ", "minutes")
    if sweep.ended is not None:
        when = f"began {began}, ended after {duration(sweep.ended - sweep.began)}"
    elif sweep.over:
        when = f"began {began}, its process {sweep.pid} is gone"
    else:
        when = f"runs since {began} as process {sweep.pid} of {sweep.host}"
    times = f"; about {duration(left)} left" if left is not None else ""
    lines = [f"sweep {sweep.name}, {when}: {sweep.command}"]
    lines.append(f"  {len(states)} jobs: {in_words(Counter(one.state for one in states))}{times}")
    lines += [_of_job(one, folder, now) for one in states if one.state not in ("done", "skipped", "waiting")]
    return lines


def _of_job(one: JobState, folder: Path, now: float) -> str:
    name = f"  {one.state:11} job {one.job.number}, {one.job.differs}"
    if one.row is None or one.job.key is None:
        return f"{name}: {one.error}"
    return f"{name}: {of_run(RunFolder.of(folder, one.job.key), one.row, now)}"


def of_run(run: RunFolder, row: ResultRow, now: float) -> str:
    """Of a run that is running where, for how long and how far it is; of another one what went wrong, and its log."""
    if row.status == "running":
        where, started = row.process, row.provenance.started
        since = f" for {duration(now - _seconds(started, now))}" if started is not None else ""
        far = run.progress()
        at = f"process {where.pid} of {where.host}" if where is not None else "a process that is not named"
        return f"{at}{since}" + (f": {far}" if far is not None else "")
    log = run.path / "svnup.log"
    return " ".join((row.error or "no error is told").split()) + (f"; log: {log}" if log.is_file() else "")


def _seconds(started: str, now: float) -> float:
    """When a run began, as its result tells it in UTC, in seconds since 1970; `now` where that is no time."""
    try:
        return datetime.fromisoformat(started).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return now

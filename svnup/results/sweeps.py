"""A sweep in its results folder: which jobs it has, how far they are, and how long the rest will take."""

from __future__ import annotations

import json
import socket
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from svnup.files import alive, sealed, unsealed, write_text
from svnup.naming import KEY
from svnup.results.row import ResultRow
from svnup.results.store import RunFolder
from svnup.results.stored import plain
from svnup.secrets import redacted

FOLDER = "sweeps"  # in the results folder
State = Literal["done", "skipped", "running", "failed", "interrupted", "dead", "waiting", "missing"]

LATEST = 2.0**33  # seconds since 1970
WORDS = {"skipped": "finished before", "finished": "done"}


@dataclass(frozen=True)
class SweepJob:
    """A job of a sweep.

    Args:
        number: in the sweep, from 1.
        differs: the overrides that not all jobs of the sweep have, and the seed.
        key: of its run; None where the job could not be built when the sweep began.
        skipped: it was finished before the sweep began.
        left: when the result that lay there when the sweep began was written, in ns; None where there was none.
        ending: what its process said at the end, of jobs that leave no result: shards, and those that are refused.
        error: why it was refused, or could not be built when the sweep began.
    """

    number: int
    differs: str
    key: str | None
    skipped: bool = False
    left: int | None = None
    ending: Literal["done", "failed"] | None = None
    error: str | None = None


@dataclass(frozen=True)
class JobState:
    """How far a job is: its state, and its result where that is of this sweep."""

    job: SweepJob
    state: State
    row: ResultRow | None = None

    @property
    def error(self) -> str:
        """What is known of a job without a result, in one line."""
        return " ".join((self.job.error or "nothing is there; the same command goes on with it").split())


@dataclass(frozen=True)
class Sweep:
    """`<results_dir>/sweeps/<name>.json`: the jobs of a sweep whose results go to that folder.

    Args:
        name: a digest of what the jobs were asked for with, so that a sweep which is started again keeps it.
        command: that started it.
        began: seconds since 1970.
        host: where the process runs that started it.
        pid: its number there.
        n_jobs: of the sweep, those with other results folders too.
        jobs: those of this folder.
        ended: seconds since 1970; None while it runs.
    """

    name: str
    command: str
    began: float
    host: str
    pid: int
    n_jobs: int
    jobs: tuple[SweepJob, ...]
    ended: float | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Raises TypeError, KeyError or ValueError where the data are not those of a sweep."""
        jobs = tuple(SweepJob(**job) for job in data["jobs"])
        sweep = cls(**data | {"jobs": jobs})
        of_jobs = [text or "" for job in jobs for text in (job.differs, job.key, job.ending, job.error)]
        texts = [sweep.name, sweep.command, sweep.host, *of_jobs]
        times = [sweep.began, sweep.ended or 0.0]
        counts = [sweep.pid, sweep.n_jobs, *(n for job in jobs for n in (job.number, job.left or 0))]
        if not (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(when, int | float) and 0 <= when < LATEST for when in times)
            and all(isinstance(count, int) for count in counts)
            and all(job.key is None or KEY.fullmatch(job.key) for job in jobs)
        ):
            raise ValueError("a value is not of its type")
        return sweep

    def write(self, results_dir: str | Path) -> None:
        folder = Path(results_dir) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{self.name}.json", json.dumps(sealed(redacted(asdict(self))), indent=1) + "\n")

    @property
    def over(self) -> bool:
        """Whether no more jobs will begin, as far as can be told from here."""
        return self.ended is not None or (self.host == socket.gethostname() and not alive(self.pid))

    def states(self, results_dir: str | Path) -> list[JobState]:
        """The state of every job, from what lies in the results folder."""
        return [self._state(job, results_dir) for job in self.jobs]

    def _state(self, job: SweepJob, results_dir: str | Path) -> JobState:
        folder = RunFolder.of(results_dir, job.key) if job.key is not None else None
        row = folder.read() if folder is not None else None
        if job.skipped:
            return JobState(job, "skipped", row)
        if folder is None or row is None or (row.status != "running" and folder.written() == job.left):  # nothing of this sweep
            return JobState(job, job.ending or ("missing" if self.over else "waiting"))
        return JobState(job, "done" if row.status == "finished" else row.status, row)

    def seconds_left(self, states: Sequence[JobState], now: float) -> float | None:
        """How long what is not done yet will take at the pace until `now`; None where nothing is left, or none is done."""
        done = sum(one.state == "done" for one in states)
        left = sum(one.state in ("running", "waiting") and one.job.key is not None for one in states)
        return (now - self.began) * left / done if done and left and self.ended is None else None


def in_words(counts: Mapping[str, int]) -> str:
    """Numbers of jobs or runs by their state or status: 3 done, 1 failed."""
    known = [state for state in ("finished", *typing.get_args(State)) if counts.get(state)]
    return ", ".join(f"{counts[state]} {WORDS.get(state, state)}" for state in known) or "none"


def sweeps_of(results_dir: str | Path) -> list[Sweep]:
    """The sweeps of a results folder, the oldest first; files that are damaged or of another version are passed over."""
    found = []
    for path in Path(results_dir, FOLDER).glob("*.json"):
        try:
            data = unsealed(plain(json.loads(path.read_text(encoding="utf-8"))))
            found.append(replace(Sweep.from_dict(data), name=path.stem))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
    return sorted(found, key=lambda sweep: sweep.began)


def newest_with(results_dir: str | Path, number: int, key: str) -> Sweep | None:
    """The sweep that a job with this number and key belongs to."""
    job = (number, key)
    return next((s for s in reversed(sweeps_of(results_dir)) if job in [(j.number, j.key) for j in s.jobs]), None)

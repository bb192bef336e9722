"""Run a job once and record it: a finished one is skipped, a killed one goes on."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from svnup import config, distributed
from svnup.claims import claimed
from svnup.files import fault, naming
from svnup.interruption import unhidden
from svnup.naming import moving_numbers
from svnup.progress import listening, say
from svnup.results.provenance import Asked, provenance
from svnup.results.row import Process, ResultRow, Status
from svnup.results.store import RunFolder, run_folders
from svnup.results.tracker import Figures
from svnup.secrets import redact, redacted

logger = logging.getLogger("svnup")


def execute(job: config.Job, asked: Asked, plots: Figures) -> None:
    """Run a job that is not finished yet, and record it in its run folder and where it is tracked.

    Of several commands with one job, one runs it and the others wait for its result; of several processes of one command the
    first one decides and records, and all run it. Raises what goes wrong; a run that had begun is then recorded as failed,
    with its traceback in svnup.log, or as interrupted.
    """
    if not distributed.is_first():
        _follow(job)
        return
    _lead(job, asked, plots)
    distributed.from_first(lambda: None)  # nothing is left to be run


def _follow(job: config.Job) -> None:
    """Run what the first process of the job runs, and record nothing."""
    from svnup import pipeline

    while (started := distributed.from_first(dict[str, Any])) is not None:
        if job.shard is not None:
            pipeline.run_shard(job)
        else:
            pipeline.run(job, Path(os.devnull), ResultRow.from_dict(started))


def _lead(job: config.Job, asked: Asked, plots: Figures) -> None:
    folder = RunFolder.of(job.results_dir, job.key)
    with naming(folder.path):
        folder.finish_publishing()
    there = _Before.of(folder, job, job.fingerprints())
    if there.row is None and (before := _of_other_code(job, there.prints)) is not None:
        _say(f"code from outside svnup has changed since {before} was made: its job runs again")
    if there.suffices and job.shard is None:
        _skip(folder, job, there, plots)
        return
    for key in ("results_dir", "cache_dir"):
        _check_folder(key, Path(getattr(job, key)))
    job.check_shapes()
    job.check_texts()
    if job.shard is not None:
        from svnup import pipeline

        shard = Path(job.cache_dir) / "shards" / f"{job.key}-{job.shard.replace('/', '-of-')}"
        with claimed(shard, lambda: _say(f"shard {shard.name} is computed by another process: this one waits for it")):
            distributed.from_first(dict[str, Any])
            _say(f"shard done: {pipeline.run_shard(job)} new coalitions in {job.cache_dir}")
        return
    with folder.claimed(lambda who: _say(f"{folder.path} is computed by {who}: this process waits for it")):
        there = _Before.of(folder, job, there.prints)  # as another process may have left it meanwhile
        if not there.suffices:
            _run_claimed(folder, job, asked, there, plots)
            return
    _skip(folder, job, there, plots)


def finished(job: config.Job, plots: Figures) -> ResultRow | None:
    """The result of a job that need not run; None where it has to, or somebody waits for its numbers.

    What lacks beside the result is added, unless it is a dry run.
    """
    folder = RunFolder.of(job.results_dir, job.key)
    if not job.dry_run:
        with naming(folder.path):
            folder.finish_publishing()
    if job.force or job.shard is not None or job.tracker.awaited or folder.written() is None:
        return None
    there = _Before.of(folder, job, job.fingerprints())
    if there.row is None or not there.suffices:
        return None
    if not job.dry_run:
        _complete(folder, there.row, plots)
    return there.row


@dataclass(frozen=True)
class _Before:
    """What a job finds in its run folder."""

    row: ResultRow | None
    prints: dict[str, str]
    changed: bool  # inputs have changed since
    stands: bool  # a result, which need not be measured again
    suffices: bool  # with all that is to be saved

    @classmethod
    def of(cls, folder: RunFolder, job: config.Job, prints: dict[str, str]) -> _Before:
        row = folder.read()
        changed = row is not None and row.fingerprints != prints
        stands = row is not None and row.status == "finished" and not (job.force or changed)
        saved = folder.has(job.save_model, job.save_format, job.save_masks)
        return cls(row, prints, changed, stands, stands and saved)


def _skip(folder: RunFolder, job: config.Job, there: _Before, plots: Figures) -> None:
    """Tell the result of a finished run."""
    assert there.row is not None
    _say(f"already finished, not run again (force=true redoes it): {folder.path}")
    _print_result(there.row)
    _complete(folder, there.row, plots)
    if job.tracker.awaited:
        with job.tracker.run(folder.path, there.row, fresh=True) as log:
            log(there.row, plots.figures(there.row, folder.path / "figures"))


def _run_claimed(folder: RunFolder, job: config.Job, asked: Asked, there: _Before, plots: Figures) -> None:
    if there.changed:
        _say(f"the inputs of {folder.path} have changed since it was made: it runs again")
    if (aside := folder.set_aside_unread()) is not None:
        _say(f"{folder.path}: its result is damaged or of another version; it is kept as {aside.name}, and its job runs again")
    others = [path.name for form, path in folder.models().items() if form != job.save_format]
    if job.save_model and others and there.stands:
        _say(f"{', '.join(others)} stays as it is; the {job.save_format} model goes to {folder.place(job.save_format)}")

    origin = getattr(job.model, "dequantized_from", lambda: None)()
    made_by = provenance(asked, job.config, name=job.name, texts=job.texts(), dequantized_from=origin)
    blank = ResultRow("running", job.key, job.config, made_by, there.prints)
    earlier = there.row if there.row is not None and there.row.status == "finished" else None
    if earlier is None:  # else it stays until there is another one that is complete
        folder.write(replace(blank, process=Process(socket.gethostname(), os.getpid())))
    try:
        row = _run_into(folder, job, blank, there, plots)
    except BaseException as error:
        left = folder.read()
        if left is None or left.status != "finished":  # a result stands, whatever becomes of its figures or of W&B
            told = fault(error) or f"{type(error).__name__}: {error}"
            ended: Status = "failed" if isinstance(error, Exception) else "interrupted"
            if (elsewhere := distributed.ended()) is not None:  # in another process of the job, before
                told, ended = elsewhere[0], "failed" if elsewhere[1] in (1, 2) else "interrupted"
            with contextlib.suppress(OSError):  # of a full disk: the error itself is told
                folder.write(replace(blank, status=ended, error=told))
        raise
    _say(f"{folder.path}  ({row.seconds:.0f} s)")
    _print_result(row)


def _run_into(folder: RunFolder, job: config.Job, blank: ResultRow, there: _Before, plots: Figures) -> ResultRow:
    """Run a job and write what it leaves; its result comes last, so that one that is there is whole."""
    from svnup import pipeline

    anew = job.force or there.changed
    with (
        _logging_to(folder.path / "svnup.log"),
        job.tracker.run(folder.path, blank, fresh=anew) as log,
        unhidden(),
        folder.telling() as tell,
        listening(tell),
    ):
        folder.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.create(redacted(job.config))))
        scratch = folder.begin(keep_blocks=not job.force)
        distributed.from_first(blank.to_dict)  # from here on all run
        row = pipeline.run(job, scratch, blank)
        figures: dict[str, Path] = {}
        try:
            figures = plots.figures(row, folder.path / "figures")
        finally:
            if gone := folder.publish(row, anew):
                _say(f"removed, since the model is pruned anew: {', '.join(gone)} in {folder.path}")
        log(row, figures)
    return row


def _complete(folder: RunFolder, row: ResultRow, plots: Figures) -> None:
    """Add what a finished run lacks beside its result, of a process that ended too early or of an earlier version."""
    if not os.access(folder.path, os.W_OK):
        return
    folder.clear()
    folder.complete(row)
    if not all((folder.path / "figures" / f"{name}.png").is_file() for name in plots.names(row)):
        plots.figures(row, folder.path / "figures")


def _of_other_code(job: config.Job, prints: dict[str, str]) -> Path | None:
    """The folder of a run that differs from this job in nothing but the code from outside that it names."""
    if not any(name.endswith(" code") for name in prints):
        return None
    for folder in run_folders(Path(job.results_dir) / "runs"):
        row = folder.read()
        same = row is not None and moving_numbers(row.config) == moving_numbers(job.config)
        if row is not None and same and any(row.fingerprints.get(k, v) != v for k, v in prints.items() if k.endswith(" code")):
            return folder.path
    return None


class _Redacted(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _LogFile(logging.FileHandler):
    """A log that stops no work: where it cannot be written that is told once, on the console."""

    def handleError(self, record: logging.LogRecord) -> None:
        told = fault(sys.exc_info()[1] or OSError())
        logger.removeHandler(self)
        logger.warning("%s: no longer written (%s)", self.baseFilename, told or "an error")


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send what the library logs to the run's own file and to the console, and the traceback of what goes wrong to the file."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not any(getattr(h, "svnup_console", False) for h in logger.handlers):
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(_Redacted("%(message)s"))
        console.svnup_console = True  # type: ignore[attr-defined]
        logger.addHandler(console)
    handler = _LogFile(path, mode="w", encoding="utf-8")
    handler.setFormatter(_Redacted("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    except Exception:
        what = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, "the run failed", (), sys.exc_info())
        handler.handle(what)
        raise
    finally:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def _check_folder(key: str, folder: Path) -> None:
    """Refuse a folder that could not be made or written."""
    try:
        folder.is_dir()  # which raises where a name is too long
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise ValueError(f"{key}={fault(error)}") from None
    try:
        tempfile.TemporaryFile(dir=there).close()  # rights do not tell of what is mounted read-only, or full
    except OSError as error:
        why = "" if error.errno in (errno.EACCES, errno.ENOTDIR) else f" ({error.strerror})"
        raise ValueError(f"{key}={folder}: {there} is not a writable directory{why}; choose another") from None


def _say(text: str) -> None:
    say(f"{text}\n")


def print_plan(job: config.Job) -> None:
    """Tell what a job will cost; raises ValueError where the device is too small for it."""
    from svnup.plan import plan, told, too_small

    made = plan(job)
    where = "what it finds goes to the cache" if job.shard is not None else f"its folder would be runs/{job.key}"
    _say(f"plan of {job.name} (nothing is run, nothing written); {where}")
    for line in told(job, made):
        _say(line)
    if (why := too_small(job, made)) is not None:
        raise ValueError(why)


def summary_of(row: ResultRow) -> str:
    """The metrics of a result in one line."""
    numbers = ("none" if metric.value is None else f"{metric.value:.2f}" for metric in row.metrics.values())
    return ", ".join(f"{name} {number}" for name, number in zip(row.metrics, numbers, strict=True)) or "not evaluated"


def _print_result(row: ResultRow) -> None:
    scores = row.shapley or row.scores
    if scores is not None and row.profile is not None:
        sparsity = row.profile.sparsity
        sums = scores.of_blocks(len(sparsity))  # attention and MLP, or experts, may be apart
        values = ["-"] * len(sparsity) if sums is None else [f"{value:.4f}" for value in sums]
        _say(f"  {'layer':>5}  {'Shapley value' if row.shapley else 'score':>13}  {'sparsity':>8}  kept")
        for index, (value, share) in enumerate(zip(values, sparsity, strict=True)):
            _say(f"  {index:>5}  {value:>13}  {share:>8.3f}  {'█' * round(40 * (1 - share))}")
    for name, metric in row.metrics.items():
        before = row.dense[name].value if name in row.dense else None
        dense = f"  (dense {before:.2f})" if before is not None else ""
        error = f" ± {metric.stderr:.2f}" if metric.stderr is not None else ""
        zeros = f" at {100 * row.sparsity.actual:.2f} % zeros" if row.sparsity else ""
        value = f"none: {metric.reason}" if metric.value is None else f"{metric.value:.2f}"
        _say(f"  {name} {value}{error}{dense}{zeros}")

"""Run a job once and record it: a finished one is skipped, a killed one goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from svnup import config
from svnup.naming import moving_numbers
from svnup.progress import say
from svnup.results.provenance import Asked, provenance
from svnup.results.row import ResultRow
from svnup.results.store import RunFolder, run_folders
from svnup.results.tracker import Figures
from svnup.secrets import redact

logger = logging.getLogger("svnup")


def execute(job: config.Job, asked: Asked, plots: Figures) -> None:
    """Run a job that is not finished yet, and record it in its run folder and where it is tracked.

    Raises what goes wrong; a run that had begun is then recorded as failed, with its traceback in svnup.log.
    """
    folder = RunFolder.of(job.results_dir, job.key)
    sharded = job.shapley is not None and job.shapley.shard is not None
    earlier, prints = folder.read(), job.fingerprints()
    changed = earlier is not None and earlier.fingerprints != prints
    if earlier is None and (before := _of_other_code(job, prints)) is not None:
        _say(f"code from outside svnup has changed since {before} was made: its job runs again")
    unsaved = not folder.has(job.save_model, job.save_format, job.save_masks)
    stands = earlier is not None and earlier.status == "finished" and not (job.force or changed)
    if earlier is not None and stands and not (sharded or unsaved):
        _say(f"already finished, not run again (force=true redoes it): {folder.path}")
        _print_result(earlier)
        _complete(folder, earlier, plots)
        if job.tracker.awaited:
            with job.tracker.run(folder.path, earlier, fresh=True) as log:
                log(earlier, plots.figures(earlier, folder.path / "figures"))
        return
    for key in ("results_dir", "cache_dir"):
        _check_folder(key, Path(getattr(job, key)))
    job.check_shapes()
    job.check_texts()
    if sharded:
        from svnup import pipeline

        _say(f"shard done: {pipeline.run_shard(job)} new coalitions in {job.cache_dir}")
        return
    if changed:
        _say(f"the inputs of {folder.path} have changed since it was made: it runs again")
    if job.force or changed:
        folder.clear_scratch()
        if gone := folder.clear_saved():
            _say(f"removed, since the model is pruned anew: {', '.join(gone)} in {folder.path}")
    if job.save_model and (others := [path.name for form, path in folder.models().items() if form != job.save_format]):
        _say(f"{', '.join(others)} stays as it is; the {job.save_format} model goes to {folder.place(job.save_format)}")

    origin = getattr(job.model, "dequantized_from", lambda: None)()
    made_by = provenance(asked, job.config, name=job.name, texts=job.texts(), dequantized_from=origin)
    blank = ResultRow("running", job.key, job.config, made_by, prints)
    if not stands:  # one that is only run to save its model stays until it has the same again
        folder.write(blank)
    try:
        row = _run_into(folder, job, blank, fresh=job.force or changed, plots=plots)
    except Exception as error:
        left = folder.read()
        if left is None or left.status != "finished":  # a result stands, whatever becomes of its figures or of W&B
            folder.write(replace(blank, status="failed", error=f"{type(error).__name__}: {error}"))
        raise
    _say(f"{folder.path}  ({row.seconds:.0f} s)")
    _print_result(row)


def _run_into(folder: RunFolder, job: config.Job, blank: ResultRow, fresh: bool, plots: Figures) -> ResultRow:
    """Run a job and write what it leaves; its result comes last, so that one that is there is whole."""
    from svnup import pipeline

    with _logging_to(folder.path / "svnup.log"), job.tracker.run(folder.path, blank, fresh=fresh) as log:
        folder.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.create(job.config)))
        row = pipeline.run(job, folder.path, blank).finite()
        try:
            figures = plots.figures(row, folder.path / "figures")
        finally:
            folder.write(row)
        folder.clear_scratch()
        log(row, figures)
    return row


def _complete(folder: RunFolder, row: ResultRow, plots: Figures) -> None:
    """Bring what a finished run lacks beside its result, of a process that ended too early or of an earlier version."""
    if not os.access(folder.path, os.W_OK):
        return
    folder.clear_scratch()
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
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
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
        handler.close()


def _check_folder(key: str, folder: Path) -> None:
    """Refuse a folder that could not be made or written."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()  # rights do not tell of what is mounted read-only, or full
    except OSError:
        raise ValueError(f"{key}={folder}: {there} is no folder that can be written; choose another") from None


def _say(text: str) -> None:
    say(f"{text}\n")


def print_plan(job: config.Job) -> None:
    from svnup.plan import plan

    _say(f"plan of {job.name} (nothing is run, nothing written); its folder would be runs/{job.key}")
    for name, value in plan(job).items():
        _say(f"  {name:30} {value:>16,}")
    if job.shapley is not None:
        _say(f"  {'shapley seconds, about':30} {job.scorer_seconds():>16,.0f}")


def _print_result(row: ResultRow) -> None:
    scores = row.shapley or row.scores
    if scores is not None and row.profile is not None:
        sparsity = row.profile["sparsity"]
        values = np.reshape(scores["values"], (len(sparsity), -1)).sum(axis=1)  # attention and MLP may be apart
        _say(f"  {'layer':>5}  {'Shapley value' if row.shapley else 'score':>13}  {'sparsity':>8}  kept")
        for index, (value, share) in enumerate(zip(values, sparsity, strict=True)):
            _say(f"  {index:>5}  {value:>13.4f}  {share:>8.3f}  {'█' * round(40 * (1 - share))}")
    for name, metric in row.metrics.items():
        dense = f"  (dense {row.dense[name]['value']:.2f})" if name in row.dense else ""
        error = f" ± {metric['stderr']:.2f}" if "stderr" in metric else ""
        zeros = f" at {100 * row.sparsity['actual']:.2f} % zeros" if row.sparsity else ""
        value = f"none: {metric['reason']}" if metric["value"] is None else f"{metric['value']:.2f}"
        _say(f"  {name} {value}{error}{dense}{zeros}")

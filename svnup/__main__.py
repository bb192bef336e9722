"""The `svnup` command: compose -> Job -> pipeline.run -> record."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svnup import config
from svnup.outside import of_ours, targets
from svnup.progress import say, to_nobody
from svnup.provenance import Asked, provenance, python_path, redact, redact_code
from svnup.results import RunFolder, run_folders
from svnup.types import ResultRow, moving_numbers

logger = logging.getLogger("svnup")

CONFIG_NAME = "config"
OF_SWEEPS = re.compile(r"[+~]*hydra([./]launcher|[./]sweeper|\.sweep\b|\.mode=)")  # overrides that a single job does not need


def main() -> int:
    """Run the command line; 0 when all went well, 2 for a user's mistake, 1 for a sweep in which a job failed."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back as exceptions, and become one line here
    config.register()
    overrides = [a for a in sys.argv[1:] if not a.startswith("-")]
    program = ["python", "-m", "svnup"] if Path(sys.argv[0]).name == "__main__.py" else ["svnup"]
    codes: list[int] = []  # Hydra drops what a task returns
    texts: config.Texts = {}  # the jobs of a sweep read the same texts

    def task(cfg: Any) -> None:
        codes.append(_job(cfg, texts, program, overrides))

    try:
        hydra.main(config_path=str(config.CONF), config_name=CONFIG_NAME, version_base="1.3")(task)()
    except JobFailed:
        return 1
    except BrokenPipeError:  # `svnup --help | head -1`
        to_nobody()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        _tell(config.explain(error, overrides))
        return 2
    finally:
        config.KeepSecrets.redact()
    return max(codes, default=0)


class JobFailed(Exception):
    """A job of a sweep failed, which it has already told; the other jobs have run."""


def _job(cfg: Any, texts: config.Texts, program: list[str], given: list[str]) -> int:
    """One job of a sweep, or the only one; what goes wrong in a sweep is told at once, since it goes on."""
    hydra_cfg = HydraConfig.get()
    alone, sweep = hydra_cfg.mode != RunMode.MULTIRUN, None
    if not alone:
        config.KeepSecrets.redact()
        sweep = hydra_cfg.runtime.choices["experiment"] or _sweep_name(given)
    overrides = list(hydra_cfg.overrides.task)
    try:
        _run(cfg, texts, Asked(_command(cfg, program, hydra_cfg), overrides, sweep))
        return 0
    except ValueError as error:
        message = str(error)
        _tell(message)
    except Exception as error:
        if alone:
            raise
        message = repr(error)
        sys.stderr.write(redact(traceback.format_exc()))
    # Outside the except block: Hydra keeps what is raised until the sweep ends, and a traceback would keep the model with it.
    if not alone:
        raise JobFailed(message)
    return 2


def _command(cfg: Any, program: list[str], hydra_cfg: Any) -> str:
    """What to paste into a shell, in the same folder, to run this job alone, be it one of a sweep or not."""
    sources = {source.provider: source.path for source in hydra_cfg.runtime.config_sources}
    flags = {
        "--config-path": sources["main"] if Path(sources["main"]) != config.CONF else None,
        "--config-dir": sources.get("command-line"),
        "--config-name": hydra_cfg.job.config_name if hydra_cfg.job.config_name != CONFIG_NAME else None,
    }
    words = [word for name, value in flags.items() if value is not None for word in (name, value)]
    words += [redact_code(o) for o in hydra_cfg.overrides.hydra if not OF_SWEEPS.match(o)]
    if hydra_cfg.mode == RunMode.MULTIRUN and not any(o.startswith("hydra.mode=") for o in hydra_cfg.overrides.hydra):
        words.append("hydra.mode=RUN")  # as an experiment has it that sweeps
    path = python_path() if any(not of_ours(target) for target in targets(OmegaConf.to_container(cfg))) else None
    before = [f"PYTHONPATH={shlex.quote(path)}"] if path else []
    return " ".join([*before, *map(shlex.quote, [*program, *words, *hydra_cfg.overrides.task])])


def _sweep_name(overrides: list[str]) -> str:
    """What people call a sweep that is no experiment: what it sweeps, in at most 120 characters, and a digest of all of it."""
    digest = hashlib.sha256(" ".join(overrides).encode()).hexdigest()[:6]
    return f"{' '.join(o for o in overrides if ',' in o)[:112]} {digest}".strip()


def _tell(message: str) -> None:
    sys.stderr.write(redact(f"svnup: {' '.join(message.split())}\n"))


def _run(cfg: Any, texts: config.Texts, asked: Asked) -> None:
    job = config.build(cfg, texts)
    if job.dry_run:
        job.check_shapes()
        job.check_texts()
        _print_plan(job)
        return
    execute(job, asked)


def execute(job: config.Job, asked: Asked) -> None:
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
        _complete(folder, earlier)
        if job.tracker.awaited:
            from svnup import plots

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
        row = _run_into(folder, job, blank, fresh=job.force or changed)
    except Exception as error:
        left = folder.read()
        if left is None or left.status != "finished":  # a result stands, whatever becomes of its figures or of W&B
            folder.write(replace(blank, status="failed", error=f"{type(error).__name__}: {error}"))
        raise
    _say(f"{folder.path}  ({row.seconds:.0f} s)")
    _print_result(row)


def _run_into(folder: RunFolder, job: config.Job, blank: ResultRow, fresh: bool) -> ResultRow:
    """Run a job and write what it leaves; its result comes last, so that one that is there is whole."""
    from svnup import pipeline, plots

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


def _complete(folder: RunFolder, row: ResultRow) -> None:
    """Bring what a finished run lacks beside its result, of a process that ended too early or of an earlier version."""
    if not os.access(folder.path, os.W_OK):
        return
    folder.clear_scratch()
    folder.complete(row)
    from svnup import plots

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


def _print_plan(job: config.Job) -> None:
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


if __name__ == "__main__":
    sys.exit(main())

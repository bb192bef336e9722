"""Weights & Biases; wandb is imported only when a run is tracked."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from svnup.config.construction import construct
from svnup.files import fault, write_text
from svnup.interruption import unhidden
from svnup.naming import NOT_IN_KEY, allocator_name, pruner_name
from svnup.pattern import UNSTRUCTURED
from svnup.progress import listening
from svnup.results.row import ResultRow
from svnup.results.select import fallback_of, is_whole
from svnup.results.tracker import Figures, Log
from svnup.secrets import redact, redacted
from svnup.types import player_names

logger = logging.getLogger(__name__)
TARGET = "svnup.reports.wandb.WandbTracker"
MARK = "wandb.json"  # in the run folder: the id of its W&B run, and the result that was logged there
LOG = "svnup.log"
CHECKOUT = Path(__file__).parents[2]  # of svnup, if it is not installed from a wheel
LONGEST = 112  # characters of a name or group, to which a job type or a key is added; W&B takes 128
SECONDS = 5.0  # at least between two records of how far a stage is
ENDED = ("failed", "interrupted", "dead")  # without a result
NAMED = ("model", "pruner", "allocator", "sparsity", "pattern", "experiment", "model.pretrained_model_name_or_path")


@dataclass(frozen=True)
class WandbTracker:
    """Logs each job as a W&B run: configuration, numbers, tables and charts per layer, figures, and the result as an artifact.

    Args:
        project: of W&B.
        entity: user or team; None is the default of the account.
        group: None is the sweep; the runs of a job alone share one of their own.
        job_type: of the run.
        tags: beside those of the methods.
        name: of the run; None is made from the methods, and what was set of their options and seeds.
        mode: None follows WANDB_MODE; offline needs no account.
        stages: scores and budget have runs of their own, of job types `shapley` (or `score`) and `allocate`, so that artifacts
            have a lineage: values -> profile -> result.
    """

    project: str = "svnup"
    entity: str | None = None
    group: str | None = None
    job_type: str = "prune"
    tags: list[str] = field(default_factory=list)
    name: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None
    stages: bool = True

    def check(self) -> None:
        """Raise ValueError if wandb is not installed."""
        from importlib.util import find_spec

        if find_spec("wandb") is None:
            raise ValueError("tracker=wandb: wandb is not installed; pip install 'svnup[wandb]', or choose tracker=none")

    @property
    def awaited(self) -> bool:
        """Whether an agent of a W&B sweep waits for this job's numbers, even if the job is already finished."""
        return "WANDB_SWEEP_ID" in os.environ

    @contextmanager
    def run(self, folder: Path, row: ResultRow, fresh: bool) -> Iterator[Log]:
        """Context of the W&B run of a run folder, which ends with the state of the job.

        While it lasts the run is told how far each stage is. If it ends without a result, the summary has the error; svnup.log,
        with the traceback, is among its files. The id of the W&B run is kept in the folder, so that an interrupted job goes on
        in the same run.

        Args:
            folder: the run folder.
            row: the result so far; one that is of a job that has ended without a result ends its W&B run likewise.
            fresh: start another W&B run, for an execution with force or changed inputs.

        Yields:
            A function that logs the result and its figures.

        Raises:
            ValueError: W&B does not start.
        """
        mark = {} if fresh else _mark(folder)
        mark = {"id": mark.get("id") or uuid.uuid4().hex[:12]}
        _write_mark(folder, mark)
        finished: list[ResultRow] = []
        places: list[str] = []  # folders of offline runs, in the order in which to upload them
        try:
            with self._open(folder, row, self.job_type, mark["id"], places) as run:
                if run.id != mark["id"] and not run.disabled:  # chosen by the agent of a W&B sweep
                    mark["id"] = run.id
                    _write_mark(folder, mark)

                def log(row: ResultRow, figures: dict[str, Path]) -> None:
                    if row.status in ENDED:
                        run.summary.update({"status": row.status, "error": redact(row.error or row.status)})
                    else:
                        self._log_result(run, folder, row, figures, mark["id"], places)
                    run.log_artifact(_artifact(f"result-{row.config_key}", "result", "result.json", row.to_json()))
                    finished.append(row)

                try:
                    with listening(_Live(run)):
                        yield log
                except BaseException as error:
                    mark["ended"] = _ended(run, error)
                    _keep(run, LOG, _log_of(folder) + traceback.format_exc())
                    raise
                _keep(run, LOG, _log_of(folder))
        finally:
            if finished and not run.disabled:
                mark["logged"] = _digest(finished[0])
            if places:
                mark["offline"] = [*mark.get("offline", []), *places]
                logger.info("W&B offline: to upload this run: %s", _sync(folder, mark))
            _write_mark(folder, mark)

    def _log_result(
        self, run: Any, folder: Path, row: ResultRow, figures: dict[str, Path], run_id: str, places: list[str]
    ) -> None:
        if self.stages and not self.awaited:  # a W&B sweep expects one run per job
            self._log_stages(folder, row, run_id, places)
            if row.profile is not None:
                _use(run, _profile(row))
        else:
            for artifact in filter(None, (_values(row), _profile(row))):
                run.log_artifact(artifact)
        layers = _layers_of_scores(row) | _tuning(row) | _layers_of_profile(row) | _layers_of_pruning(row)
        run.log(_numbers(row) | layers | _images(figures))
        run.summary.update({"status": row.status})

    @contextmanager
    def _open(self, folder: Path, row: ResultRow, job_type: str, run_id: str, places: list[str]) -> Iterator[Any]:
        import wandb

        names = _names(row.config)
        title = redact(self.name or _title(row))
        own = f"{_cut(title, row.config_key)} {row.config_key[:6]}" if self.stages and not self.awaited else ""
        git, told = row.provenance.git, row.provenance.to_dict()
        made = {k: told.get(k) for k in ("command", "git", "dirty", "versions", "hardware", "seeds")}
        setting = {"setting": " ".join(names.values())}
        config = {"config_key": row.config_key, "names": names | setting, "provenance": made, **row.config}
        argv = sys.argv  # which W&B records
        mode: Any = self.mode or os.environ.get("WANDB_MODE") or None  # its current value: wandb keeps the first one
        try:
            sys.argv = [redact(word) for word in argv]
            run = wandb.init(
                id=run_id,
                resume="allow",
                dir=str(folder.resolve()),  # absolute: wandb's service outlives a run and its directory
                project=redact(self.project),
                entity=self.entity,
                group=redact(self.group or row.provenance.sweep or own) or None,
                job_type=job_type,
                tags=[redact(tag)[:64] for tag in dict.fromkeys([*self.tags, *names.values()])],
                name=title if job_type == self.job_type else f"{title} ({job_type})",
                mode=mode,
                reinit="create_new",
                config=redacted(config),
                settings=wandb.Settings(silent=True, git_commit=git, git_root=str(CHECKOUT) if git else None),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"tracker: W&B does not start ({' '.join(str(error).split())}); run `wandb login`, or use its mode offline"
            ) from error
        finally:
            sys.argv = argv
        code = 1
        try:
            if job_type == self.job_type and (diff := row.provenance.diff):
                _keep(run, "diff.patch", diff)
            with unhidden():
                yield run
            code = int(row.status in ENDED)
        except BaseException as error:
            code = _exit_code(error)
            raise
        finally:
            run.finish(exit_code=code)
            if run.offline:
                places.append(Path(run.dir).parent.name)

    def _log_stages(self, folder: Path, row: ResultRow, run_id: str, places: list[str]) -> None:
        """Log scores and profile, each in a W&B run of its own."""
        values, profile = _values(row), _profile(row)
        if values is not None:
            with self._open(folder, row, "shapley" if row.shapley else "score", f"{run_id}-scores", places) as run:
                run.log(_layers_of_scores(row) | _cost(row, "scores"))
                run.log_artifact(values)
        if profile is not None:
            with self._open(folder, row, "allocate", f"{run_id}-profile", places) as run:
                if (values := _values(row)) is not None:
                    _use(run, values)
                run.log(_layers_of_profile(row) | _tuning(row) | _cost(row, "allocation"))
                run.log_artifact(profile)


def upload(folder: Path, row: ResultRow, plots: Figures, force: bool, **given: Any) -> str:
    """Log a run that has ended, with a result or without, as if it had been tracked, unless it already was.

    Args:
        folder: the run folder.
        row: the result.
        plots: draws its figures.
        force: log it again, as another W&B run.
        given: options of the tracker; others are those of the run's configuration.

    Returns:
        What was done, in words.

    Raises:
        ValueError: wandb is not installed or does not start.
    """
    mark = _mark(folder)
    if not force and (mark.get("logged") == _digest(row) or (row.status in ENDED and mark.get("ended") == row.status)):
        return f"is there already as {mark['id']}" + (f"; it was offline: {_sync(folder, mark)}" if "offline" in mark else "")
    own = row.config.get("tracker", {})
    own = own if own.get("_target_") == TARGET else {"_target_": TARGET}
    tracker: WandbTracker = construct(
        own | {"mode": None} | given, "tracker", WandbTracker
    )  # checked: the result may come from an untrusted source
    tracker.check()
    with tracker.run(folder, row, fresh=force or "logged" in mark) as log:
        log(row, {} if row.status in ENDED else plots.figures(row, folder / "figures"))
    mark = _mark(folder)
    what = f"{row.status}, " if row.status in ENDED else ""
    return f"{what}logged as {mark['id']}" + (f", offline; to upload it: {_sync(folder, mark)}" if "offline" in mark else "")


class _Live:
    """Tells a W&B run how far each stage is, and what its steps measure: `live/<stage>/done`, `seconds_left`, `error`.

    It keeps out of the summary, and out of the way: what W&B refuses is told once, and the work goes on.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._started: dict[str, float] = {}
        self._told = -SECONDS
        self._defined: set[str] = set()
        self._refused = False

    def __call__(self, stage: str, done: int, total: int, unit: str, numbers: Mapping[str, float]) -> None:
        now, key = time.monotonic(), f"live/{stage.replace(' ', '_')}"
        if done == 0 or key not in self._started:
            self._started[key] = now
        if self._refused or done == 0 or not (numbers or done >= total or now - self._told >= SECONDS):
            return
        self._told = now
        left = (now - self._started[key]) / done * (total - done)
        told = {"done": done, "total": total, "seconds_left": left, **numbers}
        record = {f"{key}/{name}": value for name, value in told.items()}
        try:
            for name in sorted(record.keys() - self._defined):
                over = None if name.endswith("/done") else f"{key}/done"
                self._run.define_metric(name, step_metric=over, summary="none", hidden=over is None)
                self._defined.add(name)
            self._run.log(record)
        except Exception as error:  # whatever a client raises must not stop what it only watches
            self._refused = True
            logger.warning("W&B takes no more live numbers (%s: %s)", type(error).__name__, error)


def _ended(run: Any, error: BaseException) -> str:
    """Put into the summary why a run ends without a result; returns its status."""
    status = "failed" if isinstance(error, Exception) else "interrupted"
    told = redact(fault(error) or f"{type(error).__name__}: {error}")
    run.summary.update({"status": status, "error": told})
    return status


def _exit_code(error: BaseException) -> int:
    """That of the process that ends by an error: 130 by Ctrl-C, 143 by SIGTERM, else 1."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = 1 if isinstance(error, Exception) else getattr(error, "code", 1)
    return code if isinstance(code, int) and code else 1


def _log_of(folder: Path) -> str:
    try:
        return (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _keep(run: Any, name: str, text: str) -> None:
    """Put a text among the files of a run; that it cannot be written ends no job, and hides no error of one."""
    if not text or run.disabled:
        return
    path = Path(run.dir) / name
    try:
        write_text(path, redact(text))
        run.save(str(path), base_path=run.dir, policy="now")
    except OSError as error:
        logger.warning("W&B: %s is not among the files of the run (%s)", name, fault(error) or error)


def _sync(folder: Path, mark: dict[str, Any]) -> str:
    return shlex.join(["wandb", "sync", *(str(folder / "wandb" / name) for name in mark["offline"])])


def _mark(folder: Path) -> dict[str, Any]:
    path = folder / MARK
    try:
        mark = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    places = mark.get("offline", []) if isinstance(mark, dict) else None
    words = isinstance(places, list) and all(isinstance(word, str) for word in [mark.get("id", ""), *places])
    return dict(mark) if words else {}


def _write_mark(folder: Path, mark: dict[str, Any]) -> None:
    write_text(folder / MARK, json.dumps(mark))


def _digest(row: ResultRow) -> str:
    return hashlib.sha256(row.to_json().encode()).hexdigest()


def _names(config: dict[str, Any]) -> dict[str, str]:
    """The names of model and methods by which runs are filtered and grouped."""
    model = config["model"]
    path = model.get("pretrained_model_name_or_path")
    pattern = {} if config["pattern"] == UNSTRUCTURED else {"pattern": str(config["pattern"])}
    return {
        "model": path.rstrip("/").rpartition("/")[2] if path else f"random {model.get('model_type')}",
        "pruner": pruner_name(config),
        "allocator": allocator_name(config["allocator"]),
        "sparsity": f"{config['sparsity']:g}",
        **pattern,
    }


def _title(row: ResultRow) -> str:
    """The name of a run: model and methods, and what else was set on the command line that can move a number."""
    name = row.provenance.name or " ".join(_names(row.config).values())
    return _cut(" ".join([name, *_options(row)]), row.config_key)


def _options(row: ResultRow) -> list[str]:
    """Overrides that can move a number and are in no name, seeds first."""
    scorer = row.config["allocator"].get("scorer") or {}
    unused = set(NOT_IN_KEY) - ({"shapley", "selection"} if "game" in scorer else set())
    found = []
    for override in row.provenance.overrides:
        key, _, value = override.lstrip("+~").partition("=")
        top = key.rpartition("@")[2].partition(".")[0]
        if key not in NAMED and top not in unused and not top.startswith("hydra"):
            found.append(f"{key}={value}")
    return sorted(found, key=lambda option: not option.partition("=")[0].endswith("seed"))


def _cut(text: str, key: str) -> str:
    """A text that W&B takes as a name; a longer one ends in the beginning of the run's key, by which it differs."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 8]}… {key[:6]}"


# -- what is logged, all in one step: numbers, and tables per layer


def _numbers(row: ResultRow) -> dict[str, Any]:
    """The numbers of a result, so that columns sort; a metric without a value has a `reason/` instead."""
    record: dict[str, Any] = {}
    for prefix, metrics in (("", row.metrics), ("dense/", row.dense)):
        for name, metric in metrics.items():
            name = name.replace(".", "/")  # W&B reads dots as nested keys
            if metric.value is None:
                record[f"reason/{prefix}{name}"] = metric.reason
            else:
                record[f"{prefix}{name}"] = metric.value
    for name, metric in row.metrics.items():
        dense = row.dense[name].value if name in row.dense else None
        if metric.value is not None and dense:
            record[f"vs_dense/{name.replace('.', '/')}"] = metric.value / dense - 1
    record["comparable"] = int(_comparable(row))
    if row.sparsity:
        record |= {"sparsity/target": row.sparsity.target, "sparsity/actual": row.sparsity.actual}
    record["cost/seconds"] = row.seconds
    if row.peak_memory_bytes is not None:
        record["cost/peak_memory_gib"] = row.peak_memory_bytes / 2**30
    for stage in row.stages or {}:
        record |= _cost(row, stage)
    return record


def _comparable(row: ResultRow) -> bool:
    """Whether all numbers are of whole test texts and tasks and pruning did not fall back."""
    return not fallback_of(row) and all(is_whole(metric.protocol) for metric in row.metrics.values())


def _cost(row: ResultRow, stage: str) -> dict[str, float]:
    spent = (row.stages or {}).get(stage)
    return {f"cost/{stage}_seconds": spent.seconds} if spent else {}


def _layers_of_scores(row: ResultRow) -> dict[str, Any]:
    record: dict[str, Any] = {}
    if row.shapley:
        values = row.shapley.values
        errors = row.shapley.stderr or [None] * len(values)
        n_blocks = len(row.profile.sparsity) if row.profile else len(values)
        names = list(range(n_blocks)) if len(values) == n_blocks else player_names(n_blocks)
        lines = [[n, v, e] for n, v, e in zip(names, values, errors, strict=True)]
        record |= _bars("shapley", ["layer", "shapley", "stderr"], lines, "Shapley value per layer")
        scalars = ("v_empty", "v_full", "efficiency_gap", "n_evaluations", "n_block_forwards", "seconds")
        record |= {f"shapley/{key}": getattr(row.shapley, key) for key in scalars}
    if row.scores:
        of_experts = [f"{block} {expert}" for block, expert in zip(row.scores.blocks, row.scores.experts, strict=False)]
        lines = [[name, s] for name, s in zip(of_experts or range(len(row.scores.values)), row.scores.values, strict=False)]
        record |= _bars("scores", ["layer", "score"], lines, f"Score per layer: {row.scores.method}")
        record |= {f"scores/{key}": getattr(row.scores, key) for key in ("n_block_forwards", "seconds")}
    return record


def _layers_of_profile(row: ResultRow) -> dict[str, Any]:
    if not row.profile:
        return {}
    lines = [[i, s] for i, s in enumerate(row.profile.sparsity)]
    return _bars("sparsity", ["layer", "sparsity"], lines, "Sparsity per layer")


def _layers_of_pruning(row: ResultRow) -> dict[str, Any]:
    """A table of the mean reconstruction error of each block, where it was measured; `live/pruning/error` is its chart."""
    import wandb

    of_block: dict[int, list[float]] = {}
    for linear in row.pruning.per_linear if row.pruning else ():
        if linear.error is not None and linear.block is not None:
            of_block.setdefault(linear.block, []).append(linear.error)
    if not of_block:
        return {}
    lines = [[block, sum(errors) / len(errors)] for block, errors in sorted(of_block.items())]
    return {"layers/error": wandb.Table(["layer", "error"], lines)}


def _tuning(row: ResultRow) -> dict[str, Any]:
    if not row.tuning:
        return {}
    import wandb

    curve = wandb.Table(["tried", "loss"], [[tried.label, tried.loss] for tried in row.tuning.curve])
    numbers = {f"tuning/{key}": getattr(row.tuning, key) for key in ("n_evaluations", "n_new_evaluations", "seconds")}
    return {"tuning/curve": curve, **numbers}


def _images(figures: dict[str, Path]) -> dict[str, Any]:
    import wandb

    return {f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()}


def _bars(name: str, columns: list[str], lines: list[list[Any]], title: str) -> dict[str, Any]:
    """A table per layer and its bar chart."""
    import wandb

    table = wandb.Table(columns, lines)
    return {f"layers/{name}": table, f"charts/{name}": wandb.plot.bar(table, columns[0], columns[1], title=title)}


# -- artifacts: equal content under one name is one version, whichever run logs it


def _values(row: ResultRow) -> Any:
    """The scores without their cost, so that jobs that share them share the artifact; None if there are none."""
    scores = row.shapley or row.scores
    if scores is None:
        return None
    told = scores.to_dict()
    kept = {k: told[k] for k in ("method", "values", "stderr", "higher_is", "v_empty", "v_full") if k in told}
    text = json.dumps(kept, indent=1)
    return _artifact(f"values-{hashlib.sha256(text.encode()).hexdigest()[:12]}", "values", "values.json", text)


def _profile(row: ResultRow) -> Any:
    if row.profile is None:
        return None
    return _artifact(f"profile-{row.config_key}", "profile", "profile.json", json.dumps(row.profile.to_dict()))


def _artifact(name: str, kind: str, file: str, content: str) -> Any:
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    with artifact.new_file(file, mode="w") as handle:
        handle.write(content)
    return artifact


def _use(run: Any, artifact: Any) -> None:
    """Declare an artifact as input of a run.

    Offline, `use_artifact` refuses any artifact; this does what it does online before it waits for the server, and the later
    `wandb sync` does the rest.
    """
    if run.offline:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)

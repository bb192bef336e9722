"""Weights & Biases or nothing; wandb is imported only when a run is tracked."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from svnup.types import ResultRow, player_names

Log = Callable[[ResultRow, dict[str, Path]], None]


@dataclass(frozen=True)
class NoTracker:
    """Tracks nothing."""

    def check(self) -> None: ...

    @contextmanager
    def run(self, folder: Path, config_key: str, config: dict[str, Any], name: str, fresh: bool) -> Iterator[Log]:
        yield lambda row, figures: None


@dataclass(frozen=True)
class WandbTracker:
    """One W&B run per job: resolved config, scores and profile per block as tables and bar charts, metrics, figures and the
    profile as an artifact. `mode` None follows WANDB_MODE; offline needs no account."""

    project: str = "svnup"
    entity: str | None = None
    group: str | None = None
    job_type: str = "prune"
    tags: list[str] = field(default_factory=list)
    name: str | None = None
    mode: Literal["online", "offline", "disabled"] | None = None

    def check(self) -> None:
        """Raise ValueError where wandb is not installed."""
        from importlib.util import find_spec

        if find_spec("wandb") is None:
            raise ValueError("tracker=wandb: wandb is not installed; pip install 'svnup[wandb]', or choose tracker=none")

    @contextmanager
    def run(self, folder: Path, config_key: str, config: dict[str, Any], name: str, fresh: bool) -> Iterator[Log]:
        """The W&B run of a run folder; yields what logs its result. It is finished in any case, with the state of the job.

        Its id is made once and kept in the folder: an interrupted job goes on in the same run; a `fresh` execution (force, or
        changed inputs) gets its own, and so do two users of one project.
        """
        import wandb

        path = folder / "wandb_id.json"
        if fresh or not path.is_file():
            path.write_text(json.dumps({"id": uuid.uuid4().hex[:12]}), encoding="utf-8")
        run = wandb.init(
            id=json.loads(path.read_text(encoding="utf-8"))["id"],
            resume="allow",
            dir=str(folder.resolve()),  # wandb's service outlives a run and would take a relative one as of its first
            project=self.project,
            entity=self.entity,
            group=self.group,
            job_type=self.job_type,
            tags=self.tags or None,
            name=self.name or name,
            mode=self.mode,
            config={"config_key": config_key, **config},
            settings=wandb.Settings(silent=True),
        )
        failed = True
        try:
            yield lambda row, figures: self._log(run, row, figures)
            failed = False
        finally:
            run.finish(exit_code=int(failed))

    def _log(self, run: Any, row: ResultRow, figures: dict[str, Path]) -> None:
        import wandb

        record: dict[str, Any] = {name: metric["value"] for name, metric in row.metrics.items()}
        record |= {f"dense/{name}": metric["value"] for name, metric in row.dense.items()}
        record |= {f"sparsity/{key}": row.sparsity[key] for key in ("target", "actual")} if row.sparsity else {}
        if row.shapley:
            errors = row.shapley["stderr"] or [None] * len(row.shapley["values"])
            values, n_blocks = (
                row.shapley["values"],
                len(row.profile["sparsity"]) if row.profile else len(row.shapley["values"]),
            )
            names = list(range(n_blocks)) if len(values) == n_blocks else player_names(n_blocks)
            lines = [[n, v, e] for n, v, e in zip(names, values, errors, strict=True)]
            table = wandb.Table(["layer", "shapley", "stderr"], lines)
            record["layers/shapley"] = table
            record["charts/shapley"] = wandb.plot.bar(table, "layer", "shapley", title="Shapley value per layer")
            scalars = ("v_empty", "v_full", "efficiency_gap", "n_evaluations", "n_block_forwards", "seconds")
            record |= {f"shapley/{key}": row.shapley[key] for key in scalars}
        if row.scores:
            table = wandb.Table(["layer", "score"], [[i, s] for i, s in enumerate(row.scores["values"])])
            record["layers/scores"] = table
            record["charts/scores"] = wandb.plot.bar(table, "layer", "score", title=f"Score per layer: {row.scores['method']}")
            record |= {f"scores/{key}": row.scores[key] for key in ("n_block_forwards", "seconds")}
        if row.tuning:
            record["tuning/curve"] = wandb.Table(["tried", "loss"], [[p["label"], p["loss"]] for p in row.tuning["curve"]])
            record |= {f"tuning/{key}": row.tuning[key] for key in ("n_evaluations", "n_new_evaluations", "seconds")}
        if row.profile:
            table = wandb.Table(["layer", "sparsity"], [[i, s] for i, s in enumerate(row.profile["sparsity"])])
            record["layers/sparsity"] = table
            record["charts/sparsity"] = wandb.plot.bar(table, "layer", "sparsity", title="Sparsity per layer")
            artifact = wandb.Artifact(f"profile-{row.config_key}", type="profile")
            with artifact.new_file("profile.json", mode="w") as file:
                file.write(json.dumps(row.profile))
            run.log_artifact(artifact)
        record |= {f"figures/{name}": wandb.Image(str(path)) for name, path in figures.items()}
        run.log(record)

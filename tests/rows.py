"""Results as runs leave them, made up for tests of what is done with them."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from svnup.results.row import Provenance, ResultRow
from svnup.results.store import RunFolder

GAME = {
    "_target_": "svnup.scoring.shapley.GameOptions",
    "payoff": "recip_ppl",
    "data": {"_target_": "svnup.data.Docs", "seed": 0},
}
TEST = {"_target_": "svnup.data.Docs", "n_seq": None, "seq_len": 256, "seed": 0, "role": "test"}
SHAPLEY = {"_target_": "svnup.shapley.sliding_window.SlidingWindow", "window": 5, "shard": None, "game": GAME}
ALLOCATORS: dict[str, dict[str, Any]] = {
    "uniform": {"_target_": "svnup.allocation.maps.Uniform", "scorer": None},
    "shapley": {"_target_": "svnup.allocation.maps.ScoreBudget", "scale": "log", "lam": 0.15, "scorer": SHAPLEY},
    "owl": {
        "_target_": "svnup.allocation.maps.ScoreBudget",
        "scale": "raw",
        "lam": 0.08,
        "scorer": {"_target_": "x.Owl", "m": 5.0},
    },
}
PRUNERS: dict[str, dict[str, Any]] = {
    "magnitude": {"_target_": "svnup.pruning.magnitude.Magnitude", "pattern": "unstructured", "per": "matrix"},
    "wanda": {"_target_": "svnup.pruning.wanda.Wanda", "pattern": "unstructured"},
    "sparsegpt": {"_target_": "svnup.pruning.sparsegpt.SparseGPT", "pattern": "unstructured", "damp": 0.01},
}
DENSE = {"svnup/tiny": 12.5, "other/opt": 20.0}


def protocol(model: str = "svnup/tiny", **changed: Any) -> dict[str, Any]:
    digest = hashlib.sha256(model.encode()).hexdigest()[:16]
    whole = {"dataset": "docs", "role": "test", "text": "t" * 64, "tokens_sha256": digest, "seq_len": 256, "n_windows": 300}
    return whole | {"n_tokens": 76800, "complete": True, "mean": "over windows"} | changed


def stored(**fields: Any) -> ResultRow:
    """A row by the JSON of its fields, those that it lacks as in a run that has just begun."""
    return changed(ResultRow("running", "k", {}, Provenance(), {}), **fields)


def changed(row: ResultRow, **fields: Any) -> ResultRow:
    """The row with other JSON at some of its fields."""
    return ResultRow.from_dict(row.to_dict() | fields)


def run(
    ppl: float | None = None,
    *,
    key: str | None = None,
    allocator: str = "uniform",
    pruner: str = "wanda",
    model: str = "svnup/tiny",
    sparsity: float = 0.7,
    seed: int = 0,
    status: str = "finished",
    fallback: str | None = None,
    metrics: dict[str, float] | None = None,
    measured: dict[str, Any] | None = None,
    dense: float | None = None,
    **changed: Any,
) -> ResultRow:
    """A row with one perplexity, or `metrics`; `measured` changes their protocol, `changed` the configuration (dots as __).

    Its key follows from these unless it is given.
    """
    config: dict[str, Any] = copy.deepcopy(
        {
            "dataset": {"_target_": "svnup.data.Docs", "n_seq": 64, "seq_len": 256, "seed": seed, "role": "calibration"},
            "shapley": SHAPLEY,
            "model": {"_target_": "svnup.model.source.Pretrained", "pretrained_model_name_or_path": model, "seq_len": 256},
            "allocator": ALLOCATORS[allocator],
            "split": {"_target_": "svnup.allocation.splits.UniformSplit"},
            "pruner": PRUNERS[pruner],
            "evaluation": {"_target_": "svnup.evaluation.ppl.Perplexity", "datasets": {"docs": TEST}, "seq_len": 256},
            "sparsity": sparsity,
            "pattern": "unstructured",
            "seed": seed,
            "results_dir": "results",
        }
    )
    for name, value in changed.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    if allocator == "shapley":
        config["allocator"]["scorer"]["game"]["pruner"] = copy.deepcopy(config["pruner"])
    text = re.sub(r'"_target_": "[\w.]*\.', '"_target_": "', json.dumps([config, measured], sort_keys=True))  # modules may move
    key = key or hashlib.sha256(text.encode()).hexdigest()[:12]
    values = metrics or ({} if ppl is None else {"docs/ppl": ppl})
    entries = {name: {"value": v, "protocol": protocol(model, **(measured or {}))} for name, v in values.items()}
    before = DENSE.get(model, 5.68) if dense is None else dense
    made_by = {"cpu": "Abacus 9000", "cores": 2, "gpus": [], "threads": 1}
    return stored(
        status=status,
        config_key=key,
        config=config,
        provenance={
            "hardware": made_by,
            "versions": {"svnup": "0.1.0", "torch": "2.13.0"},
            "command": "svnup",
            "overrides": [],
            "seed": seed,
        },
        fingerprints={"weights": "w"},
        metrics=entries,
        dense={name: {"value": before, "protocol": entry["protocol"]} for name, entry in entries.items()},
        sparsity={"target": sparsity, "actual": sparsity - 1e-4, "pattern": "unstructured"} if entries else None,
        profile={"sparsity": [0.6, 0.8], "params": [10, 10], "target": sparsity, "actual": [0.6, 0.8]} if entries else None,
        shapley={"method": "SlidingWindow(window=5)", "values": [1.0, 2.0], "stderr": None, "n_evaluations": 7, "seconds": 1.5}
        if allocator == "shapley"
        else None,
        pruning={"per_linear": [{"fallback": None}, {"fallback": fallback}], "seconds": {"total": 2.0}} if entries else None,
        error="ValueError: no luck" if status == "failed" else None,
        seconds=1.25,
    )


def write(folder: Path, *rows: ResultRow) -> str:
    """Put rows into a results folder; returns its path."""
    for row in rows:
        RunFolder.of(folder, row.config_key).write(row)
    return str(folder)

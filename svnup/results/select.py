"""Runs by their settings: which of many results are meant."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

from svnup.keys import did_you_mean, flatten
from svnup.naming import allocator_name, method_name, moving_numbers, recovery_name
from svnup.results.row import Measured, Protocol, ResultRow

logger = logging.getLogger(__name__)
Label = tuple[str, ...]
Where = Mapping[str, Sequence[str]]
MISSING = "-"
METRIC = "metric"  # a key of tables of several metrics


@dataclass(frozen=True)
class Run:
    """A run as tables see it: `settings` are all keys of its configuration that can move a number, as words."""

    row: ResultRow
    settings: Mapping[str, str]
    metrics: Mapping[str, Measured]
    dense: Mapping[str, Measured]

    def state(self, metric: str) -> str | None:
        """Why the run has no number of a metric in a table; None where it has one, '-' where it was not asked for."""
        if self.row.status != "finished":
            return "fail" if self.row.status == "failed" else self.row.status
        if fallback_of(self.row):
            return "fallback"
        if metric not in self.metrics:
            return MISSING
        if self.metrics[metric].protocol.limit is not None:
            return "limit"
        return "fail" if self.metrics[metric].value is None else None

    def seeds(self, of_method: bool = True) -> Label:
        """Those of the run; without those of its method, of which another method has none."""
        shared = ("seed", "dataset", "evaluation")
        return tuple(
            f"{k}={v}" for k, v in self.settings.items() if is_seed(k) and (of_method or k.partition(".")[0] in shared)
        )


def fallback_of(row: ResultRow) -> str | None:
    """What pruning had to do otherwise than asked, if anything."""
    return next((linear.fallback for linear in row.pruning.per_linear if linear.fallback), None) if row.pruning else None


def is_whole(protocol: Protocol) -> bool:
    """Whether a number under this protocol is of a whole test text or task."""
    return protocol.complete is not False and protocol.limit is None and protocol.role in (None, "test")


def uniform_taken(row: ResultRow) -> str | None:
    """Where the uniform budget was taken in place of the one by scores: what both lose by trial."""
    if row.tuning is None or row.tuning.taken != "uniform":
        return None
    lost = {tried.label: MISSING if tried.loss is None else f"{tried.loss:.4f}" for tried in row.tuning.curve}
    uniform, scores = (lost.get(label, MISSING) for label in ("uniform", "scores"))
    return f"the uniform budget was taken, which loses {uniform} nats per token by trial, by scores {scores}"


def is_seed(key: str) -> bool:
    return key == "seed" or (key.endswith(".seed") and not key.startswith("model."))


def model_of(config: Mapping[str, Any]) -> str:
    """The model of a configuration, in full."""
    return str(config["model"].get("pretrained_model_name_or_path") or f"random {config['model'].get('model_type')}")


def short_names(models: Iterable[str]) -> dict[str, str]:
    """Models without their folders or owners, where that says which is meant."""
    names = set(models)
    short = {name: name.rstrip("/").rpartition("/")[2] for name in names}
    return {name: s if list(short.values()).count(s) == 1 else name for name, s in short.items()}


def settings(config: Mapping[str, Any]) -> dict[str, str]:
    """Words for every key that can move a number: a group is called by its method, its options are dotted keys.

    The estimator of a Shapley budget counts as `shapley` and its options as `shapley.*`, as they are set, and only where they
    are used; copies that a configuration makes of its own parts are left out.
    """
    kept = moving_numbers(dict(config))
    kept.setdefault("split", {"_target_": "UniformSplit"})  # results of earlier versions have none
    allocator = {k: v for k, v in kept["allocator"].items() if (k, v) != ("compare_uniform", "off")}  # nor that
    kept["allocator"] = allocator
    if "selection" in config:
        kept["selection"] = config["selection"]
    if (scorer := allocator.get("scorer")) and "game" in scorer:
        allocator.pop("scorer")
        game = {k: v for k, v in scorer["game"].items() if not (k == "pruner" and v == kept["pruner"])}
        kept |= {"shapley": {k: v for k, v in scorer.items() if k != "shard"} | {"game": game}}
    out: dict[str, str] = {}

    def visit(node: Any, key: str) -> None:
        if not isinstance(node, dict):
            out[key] = word(node)
            return
        if "_target_" in node:
            out[key] = method_name(node)
        for name, value in node.items():
            if name != "_target_":
                visit(value, f"{key}.{name}")

    for name, value in kept.items():
        visit(value, name)
    own = {
        "model": model_of(config),
        "allocator": allocator_name(config["allocator"]),
        "split": out["split"].removesuffix("split"),
        "recovery": recovery_name(dict(config)) or "none",
    }
    return out | own


def word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def runs_of(rows: Iterable[ResultRow]) -> list[Run]:
    rows = list(rows)
    short = short_names(model_of(row.config) for row in rows)
    runs = []
    for row in rows:
        words = settings(row.config)
        words |= {"model": short[words["model"]], "status": row.status, "key": row.config_key}
        runs.append(Run(row, words, row.metrics, row.dense))
    return runs


def newest(runs: Sequence[Run]) -> list[Run]:
    """The runs whose numbers are of the newest version among them; how many others are left out is said in a warning."""
    versions = [run.row.provenance.numbers for run in runs]
    kept = [run for run, version in zip(runs, versions, strict=True) if version == max(versions)]
    if len(kept) < len(runs):
        logger.warning("left out: %d runs with numbers of versions before %d", len(runs) - len(kept), max(versions))
    return kept


def choose(runs: list[Run], where: Where) -> list[Run]:
    """The runs whose settings are among those asked for, by key: `status`, `key` (a prefix), a key of the configuration, or
    `protocol.<field>` of their metrics.

    Raises ValueError where no run has such a key or value.
    """
    for key, wanted in where.items():
        runs = _protocol_is(runs, key, wanted) if key.startswith("protocol.") else _setting_is(runs, key, wanted)
    return runs


def _setting_is(runs: list[Run], key: str, wanted: Sequence[str]) -> list[Run]:
    check_key(key, runs, "--where")
    there = {run.settings.get(key, MISSING) for run in runs}
    for value in wanted:
        if not any(same(key, text, value) for text in there):
            raise ValueError(f"--where {key}={value}: no run has it; there {listed(there, value)}")
    return [run for run in runs if any(same(key, run.settings.get(key, MISSING), value) for value in wanted)]


def _protocol_is(runs: list[Run], key: str, wanted: Sequence[str]) -> list[Run]:
    name = key.removeprefix("protocol.")

    def kept(metrics: Mapping[str, Measured]) -> dict[str, Measured]:
        fields = {k: flatten(metric.protocol.to_dict()) for k, metric in metrics.items()}
        return {k: m for k, m in metrics.items() if any(same(key, word(fields[k].get(name)), value) for value in wanted)}

    there = {word(flatten(m.protocol.to_dict()).get(name)) for run in runs for m in run.metrics.values()}
    left = [replace(run, metrics=kept(run.metrics), dense=kept(run.dense)) for run in runs]
    left = [new for new, old in zip(left, runs, strict=True) if new.metrics or not old.metrics]
    if not any(run.metrics for run in left):
        raise ValueError(f"--where {key}={','.join(wanted)}: no metric was measured so; there {listed(there, wanted[0])}")
    return left


def same(key: str, text: str, wanted: str) -> bool:
    if key == "key":
        return bool(wanted) and text.startswith(wanted)
    try:
        return text == wanted or float(text) == float(wanted)
    except ValueError:
        return False


def listed(there: set[str], given: str) -> str:
    shown = sorted(there)
    listed = ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")
    return f"{'is' if len(there) == 1 else 'are'} {listed}{did_you_mean(given, shown)}"


def check_key(key: str, runs: Iterable[Run], option: str) -> None:
    """Raise ValueError where no run has a key."""
    known = {name for run in runs for name in run.settings} | ({METRIC} if option != "--where" else set())
    if key not in known:
        hint = did_you_mean(key, sorted(known)) or "; svnup-results show DIR ID lists the keys of a run"
        raise ValueError(f"{option} {key}: no run has such a key{hint}")


def metrics_of(runs: Iterable[Run], asked: Sequence[str] = ()) -> list[str]:
    """The metrics of a table: those asked for, by name or pattern (`*/acc`), or the only one that there is.

    A secondary metric has to be named. Raises ValueError where there is a choice, or none has a name or pattern.
    """
    runs = list(runs)
    there = sorted({name for run in runs for name in run.metrics})
    first = sorted({name for run in runs for name, metric in run.metrics.items() if not metric.secondary})
    if not there:
        return list(asked) or ["no metric"]
    if not asked:
        if len(first) > 1:
            raise ValueError(f"--metric: the runs have {', '.join(first)}; choose some, by name or by a pattern as '*/acc'")
        return first
    found: list[str] = []
    for pattern in asked:
        names = [pattern] if pattern in there else [name for name in first if fnmatch(name, pattern)]
        if not names:
            raise ValueError(f"--metric {pattern}: no run has it; there {listed(set(there), pattern)}")
        found += [name for name in names if name not in found]
    return found

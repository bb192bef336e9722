"""The runs of a report: all that it reads of results, and what it compares.

Each protocol has its own column in `tables.frame`, and so has its own charts and ranking in a report.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from svnup.naming import current, moving_numbers
from svnup.pattern import UNSTRUCTURED
from svnup.reports.figures import UNITS
from svnup.reports.tables import frame
from svnup.results.row import Protocol, ResultRow
from svnup.results.select import is_whole
from svnup.types import Floats


@dataclass(frozen=True)
class Number:
    """A metric of a run: pruned and dense, None where it is not known.

    `column` is that of `tables.frame`, of the metric under its protocol; None where the number is in no table, as of a run that
    fell back. `change` is in percent against the uniform budget in the same setting.
    """

    metric: str
    column: str | None
    value: float | None
    dense: float | None
    protocol: Protocol
    stderr: float | None = None
    reason: str | None = None
    change: float | None = None

    @property
    def name(self) -> str:
        return self.column or self.metric


@dataclass(frozen=True)
class Scores:
    """Shapley values (`kind` is `Shapley value`) or other scores of a run, (n,) with standard errors (n,), 0 if not known.

    `game` are the settings of the game that they are of, with dotted keys; `cost` is in block-forwards and backward passes of
    computing everything anew.
    """

    kind: str
    method: str
    values: Floats
    stderr: Floats
    game: dict[str, str] = field(default_factory=dict)
    unit: str = ""
    cost: tuple[int, int] = (0, 0)

    @property
    def estimator(self) -> str:
        """The method and its options without the seed."""
        return re.sub(r", seed=\w+|(?<=\()seed=\w+(, )?", "", self.method)


@dataclass(frozen=True)
class Measured:
    """A run as a report needs it.

    Args:
        key: of the run.
        status: of the run; `fallback` where pruning had to do otherwise than asked, `failed` where a metric has no value.
        model: a name that is unique to the model.
        pruner: its name, with options in which runs differ.
        method: a name that is unique to the allocator and its options.
        sparsity: the target.
        pattern: of the zeros.
        seed: of the run.
        setting: a hash of all that the run shares with its uniform counterpart.
        is_uniform: whether its budget is the uniform one.
        common: the settings that it shares with runs of other seeds and sparsities.
        numbers: its metrics.
        actual: the sparsity that came out; None without a result.
        budget: sparsity of each block, (n_blocks,), empty without a result.
        scores: Shapley values and other scores.
        tried: label and loss of each candidate budget on the whole validation text.
        n_tried: evaluations that they took.
        tries_losses: whether these numbers are losses on selection text.
        trouble: why there is no result, or not the one that was asked for.
        command: that repeats it.
        about: what its page tells besides, by title.
        machine: and `versions`, in words.
    """

    key: str
    status: str
    model: str
    pruner: str
    method: str
    sparsity: float
    pattern: str
    seed: str
    setting: str
    is_uniform: bool
    common: dict[str, str]
    numbers: list[Number]
    actual: float | None
    budget: Floats
    scores: list[Scores]
    tried: list[tuple[str, float | None]]
    n_tried: int
    tries_losses: bool
    trouble: str
    command: str
    about: dict[str, dict[str, Any]]
    machine: str
    versions: str

    @property
    def zeros(self) -> str:
        """Sparsity and pattern in words."""
        return f"{100 * self.sparsity:g}\N{NO-BREAK SPACE}%" + ("" if self.pattern == UNSTRUCTURED else f" {self.pattern}")

    @property
    def name(self) -> str:
        return f"{self.model} · {self.pruner} · {self.method} · {self.zeros}"

    @property
    def n_blocks(self) -> int:
        return len(self.budget)

    @property
    def shapley(self) -> Scores | None:
        return next((one for one in self.scores if one.game), None)

    def number(self, column: str) -> Number | None:
        """The number in a column of `tables.frame`, where it has a value."""
        return next((n for n in self.numbers if n.column == column), None)

    def value(self, column: str) -> float | None:
        number = self.number(column)
        return None if number is None else number.value


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation (None for one seed) of a number over `n` seeds."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat | None:
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def text(self, form: str) -> str:
        return f"{self.mean:{form}}" + ("" if self.deviation is None else f" ± {self.deviation:{form}}")


class Collection:
    """All runs of a report.

    Attributes:
        columns: those of `tables.frame` with metrics, one for each protocol.
        runs: all runs, copies once.
    """

    def __init__(self, rows: Iterable[ResultRow]) -> None:
        known = {row.config_key: row for row in sorted(rows, key=lambda row: row.status == "finished")}
        data = frame([known[key] for key in sorted(known)])
        self.columns = [c for c in map(str, data.columns) if "/" in c and not c.endswith(" dense")]
        lines: list[dict[str, Any]] = data.to_dict("records")  # type: ignore[assignment]
        names = _names([known[line["key"]] for line in lines], lines)
        runs = [_measured(known[line["key"]], line, name, self.columns) for line, name in zip(lines, names, strict=True)]
        self.runs = _with_changes(runs, self.columns)

    @cached_property
    def settings(self) -> list[list[Measured]]:
        """Runs grouped over seeds, ordered by model, pattern and sparsity and then from best to worst by their first metric."""

        def rank(runs: list[Measured]) -> tuple[Any, ...]:
            found = [(i, s.mean * (1 if is_perplexity(c) else -1)) for i, c in enumerate(self.columns) if (s := stat(runs, c))]
            run = runs[0]
            return run.model, run.pattern != UNSTRUCTURED, run.pattern, run.sparsity, *(found or [(99, 0.0)])[0], run.name

        return sorted(grouped(self.runs, lambda run: (run.model, run.sparsity, run.common)), key=rank)

    @cached_property
    def places(self) -> dict[str, int]:
        """The place of each run among all, by its key, in the order of `settings`."""
        return {run.key: place for place, run in enumerate(run for runs in self.settings for run in runs)}

    @cached_property
    def protocols(self) -> dict[str, Protocol]:
        """The protocol of each column."""
        found = {n.column: n.protocol for run in self.runs for n in run.numbers if n.column}
        return {column: found[column] for column in self.columns if column in found}

    @cached_property
    def styles(self) -> dict[str, int]:
        """For each method the style of its series: 0 is that of the uniform budget, then the most frequent come first."""
        times = Counter(run.method for run in self.runs)
        order = sorted(times, key=lambda method: (method != "uniform", -times[method], method))
        return {method: index + ("uniform" not in times) for index, method in enumerate(order)}

    def is_whole(self, column: str) -> bool:
        """Whether a column's numbers are of whole test texts or tasks."""
        return column not in self.protocols or is_whole(self.protocols[column])


def grouped(runs: Iterable[Measured], key: Callable[[Measured], Any]) -> list[list[Measured]]:
    """Runs with the same key, in the order in which keys appear."""
    groups: dict[str, list[Measured]] = {}
    for run in runs:
        groups.setdefault(json.dumps(key(run), sort_keys=True), []).append(run)
    return list(groups.values())


def stat(runs: Iterable[Measured], column: str) -> Stat | None:
    """A column's number over runs of one setting."""
    return Stat.of([v for run in runs if (v := run.value(column)) is not None])


def change(runs: Iterable[Measured], column: str) -> Stat | None:
    """The change of a column's number against the uniform budget, over runs of one setting, in percent."""
    return Stat.of([n.change for run in runs if (n := run.number(column)) is not None and n.change is not None])


def dense(runs: Iterable[Measured], column: str) -> float | None:
    """A column's number before pruning."""
    return next((n.dense for run in runs if (n := run.number(column)) is not None and n.dense is not None), None)


def is_perplexity(column: str) -> bool:
    """Whether lower is better, and the axis logarithmic; of all other metrics higher is better."""
    return _metric(column).endswith("ppl")


def disambiguated(names: Sequence[str], nodes: Sequence[dict[str, str]], form: str = "{} [{}]") -> list[str]:
    """Names, each with the settings in which it differs from others of the same name."""
    alike: dict[str, list[dict[str, str]]] = {}
    for name, node in zip(names, nodes, strict=True):
        alike.setdefault(name, []).append(node)
    differ = {
        name: [key for key in dict.fromkeys(k for node in same for k in node) if len({node.get(key) for node in same}) > 1]
        for name, same in alike.items()
    }
    words = [[f"{key}={node[key]}" for key in differ[name] if key in node] for name, node in zip(names, nodes, strict=True)]
    return [form.format(name, ", ".join(more)) if more else name for name, more in zip(names, words, strict=True)]


def flat(node: Any, prefix: str = "", without: tuple[str, ...] = ()) -> dict[str, str]:
    """Nested values as texts by dotted key."""
    if isinstance(node, list | tuple) and any(isinstance(item, dict) for item in node):
        node = {str(i): item for i, item in enumerate(node)}
    if not isinstance(node, dict):
        return {prefix: node if isinstance(node, str) else json.dumps(node)}
    inside = [flat(v, f"{prefix}.{k}" if prefix else str(k), without) for k, v in node.items() if k not in without]
    return {key: value for part in inside for key, value in part.items()}


# -- from a result to a run of a report


@dataclass(frozen=True)
class _Names:
    model: str
    method: str
    common: dict[str, str]


def _names(rows: list[ResultRow], lines: list[dict[str, Any]]) -> list[_Names]:
    """Unique names of model and method: where several share a name, the settings in which they differ are added."""
    configs = [current(moving_numbers(row.config)) for row in rows]
    weights = [{"weights": str(row.fingerprints.get("weights"))[:8]} for row in rows]
    nodes = [flat(config["model"]) | prints for config, prints in zip(configs, weights, strict=True)]
    models = disambiguated([str(line["model"]) for line in lines], nodes)
    common = [flat({k: v for k, v in c.items() if k not in ("sparsity", "evaluation")}, without=("seed",)) for c in configs]
    said = ("model.", "pruner.", "allocator.scorer.game.pruner.", "pattern")  # shown elsewhere
    rest = [{k.removeprefix("allocator.scorer."): v for k, v in node.items() if not k.startswith(said)} for node in common]
    labels = [re.sub(r", seed=\d+|(?<=\()seed=\d+(, )?", "", str(line["allocator"])).replace(" ()", "") for line in lines]
    by_model = disambiguated([f"{model}\n{label}" for model, label in zip(models, labels, strict=True)], rest)
    methods = [name.partition("\n")[2] for name in by_model]
    return [_Names(*each) for each in zip(models, methods, common, strict=True)]


def _measured(row: ResultRow, line: dict[str, Any], names: _Names, columns: Sequence[str]) -> Measured:
    numbers = []
    for name, metric in row.metrics.items():
        column = next((c for c in columns if _metric(c) == name and _finite(line.get(c)) is not None), None)
        before = _finite(row.dense[name].value) if name in row.dense else None
        stderr = _finite(metric.stderr)
        numbers.append(Number(name, column, _finite(metric.value), before, metric.protocol, stderr, metric.reason))
    status, made = str(line["status"]), row.provenance
    hardware, versions = made.hardware, made.versions
    told = {key: value for key, value in made.to_dict().items() if key not in ("command", "overrides")}
    told |= {"fingerprints": row.fingerprints, "seconds": round(row.seconds, 2), "peak_memory_bytes": row.peak_memory_bytes}
    budget = np.array(row.profile.sparsity if row.profile else [], dtype=float)
    return Measured(
        key=row.config_key,
        status=status,
        model=names.model,
        pruner=str(line["pruner"]),
        method=names.method,
        sparsity=float(line["sparsity"]),
        pattern=str(line["pattern"]),
        seed=str(line["seed"]),
        setting=str(line["setting"]),
        is_uniform=line["allocator"] == "uniform",
        common=names.common,
        numbers=numbers,
        actual=_finite(row.sparsity.actual) if row.sparsity else None,
        budget=budget,
        scores=_scores(row, len(budget)) if len(budget) else [],
        tried=[(p.label, _finite(p.loss)) for p in row.tuning.curve if p.n_seq is None] if row.tuning else [],
        n_tried=row.tuning.n_evaluations if row.tuning else 0,
        tries_losses=row.tuning is None or row.tuning.of_losses,
        trouble=_trouble(row, status),
        command=made.command,
        about={
            "Configuration": row.config,
            "Protocol": {name: metric.protocol.to_dict() for name, metric in row.metrics.items()},
            "Provenance": told,
        },
        machine=", ".join(filter(None, (hardware.cpu, *hardware.gpus) if hardware is not None else ())),
        versions=", ".join(f"{name} {versions[name]}" for name in ("svnup", "torch", "transformers") if name in versions),
    )


def _with_changes(runs: list[Measured], columns: Sequence[str]) -> list[Measured]:
    """The runs with the change of each perplexity against the uniform budget in the same setting."""
    uniform = {(run.setting, c): v for run in runs for c in columns if run.is_uniform and (v := run.value(c)) is not None}

    def against(run: Measured, number: Number) -> Number:
        base = uniform.get((run.setting, number.column or ""))
        if run.is_uniform or not is_perplexity(number.name) or number.value is None or not base:
            return number
        return replace(number, change=100 * (number.value / base - 1))

    return [replace(run, numbers=[against(run, n) for n in run.numbers]) for run in runs]


def _scores(row: ResultRow, n_blocks: int) -> list[Scores]:
    found = []
    for kind, told in (("Shapley value", row.shapley), ("score", row.scores)):
        if not told:
            continue
        values = np.array((told.of_blocks(n_blocks) if told.blocks else told.values) or (), dtype=float)
        if not len(values) or len(values) % n_blocks:
            continue  # a file from elsewhere: which blocks they are of is not known
        stderr = np.array(told.stderr or [], dtype=float)
        stderr = np.nan_to_num(stderr) if stderr.shape == values.shape else np.zeros(len(values))
        one = Scores(kind, told.method, values, stderr)
        if told is row.shapley:
            game = _game(row, n_blocks, len(values))
            payoff = game.get("game.payoff", "")
            cost = told.n_block_forwards, told.n_backward_passes
            one = replace(one, game=game, unit=UNITS.get(payoff, payoff), cost=cost)
        found.append(one)
    return found


def _game(row: ResultRow, n_blocks: int, n_players: int) -> dict[str, str]:
    """The settings of the game of a run's Shapley values, with dotted keys."""
    config = current(moving_numbers(row.config))
    game = dict((config["allocator"].get("scorer") or {}).get("game") or {})
    prunes = game.get("absence", "skip") != "skip"
    more = {key: config.get(key) for key in ("sparsity", "pattern", "dataset")} if prunes else {}
    game = game if prunes else {key: value for key, value in game.items() if key != "pruner"}
    weights = row.fingerprints.get("weights")
    return flat({"model": config["model"], "weights": weights, **more, "game": game, "layers": n_blocks, "n": n_players})


def _trouble(row: ResultRow, status: str) -> str:
    if row.error:
        return row.error
    if status == "fallback":
        done = sorted({one.fallback for one in (row.pruning.per_linear if row.pruning else ()) if one.fallback})
        return f"Not done as asked, and kept out of charts and rankings: {'; '.join(done)}"
    return "No result: this run has not ended, or was ended from outside." if status == "running" else ""


def _finite(value: Any) -> float | None:
    """A number, or None where it is missing, infinite or nan."""
    return None if value is None or not math.isfinite(value) else float(value)


def _metric(column: str) -> str:
    """The metric of a column: its name without what `tables.frame` adds in brackets."""
    return re.split(r" [\[(]", column)[0]

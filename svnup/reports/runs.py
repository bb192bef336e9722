"""One run as text, and all runs as records for other programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from svnup.keys import flatten
from svnup.reports.grid import Cell, Grid
from svnup.reports.pivot import number
from svnup.results.row import ResultRow
from svnup.results.select import MISSING, fallback_of, settings, uniform_taken, word
from svnup.types import player_names

MOST_EXPERTS = 8  # of a block that are named in a table


def find(rows: Iterable[ResultRow], prefix: str) -> ResultRow:
    """The run whose key has this prefix; raises ValueError if none or several have it."""
    rows = list(rows)
    found = {row.config_key: row for row in rows if row.config_key.startswith(prefix)}
    if len(found) == 1:
        return next(iter(found.values()))
    keys = sorted(found or {row.config_key for row in rows})
    shown = ", ".join(keys[:8]) + (", ..." if len(keys) > 8 else "")
    raise ValueError(
        f"{prefix}: {'several runs have this prefix' if found else 'no run has a key with this prefix; there are'}: {shown}"
    )


def show(row: ResultRow, defaults: Mapping[str, Any]) -> str:
    """A run in sections: settings, metrics, sparsity, layers, cost, provenance and inputs.

    Args:
        row: the result.
        defaults: the configuration without overrides; only settings that differ from it are shown.
    """
    fallback = fallback_of(row)
    out = [f"run {row.config_key}: {row.status}" + (f", pruning fell back: {fallback}" if fallback else "")]
    out += [f"  {row.error}"] if row.error else []
    out += [f"  {taken}"] if (taken := uniform_taken(row)) else []
    sections = {
        "settings apart from the defaults": _changes(settings(row.config), settings(defaults)),
        "metrics": _metrics(row),
        "sparsity": {} if row.sparsity is None else {k: word(v) for k, v in row.sparsity.to_dict().items()},
        "layers": _layers(row),
        "cost": _cost(row),
        "provenance": _provenance(row),
        "inputs": row.fingerprints,
    }
    for title, content in sections.items():
        if isinstance(content, Grid):
            out += ["", title, *("  " + line for line in content.render("terminal").splitlines())]
        elif content:
            width = max(map(len, content))
            out += ["", title, *(f"  {name:{width}}  {text}" for name, text in content.items())]
    return "\n".join(out) + "\n"


def _provenance(row: ResultRow) -> dict[str, str]:
    """The provenance without the text of the difference to the commit, which is in result.json."""
    found = row.provenance.to_dict()
    diff = found.pop("diff", None)
    shown = {k: word(v) for k, v in flatten(found).items() if v is not None}
    return shown | ({"diff": f"{len(diff):,} characters, in result.json"} if diff else {})


def _changes(mine: Mapping[str, str], usual: Mapping[str, str]) -> dict[str, str]:
    changed = {key: text for key, text in mine.items() if text != usual.get(key)}
    return {k: f"{text}  (default {usual[k]})" if k in usual else text for k, text in changed.items()}


def _metrics(row: ResultRow) -> Grid | None:
    names = sorted({*row.dense, *row.metrics})
    head: list[tuple[str, ...]] = [("metric",), ("dense",), ("pruned",), ("change",), ("protocol",)]
    lines = []
    for name in names:
        before, after = row.dense.get(name), row.metrics.get(name)
        dense, pruned = (of.value if of is not None else None for of in (before, after))
        change = MISSING if not dense or pruned is None else f"{100 * (pruned / dense - 1):+.1f} %"
        protocol = (after or row.dense[name]).protocol.to_dict()
        said = ", ".join(f"{k} {word(v)}" for k, v in flatten(protocol).items() if len(word(v)) <= 16)
        lines.append([name, *(MISSING if v is None else number(v) for v in (dense, pruned)), change, said])
    return Grid(head, [[Cell(text) for text in line] for line in lines]) if lines else None


def _layers(row: ResultRow) -> Grid | None:
    """Score, standard error and sparsity of each block; scores of attention and MLP have a line each, those of experts are
    summed, and the experts with the highest ones named by their numbers."""
    if row.profile is None:
        return None
    sparsity, scores = row.profile.sparsity, row.shapley or row.scores
    n = len(sparsity)
    actual = row.profile.actual or [None] * n
    columns: dict[str, Sequence[Any]] = {"layer": range(n), "sparsity": sparsity, "actual": actual}
    if scores is not None and scores.blocks and (sums := scores.of_blocks(n)) is not None:
        named = sorted(zip(scores.blocks, scores.values, scores.experts, strict=True), key=lambda one: -one[1])
        best = [[expert.rpartition(".")[2] for block, _, expert in named if block == index] for index in range(n)]
        columns |= {"score of its experts": sums, "experts by score": [" ".join(of[:MOST_EXPERTS]) for of in best]}
    elif scores is not None and len(scores.values) in (n, 2 * n):  # those of linear layers would fill pages
        values = scores.values
        errors = scores.stderr or [None] * len(values)
        per_block = len(values) // n
        columns = {
            "layer": range(n) if per_block == 1 else player_names(n),
            "Shapley value" if row.shapley else "score": values,
            **({"stderr": errors} if any(e is not None for e in errors) else {}),
            **{name: [x for x in column for _ in range(per_block)] for name, column in columns.items() if name != "layer"},
        }
    texts = [
        [MISSING if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in line]
        for line in zip(*columns.values(), strict=True)
    ]
    return Grid([(name,) for name in columns], [[Cell(text) for text in line] for line in texts])


def _cost(row: ResultRow) -> dict[str, str]:
    counts = ("n_evaluations", "n_new_evaluations", "n_block_forwards", "n_backward_passes", "seconds")
    out: dict[str, str] = {}
    for stage, of in (("scores", row.shapley or row.scores), ("tuning", row.tuning)):
        out |= {f"{stage} {k}": word(round(spent, 2)) for k in counts if (spent := getattr(of, k, 0))}
    out |= {f"pruning seconds, {k}": f"{v:.2f}" for k, v in row.pruning.seconds.items()} if row.pruning is not None else {}
    out |= {"seconds": f"{row.seconds:.2f}"} if row.seconds else {}
    return out | ({"peak memory": f"{row.peak_memory_bytes / 2**20:.0f} MiB"} if row.peak_memory_bytes else {})


def records(rows: Iterable[ResultRow]) -> list[dict[str, Any]]:
    """One flat mapping per run and metric (one per run without metrics): values, protocol and the whole configuration."""
    out = []
    for row in sorted(rows, key=lambda row: row.config_key):
        common: dict[str, Any] = {"key": row.config_key, "status": row.status, "fallback": fallback_of(row), "error": row.error}
        common |= {"actual_sparsity": row.sparsity.actual if row.sparsity else None, "seconds": row.seconds}
        config = {f"config.{k}": v for k, v in flatten(row.config).items()}
        names: list[str] = sorted({*row.dense, *row.metrics})
        for name in names or [""]:
            metric, dense = row.metrics.get(name), row.dense.get(name)
            measured: dict[str, Any] = {"metric": name or None}
            measured |= {"value": metric.value if metric else None, "dense": dense.value if dense else None}
            measured |= {"stderr": metric.stderr if metric else None, "reason": metric.reason if metric else None}
            told = metric or dense
            protocol = {f"protocol.{k}": v for k, v in flatten(told.protocol.to_dict()).items()} if told else {}
            out.append({**common, **measured, **protocol, **config})
    return out


def jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    """Mappings as JSON lines."""
    return "".join(json.dumps(row, sort_keys=False) + "\n" for row in rows)

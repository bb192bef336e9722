"""The flat table of results, one line per run; numbers of different protocols never share a column."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from svnup.keys import flatten
from svnup.naming import allocator_name, current, method_name, moving_numbers, pruner_name, recovery_name
from svnup.pattern import UNSTRUCTURED
from svnup.reports.grid import Cell, Grid, csv_text
from svnup.reports.pivot import notes_on_errors, notes_on_inputs
from svnup.results.row import Protocol, ResultRow
from svnup.results.select import fallback_of, model_of, short_names, uniform_taken, word

LIMITED = " (limit "  # in names of columns with numbers of part of a task, which have no change
IDENTITY = ["model", "pruner", "allocator", "sparsity", "pattern", "seed"]


def frame(rows: list[ResultRow]) -> pd.DataFrame:
    """One line per run: settings, target and actual sparsity, and each metric, pruned and dense, in a column per protocol."""
    names = _metric_columns(rows)
    lines = []
    for row, pruner in zip(rows, _pruners(rows), strict=True):
        line: dict[str, Any] = describe(row) | {"pruner": pruner, "status": row.status, "setting": _setting(row)}
        if fallback_of(row):
            lines.append(line | {"status": "fallback", "seconds": round(row.seconds, 1), "key": row.config_key})
            continue  # not pruned as asked: its numbers are in its result, and in no table
        if row.sparsity is not None:
            line |= {"actual": row.sparsity.actual}
        for name, metric in row.metrics.items():
            if metric.secondary:
                continue
            if metric.value is None:
                line["status"] = "failed"  # the run is finished, but the metric has no value
            column = names[name, _digest(metric.protocol)]
            line |= {
                column: metric.value,
                f"{column} dense": row.dense[name].value if name in row.dense else None,
            }
        lines.append(line | {"seconds": round(row.seconds, 1), "key": row.config_key})
    data = pd.DataFrame(lines)
    data["model"] = data["model"].map(short_names(data["model"]))  # saved models are all called model
    return data.sort_values(IDENTITY, kind="stable").reset_index(drop=True)


def _pruners(rows: list[ResultRow]) -> list[str]:
    """The pruner of each run, with the options, its own and those of its recovery, in which runs of the same one differ."""
    parts = [row.config["pruner"] | (row.config["recovery"] if recovery_name(row.config) else {}) for row in rows]
    nodes = [{k: v for k, v in part.items() if k not in ("_target_", "pattern", "base")} for part in parts]
    names = [pruner_name(row.config) for row in rows]
    values: dict[tuple[str, str], set[str]] = {}
    for name, node in zip(names, nodes, strict=True):
        for key, value in node.items():
            values.setdefault((name, key), set()).add(str(value))
    shown = [[f"{k}={v}" for k, v in node.items() if len(values[name, k]) > 1] for name, node in zip(names, nodes, strict=True)]
    return [f"{name} ({', '.join(words)})" if words else name for name, words in zip(names, shown, strict=True)]


def describe(row: ResultRow) -> dict[str, Any]:
    """The display names of a run's model, pruner and allocator, with its sparsity, pattern and seed."""
    config = row.config
    scorer = config["allocator"].get("scorer")
    shared = config["allocator"].items()  # options that a scorer takes from its allocator are shown once
    own = {k: v for k, v in (scorer or {}).items() if (k, v) not in shared}
    words = [_method(scorer) if "game" in scorer else _options(own)] if scorer else []
    split = config.get("split", {"_target_": "UniformSplit"})  # results of earlier versions have none
    if (inside := method_name(split).removesuffix("split")) != "uniform":
        words.append(", ".join(filter(None, (f"split by {inside}", _options(split)))))
    words = [word for word in (*words, _options(config["allocator"])) if word]
    if row.tuning is not None and row.tuning.kind != "nll":
        words.append(f"by {row.tuning.kind}")
    words += _other_texts(row)
    words += ["uniform taken"] if uniform_taken(row) else []
    return {
        "model": model_of(config),
        "pruner": pruner_name(config),
        "allocator": allocator_name(config["allocator"]) + (f" ({', '.join(words)})" if words else ""),
        "sparsity": config["sparsity"],
        "pattern": config["pattern"],
        "seed": config["seed"],
    }


def _other_texts(row: ResultRow) -> list[str]:
    """What a budget was measured and chosen on, where that is another data set than the one that calibrates."""
    config: Mapping[str, Any] = row.config
    usual, allocator = config.get("dataset", {}).get("_target_"), config["allocator"]
    payoff = allocator.get("data") or (allocator.get("scorer") or {}).get("game", {}).get("data")
    read = {"values": payoff, "choice": config.get("selection") if row.tuning is not None else None}
    return [
        " ".join([what, "on", method_name(text), *([Path(text["path"]).name] if method_name(text) == "textfile" else [])])
        for what, text in read.items()
        if text and usual and text["_target_"] != usual
    ]


def _options(node: dict[str, Any]) -> str:
    """A node's options in words: texts as they are, numbers with their name."""
    hidden = ("_target_", "scorer", "path", "granularity", "compare_uniform")  # the third is in the method's name
    options = {
        k: v for k, v in node.items() if k not in hidden and v is not None and v is not False and not isinstance(v, dict)
    }
    return ", ".join(
        v if isinstance(v, str) and v != "auto" else k if v is True else f"{k}={_value(v)}" for k, v in options.items()
    )


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(_value, value))
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _method(scorer: dict[str, Any]) -> str:
    """Estimator and game in a few words; defaults are left out."""
    words = [scorer["_target_"].rpartition(".")[2].lower()]
    words += [f"w={scorer['window']}"] if "window" in scorer else []
    words += [f"{k}={scorer[k]}" for k in ("budget", "nodes", "sampling", "approximator") if k in scorer]
    words += [
        f"{k}={scorer[k]}" for k, usual in (("context", "present"), ("aggregation", "mean")) if scorer.get(k, usual) != usual
    ]
    game = scorer.get("game", {})
    usual_game = {"payoff": "recip_ppl", "cap": "none", "absence": "skip", "players": "block"}
    return " ".join(words + [f"{k}={game[k]}" for k, usual in usual_game.items() if game.get(k, usual) != usual])


def _setting(row: ResultRow) -> str:
    """A hash of all that a run shares with its uniform counterpart: settings without the budget, and weights."""
    config = {k: v for k, v in current(moving_numbers(row.config)).items() if k not in ("allocator", "split")}
    return hashlib.sha256(json.dumps([config, row.fingerprints.get("weights")], sort_keys=True).encode()).hexdigest()


def render(rows: list[ResultRow], form: str, title: str | None = None, command: str | None = None, ansi: bool = False) -> str:
    """The table of some runs as text.

    Args:
        rows: the results.
        form: one of `grid.FORMATS`; except in CSV, seed, pattern and status are left out if they are the default in all lines.
        title: of the table.
        command: that makes it.
        ansi: whether a terminal shows bold.
    """
    data = frame(rows)
    if form == "csv":
        shown = data.drop(columns="setting").astype(object)
        return csv_text(shown.where(shown.notna(), None).to_dict("records"))  # type: ignore[arg-type]
    drop = [c for c, same in (("seed", 0), ("pattern", UNSTRUCTURED), ("status", "finished")) if (data[c] == same).all()]
    shown = _with_change(data).drop(columns=[*drop, "setting", "seconds", "key"])
    notes = [*(f"{note}." for note in notes_on_errors(_errors(rows))), *notes_on_inputs(rows)]
    return flat(shown, title, about(rows, command), notes).render(form, ansi)


def _errors(rows: list[ResultRow]) -> dict[str, list[float]]:
    """Standard errors of the metrics that the table shows and that have one."""
    found: dict[str, list[float]] = {}
    for row in (row for row in rows if not fallback_of(row)):
        for name, metric in row.metrics.items():
            if metric.stderr is not None and not metric.secondary:
                found.setdefault(name, []).append(metric.stderr)
    return found


def listing(rows: list[ResultRow], sort: str | None = None) -> Grid:
    """One line per run, with failed and running ones.

    Args:
        rows: the results.
        sort: the column to sort by; None sorts by settings.

    Raises:
        ValueError: there is no such column.
    """
    data = frame(rows)
    if sort is not None and sort not in data.columns:
        raise ValueError(f"--sort {sort}: choose {', '.join(c for c in data.columns if c != 'setting')}")
    if sort is not None:
        data = data.sort_values([sort, *IDENTITY, "key"], kind="stable", na_position="last")
    first = ["key", "status"]
    rest = [c for c in data.columns if c not in (*first, "setting", "actual") and not c.endswith(" dense")]
    return flat(data[first + rest])


def flat(data: pd.DataFrame, title: str | None = None, about: str = "", notes: Sequence[str] = ()) -> Grid:
    """A data frame as a grid."""
    shown = data.astype(object)
    lines = [[Cell(_cell(c, v)) for c, v in zip(shown.columns, line, strict=True)] for line in shown.itertuples(index=False)]
    records: list[dict[str, Any]] = shown.to_dict("records")  # type: ignore[assignment]
    metrics = [str(column) for column in shown.columns if "/" in column and not column.endswith((" dense", " vs uniform"))]
    head: list[tuple[str, ...]] = [(str(column),) for column in shown.columns]
    return Grid(head, lines, title, about, list(notes), records=records, subject=", ".join(metrics))


def _with_change(data: pd.DataFrame) -> pd.DataFrame:
    """The data with a column beside each metric: its change in percent against the uniform budget in the same setting."""
    out = data.copy()
    for column in [c for c in data.columns if "/" in c and not c.endswith("dense") and LIMITED not in c]:
        uniform = (
            data[(data["allocator"] == "uniform") & data[column].notna()]
            .drop_duplicates("setting")
            .set_index("setting")[column]
        )
        base = [uniform.get(setting, float("nan")) for setting in data["setting"]]
        change = pd.Series([100 * (v / b - 1) for v, b in zip(data[column], base, strict=True)], index=data.index)
        out.insert(list(out.columns).index(column) + 1, f"{column} vs uniform", change.where(data["allocator"] != "uniform"))
    return out


def _cell(column: str, value: Any) -> str:
    if value is None or value != value:
        return "-"
    if column.endswith("vs uniform"):
        return f"{value:+.1f} %"
    if column == "actual":
        return f"{value:.4f}"
    return f"{value:.2f}" if "/" in column else f"{value:g}" if isinstance(value, float) else str(value)


def about(rows: list[ResultRow], command: str | None = None) -> str:
    """Where the numbers come from: command, machines, versions and protocols."""
    machines = [machine for row in rows if (machine := row.provenance.hardware) is not None]
    hardware = {f"{machine.cpu}, {machine.cores} cores" for machine in machines}
    hardware |= {gpu for machine in machines for gpu in machine.gpus}
    told = [{name: row.provenance.versions.get(name) for name in ("svnup", "torch")} for row in rows]
    versions = {", ".join(f"{name} {version}" for name, version in one.items() if version is not None) for one in told}
    protocols = {_in_words(name, m.protocol) for row in rows for name, m in row.metrics.items() if not m.secondary}
    made = f"Made by `{command}`. " if command else ""
    parts = [
        f"{made}Machine: {'; '.join(sorted(hardware))}",
        *("; ".join(sorted(filter(None, p))) for p in (versions, protocols)),
    ]
    return ". ".join(filter(None, parts)) + "."


def _in_words(name: str, protocol: Protocol) -> str:
    if (n := protocol.n_windows) is not None:
        which = f", its windows {protocol.skip + 1} to {protocol.skip + n}" if protocol.skip else ""
        return f"{name}: {n} windows of {protocol.seq_len} tokens ({protocol.role} text{which})"
    if protocol.n_items is None and protocol.tasks is None:  # of an evaluation from outside svnup
        return f"{name}: {', '.join(f'{key} {word(value)}' for key, value in flatten(protocol.to_dict()).items())}"
    limit = "" if protocol.complete else f", limit {protocol.limit}"
    what = f"mean over {', '.join(protocol.tasks)}" if protocol.tasks is not None else f"{protocol.n_items} items"
    bos = {True: ", with BOS", False: ", without BOS", None: ""}[protocol.add_bos_token]  # unknown in older results
    return f"{name}: {what}, {protocol.num_fewshot}-shot{bos}, in %{limit}"


def _digest(protocol: Protocol) -> str:
    return hashlib.sha256(json.dumps(protocol.to_dict(), sort_keys=True).encode()).hexdigest()[:6]


def _metric_columns(rows: list[ResultRow]) -> dict[tuple[str, str], str]:
    """The column of each metric and protocol: its name, with the protocol's hash if there are several, and its limit."""
    seen: dict[str, dict[str, int | None]] = {}
    for row in rows:
        for name, metric in row.metrics.items():
            seen.setdefault(name, {})[_digest(metric.protocol)] = metric.protocol.limit
    return {
        (name, digest): name + (f" [{digest}]" if len(limits) > 1 else "") + (f"{LIMITED}{limit})" if limit is not None else "")
        for name, limits in seen.items()
        for digest, limit in limits.items()
    }

"""Pivot tables of runs: methods in rows, models or tasks in columns.

A cell is the mean over seeds of runs that agree in all other settings. Runs that cannot be compared are refused with a fix. A
run that was not pruned as asked is named and left out of means: nothing is averaged or dropped silently.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from svnup.keys import flatten
from svnup.reports.grid import Cell, Grid
from svnup.results.row import Dequantized, ResultRow
from svnup.results.select import (
    METRIC,
    MISSING,
    Label,
    Run,
    Where,
    check_key,
    fallback_of,
    is_seed,
    listed,
    model_of,
    same,
    uniform_taken,
    word,
)
from svnup.types import LOCAL_COPY

# Fields of a protocol that depend on the model.
OF_MODEL = ("tokens_sha256", "n_windows", "n_tokens", "n_truncated", "batch_size", "add_bos_token")
DIGESTS = ("text", "tokens_sha256", "items_sha256")
LOWER_IS_BETTER = ("ppl", "perplexity", "nll", "loss", "bits_per_byte")
CONDITIONS = ("model", "sparsity", "pattern", METRIC)  # keys under whose values methods are compared
STATES = ("running", "dead", "interrupted", "fail", "fallback", "limit", "protocol")  # why a run has no number in a table


def notes_on_inputs(rows: Iterable[ResultRow]) -> list[str]:
    """Notes on inputs that no setting shows: files that weights were dequantized from, and local copies of data sets."""
    weights, texts = set(), set()
    for row in rows:
        if (origin := row.provenance.dequantized_from) is not None:
            weights.add(f"Weights of {model_of(row.config)}: dequantized from {_origin(origin)}.")
        for name, content, digest in (text.partition(LOCAL_COPY) for text in row.fingerprints.values()):
            if content:
                texts.add(f"{name} (SHA-256 {digest[:16]})")
    return [*sorted(weights), *([f"Texts from local copies: {', '.join(sorted(texts))}."] if texts else [])]


def _origin(origin: Dequantized) -> str:
    """A quantized file or checkpoint in words."""
    if origin.quantization_config is not None:
        return f"a checkpoint in {origin.quantization_config.get('quant_method')}"
    file = " of ".join(filter(None, (origin.file or origin.gguf_file, origin.package)))
    return f"{file} ({origin.quantization or ', '.join(origin.tensors)}, SHA-256 {origin.sha256})"


@dataclass(frozen=True)
class Summary:
    """The numbers of one cell.

    Args:
        values: one per seed.
        states: why other runs have no number.
        seeds: the seeds of each value's job, without those of methods.
        errors: the standard error over items of each value.
    """

    values: tuple[float, ...] = ()
    states: tuple[str, ...] = ()
    seeds: tuple[Label, ...] = ()
    errors: tuple[float | None, ...] = ()

    def against(self, base: Summary) -> float | None:
        """Relative change of the mean over the seeds that both have; None if they share none."""
        common = set(self.seeds) & set(base.seeds)
        mine, other = (
            [v for v, seed in zip(summary.values, summary.seeds, strict=True) if seed in common] for summary in (self, base)
        )
        return statistics.fmean(mine) / statistics.fmean(other) - 1 if common and any(other) else None

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.values) if self.n > 1 else None

    @property
    def spread(self) -> float | None:
        """The number after ±: the standard deviation over seeds, or the standard error over items of a single number."""
        return self.std if self.n > 1 else next(iter(self.errors), None)

    @property
    def state(self) -> str:
        """Why there is no number: the last of STATES that applies."""
        return next((state for state in reversed(STATES) if state in self.states), MISSING)


@dataclass(frozen=True)
class Pivot:
    """A pivot table of runs.

    Args:
        by: the keys of the rows.
        across: the keys of the columns.
        metrics: the metrics.
        units: the metrics with their units.
        cells: by the labels of row and column.
        dense: numbers of dense models by their labels.
        baseline: the keys and values that changes are relative to.
        notes: below the table.
        where: for a key, the order of its values.
    """

    by: tuple[str, ...]
    across: tuple[str, ...]
    metrics: tuple[str, ...]
    units: tuple[str, ...]
    cells: Mapping[tuple[Label, Label], Summary]
    dense: Mapping[Label, Summary]
    baseline: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    where: Where = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[Label]:
        return self._sorted({row for row, _ in self.cells}, self.by)

    @cached_property
    def columns(self) -> list[Label]:
        return self._sorted({column for _, column in self.cells}, self.across)

    def _sorted(self, labels: Iterable[Label], keys: Sequence[str]) -> list[Label]:
        """Labels in the order of --where or --metric, then the baseline, then numbers by size, then words."""
        given = {**self.where, METRIC: self.metrics}

        def place(key: str, text: str) -> tuple[int, bool, float, str]:
            named = [i for i, value in enumerate(given.get(key, ())) if same(key, text, value)]
            first = not any(same(key, text, value) for value in [self.baseline[key]]) if key in self.baseline else True
            try:
                return (named or [len(given.get(key, ()))])[0], first, float(text), ""
            except ValueError:
                return (named or [len(given.get(key, ()))])[0], first, math.inf, text

        return sorted(labels, key=lambda label: [place(k, t) for k, t in zip(keys, label, strict=True)])

    def labels(self, row: Label, column: Label) -> dict[str, str]:
        """The labels of a cell by key."""
        return dict(zip(self.by + self.across, row + column, strict=True))

    def metric(self, row: Label, column: Label) -> str:
        """The metric of a cell."""
        return self.labels(row, column).get(METRIC, self.metrics[0] if self.metrics else "")

    def dense_of(self, row: Label, column: Label) -> Summary:
        """The numbers of a cell's dense model."""
        return self.dense.get(tuple(t for k, t in self.labels(row, column).items() if _of_dense(k)), Summary())

    def change(self, row: Label, column: Label) -> float | None:
        """Relative change of a cell against its baseline over common seeds; None if there is none.

        The baseline differs from the cell only in the baseline's keys and in options of their groups (`allocator.lam` of
        `allocator`).

        Raises:
            ValueError: several cells qualify.
        """
        if not self.baseline or not self.cells[row, column].n:
            return None
        mine = self.labels(row, column)
        fixed = [k for k in mine if k not in self.baseline and not any(_within(k, group) for group in self.baseline)]
        found = []
        for (r, c), summary in self.cells.items():
            labels = self.labels(r, c)
            if all(same(k, labels[k], v) for k, v in self.baseline.items()) and all(labels[k] == mine[k] for k in fixed):
                found.append(((r, c), summary))
        if len(found) > 1:
            free = [k for k in mine if k not in self.baseline and k not in fixed]
            raise ValueError(f"--baseline: {len(found)} cells qualify; name {', '.join(free)} in it too")
        return self.cells[row, column].against(found[0][1]) if found else None

    @property
    def down(self) -> bool:
        """Whether methods are compared within a column, which they are unless rows have only conditions."""
        return any(not _condition(key) for key in self.by)

    def best(self) -> set[tuple[Label, Label]]:
        """The cells with the best number, after rounding, of each column, or of each row if methods are in columns."""
        down = self.down
        groups: dict[Label, list[tuple[Label, Label]]] = {}
        for row, column in self.cells:
            own, other = (column, row) if down else (row, column)
            keys = self.by if down else self.across
            groups.setdefault(own + tuple(t for k, t in zip(keys, other, strict=True) if _condition(k)), []).append(
                (row, column)
            )
        best = set()
        for places in groups.values():
            means = {place: mean for place in places if (mean := self.cells[place].mean) is not None}
            if len(means) < 2:
                continue
            metric = self.metric(*places[0])
            pick = min if lower_is_better(metric) else max
            top = number(pick(means.values()))
            best |= {place for place, mean in means.items() if number(mean) == top}
        return best


def lower_is_better(metric: str) -> bool:
    """Whether a lower value of a metric is better, by its name."""
    return metric.rpartition("/")[2] in LOWER_IS_BETTER


def _condition(key: str) -> bool:
    return key.partition(".")[0] in CONDITIONS


def _within(key: str, group: str) -> bool:
    """Whether a key is an option of a group; the estimator and the selection text belong to the allocator."""
    return key.startswith(f"{group}.") or (group == "allocator" and key.partition(".")[0] in ("shapley", "selection"))


def pivot(
    runs: Sequence[Run],
    by: Sequence[str],
    across: Sequence[str],
    metrics: Sequence[str],
    *,
    where: Where | None = None,
    baseline: Mapping[str, str] | None = None,
) -> Pivot:
    """Make a pivot table.

    Args:
        runs: the runs.
        by: the keys of the rows.
        across: the keys of the columns.
        metrics: the metrics.
        where: for a key, the order of its values.
        baseline: the keys and values that changes are relative to.

    Raises:
        ValueError: runs differ in a key that is neither row, column nor seed, a metric was measured under several protocols,
            or an option names a key or value that no run has.
    """
    by, across = tuple(by), tuple(across)
    if METRIC not in by + across and (len(metrics) > 1 or not across):
        across = (*across, METRIC)
    for option, keys in (("--rows", by), ("--columns", across), ("--baseline", tuple(baseline or ()))):
        for key in keys:
            check_key(key, runs, option)
    if twice := next((key for key in by + across if (by + across).count(key) > 1), None):
        raise ValueError(f"--rows, --columns: {twice} is there twice; name each key once")
    for key, value in (baseline or {}).items():
        if key not in by + across:
            raise ValueError(
                f"--baseline {key}={value}: {key} is neither a row nor a column; add it to --rows, or choose one of them"
            )
        there = set(metrics) if key == METRIC else {run.settings.get(key, MISSING) for run in runs}
        if not any(same(key, text, value) for text in there):
            raise ValueError(f"--baseline {key}={value}: no run has it; there {listed(there, value)}")
    check_settings(runs, by, across)
    check_inputs(runs)
    for metric in metrics:
        check_protocols(runs, metric)

    cells: dict[tuple[Label, Label], list[tuple[Run, str]]] = {}
    dense: dict[Label, list[tuple[Run, str]]] = {}
    for run, metric in ((run, metric) for run in runs for metric in metrics):
        labels = {**run.settings, METRIC: metric}
        row, column = (tuple(labels.get(key, MISSING) for key in keys) for keys in (by, across))
        cells.setdefault((row, column), []).append((run, metric))
        of_model = tuple(labels.get(key, MISSING) for key in by + across if _of_dense(key))
        dense.setdefault(of_model, []).append((run, metric))
    summaries = {place: summarize(entries) for place, entries in cells.items()}
    before = {label: _dense(entries) for label, entries in dense.items()}
    notes = tuple(dict.fromkeys([*_notes(runs, metrics), *notes_on_inputs(run.row for run in runs)]))
    percent = {name for run in runs for name, metric in run.metrics.items() if metric.protocol.unit == "%"}
    names = tuple(f"{name} (%)" if name in percent else name for name in metrics)
    return Pivot(by, across, tuple(metrics), names, summaries, before, dict(baseline or {}), notes, dict(where or {}))


def _of_dense(key: str) -> bool:
    return key == METRIC or key.partition(".")[0] == "model"


def _dense(entries: Iterable[tuple[Run, str]]) -> Summary:
    there = [run.dense[metric] for run, metric in entries if metric in run.dense]
    errors = {m.value: m.stderr for m in there if m.protocol.limit is None and m.value is not None}
    return Summary(tuple(sorted(errors)), errors=tuple(errors[value] for value in sorted(errors)))


def summarize(entries: Sequence[tuple[Run, str]]) -> Summary:
    """The numbers of runs that differ only in their seeds.

    Args:
        entries: runs, each with the metric to take.

    Raises:
        ValueError: one seed has two different numbers; two equal ones count once.
    """
    values: dict[Label, tuple[float, str, Label, float | None]] = {}
    states: dict[Label, str] = {}
    for run, metric in entries:
        seeds, key = run.seeds(), run.row.config_key
        if (state := run.state(metric)) is not None:
            states[seeds] = max(state, states.get(seeds, MISSING), key=[MISSING, *STATES].index)
            continue
        value, error = run.metrics[metric].value, run.metrics[metric].stderr
        assert value is not None
        other, other_key, *_ = values.setdefault(seeds, (value, key, run.seeds(of_method=False), error))
        if other != value:
            first, second = sorted((key, other_key))
            way = f"keep one with --where key={first}" if first != second else "name the folder of one"
            low, high = sorted((value, other))
            raise ValueError(
                f"{metric}: runs {first} and {second} have the same settings and seeds and different numbers, {low:g} "
                f"and {high:g} (other code, inputs or machine); {way}"
            )
    left = sorted(state for seeds, state in states.items() if seeds not in values and state != MISSING)
    numbers = sorted(values.values(), key=lambda number: number[:3])
    return Summary(tuple(n[0] for n in numbers), tuple(left), tuple(n[2] for n in numbers), tuple(n[3] for n in numbers))


def check_settings(runs: Sequence[Run], by: Sequence[str], across: Sequence[str]) -> None:
    """Raise ValueError if runs differ in a key that the table does not show.

    Options of a group in rows or columns may differ between methods (Wanda has other options than SparseGPT), and texts and
    lengths between models; `evaluation` is compared by its protocols.
    """
    shown = (*by, *across)
    names = {key: None for run in runs for key in run.settings}
    hidden = [k for k in names if k not in (*shown, "status", "key") and not is_seed(k) and k.partition(".")[0] != "evaluation"]
    columns = {key: [run.settings.get(key, MISSING) for run in runs] for key in names}
    differing = []
    for key in hidden:
        if any(columns[key] == columns[other] for other in shown if other in columns):
            continue  # equal to a shown key in all runs
        owners = [k for k in shown if _within(key, k) or (k == "model" and _comes_with_model(key))]
        values: dict[Label, set[str]] = {}
        for index, text in enumerate(columns[key]):
            values.setdefault(tuple(columns[owner][index] for owner in owners), set()).add(text)
        if any(len(texts) > 1 for texts in values.values()):
            differing.append(key)
    if not differing:
        return
    differing.sort(key=lambda k: (k.count("."), k))
    key = differing[0]
    texts = sorted(set(columns[key]), key=_by_size)
    others = [k for k in differing if k != key and not any(_within(k, group) for group in differing)]
    keep = next(text for text in texts if text != MISSING) + (f",{MISSING}" if MISSING in texts else "")
    also = f" (also in {', '.join(others[:4])})" if others else ""
    raise ValueError(
        f"the runs differ in {key} ({', '.join(texts[:6])}{', ...' if len(texts) > 6 else ''}), which is neither row, column "
        f"nor seed{also}: add it, --rows {','.join([*by, key])}, or keep one, --where {key}={keep}"
    )


def check_inputs(runs: Sequence[Run]) -> None:
    """Raise ValueError if runs with the same settings read different weights or texts by their fingerprints."""
    first: dict[tuple[str, ...], tuple[str, str]] = {}
    for run in (r for r in runs if r.row.status == "finished"):
        for name, digest in run.row.fingerprints.items():
            node = "model" if name == "weights" else name.removesuffix(" code")
            own = [f"{k}={v}" for k, v in run.settings.items() if (k == node or k.startswith(f"{node}.")) and not is_seed(k)]
            key, other = first.setdefault((name, run.settings["model"], *own), (run.row.config_key, digest))
            if other != digest:
                raise ValueError(
                    f"{name}: runs {key} and {run.row.config_key} have the same settings and read different {name} "
                    f"({other[:8]}, {digest[:8]}); run one again with force=true, or name the folder of one kind"
                )


def _comes_with_model(key: str) -> bool:
    return key.startswith(("dataset", "selection", "shapley.game.data")) and not key.endswith(".n_seq")


def _by_size(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text


def check_protocols(runs: Sequence[Run], metric: str) -> None:
    """Raise ValueError if protocols of a metric differ in more than what depends on the model."""
    entries = [
        (run.settings["model"], flatten(of[metric].protocol.to_dict()))
        for run in runs
        if run.state(metric) in (None, "fail")
        for of in (run.metrics, run.dense)
        if metric in of and of[metric].protocol.limit is None
    ]
    differing: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for _, protocol in entries for name in protocol):
        texts: dict[str, set[str]] = {}
        for model, protocol in entries:
            last = name.rpartition(".")[2]
            brought = last in OF_MODEL and (protocol.get("complete", True) or last == "tokens_sha256")
            texts.setdefault(model if brought else "", set()).add(word(protocol.get(name)))
        if any(len(found) > 1 for found in texts.values()):
            differing[name] = sorted(set().union(*texts.values()), key=_by_size)
    if not differing:
        return
    said = {name: texts for name, texts in differing.items() if name not in DIGESTS} or differing
    name, values = next(iter(said.items()))
    what = "; ".join(f"{k} is {' or '.join(text[:40] for text in texts[:4])}" for k, texts in list(said.items())[:3])
    ways = " and once with ".join(f"--where protocol.{name}={text}" for text in values[:4])
    raise ValueError(
        f"{metric} was measured under different protocols, which never share a table: {what}; make one with {ways}"
    )


def _notes(runs: Sequence[Run], metrics: Sequence[str]) -> Iterable[str]:
    """Runs that are left out and why, standard errors, and how exactly the sparsity was met."""
    actual: dict[float, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for run in sorted(runs, key=lambda run: run.row.config_key):
        name = f"{run.row.config_key} ({run.settings['model']}, {run.settings['pruner']}, {run.settings['allocator']})"
        for metric in metrics:
            state = run.state(metric)
            if state == "limit":
                yield f"Left out: {name}, {metric} was measured on limit={run.metrics[metric].protocol.limit} items."
            elif state == "fallback":
                yield f"Left out: {name}, its pruning fell back: {fallback_of(run.row)}."
            elif state == "fail":
                reason = run.metrics[metric].reason if metric in run.metrics else run.row.error
                yield f"Failed: {name}, {' '.join(str(reason).split())[:160]}."
            elif state is None:
                if (taken := uniform_taken(run.row)) is not None:
                    yield f"Uniform: {name}, {taken}."
                if (stderr := run.metrics[metric].stderr) is not None:
                    errors.setdefault(metric, []).append(stderr)
                if run.row.sparsity is not None:
                    actual.setdefault(run.row.sparsity.target, []).append(run.row.sparsity.actual)
    for note in notes_on_errors(errors):
        yield f"{note}; it stands behind the ± of a single run."
    met = [f"{target:g}: {min(a):.4f} to {max(a):.4f}" for target, a in sorted(actual.items())]
    if met:
        yield f"Actual sparsity, by target: {', '.join(met)}."


def notes_on_errors(errors: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """For each metric that has a standard error, what it is in these runs, without a full stop."""
    for metric, found in errors.items():
        low, high = number(min(found)), number(max(found))
        yield f"Standard error of {metric} over its items, of each run: {low if low == high else f'{low} to {high}'}"


def number(value: float) -> str:
    """A metric with two digits, as papers print perplexities and accuracies in percent."""
    return f"{value:.2f}"


def shown(summary: Summary, with_n: bool = False) -> str:
    """The text of a cell: mean, spread and number of seeds, or why there is no number."""
    if summary.mean is None:
        return summary.state
    parts = [number(summary.mean)]
    parts += [f"± {number(summary.spread)}"] if summary.spread is not None else []
    inside = [f"n={summary.n}"] if with_n else []
    inside += [f"{summary.states.count(s)} {s}" for s in STATES if s in summary.states]
    parts += [f"({', '.join(inside)})"] if inside else []
    return " ".join(parts)


def grid(table: Pivot, title: str | None = None, about: str = "") -> Grid:
    """A pivot table as a grid with the dense numbers first (in a column if models are in rows) and the best marked."""
    counts = {s.n for s in table.cells.values() if s.n}
    with_n = len(counts) > 1
    best = table.best()
    baseline = ", ".join(f"{k}={v}" for k, v in table.baseline.items())
    what = ", ".join(table.units)
    what += "" if counts <= {1} else ": mean ± standard deviation over seeds" + ("" if with_n else f" (n={max(counts)})")
    what += f"; changes against {baseline}" if baseline else ""
    notes = [f"{what}. The best of each {'column' if table.down else 'row'} is marked, dense apart.", *table.notes]

    dense_down = not any(_of_dense(key) for key in table.by)
    dense_across = not any(_of_dense(key) for key in table.across if key != METRIC or len(table.metrics) > 1)
    levels = max(1, len(table.across))
    head = [("",) * (levels - 1) + (key,) for key in table.by]
    has_dense = any(s.n for s in table.dense.values())

    def dense_text(row: Label, column: Label) -> str:
        values = table.dense_of(row, column)
        return shown(values) if values.mean is None or values.n == 1 else number(values.mean)

    lines, records = [], []
    if not table.rows:
        return Grid(head, [], title, about, notes)
    if dense_down and has_dense:
        labels = [Cell("dense"), *(Cell("") for _ in table.by[1:])]
        lines.append(labels + [Cell(dense_text(table.rows[0], column)) for column in table.columns])
    add_column = not dense_down and dense_across and has_dense
    head += [("",) * (levels - 1) + ("dense",)] if add_column else []
    head += [tuple(_header(k, t) for k, t in zip(table.across, column, strict=True)) for column in table.columns]
    for row in table.rows:
        line = [Cell(text) for text in row]
        line += [Cell(dense_text(row, table.columns[0]))] if add_column else []
        for column in table.columns:
            summary = table.cells.get((row, column), Summary())
            change = table.change(row, column) if (row, column) in table.cells else None
            place, metric = (row, column), table.metric(row, column)
            line.append(Cell(shown(summary, with_n), place in best, "" if change is None else f"{100 * change:+.1f} %"))
            records.append(
                {
                    **{k: v for k, v in table.labels(row, column).items() if k != METRIC},
                    "metric": metric,
                    "mean": summary.mean,
                    "std": summary.std,
                    "n": summary.n,
                    **({"change": change} if table.baseline else {}),
                    "dense": table.dense_of(row, column).mean,
                    "best": place in best,
                    "state": "finished" if summary.n else summary.state.replace(MISSING, "missing"),
                }
            )
        lines.append(line)
    return Grid(head, lines, title, about, notes, int(dense_down and has_dense), records, subject=notes[0])


def _header(key: str, text: str) -> str:
    """A column's label, with the name of its key if it would be a number alone."""
    bare = not any(c.isalpha() for c in text) or text in ("true", "false", "null")
    return f"{key.rpartition('.')[2]} {text}" if bare and key != "pattern" else text

"""Our numbers beside published ones, cell by cell, and only under the same protocol."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from svnup.keys import did_you_mean
from svnup.pattern import UNSTRUCTURED
from svnup.reports.grid import Cell, Grid
from svnup.reports.pivot import Pivot, Summary, grid, number, pivot, shown
from svnup.results.row import Protocol, ResultRow
from svnup.results.select import METRIC, MISSING, Label, Run, choose, newest, runs_of, same

HERE = Path(__file__).parents[1]
FOLDER = next(p for p in (HERE / "assets" / "published", HERE.parent / "experiments" / "published") if p.is_dir())
IDENTITY = ("model", "pruner", "allocator", "sparsity", "pattern", METRIC)
CALIBRATION = {"dataset": "c4", "dataset.n_seq": "128", "split": "uniform", "recovery": "none"}
PARTIAL = "Ours were measured on a part of the text, or on another than the test text"
DENSE = {"pruner": "none", "allocator": "none", "sparsity": "0.0", "pattern": UNSTRUCTURED}


@dataclass(frozen=True)
class Number:
    """A published number with its source; an implied one is computed from others, as its source says."""

    value: float
    source: str
    implied: bool


Theirs = Mapping[tuple[Label, Label], tuple[Number, ...]]  # published numbers by the labels of row and column


@dataclass(frozen=True)
class Published:
    """A table of the literature.

    Several sources may report a number for one cell, each measured with its own code: they are shown side by side, and compared
    only within a source.

    Args:
        about: what the table shows.
        metrics: its metrics.
        rows: the keys of the rows with their values; an empty list takes all values that were run.
        columns: the same of the columns.
        where: settings of all its runs.
        seq_len: tokens of a window.
        published_as: names of patterns under which numbers were published.
        checkpoints: paths on the Hub by the name of the model.
        numbers: all known numbers, by IDENTITY and sequence length.
    """

    about: str
    metrics: tuple[str, ...]
    rows: Mapping[str, Sequence[str]]
    columns: Mapping[str, Sequence[str]]
    where: Mapping[str, Sequence[str]]
    seq_len: int | None
    published_as: Mapping[str, str]
    checkpoints: Mapping[str, str]
    numbers: Mapping[tuple[Label, str], tuple[Number, ...]]

    @classmethod
    def load(cls, name: str, models: Sequence[str] = (), metrics: Sequence[str] = ()) -> Published:
        """Load a table by its name, with other models or metrics if given; raises ValueError if there is no such table."""
        spec = json.loads((FOLDER / "tables.json").read_text(encoding="utf-8"))
        if name not in spec["tables"]:
            raise ValueError(f"--table {name}: choose {', '.join(spec['tables'])}{did_you_mean(name, spec['tables'])}")
        table = spec["tables"][name]
        metrics = tuple(metrics or table["metrics"])
        columns = table["columns"] | ({"model": list(models)} if models else {})
        columns |= {METRIC: metrics} if METRIC in columns or len(metrics) > 1 else {}
        numbers: dict[tuple[Label, str], tuple[Number, ...]] = {}
        for line in _lines("numbers.csv"):
            key = (tuple(line[name] for name in IDENTITY), line["seq_len"])
            numbers[key] = (*numbers.get(key, ()), Number(float(line["value"]), line["source"], line["kind"] == "implied"))
        return cls(
            table["about"],
            metrics,
            table["rows"],
            columns,
            table["where"],
            table.get("seq_len"),
            table.get("published_as", {}),
            spec["checkpoints"],
            numbers,
        )

    def ours(self, rows: Iterable[ResultRow], where: Mapping[str, Sequence[str]]) -> Ours:
        """Our part of the table, with empty cells for what has not been run.

        Args:
            rows: results to choose from.
            where: settings to choose them by.

        Raises:
            ValueError: a model has neither a run nor a published number.
        """
        names = {_file(path): name for name, path in self.checkpoints.items()}
        known = dict.fromkeys((*self.rows, *self.columns), MISSING)
        runs = []
        for run in runs_of(rows):
            path = run.row.config["model"].get("pretrained_model_name_or_path") or ""
            model = names.get(_file(path), run.settings["model"])
            runs.append(replace(run, settings={**known, **run.settings, "model": model}))
        models = {run.settings["model"] for run in runs} | set(self.checkpoints)
        if unknown := [name for name in self.columns.get("model", ()) if name not in models]:
            raise ValueError(
                f"--model {unknown[0]}: no run here is of it, and no published number; choose {', '.join(sorted(models))}"
            )
        chosen = newest(choose(runs, where)) if runs else []
        wanted = {k: v for k, v in {**self.rows, **self.columns, **self.where}.items() if v and k != METRIC}
        inside = [r for r in chosen if all(any(same(k, r.settings.get(k, MISSING), v) for v in vs) for k, vs in wanted.items())]
        order = {k: v for k, v in {**self.rows, **self.columns}.items() if v}
        by, across = tuple(self.rows), tuple(self.columns)
        table = Pivot(by, across, self.metrics, self.metrics, {}, {}, where=order)
        if inside:
            table = pivot(inside, by, across, self.metrics, where=order)
        places = product(_expected(self.rows, table.rows), _expected(self.columns, table.columns))
        cells = {place: table.cells.get(place, Summary()) for place in places}
        return Ours(replace(table, cells=cells, baseline={"allocator": "uniform"}), inside, len(chosen) - len(inside), self)

    def key(self, labels: Mapping[str, str]) -> Label | None:
        """Lookup key of a cell in the published numbers; None if it sets options that papers do not report."""
        asked = {METRIC: self.metrics[0], "pattern": UNSTRUCTURED} | {k: v[0] for k, v in self.where.items()} | dict(labels)
        if any(text != MISSING for k, text in asked.items() if k not in IDENTITY):
            return None
        asked["pattern"] = self.published_as.get(asked["pattern"], asked["pattern"])
        return tuple(asked.get(key, MISSING) for key in IDENTITY)


@dataclass(frozen=True)
class Ours:
    """Our part of a published table.

    Args:
        table: its cells.
        runs: the runs in them.
        n_others: number of runs that do not belong to the table.
        field: the published table.
    """

    table: Pivot
    runs: list[Run]
    n_others: int
    field: Published

    @cached_property
    def protocols(self) -> list[Protocol]:
        """The protocols of our numbers."""
        return [r.metrics[m].protocol for r in self.runs for m in self.field.metrics if r.state(m) is None]

    @property
    def seq_len(self) -> int | None:
        """Tokens of a window, of our numbers or else of the table."""
        return next((p.seq_len for p in self.protocols if p.seq_len is not None), self.field.seq_len)

    @property
    def on_whole_text(self) -> bool:
        """Whether ours were measured on the whole test text, as in the literature."""
        return all(p.complete and p.role == "test" for p in self.protocols)

    @cached_property
    def calibration_differences(self) -> str:
        """Settings of calibration and split in which our runs differ from published ones; empty if in none."""
        usual = CALIBRATION | {"dataset.seq_len": str(self.seq_len)}
        there = {key: sorted({run.settings.get(key, MISSING) for run in self.runs}) for key in usual}
        return ", ".join(f"{key} {' or '.join(there[key])}" for key, text in usual.items() if there[key] not in ([], [text]))

    def published(self, labels: Mapping[str, str]) -> tuple[Number, ...]:
        """The published numbers of a cell at our sequence length, one of each source."""
        key = self.field.key(labels)
        return () if key is None else self.field.numbers.get((key, str(self.seq_len)), ())

    def change(self, ours: float | None, theirs: float | None, dense: bool = False) -> float | None:
        """Relative difference of our number to a published one; None if they cannot be compared."""
        same = self.on_whole_text and (dense or not self.calibration_differences)
        return ours / theirs - 1 if same and ours is not None and theirs else None

    @property
    def came_out_uniform(self) -> list[str]:
        """The cells whose allocator returned the uniform budget, so that their numbers say nothing of the allocator."""
        keys = [key for key in (*self.table.by, *self.table.across) if key != METRIC]
        found = []
        for run in self.runs:
            profile = run.row.profile
            even = profile is not None and len(set(profile.sparsity)) == 1 and not profile.linears
            if even and run.settings["allocator"] != "uniform":
                found.append(", ".join(run.settings.get(key, MISSING) for key in keys))
        return list(dict.fromkeys(found))

    @property
    def calibration(self) -> list[str]:
        """A note on why pruned models are not compared, if their calibration or split differs."""
        usual = (
            f"The field calibrates on C4, {CALIBRATION['dataset.n_seq']} sequences as long as the windows, and divides no block"
        )
        return (
            [f"{usual}; ours have {self.calibration_differences}: no differences of pruned models."]
            if self.calibration_differences
            else []
        )


def _file(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2].lower()


def _lines(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _expected(values: Mapping[str, Sequence[str]], there: Sequence[Label]) -> list[Label]:
    """The labels of a table: those of runs, and the others that the table has."""
    out = list(there)
    wanted: list[Sequence[str | None]] = [of or [None] for of in values.values()]
    for asked in product(*wanted):
        if not any(all(a is None or same(k, t, a) for k, t, a in zip(values, label, asked, strict=True)) for label in there):
            out.append(tuple(text or MISSING for text in asked))
    return out


def side_by_side(field: Published, ours: Ours, title: str | None = None, about: str = "") -> Grid:
    """A grid with our number, the published ones and the relative difference of each cell.

    A column without published numbers has ours alone.
    """
    table = replace(ours.table, baseline={})
    lines = [(table.labels(row, column), (row, column)) for row in table.rows for column in table.columns]
    theirs = {place: found for labels, place in lines if (found := ours.published(labels))}
    dense = {
        column: found
        for column in table.columns
        if (found := ours.published({**dict(zip(table.across, column, strict=True)), **DENSE}))
    }
    compared = {*dense, *(column for _, column in theirs)}
    sources = list(dict.fromkeys(one.source for found in (*dense.values(), *theirs.values()) for one in found))
    best, best_theirs = table.best(), _best_of_each_source(table, theirs)
    with_n = len({s.n for s in table.cells.values() if s.n}) > 1

    def cells(mine: Summary, found: Sequence[Number], column: Label, place: tuple[Label, Label] | None = None) -> list[Cell]:
        own = Cell(shown(mine, with_n=with_n and place is not None), place in best)
        if column not in compared:
            return [own]
        said, changes = [], []
        for one in found:
            mark = "*" if (place, one.source) in best_theirs else ""
            said.append(f"{'~' if one.implied else ''}{number(one.value)}{mark} [{sources.index(one.source) + 1}]")
            change = ours.change(mine.mean, one.value, place is None)
            changes += [] if change is None else [f"{100 * change:+.1f} %"]
        return [own, Cell("; ".join(said) or MISSING), Cell("; ".join(changes) or MISSING)]

    plain = grid(table)
    n_labels = len(table.by)
    head = [("",) * len(table.across) + (key,) for key in table.by]
    for column, names in zip(table.columns, plain.head[n_labels:], strict=True):
        head += [(*names, kind) for kind in (("ours", "published", "difference") if column in compared else ("ours",))]
    first = [Cell("dense"), *(Cell("") for _ in table.by[1:])]
    for column in table.columns:
        own = table.dense_of(table.rows[0], column)
        first += cells(Summary(own.values[:1], errors=own.errors[:1]), dense.get(column, ()), column)
    body, records = [first], []
    for row in table.rows:
        body.append([Cell(text) for text in row])
        for column in table.columns:
            mine, found = table.cells[row, column], theirs.get((row, column), ())
            body[-1] += cells(mine, found, column, (row, column))
            record: dict[str, Any] = {METRIC: table.metric(row, column)} | table.labels(row, column)
            record |= {"mean": mine.mean, "std": mine.std, "n": mine.n}
            record |= {"state": "finished" if mine.n else mine.state.replace(MISSING, "missing")}
            for one in found or (None,):
                said = {"published": one.value if one else None, "source": one.source if one else None}
                records.append(record | said | {"difference": ours.change(mine.mean, one.value if one else None)})
    notes = [f"{field.about}: {plain.notes[0]}"]
    notes += [f"[{i}] {source}{' (~: implied)' if _implied(source, theirs) else ''}." for i, source in enumerate(sources, 1)]
    if len({one.source for found in theirs.values() for one in found}) > 1:
        notes.append("Sources have baselines of their own and are no one protocol: compare published numbers within one.")
    notes += ["An asterisk marks the best that its source reports in the column."] if best_theirs else []
    return Grid(head, body, title, about, [*notes, *_left_out(ours, theirs), *plain.notes[1:]], 1, records, subject=notes[0])


def _best_of_each_source(table: Pivot, theirs: Theirs) -> set[tuple[tuple[Label, Label], str]]:
    """Cells and sources whose number is the best of several that the source reports in a column, implied ones left out."""
    out: set[tuple[tuple[Label, Label], str]] = set()
    for source in dict.fromkeys(one.source for found in theirs.values() for one in found if not one.implied):
        cells = {place: Summary((one.value,)) for place, found in theirs.items() for one in found if one.source == source}
        columns = [column for _, column in cells]
        best = replace(table, cells=cells).best()
        out |= {(place, source) for place in best if columns.count(place[1]) > 1}
    return out


def _implied(source: str, theirs: Theirs) -> bool:
    return any(one.implied for found in theirs.values() for one in found if one.source == source)


def _left_out(ours: Ours, theirs: Theirs) -> list[str]:
    """Notes on what is not compared and why."""
    seq_len = ours.seq_len
    under = f" at seq_len {seq_len}" if seq_len else ""
    notes = [] if theirs else [f"No published numbers of these cells are known{under}."]
    keys = {ours.field.key(ours.table.labels(row, column)) for row, column in ours.table.cells}
    known = ours.field.numbers
    other = sorted(length for key, length in known if key in keys and length != str(seq_len) for _ in known[key, length])
    if other:
        notes.append(
            f"Not compared: {len(other)} published numbers at seq_len {', '.join(dict.fromkeys(other))}; ours is {seq_len}."
        )
    notes += [] if ours.on_whole_text else [f"{PARTIAL}: no differences."]
    notes += ours.calibration if theirs else []
    if even := ours.came_out_uniform:
        notes.append(f"Not compared with uniform, because the budget came out uniform: {'; '.join(even)}.")
    return notes + ([f"Runs in this folder that are not of this table: {ours.n_others}."] if ours.n_others else [])


def headline(field: Published, ours: Ours, title: str | None = None) -> Grid:
    """The relative change of SparseGPT's perplexity by SV-NUP against the uniform budget per model, beside the abstract's."""
    abstract = {line["model"]: line for line in _lines("headline.csv")}
    body, records = [], []
    for column in ours.table.columns:
        labels = dict(zip(ours.table.across, column, strict=True))
        if labels.get(METRIC, field.metrics[0]) != field.metrics[0]:
            continue
        uniform, shapley = (ours.table.cells[("sparsegpt", budget), column] for budget in ("uniform", "shapley"))
        change = shapley.against(uniform)
        claim = abstract.get(labels["model"], {})
        theirs = float(claim["change"]) if claim else None
        percent = [MISSING if c is None else f"{100 * c:+.2f} %" for c in (change, theirs)]
        body.append([Cell(text) for text in (labels["model"], shown(uniform), shown(shapley), *percent)])
        records.append(
            {"model": labels["model"], "uniform": uniform.mean, "shapley": shapley.mean, "change": change}
            | {"published_change": theirs, "source": claim.get("source")}
        )
    head: list[tuple[str, ...]] = [("model",), ("uniform",), ("SV-NUP",), ("change",), ("published change",)]
    sources = ", ".join(sorted({line["source"] for line in abstract.values()}))
    notes = [f"SparseGPT at 70 %, {field.metrics[0]}: SV-NUP against the uniform budget. Published: {sources}."]
    notes += [] if ours.on_whole_text else [f"{PARTIAL}."]
    notes += ours.calibration if any(r["change"] is not None and r["published_change"] is not None for r in records) else []
    return Grid(head, body, title, "", notes, 0, records, subject=notes[0])

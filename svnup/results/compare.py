"""Whether two results folders, or two tables in files, say the same."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from svnup.keys import flatten
from svnup.results.row import Protocol, ResultRow
from svnup.results.select import settings, word
from svnup.results.store import load

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)
NOT_COMPARED = ("seconds", "key", "best")  # columns of tables: of the machine, of the version, derived
Table = tuple[list[str], list[list[str]]]


@dataclass
class Comparison:
    """What was compared: the number of cells, those that differ in words, and the largest relative difference of the others."""

    tolerance: float
    n: int = 0
    different: list[str] = field(default_factory=list)
    largest: float = 0.0
    identical: bool = True
    byte_equal: bool = False

    def cell(self, place: str, a: str, b: str, mean: float | None = None, quotient: bool = False) -> None:
        self.n += 1
        self.identical &= a == b
        off = 0.0 if a == b else difference(a, b, mean, quotient)
        if off is None or off > self.tolerance:
            self.different.append(f"{place}: {a} | {b}" + (f"  ({100 * off:.2g} % apart)" if off is not None else ""))
        else:
            self.largest = max(self.largest, off)

    def apart(self, place: str, why: str) -> None:
        self.n += 1
        self.identical = False
        self.different.append(f"{place}: {why}")

    def summary(self) -> str:
        if self.byte_equal:
            return f"byte-equal ({self.n} cells)"
        if self.different:
            return f"{len(self.different)} of {self.n} cells differ by more than {100 * self.tolerance:g} %"
        if self.identical:
            return f"all {self.n} cells are equal to the last digit"
        return f"all {self.n} cells are within {100 * self.tolerance:g} %; the largest difference is {100 * self.largest:.2g} %"


def compare(a: Path, b: Path, tolerance: float = 0.01) -> Comparison:
    """Compare two results folders, run by run, or two files with tables (.md, .csv), cell by cell.

    Numbers differ relatively; a standard deviation as a share of its mean; a change in percent, which is a quotient of two
    numbers, by half of what the quotient is off. Raises ValueError where one is neither, or they are not of one kind.
    """
    out = Comparison(tolerance)
    for path in (a, b):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder; name two results folders or two tables")
    if a.is_dir() != b.is_dir():
        raise ValueError(f"{a}, {b}: one is a folder and one a file; name two results folders or two tables")
    if a.is_dir():
        _runs(out, load(a), load(b), a, b)
        return out
    out.byte_equal = a.read_bytes() == b.read_bytes()
    tables = [_tables(path) for path in (a, b)]
    if len(tables[0]) != len(tables[1]):
        raise ValueError(f"{a}, {b}: {len(tables[0])} tables in one and {len(tables[1])} in the other")
    protocols = [_protocols(path) for path in (a, b)]
    for name in protocols[0].keys() & protocols[1].keys():
        if protocols[0][name] != protocols[1][name]:
            out.apart(name, f"under different protocols, {protocols[0][name]} | {protocols[1][name]}")
    for one, other in zip(*tables, strict=True):
        _cells(out, one, other)
    return out


def difference(a: str, b: str, mean: float | None = None, quotient: bool = False) -> float | None:
    """How far two cells are apart, relatively; None where their words differ."""
    a, b = (text.replace("*", "").strip() for text in (a, b))
    words = NUMBER.split(a)
    if words != NUMBER.split(b):
        return None
    off = 0.0
    for i, (x, y) in enumerate(zip(map(float, NUMBER.findall(a)), map(float, NUMBER.findall(b)), strict=True)):
        mean = x if mean is None else mean
        if quotient or words[i + 1].startswith(" %"):
            unit = 1 if quotient else 100
            off = max(off, abs((unit + x) / (unit + y) - 1) / 2 if unit + y else abs(x - y) / unit)
        else:
            spread = words[i].endswith("± ")
            scale = abs(mean) if spread else max(abs(x), abs(y))
            off = max(off, abs(x - y) / scale if x != y and scale else float(x != y))
    return off


def _tables(path: Path) -> list[Table]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        lines = list(csv.reader(text.splitlines()))
        tables = [(lines[0], lines[1:])] if lines else []
    elif path.suffix == ".md":
        tables = []
        for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.MULTILINE):
            head, _, *body = [
                [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in block.splitlines()
            ]
            tables.append((head, body))
    else:
        raise ValueError(f"{path}: only tables in Markdown (.md) and CSV (.csv) are compared; render it as one of these")
    if not tables:
        raise ValueError(f"{path}: no table in this file")
    return tables


def _protocols(path: Path) -> dict[str, str]:
    """What a table in Markdown says above it of how each metric was measured."""
    made = re.search(r"^.*Machine: .*\.$", path.read_text(encoding="utf-8"), re.MULTILINE) if path.suffix == ".md" else None
    return dict(re.findall(r"([^\s;]+/[^\s;]+): (.+?)(?=; [^\s;]+/[^\s;]+: |\.$)", made[0])) if made else {}


def _cells(out: Comparison, a: Table, b: Table) -> None:
    (head_a, lines_a), (head_b, lines_b) = ((_apart(head), lines) for head, lines in (a, b))
    n_keys = _n_keys(lines_a, lines_b, min(len(head_a), len(head_b)))
    rows_a, rows_b = ({_name(line, n_keys, i): line for i, line in enumerate(lines)} for lines in (lines_a, lines_b))
    for name in dict.fromkeys([*rows_a, *rows_b]):
        if name not in rows_a or name not in rows_b:
            out.apart(name, f"only in the {'first' if name in rows_a else 'second'}")
            continue
        cells_a, cells_b = (dict(zip(h, r, strict=False)) for h, r in ((head_a, rows_a[name]), (head_b, rows_b[name])))
        for column in dict.fromkeys([*head_a, *head_b]):
            if column in NOT_COMPARED:
                continue
            if column not in cells_a or column not in cells_b:
                out.apart(f"{name}, {column}", f"only in the {'first' if column in cells_a else 'second'}")
                continue
            mean = float(cells_a["mean"]) if column == "std" and cells_a.get("mean") else None
            place = f"{name}, {column}"
            if mean is None or not (cells_a[column] and cells_b[column]):
                out.cell(place, cells_a[column], cells_b[column], quotient=column in ("change", "difference"))
            else:
                out.cell(place, f"± {cells_a[column]}", f"± {cells_b[column]}", mean)


def _apart(head: list[str]) -> list[str]:
    """Headers, the second of two equal ones with its number."""
    return [f"{h} ({n})" if (n := head[: i + 1].count(h)) > 1 else h for i, h in enumerate(head)]


def _n_keys(a: list[list[str]], b: list[list[str]], n: int) -> int:
    """How many columns name a line: the fewest first ones that tell all lines apart in both tables; 0 where none do."""
    return next((k for k in range(1, n + 1) if all(len({tuple(r[:k]) for r in rows}) == len(rows) for rows in (a, b))), 0)


def _name(line: list[str], n_keys: int, index: int) -> str:
    return " ".join(filter(None, line[:n_keys])) if n_keys else f"line {index + 1}"


def _runs(out: Comparison, a: list[ResultRow], b: list[ResultRow], path_a: Path, path_b: Path) -> None:
    for path, rows in ((path_a, a), (path_b, b)):
        if not rows:
            raise ValueError(f"{path}: no result.json below this folder; run svnup first, or name another")
    of_a, of_b = ({_identity(row): row for row in sorted(rows, key=_finished_last)} for rows in (a, b))
    for identity in sorted({*of_a, *of_b}):
        if identity not in of_a or identity not in of_b:
            alone = of_a.get(identity) or of_b[identity]
            out.apart(_people(alone), f"only in {path_a if identity in of_a else path_b}")
            continue
        one, other = of_a[identity], of_b[identity]
        out.cell(f"{_people(one)}, status", one.status, other.status)
        if one.sparsity and other.sparsity:
            out.cell(f"{_people(one)}, actual sparsity", str(one.sparsity.actual), str(other.sparsity.actual))
        for kind, x, y in (("", one.metrics, other.metrics), (" dense", one.dense, other.dense)):
            for metric in sorted({*x, *y}):
                place = f"{_people(one)}, {metric}{kind}"
                if metric not in x or metric not in y:
                    out.apart(place, f"only in {path_a if metric in x else path_b}")
                elif protocols := _fields(x[metric].protocol, y[metric].protocol):
                    out.apart(place, f"under different protocols, {protocols[0]} | {protocols[1]}")
                else:
                    out.cell(place, word(x[metric].value), word(y[metric].value))


def _fields(a: Protocol, b: Protocol) -> tuple[str, str] | None:
    """The fields in which two protocols differ."""
    x, y = flatten(a.to_dict()), flatten(b.to_dict())
    names = [name for name in dict.fromkeys([*x, *y]) if x.get(name) != y.get(name)]
    if not names:
        return None
    first, second = (", ".join(f"{name} {word(of.get(name))}" for name in names) for of in (x, y))
    return first, second


def _identity(row: ResultRow) -> str:
    return json.dumps(settings(row.config), sort_keys=True)


def _finished_last(row: ResultRow) -> tuple[bool, str]:
    return row.status == "finished", row.config_key


def _people(row: ResultRow) -> str:
    words: Iterable[str] = (settings(row.config)[key] for key in ("model", "pruner", "allocator", "sparsity", "pattern"))
    return f"{row.config_key} ({' '.join(words)}, seed {row.config['seed']})"

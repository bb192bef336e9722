"""Tables as text: terminal, Markdown, LaTeX (booktabs), HTML, and CSV with one line per number."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import groupby
from typing import Any

WORDS = ("fail", "running", "interrupted", "dead", "fallback", "limit", "protocol", "nan")  # in place of a number
MISSING = "-"
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how what a spreadsheet computes begins
NUMBER = re.compile(r"[+-]?\d[\d.,]*(e[+-]?\d+)?( ?%)?", re.IGNORECASE)
FORMATS = ("terminal", "markdown", "csv", "latex", "html")
LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "−": "$-$",
        "×": r"$\times$",
    }
)


STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;color-scheme:light dark}table{border-collapse:collapse}"
    "th,td{padding:.2rem .8rem;text-align:left}.n{text-align:right;font-variant-numeric:tabular-nums}"
    "thead tr:last-child th,tbody tr:last-child td,.rule td{border-bottom:1px solid #8888}th.g{text-align:center}"
)


@dataclass(frozen=True)
class Cell:
    """The text of a cell, whether it is the best of those it is compared with, and its change against a baseline."""

    text: str
    best: bool = False
    change: str = ""

    @property
    def whole(self) -> str:
        return " ".join(filter(None, (self.text, self.change)))


@dataclass(frozen=True)
class Grid:
    """A table: lines of cells below a header.

    Args:
        head: the name of each column, of one or several levels, outermost first.
        lines: the cells.
        title: of the table.
        about: where the numbers come from, written to files.
        notes: below the table.
        n_first: number of first lines (dense) that a rule separates.
        records: for CSV, one mapping per number.
        align: l or r for each column, for Markdown; where it is empty, readers choose.
        subject: what the numbers are, with the names of the metrics: the caption in LaTeX, after the title.
    """

    head: list[tuple[str, ...]]
    lines: list[list[Cell]]
    title: str | None = None
    about: str = ""
    notes: list[str] = field(default_factory=list)
    n_first: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    align: str = ""
    subject: str = ""

    def render(self, form: str, ansi: bool = False) -> str:
        """The table in one of FORMATS.

        Args:
            form: the format.
            ansi: whether a terminal shows bold; if not, the best have an asterisk.
        """
        if form == "csv":
            return csv_text(self.records)
        if form == "html":
            return render_all([self], form)
        return {"markdown": self._markdown, "latex": self._latex}.get(form, lambda: self._terminal(ansi))()

    @property
    def _numeric(self) -> list[bool]:
        """Which columns are aligned to the right: those of numbers, or of words for missing ones."""
        columns = [[line[i].text for line in self.lines] for i in range(len(self.head))]
        return [any(texts) and all(_is_number(text) for text in texts) for texts in columns]

    def _spans(self, level: int) -> list[tuple[str, int]]:
        """Headers of a level as (text, number of columns); at the innermost level each column has its own."""
        words = [column[: level + 1] if level < len(column) - 1 else (*column, i) for i, column in enumerate(self.head)]
        return [(str(word[level]), len(list(same))) for word, same in groupby(words)]

    def _markdown(self) -> str:
        shown = ["| " + " | ".join(_escaped(" ".join(filter(None, column))) for column in self.head) + " |"]
        shown.append("|" + "|".join(" ---: " if side == "r" else " --- " for side in self.align or "l" * len(self.head)) + "|")
        for line in self.lines:
            shown.append("| " + " | ".join(f"**{_escaped(c.whole)}**" if c.best else _escaped(c.whole) for c in line) + " |")
        top = [f"# {_escaped(self.title)}\n"] if self.title else []
        top += [f"{_escaped(self.about)}\n"] if self.about else []
        bottom = ["", *(f"- {_escaped(note)}" for note in self.notes)] if self.notes else []
        return "\n".join(top + shown + bottom) + "\n"

    def _latex(self) -> str:
        numeric = self._numeric
        out = [f"% {' '.join(text.split())}" for text in (self.title, self.about, *self.notes) if text]
        caption = " ".join(f"{text.rstrip('.')}." for text in (self.title, self.subject) if text)
        out += [r"\begin{table}", r"\centering", *([rf"\caption{{{_tex(caption)}}}"] if caption else [])]
        out += [rf"\begin{{tabular}}{{{''.join('r' if n else 'l' for n in numeric)}}}", r"\toprule"]
        levels = len(self.head[0])
        for level in range(levels):
            words, rules, start = [], [], 1
            for text, width in self._spans(level):
                inner = level == levels - 1 or not text
                words.append(_tex(text) + " &" * (width - 1) if inner else rf"\multicolumn{{{width}}}{{c}}{{{_tex(text)}}}")
                rules += [] if inner else [rf"\cmidrule(lr){{{start}-{start + width - 1}}}"]
                start += width
            out += [" & ".join(words) + r" \\", *([" ".join(rules)] if rules else [])]
        out.append(r"\midrule")
        for index, line in enumerate(self.lines):
            out.append(" & ".join(map(_tex_cell, line)) + r" \\")
            out += [r"\midrule"] if index == self.n_first - 1 and self.n_first < len(self.lines) else []
        return "\n".join([*out, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"

    def _view(self) -> dict[str, Any]:
        """The table as its HTML template reads it."""
        numeric = ["n" if number else "" for number in self._numeric]
        *groups, names = [self._spans(level) for level in range(len(self.head[0]))]
        return {
            "title": self.title,
            "about": self.about,
            "groups": groups,
            "names": [(text, kind) for (text, _), kind in zip(names, numeric, strict=True)],
            "lines": [
                {"ruled": index == self.n_first - 1, "cells": [*zip(line, numeric, strict=True)]}
                for index, line in enumerate(self.lines)
            ],
            "notes": self.notes,
        }

    def _terminal(self, ansi: bool) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD)
        for column, numeric in zip(self.head, self._numeric, strict=True):
            table.add_column(Text("\n".join(column)), justify="right" if numeric else "left", no_wrap=True)
        mark = "" if ansi or not any(c.best for line in self.lines for c in line) else " "
        for index, line in enumerate(self.lines):
            words = [
                Text(c.whole + (mark and ("*" if c.best else mark if n else "")), "bold" if c.best and ansi else "")
                for c, n in zip(line, self._numeric, strict=True)
            ]
            table.add_row(*words, end_section=index == self.n_first - 1)
        out = StringIO()
        Console(file=out, width=10_000, force_terminal=ansi, color_system="standard" if ansi else None).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        top = [self.title, ""] if self.title else []
        return "\n".join([*top, "\n".join(lines).strip("\n"), *self.notes]) + "\n"


def render_all(grids: Sequence[Grid], form: str, ansi: bool = False) -> str:
    """Several tables below each other, in HTML as one page; the arguments are those of `Grid.render`."""
    if form != "html":
        return "\n".join(grid.render(form, ansi) for grid in grids)
    from svnup.reports.templates import render

    return render("tables.html.jinja", grids=[grid._view() for grid in grids], style=STYLE) + "\n"


def csv_text(records: Iterable[dict[str, Any]]) -> str:
    """Mappings as CSV: each key is a column, in the order of first occurrence; missing values are empty."""
    records = list(records)
    out = StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(_harmless, names))
    writer.writerows([_harmless(record.get(name)) for name in names] for record in records)
    return out.getvalue()


def _is_number(text: str) -> bool:
    return not text or not text[0].isalpha() or text in WORDS


def _escaped(text: str) -> str:
    """Text for Markdown that makes no heading, link, image or HTML of its own, whoever wrote it."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return plain.replace("](", "]\\(").replace("|", "\\|")


def _harmless(value: Any) -> Any:
    """A value for CSV that a spreadsheet takes for text: what begins as a formula does gets a quote before it."""
    if isinstance(value, str) and value[:1] in FORMULA and value != MISSING and not NUMBER.fullmatch(value):
        return f"'{value}"
    return value


def _tex_cell(cell: Cell) -> str:
    text = rf"\textbf{{{_tex(cell.text)}}}" if cell.best else _tex(cell.text)
    return f"{text} ({_tex(cell.change)})" if cell.change else text


def _tex(text: str) -> str:
    minus = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return ("{}" if text.startswith(("[", "*")) else "") + minus.translate(LATEX)  # else an option of the line break before it

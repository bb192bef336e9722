"""One self-contained HTML page about the runs of a results folder.

The page loads nothing: charts are inline SVG, style and script are embedded, and its content security policy forbids all else.
The same results make the same bytes. Whatever comes from a result is escaped (svnup/reports/svg.py). Each protocol has its own
column in `tables.frame`, and so has its own charts and ranking here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np

from svnup.naming import moving_numbers
from svnup.pattern import UNSTRUCTURED
from svnup.reports import svg
from svnup.reports.figures import UNITS
from svnup.reports.svg import Markup, Point, Series, element
from svnup.reports.tables import frame
from svnup.results.row import Protocol, ResultRow, Scores, Tuning
from svnup.types import player_names

LONGEST = 2000  # characters of a value that a run's page shows; result.json has the rest
LEAST_ERROR = 1e-4  # smaller errors of estimators are drawn here on the logarithmic axis
PASSES = 4  # forward passes that a backward pass counts as: svnup/shapley/gates.py
ZEROS = "sparsity (% zeros)"


def report(rows: list[ResultRow]) -> str:
    """The HTML page about some results; raises ValueError if there are none."""
    if not rows:
        raise ValueError("no runs to report on")
    page = Page(rows)
    sections = {
        "leaderboard": ("Leaderboard", _leaderboard(page)),
        "sparsity": ("Perplexity against sparsity", _sparsity(page)),
        "layers": ("Layers", _layers(page)),
        "estimators": ("Estimators", _estimators(page)),
        "protocols": ("Protocols", _protocols(page)),
        "runs": ("Runs", _runs(page)),
    }
    style, script = ((files("svnup.assets") / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'"
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", "svnup report"),
        element("style", Markup(style)),
    ]
    main = [
        element("section", element("h2", name, id=f"{key}-title"), content, id=key, aria_labelledby=f"{key}-title")
        for key, (name, content) in sections.items()
    ]
    body = [
        element("a", "Skip to the leaderboard", class_="skip", href="#leaderboard"),
        element("header", element("h1", "svnup report"), _summary(page)),
        element("nav", *(element("a", name, href=f"#{key}") for key, (name, _) in sections.items()), aria_label="Sections"),
        element("main", *main),
        element("footer", _machines(page)),
        element("div", id="tip", role="presentation", hidden=True),
        element("script", Markup(script)),
    ]
    return f"<!DOCTYPE html>\n{element('html', element('head', *head), element('body', *body), lang='en')}\n"


# -- runs, and what they have in common


@dataclass(frozen=True)
class PageRun:
    """A run on the page.

    Args:
        row: the result.
        line: its line of `tables.frame`.
        model: a name that is unique to the model.
        method: a name that is unique to the allocator and its options.
        common: the settings that it shares with runs of other seeds and sparsities.
    """

    row: ResultRow
    line: dict[str, Any]
    model: str
    method: str
    common: dict[str, str]

    @property
    def pruner(self) -> str:
        return str(self.line["pruner"])

    @property
    def sparsity(self) -> float:
        return float(self.line["sparsity"])

    @property
    def pattern(self) -> str:
        return str(self.line["pattern"])

    @property
    def budget(self) -> str:
        return f"{100 * self.sparsity:g}\N{NO-BREAK SPACE}%" + ("" if self.pattern == UNSTRUCTURED else f" {self.pattern}")

    @property
    def name(self) -> str:
        return f"{self.model} · {self.pruner} · {self.method} · {self.budget}"

    @property
    def anchor(self) -> str:
        return f"run-{self.row.config_key}"

    def value(self, column: str) -> float | None:
        value = self.line.get(column)
        return None if value is None or value != value else float(value)


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation (None for one seed) of a number over `n` seeds."""

    mean: float
    deviation: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat | None:
        return (
            cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))
            if values
            else None
        )

    def text(self, form: str) -> str:
        return f"{self.mean:{form}}" + ("" if self.deviation is None else f" ± {self.deviation:{form}}")

    def point(self, x: float, y: float, tip: str) -> Point:
        """A point at (x, y) with a whisker of one standard deviation that stays positive."""
        if self.deviation is None:
            return Point(x, y, tip=tip)
        return Point(x, y, max(y - self.deviation, y / 10), y + self.deviation, tip)


class Page:
    """The runs as the sections need them.

    Attributes:
        metrics: the columns of `tables.frame` with metrics, one for each protocol.
        runs: all runs.
        styles: for each method the style of its series.
    """

    def __init__(self, rows: list[ResultRow]) -> None:
        known = {row.config_key: row for row in sorted(rows, key=lambda row: row.status == "finished")}
        data = frame([known[key] for key in sorted(known)])  # copies of a run count once
        self.metrics = [c for c in map(str, data.columns) if "/" in c and not c.endswith(" dense")]
        self.runs = _named(known, data.to_dict("records"))
        times = Counter(run.method for run in self.runs)
        order = sorted(times, key=lambda method: (method != "uniform", -times[method], method))
        self.styles = {method: index + ("uniform" not in times) for index, method in enumerate(order)}

    @cached_property
    def settings(self) -> list[list[PageRun]]:
        """Runs grouped over seeds, ordered by model, pattern and sparsity and then from best to worst by their first metric."""

        def rank(runs: list[PageRun]) -> tuple[Any, ...]:
            found = [(i, s.mean * (1 if _is_ppl(c) else -1)) for i, c in enumerate(self.metrics) if (s := self.stat(runs, c))]
            run = runs[0]
            return run.model, run.pattern != UNSTRUCTURED, run.pattern, run.sparsity, *(found or [(99, 0.0)])[0], run.name

        return sorted(_grouped(self.runs, lambda run: (run.model, run.sparsity, run.common)), key=rank)

    @cached_property
    def changes(self) -> dict[tuple[str, str], float]:
        """Change in percent of a run's perplexity against the uniform budget in the same setting, by key and column."""
        out = {}
        for column in filter(_is_ppl, self.metrics):
            measured = [(run, value) for run in self.runs if (value := run.value(column)) is not None]
            uniform = {run.line["setting"]: value for run, value in measured if run.line["allocator"] == "uniform"}
            for run, value in measured:
                if run.line["allocator"] != "uniform" and run.line["setting"] in uniform:
                    out[run.row.config_key, column] = 100 * (value / uniform[run.line["setting"]] - 1)
        return out

    def stat(self, runs: list[PageRun], column: str) -> Stat | None:
        return Stat.of([v for run in runs if (v := run.value(column)) is not None])

    def change(self, runs: list[PageRun], column: str) -> Stat | None:
        return Stat.of([c for run in runs if (c := self.changes.get((run.row.config_key, column))) is not None])

    def dense(self, runs: list[PageRun], column: str) -> float | None:
        return next((d for run in runs if (d := run.value(f"{column} dense")) is not None), None)

    def column(self, run: PageRun, metric: str) -> str | None:
        """The column of `tables.frame` with a run's metric; None if there is none."""
        return next((c for c in self.metrics if _metric(c) == metric and run.value(c) is not None), None)

    @cached_property
    def protocols(self) -> dict[str, Protocol]:
        """The protocol of each column."""
        found = {c: m.protocol for run in self.runs for name, m in run.row.metrics.items() if (c := self.column(run, name))}
        return {column: found[column] for column in self.metrics if column in found}


def _named(rows: dict[str, ResultRow], lines: list[dict[Any, Any]]) -> list[PageRun]:
    """Runs with unique names of model and method: where several share a name, the settings in which they differ are added."""
    configs = [moving_numbers(rows[line["key"]].config) for line in lines]
    weights = [{"weights": str(rows[line["key"]].fingerprints.get("weights"))[:8]} for line in lines]
    nodes = [_flat(config["model"]) | prints for config, prints in zip(configs, weights, strict=True)]
    models = _disambiguated([str(line["model"]) for line in lines], nodes)
    common = [_flat({k: v for k, v in c.items() if k not in ("sparsity", "evaluation")}, without=("seed",)) for c in configs]
    said = ("model.", "pruner.", "allocator.scorer.game.pruner.", "pattern")  # shown elsewhere
    rest = [{k.removeprefix("allocator.scorer."): v for k, v in node.items() if not k.startswith(said)} for node in common]
    labels = [re.sub(r", seed=\d+|(?<=\()seed=\d+(, )?", "", str(line["allocator"])).replace(" ()", "") for line in lines]
    by_model = _disambiguated([f"{model}\n{label}" for model, label in zip(models, labels, strict=True)], rest)
    methods = [name.partition("\n")[2] for name in by_model]
    return [
        PageRun(rows[line["key"]], line, model, method, shared)
        for line, model, method, shared in zip(lines, models, methods, common, strict=True)
    ]


def _disambiguated(names: list[str], nodes: list[dict[str, str]], form: str = "{} [{}]") -> list[str]:
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


def _flat(node: Any, prefix: str = "", without: tuple[str, ...] = ()) -> dict[str, str]:
    """Nested values as texts by dotted key."""
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        node = {str(i): item for i, item in enumerate(node)}
    if not isinstance(node, dict):
        return {prefix: node if isinstance(node, str) else json.dumps(node)}
    inside = [_flat(v, f"{prefix}.{k}" if prefix else str(k), without) for k, v in node.items() if k not in without]
    return {key: value for flat in inside for key, value in flat.items()}


def _grouped(runs: Iterable[PageRun], key: Callable[[PageRun], Any]) -> list[list[PageRun]]:
    """Runs with the same key, in the order in which keys appear."""
    groups: dict[str, list[PageRun]] = {}
    for run in runs:
        groups.setdefault(json.dumps(key(run), sort_keys=True), []).append(run)
    return list(groups.values())


def _metric(column: str) -> str:
    """The metric of a column: its name without what `tables.frame` adds in brackets."""
    return re.split(r" [\[(]", column)[0]


def _is_ppl(column: str) -> bool:
    return _metric(column).endswith("ppl")  # of all other metrics higher is better


def _signed(percent: float, digits: int = 1) -> str:
    return f"{percent:+.{digits}f} %".replace("-", "−")


# -- elements of the page


def _note(*words: object) -> Markup:
    return element("p", *words, class_="note")


def _badge(status: str) -> Markup:
    return element("span", status, class_=f"badge {'failed' if status == 'failed' else 'other'}")


def _scroll(label: str, head: Sequence[Markup], body: Sequence[Markup], **attributes: object) -> Markup:
    caption = element("caption", label, class_="unseen")
    rows = element("thead", element("tr", *head)), element("tbody", *body, **attributes)
    return element("div", element("table", caption, *rows), class_="scroll", tabindex=0, role="group", aria_label=label)


def _table(label: str, head: Sequence[object], body: Iterable[Sequence[object]]) -> Markup:
    rows = [element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest)) for first, *rest in body]
    return _scroll(label, [element("th", cell, scope="col") for cell in head], rows)


def _figure(title: str, *parts: object) -> Markup:
    return element("figure", element("figcaption", title), *parts)


def _charts(*figures: object, class_: str = "charts") -> Markup:
    return element("div", *figures, class_=class_)


def _numbers(series: Sequence[Series], x: str, show: Callable[[float], str] = "{:g}".format) -> Markup:
    """The numbers of a chart as a table, collapsed."""

    def cell(point: Point | None) -> str:
        spread = "" if point is None or point.low is None else f" ({point.low:.4g} to {point.high:.4g})"
        return "–" if point is None else f"{point.y:.4g}{spread}"

    found = [{p.x: p for p in one.points} for one in series]
    body = [[show(at), *(cell(f.get(at)) for f in found)] for at in sorted({at for f in found for at in f})]
    return element("details", element("summary", "numbers"), _table("Numbers", [x, *(one.name for one in series)], body))


def _legend(series: Iterable[Series]) -> Markup:
    def item(one: Series) -> Markup:
        words = svg.swatch(one), element("span", one.name)
        return element("li", element("button", *words, type="button", data_s=one.name, aria_pressed="false"))

    items = [item(one) for one in sorted(series, key=lambda one: one.style)]
    return element("ul", *items, class_="legend", aria_label="Press a name to highlight it")


def _ends(series: Iterable[Series]) -> list[float]:
    return [v for one in series for p in one.points for v in (p.y, p.low, p.high) if v is not None]


# -- header and footer


def _summary(page: Page) -> Markup:
    models = sorted({run.model for run in page.runs})
    blocks = next((len(run.row.profile.sparsity) for run in page.runs if run.row.profile), None)
    count = Counter(run.row.status for run in page.runs)
    tiles: list[tuple[str, object, object]] = [
        ("runs", len(page.runs), ", ".join(f"{n} {status}" for status, n in sorted(count.items()))),
        ("models", len(models), ", ".join(models))
        if len(models) > 1
        else ("model", models[0], f"{blocks} layers" if blocks else ""),
    ]
    changed = [(s.mean, i, c) for i, runs in enumerate(page.settings) for c in page.metrics if (s := page.change(runs, c))]
    if changed:
        change, index, column = min(changed)
        run = page.settings[index][0]
        where = element("a", run.name, href=f"#{run.anchor}")
        tiles.append((f"best change of {column} against the uniform budget", _signed(change), where))
    cells = [(element("dt", name), element("dd", value, class_="big"), element("dd", note)) for name, value, note in tiles]
    return element("dl", *(element("div", *cell) for cell in cells), class_="tiles")


def _machines(page: Page) -> str:
    machines, versions = set(), set()
    for run in page.runs:
        hardware, found = run.row.provenance.hardware, run.row.provenance.versions
        machines.add(", ".join(filter(None, (hardware.cpu, *hardware.gpus) if hardware is not None else ())))
        versions.add(", ".join(f"{name} {found[name]}" for name in ("svnup", "torch", "transformers") if name in found))
    return f"Measured on {'; '.join(sorted(machines))} with {'; '.join(sorted(versions))}."


# -- leaderboard


def _leaderboard(page: Page) -> Markup:
    """One line per configuration, over seeds; the best of each model, pattern and sparsity is marked in every column."""
    means: dict[tuple[str, str, str], list[float]] = {}
    for runs in page.settings:
        for column in page.metrics:
            limited = column in page.protocols and page.protocols[column].limit is not None  # part of a task: not compared
            if (stat := page.stat(runs, column)) is not None and not limited:
                means.setdefault((runs[0].model, runs[0].budget, column), []).append(stat.mean)
    best = {at: (min if _is_ppl(at[2]) else max)(found) for at, found in means.items() if len(found) > 1}
    several = len({run.model for run in page.runs}) > 1
    body = []
    for runs in page.settings:
        run = runs[0]
        name, _, rest = run.method.partition(" ")
        words = [
            element("strong", name),
            element("span", run.pruner, class_="small narrow"),
            element("span", rest, class_="small"),
        ]
        cells = [element("td", run.model)] if several else []
        cells += [element("th", *words, scope="row", data_v=run.method), element("td", run.pruner, class_="pruner")]
        cells.append(element("td", run.budget, class_="n", data_v=run.sparsity))
        for column in page.metrics:
            stat = page.stat(runs, column)
            first = stat is not None and stat.mean == best.get((run.model, run.budget, column))
            cells.append(_number(stat, "{:.2f}".format, "best" if first else ""))
            if _is_ppl(column):
                change, dense = page.change(runs, column), page.dense(runs, column)
                cells.append(_number(change, _signed, "" if change is None else "gain" if change.mean < 0 else "loss"))
                cells.append(_number(None if dense is None else Stat(dense, None, 1), "{:.2f}".format, "dense"))
        cells.append(element("td", *(_link(one, runs) for one in runs), class_="links"))
        status = " ".join(sorted({one.row.status for one in runs}))
        given = {"data_model": run.model, "data_pruner": run.pruner, "data_sparsity": run.budget, "data_status": status}
        body.append(element("tr", *cells, **given))
    head = [_heading("model")] if several else []
    head += [_heading("method"), _heading("pruner", kind="pruner"), _heading("sparsity", kind="n")]
    for column in page.metrics:
        head.append(_heading(column, kind="n"))
        head += [_heading("vs uniform", column, "n"), _heading("dense", column, "n dense")] if _is_ppl(column) else []
    head.append(element("th", "runs by seed", scope="col"))
    best_of = element("span", "best", class_="mark"), "of a model at a sparsity, under one protocol. Click a heading to sort."
    measured = [element("li", element("b", c), f": {_protocol_words(p)}") for c, p in page.protocols.items()]
    table = element("div", _scroll("Leaderboard", head, body, id="board"), class_="board")
    note = _note("Mean ± standard deviation over seeds. ", *best_of)
    return Markup(note + element("ul", *measured, class_="note") + _filters(page) + table)


def _number(stat: Stat | None, show: Callable[[float], str], kind: str = "") -> Markup:
    spread = "" if stat is None or stat.deviation is None else f" ± {show(stat.deviation).strip('+ %')}"
    words = "–" if stat is None else show(stat.mean), element("span", spread, class_="small sd") if kind != "dense" else ""
    mark = element("span", "best", class_="mark") if kind == "best" else ""
    classes = " ".join(filter(None, ("n", "none" if stat is None else "", kind)))
    return element("td", mark, *words, class_=classes, data_v=None if stat is None else f"{stat.mean:.10g}")


def _link(run: PageRun, among: list[PageRun]) -> Markup:
    seed = str(run.line["seed"])
    text = seed if [str(one.line["seed"]) for one in among].count(seed) == 1 else run.row.config_key[:6]
    link = element("a", text, href=f"#{run.anchor}", aria_label=f"{text}: run {run.row.config_key}, seed {seed}")
    return Markup(link + ("" if run.line["status"] == "finished" else _badge(run.line["status"])) + " ")


def _heading(name: str, of: str = "", kind: str | None = None) -> Markup:
    words = name, element("span", f" of {of}", class_="unseen") if of else ""
    return element("th", element("button", *words, type="button"), scope="col", class_=kind, aria_sort="none")


def _filters(page: Page) -> Markup:
    controls = [element("label", "filter ", element("input", type="search", id="words", autocomplete="off"))]
    budgets = list(dict.fromkeys(run.budget for run in sorted(page.runs, key=lambda run: run.sparsity)))
    for name, values in (
        ("model", sorted({run.model for run in page.runs})),
        ("pruner", sorted({run.pruner for run in page.runs})),
        ("sparsity", budgets),
        ("status", sorted({run.row.status for run in page.runs})),
    ):
        if len(values) > 1:
            options = [element("option", "all", value=""), *(element("option", value) for value in values)]
            controls.append(element("label", f"{name} ", element("select", *options, data_by=name)))
    count = element("output", id="count", for_="words", aria_live="polite")
    return element("form", *controls, count, class_="filters", id="filters", hidden=True)


# -- perplexity against sparsity


def _sparsity(page: Page) -> Markup:
    shown = []
    for column in filter(_is_ppl, page.metrics):
        measured = [run for run in page.runs if run.value(column) is not None]
        for runs in _grouped(measured, lambda run: (run.model, run.pattern)):
            about = [column] if len(page.protocols) > 1 else []
            about += [runs[0].model] + ([] if runs[0].pattern == UNSTRUCTURED else [runs[0].pattern])
            charts = _curves(page, runs, column)
            wide = " wide" if charts.count("<figure") > 1 else ""
            shown.append(element("div", element("h3", " · ".join(about)), charts, class_=f"part{wide}"))
    if not shown:
        return _note("Left out: no finished run has a perplexity.")
    note = _note("Lines are means over seeds, bands one standard deviation. Each chart holds numbers of one protocol.")
    return Markup(note + element("div", *shown, class_="parts"))


def _curves(page: Page, runs: list[PageRun], column: str) -> Markup:
    """For each pruner a chart of the methods that were run at several sparsities, all with the same axes.

    If other methods were run at one sparsity only, a second chart ranks all methods there.
    """
    dense = page.dense(runs, column)
    reference = (dense, f"dense {dense:.2f}") if dense else None
    spots = sorted({100 * run.sparsity for run in runs})
    y = svg.logarithmic(column, [run.line[column] for run in runs] + ([dense] if dense else []))
    figures: list[Markup] = []
    used: dict[str, Series] = {}
    for group in _grouped(runs, lambda run: run.pruner):
        pruner, series = group[0].pruner, []
        for same in _grouped(sorted(group, key=lambda run: run.sparsity), lambda run: run.common):
            name, points = same[0].method, []
            for repeated in _grouped(same, lambda run: run.sparsity):
                stat, budget = page.stat(repeated, column), repeated[0].budget
                assert stat is not None
                seeds = f" ({stat.n} seeds)" if stat.n > 1 else ""
                tip = f"{name} at {budget}: {stat.text('.2f')}{seeds}"
                points.append(stat.point(100 * repeated[0].sparsity, stat.mean, tip))
            series.append(Series(name, points, page.styles[name]))
        series.sort(key=lambda one: one.style)
        title = f"{column} of {group[0].model} with {pruner}"
        if lines := [one for one in series if len(one.points) > 1]:
            used |= {one.name: one for one in lines}
            drawn = svg.lines(f"{title} against sparsity", svg.Axis(ZEROS, spots[0], spots[-1], spots), y, lines, reference)
            figures.append(_figure(pruner, drawn, _numbers(lines, "sparsity")))
        if len(lines) < len(series):
            at = Counter(one.points[0].x for one in series if len(one.points) == 1).most_common(1)[0][0]
            there = [
                Series(s.name, [Point(p.y, 0, p.low, p.high, p.tip)], s.style) for s in series for p in s.points if p.x == at
            ]
            there.sort(key=lambda one: one.points[0].x)
            near = svg.logarithmic(column, [one.points[0].x for one in there] + ([dense] if dense else []))
            figures.append(_figure(f"{pruner} at {at:g} %", svg.ranking(f"{title} at {at:g} %", near, there, reference)))
    return element("div", _charts(*figures, class_="charts flowing"), _legend(used.values()) if used else "", class_="panel")


# -- layers: Shapley values and profiles


def _layers(page: Page) -> Markup:
    shown = []
    for runs in _grouped((run for run in page.runs if run.row.profile), lambda run: (run.model, _n_blocks(run))):
        plain = [run for run in runs if not run.row.shapley]
        games = _grouped((run for run in runs if run.row.shapley), _game)
        names = _disambiguated([runs[0].model] * len(games), [_game(of_game[0]) for of_game in games], "{} · {}")
        for name, of_game in zip(names, games, strict=True):
            shown.append(element("h3", name) + _beside(page, [_shapley(of_game)], of_game + plain))
        if not games:
            shown.append(element("h3", runs[0].model) + _beside(page, [], plain))
    if not shown:
        return _note("Left out: no finished run has a profile.")
    note = (
        "What each layer contributes, and the budget that follows. Lines are means over runs, bands and whiskers their range."
    )
    return Markup(_note(note) + "".join(shown))


def _game(run: PageRun) -> dict[str, str]:
    """The settings of the game of a run's Shapley values, with dotted keys."""
    config = moving_numbers(run.row.config)
    game = dict((config["allocator"].get("scorer") or {}).get("game") or {})
    prunes = game.get("absence", "skip") != "skip"
    more = {key: config.get(key) for key in ("sparsity", "pattern", "dataset")} if prunes else {}
    game = game if prunes else {key: value for key, value in game.items() if key != "pruner"}
    return _flat(
        {
            "model": config["model"],
            "weights": run.row.fingerprints.get("weights"),
            **more,
            "game": game,
            "layers": _n_blocks(run),
        }
    )


def _estimator(run: PageRun) -> str:
    """A run's estimator and its options without the seed."""
    assert run.row.shapley is not None
    return re.sub(r", seed=\w+|(?<=\()seed=\w+(, )?", "", run.row.shapley.method)


def _estimator_names(methods: Iterable[str]) -> dict[str, str]:
    """Short names of estimators, with the options in which those of one kind differ."""
    methods = list(dict.fromkeys(methods))
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", method.partition("(")[0]).lower() for method in methods]
    options = [dict(re.findall(r"(\w+)=([^,()]+)", method)) for method in methods]
    return dict(zip(methods, _disambiguated(names, options, "{} {}"), strict=True))


def _shapley(runs: list[PageRun]) -> Markup:
    """The values of one game by each estimator, over seeds."""
    names = _estimator_names(map(_estimator, runs))
    n_blocks = _n_blocks(runs[0])
    series: list[Series] = []
    for same in sorted(_grouped(runs, _estimator), key=lambda same: (-len(same), _estimator(same[0]))):
        found = [run.row.shapley for run in same if run.row.shapley]
        values = np.array([one.values for one in found])
        error = np.array([one.stderr or np.zeros(values.shape[1]) for one in found]).max(axis=0)
        name, mean = names[_estimator(same[0])], values.mean(axis=0)
        low, high = np.minimum(values.min(axis=0), mean - error), np.maximum(values.max(axis=0), mean + error)
        series.append(Series(name, _points(mean, low, high, n_blocks, name), len(series) + 1))
    payoff = runs[0].row.config["allocator"]["scorer"]["game"].get("payoff", "")
    title, x, y = (
        f"Shapley values of {runs[0].model}",
        svg.layers(n_blocks),
        svg.symlog(UNITS.get(payoff, payoff), _ends(series)),
    )
    drawn = svg.bars(title, x, y, series[0]) if len(series) == 1 else svg.lines(title, x, y, series)
    return _figure("Shapley values", drawn, _legend(series), _numbers(series, "layer", _layer_names(series, n_blocks)))


def _n_blocks(run: PageRun) -> int:
    return len(run.row.profile.sparsity) if run.row.profile else 0


def _points(values: Any, low: Any, high: Any, n_blocks: int, name: str = "") -> list[Point]:
    """One point per block, or two if attention and MLP have values of their own."""
    per_block = len(values) // n_blocks
    names = player_names(n_blocks) if per_block == 2 else list(map(str, range(n_blocks)))
    tips = [f"{name}, layer {names[i]}: {v:.4g}" if name else "" for i, v in enumerate(values)]
    ends = [(float(a), float(b)) if a < b else (None, None) for a, b in zip(low, high, strict=True)]
    return [
        Point(i / per_block, float(v), a, b, tip) for i, (v, (a, b), tip) in enumerate(zip(values, ends, tips, strict=True))
    ]


def _layer_names(series: Sequence[Series], n_blocks: int) -> Callable[[float], str]:
    halved = any(p.x % 1 for one in series for p in one.points)
    return (lambda at: player_names(n_blocks)[round(2 * at)]) if halved else "{:g}".format


def _beside(page: Page, values: list[Markup], runs: list[PageRun]) -> Markup:
    """Charts of values beside the profiles at the sparsity with the most methods; profiles at others are collapsed."""
    groups = _grouped(sorted(runs, key=lambda run: (run.pattern, run.sparsity)), lambda run: run.budget)
    main = max(groups, key=lambda group: (len({run.method for run in group}), group[0].sparsity))
    others = [group for group in groups if group is not main]
    parts = [_charts(*values, _profiles(page, main))]
    if others:
        summary = element("summary", f"Budgets at {', '.join(group[0].budget for group in others)}")
        parts.append(element("details", summary, _charts(*(_profiles(page, group) for group in others))))
    return element("div", *parts, class_="panel")


def _profiles(page: Page, runs: list[PageRun]) -> Markup:
    n_blocks, title = _n_blocks(runs[0]), f"Budgets at {runs[0].budget}"
    series = []
    for same in _grouped(runs, lambda run: run.method):
        shares = 100 * np.array([run.row.profile.sparsity for run in same if run.row.profile])
        points = _points(shares.mean(axis=0), shares.min(axis=0), shares.max(axis=0), n_blocks, same[0].method)
        series.append(Series(same[0].method, points, page.styles[same[0].method]))
    series.sort(key=lambda one: one.style)
    drawn = svg.lines(title, svg.layers(n_blocks), svg.linear(ZEROS, _ends(series)), series)
    return _figure(title, drawn, _legend(series), _numbers(series, "layer"))


# -- estimators


def _estimators(page: Page) -> Markup:
    """Error against cost for games that have values of the exact estimator and of others."""
    games = _grouped((run for run in page.runs if run.row.shapley), _game)
    names = _disambiguated([runs[0].model for runs in games], [_game(runs[0]) for runs in games], "{} · {}")
    shown = []
    for name, runs in zip(names, games, strict=True):
        others = [run for run in runs if not _estimator(run).startswith("Exact(")]
        exact = next((run.row.shapley for run in runs if run not in others), None)
        if exact is not None and others:
            shown.append(element("h3", name) + _errors(exact, others))
    if not shown:
        needed = "Left out: it takes runs of shapley=exact and of another estimator on the same model and game"
        return _note(f"{needed}, and no game here has both.")
    note = (
        "Distance from the exact values: root mean square over the layers, as a share of their standard deviation; mean and "
        "standard deviation over seeds. The cost is that of computing everything anew, in passes of one block over the payoff "
        f"text; a backward pass through the model counts as {PASSES} forward passes."
    )
    return Markup(_note(note) + "".join(shown))


def _errors(exact: Scores, runs: list[PageRun]) -> Markup:
    truth = np.array(exact.values)
    names = _estimator_names(map(_estimator, runs))
    points: dict[str, list[Point]] = {kind: [] for kind in sorted({method.partition("(")[0] for method in names})}
    body = []
    for same in _grouped(runs, _estimator):
        found = {v.method: v for run in same if (v := run.row.shapley)}.values()  # runs with other pruners share them
        errors = [float(np.sqrt(np.mean((np.array(v.values) - truth) ** 2)) / (truth.std() or 1.0)) for v in found]
        cost = statistics.fmean(v.n_block_forwards + PASSES * len(truth) * v.n_backward_passes for v in found)
        stat, method = Stat.of(errors), _estimator(same[0])
        assert stat is not None
        tip = f"{names[method]}: error {stat.text('.3f')}, {cost:,.0f} block-forwards"
        points[method.partition("(")[0]].append(stat.point(max(cost, 1.0), max(stat.mean, LEAST_ERROR), tip))
        body.append((cost, [names[method], f"{cost:,.0f}", stat.text(".4f"), stat.n]))
    kinds = [next(iter(_estimator_names([kind]).values())) for kind in points]
    series = [Series(kind, found, 1 + i) for i, (kind, found) in enumerate(zip(kinds, points.values(), strict=True))]
    price = max(1, exact.n_block_forwards)
    x = svg.logarithmic("cost (block-forwards)", [*(p.x for one in series for p in one.points), price])
    y = svg.logarithmic("error", _ends(series))
    chart = svg.scatter("Error of estimators against their cost", x, y, series, (price, f"exact: {price:,}"))
    ordered = [line for _, line in sorted(body, key=lambda item: (item[0], item[1][0]))]
    table = _table("Error and cost of each estimator", ["estimator", "block-forwards", "error", "seeds"], ordered)
    return element("div", _charts(_figure("Error against cost", chart, _legend(series)), table), class_="panel")


# -- protocols


def _protocols(page: Page) -> Markup:
    if not page.protocols:
        return _note("Left out: nothing was evaluated.")
    flat = [_flat(protocol.to_dict()) for protocol in page.protocols.values()]
    keys = dict.fromkeys(key for one in flat for key in one)
    table = _table("Protocols", ["protocol", *page.protocols], [[key, *(one.get(key, "–") for one in flat)] for key in keys])
    note = "Numbers are compared only with numbers of the same protocol; those of another have a column of their own."
    return Markup(_note(note) + table)


def _protocol_words(protocol: Protocol) -> str:
    """A protocol in one line."""
    kept = {k: v for k, v in _flat(protocol.to_dict()).items() if k != "complete" and len(v) <= 12}
    words = ", ".join(f"{k} {v}" for k, v in kept.items())
    return words + (" (part of the text only)" if protocol.complete is False else "")


# -- runs


def _runs(page: Page) -> Markup:
    note = _note("Every run with its numbers, the command that repeats it, its inputs and its machine.")
    field = element("label", "filter ", element("input", type="search", id="run-words", autocomplete="off"))
    form = element("form", field, element("output", id="run-count", aria_live="polite"), class_="filters", hidden=True)
    runs = element("div", *(_run(page, run) for runs in page.settings for run in runs), id="all-runs")
    return Markup(note + form + runs)


def _run(page: Page, run: PageRun) -> Markup:
    row, status = run.row, str(run.line["status"])
    first = next((f"{name} {m.value:.2f}" for name, m in row.metrics.items() if m.value is not None), "")
    words = element("code", row.config_key), f" {run.name} · seed {run.line['seed']} ", element("span", first, class_="result")
    badge = "" if status == "finished" else _badge(status)
    command = (
        element("pre", element("code", row.provenance.command)),
        element("button", "copy", type="button", class_="copy", hidden=True),
    )
    made = {key: value for key, value in row.provenance.to_dict().items() if key not in ("command", "overrides")}
    made |= {"fingerprints": row.fingerprints, "seconds": round(row.seconds, 2), "peak_memory_bytes": row.peak_memory_bytes}
    parts = [
        element("p", trouble, class_="error", role="note") if (trouble := _trouble(row, status)) else "",
        _metrics(page, run),
        element("div", element("h3", "Command"), *command, class_="command"),
        _charts(*_run_figures(run)),
        _listing("Configuration", row.config),
        _listing("Protocol", {name: metric.protocol.to_dict() for name, metric in row.metrics.items()}),
        _listing("Provenance", made),
    ]
    return element("details", element("summary", *words, badge), element("div", *parts, class_="run"), id=run.anchor)


def _trouble(row: ResultRow, status: str) -> str:
    if row.error:
        return row.error
    if status == "fallback":
        done = sorted({one.fallback for one in (row.pruning.per_linear if row.pruning else ()) if one.fallback})
        return f"Not done as asked, and kept out of charts and rankings: {'; '.join(done)}"
    return "No result: this run has not ended, or was ended from outside." if status == "running" else ""


def _metrics(page: Page, run: PageRun) -> Markup:
    body = []
    for name, metric in run.row.metrics.items():
        column, value = page.column(run, name), metric.value
        dense = run.row.dense[name].value if name in run.row.dense else None
        change = page.changes.get((run.row.config_key, column)) if column else None
        error = f" ± {metric.stderr:.4f} (standard error)" if metric.stderr is not None else ""
        pruned = f"none: {metric.reason}" if value is None else f"{value:.4f}{error}"
        against = "–" if change is None else _signed(change, 2)
        body.append([column or name, pruned, "–" if dense is None else f"{dense:.4f}", against])
    if run.row.sparsity:
        body.append(["sparsity", f"{run.row.sparsity.actual:.6f}", f"target {run.row.sparsity.target:g}", ""])
    return _table(f"Numbers of {run.row.config_key}", ["metric", "pruned", "dense", "vs uniform"], body) if body else Markup()


def _run_figures(run: PageRun) -> list[Markup]:
    row, n_blocks, figures = run.row, _n_blocks(run), []
    for kind, scores in (("Shapley value", row.shapley), ("score", row.scores)):
        if scores and n_blocks:
            values = np.array(scores.values)
            error = np.array(scores.stderr or np.zeros(len(values)))
            series = Series("", _points(values, values - error, values + error, n_blocks))
            title = f"{kind} per layer: " + ", ".join(f"{v:.3g}" for v in values)
            drawn = svg.bars(title, svg.layers(n_blocks), svg.symlog(kind, _ends([series])), series)
            figures.append(_figure(f"{kind}: {scores.method}", drawn))
    if row.profile:
        shares, target = 100 * np.array(row.profile.sparsity), 100 * row.profile.target
        title = "Sparsity per layer in percent: " + ", ".join(f"{v:.1f}" for v in shares)
        series = Series("", _points(shares, shares, shares, n_blocks), 2)
        y = svg.linear(ZEROS, [0.0, 100.0])
        figures.append(_figure("Budget", svg.bars(title, svg.layers(n_blocks), y, series, (target, f"target {target:g} %"))))
    if row.tuning:
        figures += _tuning(row.tuning)
    return figures


def _tuning(tuning: Tuning) -> list[Markup]:
    """The losses of candidates on the whole selection text."""
    tried = [(point.label, point.loss) for point in tuning.curve if point.n_seq is None]
    points = [Point(i, loss, tip=f"{label}: {loss:.4f}") for i, (label, loss) in enumerate(tried) if loss is not None]
    if not points:
        return []

    def label(at: float) -> str:
        return tried[int(at)][0].rpartition("=")[2]

    series = [Series("loss", points)]
    x = svg.Axis("tried", -0.5, len(tried) - 0.5, range(0, len(tried), 1 + len(tried) // 8), show=label)
    drawn = svg.lines("Loss of what was tried", x, svg.linear("loss (nats per token)", _ends(series)), series)
    return [_figure(f"Tuning: {tuning.n_evaluations} evaluations on selection text", drawn, _numbers(series, "tried", label))]


def _listing(title: str, node: dict[str, Any]) -> Markup:
    body = element("pre", _outline(node), tabindex=0, aria_label=title)
    return element("details", element("summary", title), body, class_="listing") if node else Markup()


def _outline(node: dict[Any, Any], indent: str = "") -> str:
    """Nested values in the style of YAML."""
    lines = []
    for key, value in node.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", _outline(value, indent + "  ")]
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        cut = f"… ({len(text):,} characters in result.json)" if len(text) > LONGEST else ""
        lines.append(f"{indent}{key}: {text[:LONGEST]}{cut}")
    return "\n".join(lines)

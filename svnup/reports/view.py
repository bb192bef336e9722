"""What a report shows, as plain data for its template (svnup/assets/report.html.jinja).

The same runs make the same view. Whatever stands in it is text that the template escapes; only charts are markup.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from svnup.pattern import UNSTRUCTURED
from svnup.reports import svg
from svnup.reports.measured import (
    Collection,
    Measured,
    Number,
    Scores,
    Stat,
    change,
    dense,
    disambiguated,
    flat,
    grouped,
    is_perplexity,
    stat,
)
from svnup.reports.svg import Point, Reference, Series
from svnup.results.row import Protocol
from svnup.types import Floats, player_names

LONGEST = 2000  # characters of a value that a run's page shows; result.json has the rest
LEAST_ERROR = 1e-4  # smaller errors of estimators are drawn here on the logarithmic axis
PASSES = 4  # forward passes that a backward pass counts as: svnup/shapley/gates.py
ZEROS = "sparsity (% zeros)"
MISSING = "–"


@dataclass(frozen=True)
class Tile:
    """A number at the top of the page; `run` is the key of the run that it is of."""

    name: str
    value: str
    note: str
    run: str | None = None


@dataclass(frozen=True)
class Choice:
    """A menu of the filter: what runs have one of several values of."""

    name: str
    values: list[str]


@dataclass(frozen=True)
class Column:
    """A column of the leaderboard; `of` is the metric where its name does not say it, `kind` its class of style."""

    name: str
    of: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Cell:
    """A number of the leaderboard: its text, its standard deviation, its class of style, and by what it is sorted."""

    text: str = MISSING
    spread: str = ""
    kind: str = ""
    value: str | None = None
    best: bool = False


@dataclass(frozen=True)
class RunLink:
    """A link to a run of a line of the leaderboard, by its seed, with its status if it is not finished."""

    text: str
    key: str
    seed: str
    status: str | None


@dataclass(frozen=True)
class Line:
    """A line of the leaderboard: one configuration, over seeds."""

    model: str
    method: str
    options: str
    pruner: str
    zeros: str
    sparsity: float
    cells: list[Cell]
    links: list[RunLink]
    runs: list[int]

    @property
    def sorted_by(self) -> str:
        return f"{self.method} {self.options}".strip()


@dataclass(frozen=True)
class Leaderboard:
    columns: list[Column]
    lines: list[Line]
    several_models: bool
    measured: list[tuple[str, str]]  # column, and its protocol in words


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    swatch: Markup
    runs: Sequence[int]


@dataclass(frozen=True)
class Table:
    """A table below a head; `runs` are, for each line or for each column but the first, the places of its runs."""

    label: str
    head: list[str]
    body: list[list[str]]
    runs_of_lines: list[Sequence[int]] = field(default_factory=list)
    runs_of_columns: list[Sequence[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    title: str
    chart: Markup
    legend: list[Key] = field(default_factory=list)
    numbers: Table | None = None


@dataclass(frozen=True)
class Panel:
    """Figures that belong together, with one legend or with one each; `others` are folded below `more`."""

    title: str
    figures: list[Figure]
    legend: list[Key] = field(default_factory=list)
    table: Table | None = None
    more: str = ""
    others: list[Figure] = field(default_factory=list)


@dataclass(frozen=True)
class Section:
    """Panels below a note, which says what is left out where there are none."""

    note: str
    panels: list[Panel] = field(default_factory=list)


@dataclass(frozen=True)
class RunPage:
    """All that the page tells of one run; `listings` are nested values in the style of YAML, by title."""

    key: str
    model: str
    pruner: str
    method: str
    zeros: str
    seed: str
    status: str
    result: str
    trouble: str
    numbers: Table | None
    command: str
    figures: list[Figure]
    listings: list[tuple[str, str]]

    @property
    def name(self) -> str:
        return f"{self.model} · {self.pruner} · {self.method} · {self.zeros} · seed {self.seed}"


@dataclass(frozen=True)
class Report:
    tiles: list[Tile]
    choices: list[Choice]
    leaderboard: Leaderboard
    sparsity: Section
    layers: Section
    estimators: Section
    protocols: Table | None
    runs: list[RunPage]
    machines: str
    versions: str


def view(runs: Collection) -> Report:
    """What a report of some runs shows."""
    return Report(
        tiles=_tiles(runs),
        choices=_choices(runs),
        leaderboard=_leaderboard(runs),
        sparsity=_sparsity(runs),
        layers=_layers(runs),
        estimators=_estimators(runs),
        protocols=_protocols(runs),
        runs=[_run(run) for same in runs.settings for run in same],
        machines="; ".join(sorted({run.machine for run in runs.runs})),
        versions="; ".join(sorted({run.versions for run in runs.runs})),
    )


# -- top of the page


def _tiles(runs: Collection) -> list[Tile]:
    models = sorted({run.model for run in runs.runs})
    blocks = next((run.n_blocks for run in runs.runs if run.n_blocks), None)
    count = Counter(run.status for run in runs.runs)
    tiles = [Tile("runs", str(len(runs.runs)), ", ".join(f"{n} {status}" for status, n in sorted(count.items())))]
    if len(models) > 1:
        tiles.append(Tile("models", str(len(models)), ", ".join(models)))
    else:
        tiles.append(Tile("model", models[0], f"{blocks} layers" if blocks else ""))
    changed = [(s.mean, i, c) for i, same in enumerate(runs.settings) for c in runs.columns if (s := change(same, c))]
    whole = [one for one in changed if runs.is_whole(one[2])]
    if whole:
        percent, index, column = min(whole)
        run = runs.settings[index][0]
        name = f"best change of {column} against the uniform budget"
        tiles.append(Tile(name, _signed(percent), run.name, run.key))
    elif changed:
        note = "all numbers here are of part of a text, whose changes are in the leaderboard"
        tiles.append(Tile("best change against the uniform budget", MISSING, note))
    return tiles


def _choices(runs: Collection) -> list[Choice]:
    zeros = list(dict.fromkeys(run.zeros for run in sorted(runs.runs, key=lambda run: run.sparsity)))
    found = [
        Choice("model", sorted({run.model for run in runs.runs})),
        Choice("pruner", sorted({run.pruner for run in runs.runs})),
        Choice("sparsity", zeros),
        Choice("status", sorted({run.status for run in runs.runs})),
    ]
    return [choice for choice in found if len(choice.values) > 1]


# -- leaderboard


def _leaderboard(runs: Collection) -> Leaderboard:
    """One line per configuration, over seeds; the best of each model, pattern and sparsity is marked in every column."""
    means: dict[tuple[str, str, str], list[float]] = {}
    for same in runs.settings:
        for column in runs.columns:
            limited = column in runs.protocols and runs.protocols[column].limit is not None  # of part of a task: not compared
            if (found := stat(same, column)) is not None and not limited:
                means.setdefault((same[0].model, same[0].zeros, column), []).append(found.mean)
    best = {at: (min if is_perplexity(at[2]) else max)(found) for at, found in means.items() if len(found) > 1}
    columns: list[Column] = []
    for column in runs.columns:
        columns.append(Column(column, kind="n"))
        if is_perplexity(column):
            columns += [Column("vs uniform", column, "n"), Column("dense", column, "n dense")]
    lines = []
    for same in runs.settings:
        run, cells = same[0], []
        for column in runs.columns:
            found = stat(same, column)
            is_best = found is not None and found.mean == best.get((run.model, run.zeros, column))
            cells.append(_cell(found, "{:.2f}".format, best=is_best))
            if is_perplexity(column):
                moved, before = change(same, column), dense(same, column)
                cells.append(_cell(moved, _signed, "" if moved is None else "gain" if moved.mean < 0 else "loss"))
                cells.append(_cell(None if before is None else Stat(before, None, 1), "{:.2f}".format, "dense"))
        method, _, options = run.method.partition(" ")
        links = [_link(one, same) for one in same]
        places = _places(runs, same)
        lines.append(Line(run.model, method, options, run.pruner, run.zeros, run.sparsity, cells, links, places))
    several = len({run.model for run in runs.runs}) > 1
    return Leaderboard(columns, lines, several, [(c, _protocol_words(p)) for c, p in runs.protocols.items()])


def _cell(found: Stat | None, show: Callable[[float], str], kind: str = "", best: bool = False) -> Cell:
    if found is None:
        return Cell(kind=kind)
    spread = "" if found.deviation is None else f" ± {show(found.deviation).strip('+ %')}"
    return Cell(show(found.mean), spread, kind, f"{found.mean:.10g}", best)


def _link(run: Measured, among: Sequence[Measured]) -> RunLink:
    text = run.seed if [one.seed for one in among].count(run.seed) == 1 else run.key[:6]
    return RunLink(text, run.key, run.seed, None if run.status == "finished" else run.status)


def _signed(percent: float, digits: int = 1) -> str:
    return f"{percent:+.{digits}f} %".replace("-", "−")


def _places(runs: Collection, some: Iterable[Measured]) -> list[int]:
    return sorted(runs.places[run.key] for run in some)


# -- perplexity against sparsity


def _sparsity(runs: Collection) -> Section:
    panels = []
    for column in filter(is_perplexity, runs.columns):
        there = [run for run in runs.runs if (value := run.value(column)) is not None and value > 0]
        for same in grouped(there, lambda run: (run.model, run.pattern)):
            about = [column] if len(runs.protocols) > 1 else []
            about += [same[0].model] + ([] if same[0].pattern == UNSTRUCTURED else [same[0].pattern])
            panels.append(_curves(runs, same, column, " · ".join(about)))
    if not panels:
        return Section("Left out: no finished run has a perplexity.")
    return Section(
        "Lines are means over seeds, bands one standard deviation. Each chart holds numbers of one protocol.", panels
    )


def _curves(runs: Collection, some: list[Measured], column: str, title: str) -> Panel:
    """For each pruner a chart of the methods that were run at several sparsities, all with the same axes.

    If other methods were run at one sparsity only, a second chart ranks all methods there.
    """
    before = dense(some, column)
    reference = Reference(before, f"dense {before:.2f}") if before and before > 0 else None
    drawn: list[tuple[str, list[Series], list[Series]]] = []  # by pruner: series of lines, and all series
    for group in grouped(some, lambda run: run.pruner):
        series = []
        for same in grouped(sorted(group, key=lambda run: run.sparsity), lambda run: run.common):
            points = [_point(runs, repeated, column) for repeated in grouped(same, lambda run: run.sparsity)]
            series.append(Series(same[0].method, points, runs.styles[same[0].method], _places(runs, same)))
        series.sort(key=lambda one: one.style)
        drawn.append((group[0].pruner, [one for one in series if len(one.points) > 1], series))
    figures, used = [], {one.name: one for _, lines, _ in drawn for one in lines}
    shown = [one for _, lines, _ in drawn for one in lines]
    for pruner, lines, series in drawn:
        about = f"{column} of {some[0].model} with {pruner}"
        if lines:
            x = svg.sparsities(ZEROS, [p.x for one in shown for p in one.points])
            y = svg.logarithmic(column, svg.ends(shown), reference)
            chart = svg.lines(f"{about} against sparsity", x, y, lines, reference)
            figures.append(Figure(pruner, chart, numbers=_numbers(lines, "sparsity")))
        if len(lines) < len(series):
            at = Counter(one.points[0].x for one in series if len(one.points) == 1).most_common(1)[0][0]
            there = [
                Series(s.name, [Point(p.y, 0, p.low, p.high, p.tip)], s.style, p.runs)
                for s in series
                for p in s.points
                if p.x == at
            ]
            there.sort(key=lambda one: one.points[0].x)
            marks = [v for one in there for p in one.points for v in (p.x, p.low, p.high) if v is not None]
            chart = svg.ranking(f"{about} at {at:g} %", svg.logarithmic(column, marks, reference), there, reference)
            figures.append(Figure(f"{pruner} at {at:g} %", chart))
    return Panel(title, figures, _legend(used.values()))


def _point(runs: Collection, repeated: list[Measured], column: str) -> Point:
    """The mean over seeds at one sparsity, with a whisker of one standard deviation that stays positive."""
    found = stat(repeated, column)
    assert found is not None
    seeds = f" ({found.n} seeds)" if found.n > 1 else ""
    tip = f"{repeated[0].method} at {repeated[0].zeros}: {found.text('.2f')}{seeds}"
    return _at(100 * repeated[0].sparsity, found, tip, _places(runs, repeated))


def _at(x: float, found: Stat, tip: str, places: Sequence[int], y: float | None = None) -> Point:
    y = found.mean if y is None else y
    if found.deviation is None:
        return Point(x, y, tip=tip, runs=places)
    return Point(x, y, max(y - found.deviation, y / 10), y + found.deviation, tip, places)


def _legend(series: Iterable[Series]) -> list[Key]:
    return [Key(one.name, svg.swatch(one), one.runs) for one in sorted(series, key=lambda one: one.style)]


def _numbers(series: Sequence[Series], x: str, show: Callable[[float], str] = "{:g}".format) -> Table:
    """The numbers of a chart as a table."""

    def cell(point: Point | None) -> str:
        spread = "" if point is None or point.low is None else f" ({point.low:.4g} to {point.high:.4g})"
        return MISSING if point is None else f"{point.y:.4g}{spread}"

    found = [{p.x: p for p in one.points} for one in series]
    body = [[show(at), *(cell(f.get(at)) for f in found)] for at in sorted({at for f in found for at in f})]
    return Table("Numbers", [x, *(one.name for one in series)], body, runs_of_columns=[one.runs for one in series])


# -- layers: Shapley values and budgets


def _layers(runs: Collection) -> Section:
    panels = []
    for some in grouped((run for run in runs.runs if run.n_blocks), lambda run: (run.model, run.n_blocks)):
        plain = [run for run in some if not run.shapley]
        games = grouped((run for run in some if run.shapley), _game)
        names = disambiguated([some[0].model] * len(games), [_game(of_game[0]) for of_game in games], "{} · {}")
        for name, of_game in zip(names, games, strict=True):
            panels.append(_beside(runs, name, _shapley(runs, of_game), of_game + plain))
        if not games:
            panels.append(_beside(runs, some[0].model, [], plain))
    if not panels:
        return Section("Left out: no finished run has a profile.")
    note = (
        "What each layer contributes, and the budget that follows. Lines are means over runs, bands and whiskers their range."
    )
    return Section(note, panels)


def _game(run: Measured) -> dict[str, str]:
    return run.shapley.game if run.shapley else {}


def _values_of(run: Measured) -> Scores:
    assert run.shapley is not None
    return run.shapley


def _estimator_names(methods: Iterable[str]) -> dict[str, str]:
    """Short names of estimators, with the options in which those of one kind differ."""
    methods = list(dict.fromkeys(methods))
    names = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", method.partition("(")[0]).lower() for method in methods]
    options = [dict(re.findall(r"(\w+)=([^,()]+)", method)) for method in methods]
    return dict(zip(methods, disambiguated(names, options, "{} {}"), strict=True))


def _shapley(runs: Collection, some: list[Measured]) -> list[Figure]:
    """The values of one game by each estimator, over seeds."""

    def estimator(run: Measured) -> str:
        return _values_of(run).estimator

    names, n_blocks = _estimator_names(map(estimator, some)), some[0].n_blocks
    series: list[Series] = []
    for same in sorted(grouped(some, estimator), key=lambda same: (-len(same), estimator(same[0]))):
        found = [_values_of(run) for run in same]
        values = np.array([one.values for one in found])
        error = np.array([one.stderr for one in found]).max(axis=0)
        name, mean = names[estimator(same[0])], values.mean(axis=0)
        low, high = np.minimum(values.min(axis=0), mean - error), np.maximum(values.max(axis=0), mean + error)
        series.append(Series(name, _points(mean, low, high, n_blocks, name), len(series) + 1, _places(runs, same)))
    if not svg.ends(series):
        return []
    x, y = svg.layers(n_blocks), svg.symlog(_values_of(some[0]).unit, svg.ends(series))
    title = f"Shapley values of {some[0].model}"
    chart = svg.bars(title, x, y, series[0]) if len(series) == 1 else svg.lines(title, x, y, series)
    numbers = _numbers(series, "layer", _layer_names(len(_values_of(some[0]).values) // n_blocks, n_blocks))
    return [Figure("Shapley values", chart, _legend(series), numbers)]


def _points(values: Floats, low: Floats, high: Floats, n_blocks: int, name: str = "") -> list[Point]:
    """One point per block, or one for each of its parts that has a value of its own; none where it is not a number."""
    per_block, found = len(values) // n_blocks, []
    names = _player_names(per_block, n_blocks)
    for i, (value, a, b) in enumerate(zip(values.tolist(), low.tolist(), high.tolist(), strict=True)):
        if not np.isfinite(value):
            continue
        tip = f"{name}, layer {names[i]}: {value:.4g}" if name else ""
        low_end, high_end = (a, b) if a < b else (None, None)
        found.append(Point((i - (per_block - 1) / 2) / per_block, value, low_end, high_end, tip))
    return found


def _player_names(per_block: int, n_blocks: int) -> list[str]:
    if per_block == 2:
        return player_names(n_blocks)
    return [f"{block}.{part}" if per_block > 1 else str(block) for block in range(n_blocks) for part in range(per_block)]


def _layer_names(per_block: int, n_blocks: int) -> Callable[[float], str]:
    """The name of what stands at a place of the axis of layers."""
    names = _player_names(per_block, n_blocks)
    return lambda at: names[round(per_block * at + (per_block - 1) / 2)]


def _beside(runs: Collection, title: str, values: list[Figure], some: list[Measured]) -> Panel:
    """Charts of values beside the budgets at the sparsity with the most methods; budgets at others are folded."""
    groups = grouped(sorted(some, key=lambda run: (run.pattern, run.sparsity)), lambda run: run.zeros)
    main = max(groups, key=lambda group: (len({run.method for run in group}), group[0].sparsity))
    others = [group for group in groups if group is not main]
    more = f"Budgets at {', '.join(group[0].zeros for group in others)}" if others else ""
    figures = [*values, _budgets(runs, main)]
    return Panel(title, figures, more=more, others=[_budgets(runs, group) for group in others])


def _budgets(runs: Collection, some: list[Measured]) -> Figure:
    n_blocks, title = some[0].n_blocks, f"Budgets at {some[0].zeros}"
    series = []
    for same in grouped(some, lambda run: run.method):
        shares = 100 * np.array([run.budget for run in same])
        points = _points(shares.mean(axis=0), shares.min(axis=0), shares.max(axis=0), n_blocks, same[0].method)
        series.append(Series(same[0].method, points, runs.styles[same[0].method], _places(runs, same)))
    series.sort(key=lambda one: one.style)
    chart = svg.lines(title, svg.layers(n_blocks), svg.linear(ZEROS, svg.ends(series)), series)
    return Figure(title, chart, _legend(series), _numbers(series, "layer"))


# -- estimators


def _estimators(runs: Collection) -> Section:
    """Error against cost for games that have values of the exact estimator and of others."""
    games = grouped((run for run in runs.runs if run.shapley), _game)
    names = disambiguated([some[0].model for some in games], [_game(some[0]) for some in games], "{} · {}")
    panels = []
    for name, some in zip(names, games, strict=True):
        exact = [run for run in some if _values_of(run).estimator.startswith("Exact(")]
        others = [run for run in some if not _values_of(run).estimator.startswith("Exact(")]
        if exact and others:
            panels.append(_errors(runs, name, _values_of(exact[0]), others))
    if not panels:
        needed = "Left out: it takes runs of shapley=exact and of another estimator on the same model and game"
        return Section(f"{needed}, and no game here has both.")
    note = (
        "Distance from the exact values: root mean square over the layers, as a share of their standard deviation; mean and "
        "standard deviation over seeds. The cost is that of computing everything anew, in passes of one block over the payoff "
        f"text; a backward pass through the model counts as {PASSES} forward passes."
    )
    return Section(note, panels)


def _errors(runs: Collection, title: str, exact: Scores, some: list[Measured]) -> Panel:
    truth = exact.values
    names = _estimator_names(_values_of(run).estimator for run in some)
    points: dict[str, list[Point]] = {kind: [] for kind in sorted({method.partition("(")[0] for method in names})}
    body: list[tuple[float, list[str], list[int]]] = []
    for same in grouped(some, lambda run: _values_of(run).estimator):
        found = {_values_of(run).method: _values_of(run) for run in same}.values()  # runs with other pruners share them
        errors = [float(np.sqrt(np.mean((one.values - truth) ** 2)) / (truth.std() or 1.0)) for one in found]
        cost = statistics.fmean(one.cost[0] + PASSES * len(truth) * one.cost[1] for one in found)
        spread, method, places = Stat.of(errors), _values_of(same[0]).estimator, _places(runs, same)
        if spread is None or not np.isfinite(spread.mean):
            continue
        tip = f"{names[method]}: error {spread.text('.3f')}, {cost:,.0f} block-forwards"
        points[method.partition("(")[0]].append(_at(max(cost, 1.0), spread, tip, places, max(spread.mean, LEAST_ERROR)))
        body.append((cost, [names[method], f"{cost:,.0f}", spread.text(".4f"), str(spread.n)], places))
    kinds = [next(iter(_estimator_names([kind]).values())) for kind in points]
    series = [
        Series(kind, marks, 1 + i, sorted({place for p in marks for place in p.runs}))
        for i, (kind, marks) in enumerate(zip(kinds, points.values(), strict=True))
        if marks
    ]
    body.sort(key=lambda line: (line[0], line[1][0]))
    head = ["estimator", "block-forwards", "error", "seeds"]
    table = Table("Error and cost of each estimator", head, [b for _, b, _ in body], [places for *_, places in body])
    if not series:
        return Panel(title, [], table=table)
    price = Reference(max(1, exact.cost[0]), f"exact: {max(1, exact.cost[0]):,}")
    x = svg.logarithmic("cost (block-forwards)", [p.x for one in series for p in one.points], price)
    chart = svg.scatter("Error of estimators against their cost", x, svg.logarithmic("error", svg.ends(series)), series, price)
    return Panel(title, [Figure("Error against cost", chart, _legend(series))], table=table)


# -- protocols


def _protocols(runs: Collection) -> Table | None:
    if not runs.protocols:
        return None
    found = [flat(protocol.to_dict()) for protocol in runs.protocols.values()]
    keys = dict.fromkeys(key for one in found for key in one)
    return Table("Protocols", ["protocol", *runs.protocols], [[key, *(one.get(key, MISSING) for one in found)] for key in keys])


def _protocol_words(protocol: Protocol) -> str:
    """A protocol in one line."""
    kept = {k: v for k, v in flat(protocol.to_dict()).items() if k != "complete" and len(v) <= 12}
    words = ", ".join(f"{k} {v}" for k, v in kept.items())
    return words + (" (part of the text only)" if protocol.complete is False else "")


# -- runs


def _run(run: Measured) -> RunPage:
    first = next((f"{n.metric} {n.value:.2f}" for n in run.numbers if n.value is not None), "")
    return RunPage(
        key=run.key,
        model=run.model,
        pruner=run.pruner,
        method=run.method,
        zeros=run.zeros,
        seed=run.seed,
        status=run.status,
        result=first,
        trouble=run.trouble,
        numbers=_numbers_of(run),
        command=run.command,
        figures=_run_figures(run),
        listings=[(title, _outline(node)) for title, node in run.about.items() if node],
    )


def _numbers_of(run: Measured) -> Table | None:
    def line(number: Number) -> list[str]:
        error = f" ± {number.stderr:.4f} (standard error)" if number.stderr is not None else ""
        pruned = f"none: {number.reason}" if number.value is None else f"{number.value:.4f}{error}"
        before = MISSING if number.dense is None else f"{number.dense:.4f}"
        return [number.name, pruned, before, MISSING if number.change is None else _signed(number.change, 2)]

    body = [line(number) for number in run.numbers]
    if run.actual is not None:
        body.append(["sparsity", f"{run.actual:.6f}", f"target {run.sparsity:g}", ""])
    return Table(f"Numbers of {run.key}", ["metric", "pruned", "dense", "vs uniform"], body) if body else None


def _run_figures(run: Measured) -> list[Figure]:
    figures, x = [], svg.layers(run.n_blocks) if run.n_blocks else None
    for scores in run.scores:
        values, error = scores.values, scores.stderr
        series = Series("", _points(values, values - error, values + error, run.n_blocks))
        if x is not None and series.points:
            title = f"{scores.kind} per layer: " + ", ".join(f"{v:.3g}" for v in values)
            chart = svg.bars(title, x, svg.symlog(scores.kind, svg.ends([series])), series)
            figures.append(Figure(f"{scores.kind}: {scores.method}", chart))
    if x is not None:
        shares, target = 100 * run.budget, 100 * run.sparsity
        title = "Sparsity per layer in percent: " + ", ".join(f"{v:.1f}" for v in shares)
        series = Series("", _points(shares, shares, shares, run.n_blocks), 2)
        y = svg.linear(ZEROS, [target, *shares.tolist()], zero=True)
        figures.append(Figure("Budget", svg.bars(title, x, y, series, Reference(target, f"target {target:g} %"))))
    return figures + _tuning(run)


def _tuning(run: Measured) -> list[Figure]:
    """The losses of candidates on the whole selection text, or their misalignments on calibration text."""
    tried = run.tried
    what, unit, text = "loss", "loss (nats per token)", "selection text"
    if not run.tries_losses:
        what, unit, text = "misalignment", "misalignment", "calibration text"
    digits = ".4f" if run.tries_losses else ".4g"
    points = [Point(i, loss, tip=f"{label}: {loss:{digits}}") for i, (label, loss) in enumerate(tried) if loss is not None]
    if not points:
        return []

    def label(at: float) -> str:
        return tried[int(at)][0].rpartition("=")[2]

    series = [Series(what, points)]
    x = svg.Axis("tried", -0.5, len(tried) - 0.5, range(0, len(tried), 1 + len(tried) // 8), show=label)
    chart = svg.lines(f"{what.capitalize()} of what was tried", x, svg.linear(unit, svg.ends(series)), series)
    return [Figure(f"Tuning: {run.n_tried} evaluations on {text}", chart, numbers=_numbers(series, "tried", label))]


def _outline(node: dict[str, object], indent: str = "") -> str:
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

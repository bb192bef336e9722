"""The numbers in the documentation: computed from the committed tables and written into the pages.

    python tools/insert_numbers.py            # or: make numbers

A page marks a number, a phrase of numbers or a table with its name, `<!--n:NAME-->...<!--/n-->`; what stands between is
replaced by `numbers()[NAME]`. tests/test_numbers.py fails where a page says something else, and on a result in prose that is
not marked.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "results" / "tables"
DOCS = ("getting_started", "budgets", "choosing", "finetuning", "leaderboard", "real_model")
PAGES = ("README.md", *(f"docs/{name}.md" for name in DOCS))
MARK = re.compile(r"<!--n:([a-z0-9-]+)-->(.*?)<!--/n-->", re.DOTALL)

MODELS, PRUNERS = ("tiny", "tiny_opt"), ("magnitude", "wanda", "sparsegpt")
LEVELS = ("0.5", "0.6", "0.7", "0.8")
FIELD = ("owl", "dlp", "alpha_pruning")
CONTROLS = ("random", "reversed")
SUBLAYERS, ROUNDS, SEARCH = "shapley_sublayers", "shapley_rounds", "search"
SHOWN = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
Cell = tuple[str, str, str]  # model, pruner, sparsity
Line = dict[str, str]


def filled(text: str, values: dict[str, str]) -> str:
    """The page with every marked number as it is in `values`; raises ValueError for a name that is not there."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in values:
            raise ValueError(f"<!--n:{name}-->: no such number; tools/insert_numbers.py has {', '.join(values)}")
        return f"<!--n:{name}-->{values[name]}<!--/n-->"

    return MARK.sub(value, text)


# -- reading tables


def lines_of(name: str, heading: str = "") -> list[Line]:
    """The table of a Markdown file that follows the line that ends with `heading` (or is the first), by its column heads.

    Of columns with the same head the second is called 'head 2', and so on.
    """
    lines = (TABLES / name).read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(heading)) if heading else 0
    first = next(i for i in range(start, len(lines)) if lines[i].startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    head, _, *body = rows
    names = [f"{name} {n}" if (n := head[: i + 1].count(name)) > 1 else name for i, name in enumerate(head)]
    return [dict(zip(names, row, strict=True)) for row in body]


def row(lines: list[Line], **where: str) -> Line:
    (found,) = [line for line in lines if all(line[key] == value for key, value in where.items())]
    return found


def number(text: str) -> float:
    """The first number of a cell: of '13.53 ± 0.01' the mean."""
    return float(re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace(",", ""))[0])


class Board:
    """leaderboard.csv: mean perplexities over the seeds, what was chosen, and what it cost."""

    def __init__(self) -> None:
        self.seeds: dict[tuple[Cell, str], list[float]] = {}
        self.chosen: dict[tuple[Cell, str], str] = {}
        self.cost: dict[tuple[Cell, str], float] = {}
        with (TABLES / "leaderboard.csv").open(encoding="utf-8", newline="") as file:
            for line in csv.DictReader(file):
                key = ((line["model"], line["pruner"], line["sparsity"]), line["allocator"])
                self.seeds.setdefault(key, []).append(float(line["ppl"]))
                self.chosen[key], self.cost[key] = line["chosen"], float(line["cost"])
        self.cells = [(m, p, s) for m in MODELS for s in LEVELS for p in PRUNERS]

    def mean(self, cell: Cell, name: str) -> float:
        return statistics.fmean(self.seeds[cell, name])

    def names(self, cell: Cell) -> list[str]:
        return [name for there, name in self.seeds if there == cell]

    def change(self, cell: Cell, name: str, other: str = "uniform") -> float:
        """Perplexity against another's in percent, of their means."""
        return 100 * (self.mean(cell, name) / self.mean(cell, other) - 1)

    def share(self, name: str, other: str, cells: Iterable[Cell]) -> float:
        """The gain against uniform as a share of another's, in percent: the mean of the cells' ratios."""
        return 100 * statistics.fmean(self.change(cell, name) / self.change(cell, other) for cell in cells)

    def with_all(self, *names: str) -> list[Cell]:
        return [cell for cell in self.cells if all((cell, name) in self.seeds for name in names)]


# -- writing them


def joined(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def percents(values: Iterable[float], digits: int = 0, sign: bool = False) -> str:
    """'58, 37 and 17 %'"""
    return joined(f"{value:{'+' if sign else ''}.{digits}f}" for value in values) + " %"


def span(values: Sequence[float], digits: int = 0, unit: str = " %") -> str:
    """'12 to 14 %'"""
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def table(head: Sequence[str], align: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    rows = [head, align, *body]
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def columns(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as a terminal shows it, indented: numbers to the right."""
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    numeric = [all(re.match(r"[-+]?[\d.]+|-$", line[i]) for line in body) for i in range(len(head))]

    def shown(line: Sequence[str]) -> str:
        cells = (f"{text:>{w}}" if n else f"{text:<{w}}" for text, w, n in zip(line, widths, numeric, strict=True))
        return ("      " + "   ".join(cells)).rstrip()

    rule = "     " + "─" * (sum(widths) + 3 * len(widths) - 1)
    return "\n\n" + "\n".join([shown(head), rule, *map(shown, body)]) + "\n\n"


# -- the numbers, page by page


def of_the_leaderboard() -> dict[str, str]:
    board, out = Board(), {}
    for model in MODELS:
        at_70 = [(model, pruner, "0.7") for pruner in PRUNERS]
        out[f"sublayers-gain-{model}"] = percents(-board.change(cell, SUBLAYERS) for cell in at_70)
        mine = [cell for cell in board.cells if cell[0] == model]
        for name in ("block_influence", "leave_one_out"):
            lower = sum(board.mean(cell, name) < board.mean(cell, "shapley") for cell in mine)
            out[f"{name.replace('_', '-')}-lower-{model}"] = f"{lower} of {len(mine)}"
        gains = [board.change((model, pruner, "0.7"), SUBLAYERS) for pruner in ("sparsegpt", "magnitude")]
        out[f"better-pruner-{model}"] = percents([100 * gains[0] / gains[1]])
        rounds = [-board.change(cell, ROUNDS, "shapley") for cell in at_70]
        out[f"rounds-gain-{model}"] = span(rounds, 1) if min(rounds) > 0 else f"up to {max(rounds):.1f} %"
    out["cells"] = str(len(board.cells))
    out["share-block-influence"] = percents([board.share("block_influence", "shapley", board.cells)])
    out["share-leave-one-out"] = percents([board.share("leave_one_out", "shapley", board.cells)])
    out["share-rounds"] = percents([board.share(ROUNDS, "shapley", board.cells)])
    opt = {pruner: -board.change(("tiny_opt", pruner, "0.7"), "block_influence", "shapley") for pruner in PRUNERS}
    out["influence-opt-70"] = percents([opt["magnitude"], opt["wanda"], opt["sparsegpt"]], 1)
    cell = ("tiny", "wanda", "0.7")
    for name in ("shapley", "block_influence", "leave_one_out", ROUNDS, SUBLAYERS, SEARCH):
        out[f"cost-{name.replace('_', '-')}"] = f"{board.cost[cell, name]:.0f}"
    tuning = board.cost[cell, "atp"]  # seven losses and no scores
    for name in ("shapley", "block_influence", "leave_one_out"):
        out[f"scores-cost-{name.replace('_', '-')}"] = f"{board.cost[cell, name] - tuning:.0f}"
    out["rounds-cost"] = f"{board.cost[cell, ROUNDS] / board.cost[cell, 'shapley']:.1f} times"
    for name in ("shapley", ROUNDS, SUBLAYERS):
        out[f"search-cost-{name.replace('_', '-')}"] = f"{board.cost[cell, SEARCH] / board.cost[cell, name]:.0f} times"
    out |= lowest(board) | published_heuristics(board) | controls(board) | tables_at_70(board)
    out["search-cells"] = str(len(board.with_all(SEARCH)))
    out["curves-behind-wanda"] = span([board.change((m, "wanda", "0.7"), "curves", ROUNDS) for m in MODELS])
    out["curves-behind-opt-sparsegpt"] = percents([board.change(("tiny_opt", "sparsegpt", "0.7"), "curves", ROUNDS)], 1)
    odd = [[f"{board.mean(('tiny_opt', p, s), 'uniform'):.1f}" for s in LEVELS] for p in ("wanda", "magnitude")]
    out["opt-uniform-wanda"], out["opt-uniform-magnitude"] = map(joined, odd)
    largest = [c for c in board.cells if board.chosen[c, SUBLAYERS] == "lam=0.3"]
    out["sublayers-largest-lam"] = f"{len(largest)} of {len(board.cells)}"
    return out


def lowest(board: Board) -> dict[str, str]:
    """Who has the lowest mean, and what search has to do with it."""
    out, whole = {}, len(board.cells)
    entered = {cell: [n for n in board.names(cell) if n not in CONTROLS] for cell in board.cells}
    first = {cell: min(names, key=lambda n: board.mean(cell, n)) for cell, names in entered.items()}
    out["sublayers-lowest"] = f"{sum(name == SUBLAYERS for name in first.values())} of {whole}"
    blocks = {cell: [n for n in names if n != SUBLAYERS] for cell, names in entered.items()}
    best = {cell: min(board.mean(cell, n) for n in names) for cell, names in blocks.items()}
    out["rounds-lowest"] = f"{sum(board.mean(cell, ROUNDS) == best[cell] for cell in board.cells)} of {whole}"
    others = {
        cell: min(names, key=lambda n: board.mean(cell, n))
        for cell, names in blocks.items()
        if board.mean(cell, ROUNDS) > best[cell]
    }
    counts = {name: sum(other == name for other in others.values()) for name in dict.fromkeys(others.values())}
    out["rounds-not-lowest"] = joined(f"`{name}` in {count}" for name, count in counts.items())
    searched = board.with_all(SEARCH)
    for name in ("shapley", ROUNDS, SUBLAYERS):
        out[f"against-search-{name.replace('_', '-')}"] = percents(
            (board.change(c, name, SEARCH) for c in searched), 1, sign=True
        )
    lower = sum(board.mean(cell, SEARCH) < board.mean(cell, ROUNDS) for cell in searched)
    out["search-below-rounds"] = f"{lower} of {len(searched)}"
    return out


def published_heuristics(board: Board) -> dict[str, str]:
    """Where the selection text chose an amplitude for OWL, DLP and AlphaPruning, and what came of it on test text."""
    cells = board.with_all(*FIELD)
    pairs = [(cell, name) for name in FIELD for cell in cells]
    chosen = [pair for pair in pairs if number(board.chosen[pair].partition("=")[2]) > 0]
    out = {"heuristics-uniform": f"{len(pairs) - len(chosen)} of {len(pairs)}", "heuristics-chosen": str(len(chosen))}
    for pruner in ("magnitude", "wanda"):
        cell = ("tiny", pruner, "0.7")
        out[f"heuristics-tiny-{pruner}"] = percents(-board.change(cell, name) for name in ("owl", "dlp"))
        out[f"atp-tiny-{pruner}"] = percents([-board.change(cell, "atp")])
    rest = [pair for pair in chosen if (pair[0][0], pair[0][2]) != ("tiny", "0.7")]
    out["heuristics-rest"] = joined(
        f"{name} on {c[0]} with {SHOWN[c[1]]} at {100 * float(c[2]):.0f} % ({board.change(c, name):+.1f} %)" for c, name in rest
    )
    return out


def controls(board: Board) -> dict[str, str]:
    out = {}
    for name in CONTROLS:
        cells = board.with_all(name)
        changes = [board.change(cell, name) for cell in cells]
        runs = [pair for cell in cells for pair in zip(board.seeds[cell, name], board.seeds[cell, "uniform"], strict=True)]
        better = sum(mine < uniform for mine, uniform in runs)
        out[f"{name}-worse"] = f"{sum(change > 0 for change in changes)} of {len(cells)}"
        out[f"{name}-better-runs"] = f"{better} of {len(runs)}"
        out[f"{name}-span"] = span(changes)
        out[f"{name}-least"] = percents([min(changes)])
    worse = [
        f"`{name}` by {board.change(cell, name):.1f} % ({cell[0]}, {SHOWN[cell[1]]}, {100 * float(cell[2]):.0f} %)"
        for cell in board.cells
        for name in board.names(cell)
        if name not in (*CONTROLS, "uniform") and board.change(cell, name) > 0
    ]
    return out | {"worse-than-uniform": joined(worse), "n-worse-than-uniform": str(len(worse))}


def tables_at_70(board: Board) -> dict[str, str]:
    names = ("uniform", "owl, dlp, alpha_pruning, atp", "block_influence", "curves", "shapley", ROUNDS, SUBLAYERS, SEARCH)
    body = []
    for model in MODELS:
        for pruner in PRUNERS:
            cell: Cell = (model, pruner, "0.7")
            least = min(board.mean(cell, name) for name in board.names(cell) if name not in CONTROLS)
            shown = [f"{model}, {SHOWN[pruner]}"]
            for name in names:
                found = min(
                    (n for n in name.split(", ") if n in board.names(cell)), key=lambda n: board.mean(cell, n), default=None
                )
                if found is None:
                    shown.append("")
                    continue
                ppl = board.mean(cell, found)
                said = f" ({found})" if ", " in name and ppl < board.mean(cell, "uniform") else ""
                shown.append(f"**{ppl:.2f}**{said}" if ppl == least else f"{ppl:.2f}{said}")
            body.append(shown)
    heads = ["", *(f"best of {name}" if ", " in name else name for name in names)]
    return {"board-70": table(heads, ["---", *["---:"] * len(names)], body)}


def of_the_comparisons() -> dict[str, str]:
    """Counts of differences that are more than chance, and the intervals at 70 %."""
    out = {}
    questions = {
        "sublayers": f"{SUBLAYERS} against the best of all others",
        "rounds": f"{ROUNDS} against the best other with one budget a block",
        "rounds-not-searched": f"{ROUNDS} against the best other with one budget a block, but for search",
        "influence": "block_influence against shapley",
        "leave-one-out": "leave_one_out against shapley",
        "shapley-uniform": "shapley against uniform",
        "rounds-search": f"{ROUNDS} against search",
        "sublayers-search": f"{SUBLAYERS} against search",
    }
    for key, question in questions.items():
        lines = lines_of("comparisons.md", f"## {question}")
        tested = [line for line in lines if line["p, corrected"] != "-"]
        alone = [line for line in tested if "[-" in line["95 % interval"] and ", -" in line["95 % interval"]]
        sure = [line for line in tested if line["p, corrected"] == "under 0.001" or number(line["p, corrected"]) < 0.05]
        out[f"{key}-tested"] = str(len(tested))
        out[f"{key}-alone"] = f"{len(alone)} of {len(tested)}"
        out[f"{key}-sure"] = f"{sum(number(line['change']) < 0 for line in sure)} of {len(tested)}"
        out[f"{key}-surely-worse"] = f"{sum(number(line['change']) > 0 for line in sure)} of {len(tested)}"
        for line in lines:
            model, pruner, sparsity = line["cell"].split(", ")
            if sparsity == "70 %":
                shown = line["change"] if line["95 % interval"] == "-" else f"{line['change']} {line['95 % interval']}"
                out[f"{key}-{model.replace('_', '-')}-{pruner}"] = f"{shown} ({line['against']})"
    against = [cell for level in LEVELS for cell in row(lines_at(level), allocator=SUBLAYERS).items() if cell[0] != "allocator"]
    zero = sum(", +" in text for _, text in against)
    out["sublayers-bootstrap-zero"] = f"{zero} of {len(against)}"
    return out


def lines_at(level: str) -> list[Line]:
    """Of leaderboard.md: perplexity against that of the rounds, with bootstrap intervals."""
    return lines_of("leaderboard.md", f"### {100 * float(level):.0f} %")


def of_the_games() -> dict[str, str]:
    screen = lines_of("games.md", "## Screen: perplexity on the selection text, Wanda, 70 %, seed 0")
    best = {line["what"]: line["perplexity"] for line in lines_of("games.md", "The best of each kind:")}
    setting = "absence, players, payoff, estimator; scale"
    text = (TABLES / "games.md").read_text(encoding="utf-8")
    out = {"games-settings": re.findall(r"of (\d+) settings beat uniform", text)[0]}
    out["games-uniform"] = row(screen, **{setting: "uniform"})["perplexity"]
    kinds = {
        "payoffs": ("recip_ppl", "kl", "accuracy", "neg_nll", "neg_nll, capped", "neg_ppl"),
        "scales": ("log", "rank", "clip", "raw"),
        "players": ("sublayer", "block"),
        "absences": ("skip", "prune"),
        "estimators": ("w=1", "w=5", "w=3", "exact", "w=8", "w=5, context absent", "gates"),
    }
    for kind, names in kinds.items():
        out[f"games-{kind}"] = " / ".join(best[name] for name in names)
    for name, what in {
        "nll-window": "skip, block, neg_nll, w=5; log",
        "capped-exact": "skip, block, neg_nll, capped, exact; log",
        "recip-exact": "skip, block, recip_ppl, exact; log",
        "default": "skip, block, recip_ppl, w=5; log",
        "recip-w1": "skip, block, recip_ppl, w=1; log",
    }.items():
        out[f"games-{name}"] = row(screen, **{setting: what})["perplexity"]
    seeds = lines_of("games.md", "mean ± sd over 3 calibration seeds")
    words = {
        "uniform": "uniform",
        "skip, block, neg_nll, w=5; log": "-NLL, w=5, log (plain)",
        "skip, block, recip_ppl, w=5; log": "recip_ppl, w=5, log (default)",
        "skip, block, recip_ppl, exact; log": "recip_ppl, exact, log",
        "skip, sublayer, recip_ppl, w=1; log": "recip_ppl, sublayers, w=1, log",
    }
    cells = [key for key in seeds[0] if key != "setting"]
    heads = ["setting", *(cell.replace("wanda", "Wanda").replace("sparsegpt", "SparseGPT") for cell in cells)]
    body = [[said, *(row(seeds, setting=what)[cell].split(" ")[0] for cell in cells)] for what, said in words.items()]
    out["games-seeds"] = table(heads, ["---"] * len(heads), body)
    tested = lines_of("games.md", "## Test text, read once: perplexity at 70 %, mean ± sd over 3 calibration seeds")
    uniform = row(tested, setting="uniform")
    body = []
    for line in tested:
        said = {"uniform": "uniform", "skip, block, neg_nll, w=5; log": "plain"}.get(line["setting"], "default")
        changes = [f" ({100 * (number(line[p]) / number(uniform[p]) - 1):+.1f} %)" for p in ("wanda", "sparsegpt")]
        cells = [
            line[p] + (change if said == "default" else "") for p, change in zip(("wanda", "sparsegpt"), changes, strict=True)
        ]
        body.append([said, *cells])
    out["games-test"] = table(["setting", "Wanda", "SparseGPT"], ["---"] * 3, body)
    exact = exact_values("## skip, -NLL capped at chance")
    out["first-block"] = f"{exact[0] / statistics.median(exact[1:]):.0f} times"
    return out


def exact_values(heading: str) -> list[float]:
    text = (TABLES / "estimators.md").read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    return [float(value) for value in re.findall(r"Exact values: (.*)\.\n", text)[0].split(", ")]


def of_budgets_and_windows() -> dict[str, str]:
    ideas = {line["idea"]: line for line in lines_of("budgets.md")}
    out = {}
    for name, idea in {
        "sublayers": "players and budgets per sublayer",
        "sublayers-w1": "players and budgets per sublayer, windows of 1",
        "sublayer-rounds": "players and budgets per sublayer, 3 rounds, the first to 0.3",
        "linears-shapley": "blocks divided among linears by their Shapley values",
        "linears-outliers": "blocks divided among linears by outliers",
        "rounds": "2 rounds: values of the pruned model correct the budget",
        "pruned": "absent is pruned, others dense",
        "w1": "windows of 1 (leave one out)",
    }.items():
        out[f"budgets-{name}"] = (
            joined(ideas[idea][column].removesuffix(" %") for column in ("vs default", "vs default 2")) + " %"
        )
    windows = [line for line in lines_of("window_ablation_tiny.md") if line["allocator"] == "shapley"]
    body = [[line["shapley.window"], *(line[f"tiny {p} ours"].strip("*") for p in ("wanda", "sparsegpt"))] for line in windows]
    out["windows"] = table(["window", "Wanda", "SparseGPT"], ["---:"] * 3, body)
    return out


def of_the_estimators() -> dict[str, str]:
    games = {"capped": "## skip, -NLL capped at chance", "pruned": "## prune (Wanda, 70 %), -NLL", "plain": "## skip, -NLL"}
    lines = {name: lines_of("estimators.md", heading) for name, heading in games.items()}

    def value(game: str, estimator: str, column: str) -> float:
        return number(row(lines[game], estimator=estimator)[column])

    out = {f"spearman-w{w}": f"{value('capped', f'sliding window w={w}', 'Spearman'):.3f}" for w in (1, 5)}
    for game in ("capped", "pruned"):
        out[f"permutation-error-{game}"] = percents([100 * value(game, "permutation, budget 144", "error / spread")], 1)
    plain = value("pruned", "permutation, budget 400, not antithetic", "error / spread")
    out["antithetic"] = percents([100 * value("pruned", "permutation, budget 400", "error / spread") / plain])
    rho = [value("plain", f"gates, {nodes} nodes", "Spearman") for nodes in (2, 4, 8)]
    out["spearman-gates"] = f"{min(rho):.3f} to {max(rho):.3f}"
    benchmark = (ROOT / "results" / "benchmarks" / "shapley_cost.md").read_text(encoding="utf-8")
    out["gates-cost"] = f"{float(re.findall(r'Gates with 8 nodes: ([0-9.]+) full', benchmark)[0]):.0f}"
    forwards = [
        value("capped", name, "block-forwards")
        for name in ("permutation, budget 1200, truncated 1 %", "permutation, budget 1200")
    ]
    out["truncation"] = f"{forwards[0]:,.0f} block-forwards instead of {forwards[1]:,.0f}"
    steps = [value("plain", f"sliding window w={w}", "block-forwards") for w in (1, 5)]
    out["w1-forwards"], out["w5-forwards"] = (f"{step:.0f}" for step in steps)
    return out


def of_the_pruners() -> dict[str, str]:
    errors = {line["better than"]: line for line in lines_of("pruners.md", "### Built-in model, 70 %: 84 layers")}
    whole = {line["pruner"]: line for line in lines_of("pruners.md", "## On the whole model")}
    share = "error / Wanda's"
    order = sorted(whole, key=lambda name: (number(whole[name]["50 %"]), number(whole[name]["70 %"])))
    body = []
    for name in order:
        perplexities = [whole[name][column].split(" ")[0] for column in ("50 %", "70 %", "2:4")]
        body.append([f"`{name}`", *perplexities, errors[name][share], errors[name]["sparsegpt"]])
    heads = ["pruner", "50 %", "70 %", "2:4", "error", "better than SparseGPT in"]
    return {"pruners": table(heads, ["---"] * 6, body)}


def of_the_demo() -> dict[str, str]:
    lines = lines_of("smoke.md")
    return {"smoke": columns(list(lines[0]), [list(line.values()) for line in lines])}


def code_first(setting: str) -> str:
    """'`shapley_margins`, linear layers'"""
    name, comma, rest = setting.partition(",")
    return f"`{name}`{comma}{rest}"


def of_recovery() -> dict[str, str]:
    """Budgets without and with refitted weights, and how much of what a budget gains is left."""
    lines = lines_of("recovery.md")
    heads = [key for key in lines[0] if key not in ("error", "s")]
    body = [[line[key] for key in heads] for line in lines]
    changes = [(number(line["change"]), number(line["change 2"])) for line in lines]
    shares = [100 * after / before for before, after in changes]
    cheap = row(lines, pruner="wanda", zeros="70 %")
    return {
        "recovery": table([head.removesuffix(" 2") for head in heads], ["---", *["---:"] * (len(heads) - 1)], body),
        "recovery_left": f"{min(shares):.0f} to {max(shares):.0f} %",
        "recovery_uniform": f"{cheap['uniform']} to {cheap['uniform, refitted']}",
        "recovery_budget": cheap["shapley"],
    }


def of_finetuning() -> dict[str, str]:
    """Perplexities before and after training, and what a merge of adapters loses."""
    out, kept = dict[str, str](), ["budget", "zeros", "before", "trained"]
    for name in ("finetuning", "finetuning_real"):
        lines = lines_of(f"{name}.md")
        plain = row(lines, budget="uniform")
        out |= {
            name: table(kept, ["---", *["---:"] * 3], [[line[key] for key in kept] for line in lines]),
            f"{name}_lora": f"from {plain['LoRA']} to {plain['LoRA, merged']}",
            f"{name}_masked": plain["masked LoRA, merged"],
        }
    return out


def of_the_experts() -> dict[str, str]:
    """How scores of experts agree with measured sensitivity, and budgets by them."""
    agreement, budgets = (lines_of("experts.md", heading) for heading in ("Agreement with measured sensitivity", "## Budgets"))
    levels = [key for key in agreement[0] if key.endswith(" %")]
    kept = ["pruner", "zeros", "score", "perplexity", "change"]
    return {
        "experts_agreement": table(
            ["score", *levels],
            ["---", *["---:"] * len(levels)],
            [[line[key] for key in ("score", *levels)] for line in agreement],
        ),
        "experts_budgets": table(
            kept, ["---", "---:", "---", "---:", "---:"], [[line[key] for key in kept] for line in budgets]
        ),
    }


def of_the_margins() -> dict[str, str]:
    """What is measured of values at the margin; cells and settings of which nothing is are left out."""
    lines = lines_of("margins.md")
    cells = [key for key in lines[0] if key != "setting" and any(line[key] != "-" for line in lines)]
    rows = [line for line in lines if any(line[cell] != "-" for cell in cells)]
    heads = ["on selection text", *(cell.replace("wanda", "Wanda").replace("sparsegpt", "SparseGPT") for cell in cells)]
    body = [[code_first(line["setting"]), *(line[cell].partition(" (")[0] for cell in cells)] for line in rows]
    whole = [key for key in lines[0] if key != "setting"]
    costs = {line["setting"]: line for line in lines_of("margins.md", "## What it takes")}
    of = {line["setting"]: line for line in lines}

    def below(one: str, other: str) -> str:
        pairs = [(of[one][cell], of[other][cell]) for cell in cells if "-" not in (of[one][cell], of[other][cell])]
        both = [[number(text.partition(" ")[0].rstrip(",")) for text in pair] for pair in pairs]
        return f"{sum(a < b for a, b in both)} of {len(both)}"

    blocks, linears, parts = (f"shapley_margins{part}" for part in ("", ", linear layers", ", attention and MLP"))
    return {
        "margins-blocks-below": below(blocks, "shapley, lam=auto"),
        "margins-parts-below-linears": below(parts, linears),
        "margins-parts-below-values": below(parts, "shapley_sublayers, lam=auto"),
        "margins-linears-below-values": below(linears, "shapley_sublayers, lam=auto"),
        "margins": table(heads, ["---", *["---:"] * len(cells)], body),
        "margins-cells": f"{len(cells)} of {len(whole)}",
        "margins-cost": costs["shapley_margins, linear layers"]["cost"],
        "margins-cost-shapley": costs["shapley, lam=auto"]["cost"],
    }


def of_the_intervals() -> dict[str, str]:
    """Changes on the real model with their intervals, by budget and cell, and what rounding alone changes."""
    ours = {
        "margins": "shapleymargins",
        "mixed": "marginsandinfluence",
        "linears": "shapleymarginslinears",
        "mixed-linears": "marginsandinfluencelinears",
    }
    out: dict[str, str] = {}
    for heading in ("## One budget a block", "## Finer budgets"):
        for line in lines_of("smollm2_intervals.md", f"{heading}: each of ours against the best other"):
            names = [name for name, method in ours.items() if line["budget"].partition(" (")[0] == method]
            if names:
                name, runs = names[0] + "-refresh" * ("refresh" in line["budget"]), line["runs"]
                told = f"{line['change']} {line['95 % interval']}, {runs} run{'s' * (runs != '1')}"
                told += f" of {line['seeds']} seed{'s' * (line['seeds'] != '1')}" * (runs != line["seeds"])
                out[f"beside-{name}-{cell_key(line['cell'])}"] = told
    others = lines_of("smollm2_intervals.md", "## Values at the margin per linear layer against every other budget")
    for line in others:
        if line["against"].partition(" (")[0] == ours["linears"]:
            out[f"mixed-beside-linears-{cell_key(line['cell'])}"] = f"{line['change']} {line['95 % interval']}"
    finer = (ours["linears"], ours["mixed-linears"])
    for name in ("linears", "mixed-linears"):
        mine = [line for line in others if line["budget"].partition(" (")[0] == ours[name]]
        mine = [line for line in mine if line["against"].partition(" (")[0] not in finer]
        by_values = [line for line in mine if line["against"].startswith(("shapley", "margins"))]
        plain = [line for line in mine if line not in by_values]
        out |= {f"n-{name}-beside-others": str(len(plain)), f"not-below-others-{name}": listed(plain, "against")}
        out |= {f"n-{name}-beside-ours": str(len(by_values)), f"not-below-ours-{name}": listed(by_values, "against")}
        out[f"n-{name}-cells"] = str(len({line["cell"] for line in plain}))
    text = (TABLES / "smollm2_intervals.md").read_text(encoding="utf-8")
    moved = re.findall(r"(\w+), (\d+) %: ([\d.]+) %", text.partition("Root mean square: ")[2].partition("\n")[0])
    out |= {f"rounding-{pruner}-{level}": f"{size} %" for pruner, level, size in moved}
    against = lines_of("smollm2_intervals.md", "## Every budget against uniform")
    out |= {
        f"influence-{cell_key(line['cell'])}": f"{line['change']} {line['95 % interval']}"
        for line in against
        if line["budget"] == "blockinfluence"
    }
    return out | {"not-below-uniform": listed(against, "budget"), "n-beside-uniform": str(len(against))}


def listed(lines: list[Line], key: str) -> str:
    """The lines whose interval, or whose p-value once corrected, does not tell them from no change or from more."""

    def is_lower(line: Line) -> bool:
        sure = line["p, corrected"] == "under 0.001" or number(line["p, corrected"]) < 0.05
        return sure and number(line["95 % interval"].strip("[]").split(", ")[1]) < 0

    named = [f"{short_name(line[key])} with {line['cell']}" for line in lines if not is_lower(line)]
    return "; ".join(named) or "none"


def cell_key(cell: str) -> str:
    """'wanda-60' of 'wanda, 60 %'"""
    return cell.removesuffix(" %").replace(", ", "-")


# Options that a budget has everywhere in the table of the real model.
USUAL = {"log", "raw", "mean", "lam=0.15", "lam=0.08", "m=5", "epsilon=0.2", "levels=5"}
USUAL |= {"rounds=6", "step=0.05", "delta=0.05", "nodes=1", "n_seq=8", "trial_n_seq=16", "influence=0.5"}  # of margins
USUAL |= {"offspring=16", "sequences=4/16", "survivors=4/1", "seed=0", "trial", "by kl"}  # of the search


def short_name(allocator: str) -> str:
    """A budget without the options that the table of the real model has everywhere."""
    method, _, options = allocator.partition(" (")
    told = [word for word in options.rstrip(")").split(", ") if word and word not in USUAL]
    return method + (f" ({', '.join(told)})" if told else "")


def of_the_real_budgets() -> dict[str, str]:
    """The budgets on the real model: perplexities of all runs by cell, on GPUs by seed, and on CPUs by machine."""
    cells = [(pruner, sparsity) for sparsity in ("0.5", "0.6", "0.7") for pruner in ("wanda", "sparsegpt", "alps")]

    def read(*files: str) -> dict[str, dict[tuple[str, str], dict[str, str]]]:
        """Perplexity by budget, cell, and run: the seed, or on CPUs its table as well."""
        found: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
        for file in files:
            for line in lines_of(f"{file}.md"):
                cell = (line["pruner"], line["sparsity"])
                if cell in cells and "=auto" not in line["allocator"]:
                    of_cell = found.setdefault(short_name(line["allocator"]), {}).setdefault(cell, {})
                    of_cell[line.get("seed", "0") + file * (files != gpu)] = line["wikitext2/ppl"]
        return found

    def told(run: tuple[str, str]) -> str:
        """The perplexity of a run, with its seed where it is one of several tables."""
        key, ppl = run
        return f"{ppl} ({key[0]})" if len(key) > 1 else ppl

    def shown(found: dict[str, dict[tuple[str, str], dict[str, str]]]) -> str:
        used = [cell for cell in cells if any(cell in of_budget for of_budget in found.values())]
        heads = [f"{pruner}, {sparsity[2:]}0 %" for pruner, sparsity in used]
        body = [
            [name, *(", ".join(map(told, sorted(found[name].get(cell, {"": "-"}).items()))) for cell in used)]
            for name in sorted(found, key=lambda name: (name != "uniform", name))
        ]
        return table(["budget", *heads], ["---"] * (1 + len(used)), body)

    gpu = ("smollm2_h100", "smollm2_h200")
    here, there = read("smollm2", "smollm2_v4", "smollm2_epyc"), read(*gpu)
    out = {"real-budgets": shown(there), "real-budgets-cpu": shown(here)}
    for sparsity in ("0.6", "0.7"):
        runs = [
            *here["blockinfluence"]["sparsegpt", sparsity].values(),
            *there["blockinfluence"]["sparsegpt", sparsity].values(),
        ]
        ppl = [number(text) for text in runs]
        out[f"influence-span-{sparsity[2:]}0"] = f"{min(ppl):.2f} to {max(ppl):.2f} in {len(ppl)} runs"
    for name, cell in {"refreshed-60": ("sparsegpt", "0.6"), "refreshed-wanda-70": ("wanda", "0.7")}.items():
        (out[name],) = here["marginsandinfluence (refresh)"][cell].values()
    out["mixed-wanda-70"] = there["marginsandinfluence"]["wanda", "0.7"]["0"]
    for key, budget in {
        "linears-70-refreshed": "shapleymarginslinears (refresh)",
        "linears-70-again": "shapleymarginslinears",
    }.items():
        out[key] = here[budget]["sparsegpt", "0.7"]["2smollm2_epyc"]
    out["linears-50-cpu"] = here["shapleymarginslinears"]["sparsegpt", "0.5"]["0smollm2_epyc"]
    out["linears-50-gpu"] = there["shapleymarginslinears"]["sparsegpt", "0.5"]["0"]
    for name, budget in {"uniform": "uniform", "influence": "blockinfluence"}.items():
        out[f"alps-{name}"] = there[budget]["alps", "0.6"]["0"]
    return out | of_the_trials(there)


def of_the_trials(budgets: dict[str, dict[tuple[str, str], dict[str, str]]]) -> dict[str, str]:
    """What choosing knobs and searching came to on the real model, at 60 % with Wanda."""
    lines, cell = lines_of("smollm2_h200_trials.md"), ("wanda", "0.6")
    body: list[list[str]] = []
    out: dict[str, str] = {}
    for line in lines:
        tried = [(float(loss), label) for label, _, loss in (one.partition(": ") for one in line["tried"].split(", "))]
        method = line["allocator"].partition(" (")[0]
        if method == "searchlinears":
            n = re.findall(r"generations=(\d+)", line["allocator"])[0]
            out |= {f"search-{n}": line["wikitext2/ppl"], f"search-{n}-evaluations": line["evaluations"]}
            out |= {f"search-{n}-loss": f"{tried[-1][0]:.3f}", f"search-{n}-loss-before": f"{tried[-3][0]:.3f}"}
            continue
        loss, label = min(tried)
        uniform = next(loss for loss, label in tried if label.endswith("=0"))
        plain = "shapley (slidingwindow w=3)" if method == "shapley" else method
        published = budgets[plain][cell]["0"]
        body.append([plain, label, f"{uniform:.3f}", f"{loss:.3f}", published, line["wikitext2/ppl"]])
    heads = ["budget", "chosen of seven", "loss of uniform", "its loss", "perplexity as published", "as chosen"]
    return out | {"real-trials": table(heads, ["---"] * len(heads), body)}


def of_zero_shot() -> dict[str, str]:
    """Zero-shot accuracy on the real model, dense and pruned with SparseGPT."""
    tasks = {"BoolQ": "boolq/acc", "RTE": "rte/acc", "WinoGrande": "winogrande/acc", "PIQA": "piqa/acc"}
    tasks |= {"ARC-Easy": "arc_easy/acc", "mean": "zero_shot/mean"}
    names = {"uniform": "uniform", "blockinfluence": "block_influence"}
    names |= dict.fromkeys(("fromfile", "shapleymarginslinears"), "shapley_margins, one a linear layer")
    lines = lines_of("smollm2_zero_shot.md")
    dense = ["-", "dense", *(lines[0][f"{task} (limit 400) dense"] for task in tasks.values())]
    body = [
        [f"{line['sparsity'][2:]}0 %", name, *(line[f"{task} (limit 400)"] for task in tasks.values())]
        for method, name in names.items()
        for line in lines
        if line["allocator"].partition(" (")[0] == method
    ]
    text = (TABLES / "smollm2_zero_shot.md").read_text(encoding="utf-8")
    errors = re.findall(r"Standard error of (\S+) over its items, of each run: (\d+\.\d+)(?: to (\d+\.\d+))?", text)
    of_tasks = [float(high or low) for name, low, high in errors if name != "zero_shot/mean"]
    of_mean = next(high or low for name, low, high in errors if name == "zero_shot/mean")
    return {
        "zero-shot": table(
            ["sparsity", "budget", *tasks], ["---"] * (2 + len(tasks)), [dense, *sorted(body, key=lambda b: b[0])]
        ),
        "zero-shot-error": f"{max(of_tasks):.1f}",
        "zero-shot-mean-error": f"{float(of_mean):.1f}",
    }


def of_the_real_model() -> dict[str, str]:
    """Games on a real model beside what sparsity costs its blocks."""
    games = lines_of("real_model.md")
    text = (TABLES / "real_model.md").read_text(encoding="utf-8")

    def agreement(game: str) -> str:
        found = [number(line["Spearman"]) for line in games if line["game"].startswith(game)]
        return span(found, 2, "")

    budgets = [
        line | {"allocator": line["allocator"].partition(" (")[0]}
        for line in lines_of("smollm2_h200.md")
        if (line["pruner"], line["sparsity"], line["seed"]) == ("wanda", "0.6", "0")
        if short_name(line["allocator"]) == line["allocator"].partition(" (")[0]
    ]
    newest, third = lines_of("smollm2_v4.md"), lines_of("smollm2_epyc.md")
    shown = ("game", "payoff", "Spearman", "Pearson of logs", "standard error / spread")
    noise = [number(line["standard error / spread"]) for line in games if line["standard error / spread"] != "-"]
    return {
        **of_the_intervals(),
        **of_the_real_budgets(),
        **of_zero_shot(),
        "real-dense": row(budgets, allocator="uniform")["wikitext2/ppl dense"],
        "real-uniform": row(budgets, allocator="uniform")["wikitext2/ppl"],
        "real-margins": row(budgets, allocator="shapleymargins")["wikitext2/ppl"],
        "real-linears": row(budgets, allocator="shapleymarginslinears")["wikitext2/ppl"],
        "real-mixed-linears": row(budgets, allocator="marginsandinfluencelinears")["wikitext2/ppl"],
        "real-block-influence": row(budgets, allocator="blockinfluence")["wikitext2/ppl"],
        "real-thanos": row(newest, pruner="thanos", allocator="uniform", sparsity="0.6")["wikitext2/ppl"],
        "real-sparseswaps": row(third, pruner="sparseswaps (wanda)")["wikitext2/ppl"],
        "alps-linears": row(third, pruner="alps", allocator="fromfile")["wikitext2/ppl"],
        "real-refitted": row(third, pruner="wanda + reconstruct")["wikitext2/ppl"],
        "real-not-refitted": row(third, pruner="wanda", allocator="uniform", sparsity="0.6")["wikitext2/ppl"],
        "real-n-seq": re.findall(r"on the same (\d+) x", text)[0],
        "real-games": table(shown, ["---"] * len(shown), [[line[key] for key in shown] for line in games]),
        "real-skip": agreement("skip, dense context, w=1"),
        "real-skip-w3": agreement("skip, dense context, w=3"),
        "real-influence": agreement("block influence"),
        "real-prune-dense": agreement("prune 0.6, dense context, w=1"),
        "real-prune-pruned": agreement("prune 0.6, pruned context, w=1"),
        "real-margin": agreement("margin 0.6, w=1"),
        "real-gates": agreement("Aumann-Shapley"),
        "real-stderr": f"{max(noise):.2f}",
    }


def of_other_texts() -> dict[str, str]:
    """Margins with SparseGPT whose values are measured on WikiText-2, and how margins prune on C4 and on WikiText-2."""
    out = {}
    for line in lines_of("smollm2.md"):
        if "values on textfile" in line["allocator"] and line["pruner"] == "sparsegpt":
            out[f"real-text-{line['sparsity'][2:]}0"] = line["wikitext2/ppl"]
    for line in lines_of("transfer.md"):
        if line["budget"] == "margins" and line["cell"].startswith("sparsegpt"):
            level = f"{line['cell'][-1]}0"
            out[f"transfer-wiki-{level}"] = line["change 2"]
            out[f"transfer-margins-{level}"] = line["WikiText-2"]
        if line["budget"] == "block influence" and line["cell"].startswith("sparsegpt"):
            out[f"transfer-influence-{line['cell'][-1]}0"] = line["WikiText-2"]
        if line["budget"] == "half margins, half influence":
            pruner, _, sparsity = line["cell"].partition(", ")
            out[f"transfer-half-{pruner}-{sparsity[2:]}0"] = line["change 2"]
    return out


def of_the_choices() -> dict[str, str]:
    """On windows 1 to 32 of WikiText-2: budgets whose statistics are taken anew, and two ways of attention."""
    out = {}
    for line in lines_of("smollm2_choice.md"):
        if line["allocator.refresh"] == "true":
            out[f"choice-{line['allocator']}"] = line["wikitext2/ppl"].strip("*")
        elif line["allocator"] == "uniform":
            out[f"choice-{line['model.attn_implementation']}"] = line["wikitext2/ppl"]
    return out


def of_the_benchmarks() -> dict[str, str]:
    """How fast games and prunings are, beside straightforward and released code."""
    games = lines_of("../benchmarks/shapley_cost.md")
    cost = (TABLES / "../benchmarks/pruning_cost.md").read_text(encoding="utf-8")
    models = [heading for heading in re.findall(r"^## (.*)$", cost, re.MULTILINE) if "blocks" in heading]
    released = [row(lines_of("../benchmarks/pruning_cost.md", name), stage="released code, whole job") for name in models]
    return {
        "speed-window": row(games, values="sliding window w=5", way="straightforward")["times svnup"],
        "speed-wanda": span([number(line["of the job"]) for line in released], 2, ""),
        "speed-sparsegpt": span([number(line["of the job 2"]) for line in released], 2, ""),
    } | of_the_gpu()


def of_the_gpu() -> dict[str, str]:
    """What a 7B shape takes on an H200."""
    reached = {
        line["of 7B"].partition(" ")[0].rstrip(","): line["seconds"]
        for line in lines_of("../benchmarks/gpu.md", "## NVIDIA H200")
    }
    return {f"gpu-{what.lower()}": f"{number(seconds):.0f} s" for what, seconds in reached.items()}


def of_the_paper() -> dict[str, str]:
    with (ROOT / "experiments" / "published" / "headline.csv").open(encoding="utf-8", newline="") as file:
        lines = {line["model"]: float(line["change"]) for line in csv.DictReader(file)}
    return {"paper-7b": percents([-100 * lines["llama_7b"]], 2)}


def of_the_families() -> dict[str, str]:
    """How many tiny models of causal families of transformers work, of all that were tried."""
    verdicts = [line["verdict"] for line in lines_of("families.md", "and why |")]
    counts = {verdict: verdicts.count(verdict) for verdict in ("works", "in part")}
    return {"families": str(len(verdicts)), "families_work": str(counts["works"]), "families_part": str(counts["in part"])}


def numbers() -> dict[str, str]:
    """Every number by its name."""
    parts = [of_the_leaderboard(), of_the_comparisons(), of_the_games(), of_budgets_and_windows(), of_the_estimators()]
    parts += [of_the_pruners(), of_the_demo(), of_the_paper(), of_the_margins(), of_the_real_model(), of_other_texts()]
    parts += [of_the_choices()]
    parts += [of_recovery(), of_finetuning(), of_the_experts(), of_the_benchmarks(), of_the_families()]
    out: dict[str, str] = {}
    for part in parts:
        assert not out.keys() & part.keys()
        out |= {name.replace("_", "-"): text for name, text in part.items()}
    return out


def main() -> None:
    values = numbers()
    for name in PAGES:
        page = ROOT / name
        page.write_text(filled(page.read_text(encoding="utf-8"), values), encoding="utf-8")


if __name__ == "__main__":
    main()

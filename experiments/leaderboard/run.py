"""The leaderboard: every allocator with three pruners, on the built-in model and on one on which nothing was chosen.

A cell is a model, a pruner and a sparsity. In each, an allocator's knob is chosen once, on the selection text with the first
calibration seed (seven losses, uniform among them); then the model is pruned with three calibration seeds and read on test
text. Search gets about twenty times what the Shapley budget cost, in losses on the same text. The controls take the
amplitude of the Shapley budget. 0.6 and 0.7 have all allocators, 0.5 and 0.8 uniform and the five that are best at these on
selection text. Writes results/tables/leaderboard.md and .csv and the figures; what is measured is kept in the cache, and a
killed run goes on.

    python -m experiments.leaderboard.run [--cache results/cache] [--workers 2] [--models tiny,tiny_opt] [--no-search] [--quick]

With --long-search tiny_opt/wanda there is one more search there, which gets twenty times what `shapley_rounds` cost: three
quarters of an hour a cell.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from experiments.study import figure, interval, parse, parser, publish
from svnup import NUMBERS_VERSION, config
from svnup.allocation import Budget
from svnup.allocation.maps import Tuned
from svnup.config import CONF, Job
from svnup.data import tokens_sha256
from svnup.language_model import LanguageModel
from svnup.pipeline import replacements, trial_of
from svnup.pruning.walk import temporarily_pruned
from svnup.results.provenance import hardware
from svnup.results.row import Round, Tried, Tuning
from svnup.scoring import Context
from svnup.types import Floats, SparsityProfile

MODELS = ("tiny", "tiny_opt")
SUBLAYERS = "shapley_sublayers"  # attention and MLP are players with budgets of their own:
OF_SUBLAYERS = ("allocator.granularity=sublayer", "shapley.game.players=sublayer")
TUNED = ("shapley", SUBLAYERS, "leave_one_out", "owl", "alpha_pruning", "dlp", "atp", "block_influence")
CONTROLS = ("random", "reversed")
ROUNDS = "shapley_rounds"
SEARCH, LONG = "search", "search_long"  # the second at 20 times the cost of rounds, where it is asked for
PROFILED = (ROUNDS, "curves", SEARCH, LONG)  # whose profile is the choice, made once for all seeds
ALLOCATORS = ("uniform", ROUNDS, *TUNED, "curves", SEARCH, LONG, *CONTROLS)
SEARCH_CELLS = {("wanda", 0.7), ("sparsegpt", 0.7)}  # a search costs as much as all else in a cell
Cell = tuple[str, str, float]  # model, pruner, sparsity


@dataclass(frozen=True)
class Sizes:
    """How much is measured, on how much text; the defaults made the committed leaderboard."""

    pruners: tuple[str, ...] = ("magnitude", "wanda", "sparsegpt")
    sparsities: tuple[float, ...] = (0.7, 0.6)
    more_sparsities: tuple[float, ...] = (0.5, 0.8)
    allocators: tuple[str, ...] = ALLOCATORS
    seeds: tuple[int, ...] = (0, 1, 2)
    n_calibration: int = 16
    n_selection: int = 24
    n_test: int = 64
    n_payoff: int = 8
    seq_len: int = 256
    search: int = 20  # the budget of search, in costs of the Shapley budget


FULL = Sizes()
QUICK = Sizes(
    pruners=("wanda",),
    sparsities=(0.7,),
    more_sparsities=(),
    allocators=("uniform", ROUNDS, "shapley", "owl", SEARCH, *CONTROLS),
    seeds=(0, 1),
    n_calibration=2,
    n_selection=4,
    n_test=3,
    n_payoff=1,
    seq_len=32,
    search=1,
)


@dataclass(frozen=True)
class Entry:
    """One allocator in one cell: test NLL in nats per seed and window (3, n), profile per seed (3, n_blocks), what was chosen
    and what it cost, in forward passes of the model over the calibration text."""

    cell: Cell
    allocator: str
    chosen: str
    losses: Floats
    profiles: Floats
    n_losses: int
    cost: float
    curve: tuple[Tried, ...]

    @property
    def perplexities(self) -> Floats:
        out: Floats = np.exp(self.losses.mean(axis=1))
        return out


class Bench:
    """The models, and what was measured once ever: one JSON line each, in a file per process."""

    def __init__(self, cache: str | Path, sizes: Sizes = FULL) -> None:
        self.cache, self.sizes = Path(cache), sizes
        self.folder = self.cache / "leaderboard"
        self.known: dict[str, Any] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    key, value = json.loads(line)
                    self.known[key] = value
                except ValueError:
                    continue  # torn by a kill: computed again
        self.models: dict[str, LanguageModel] = {}
        self.jobs: dict[tuple[Any, ...], Job] = {}  # composing one takes half a second
        self.texts: config.Texts = {}

    def remembered(self, what: list[Any]) -> Any:
        return self.known.get(self._key(what))

    def remember(self, what: list[Any], value: Any) -> None:
        self.known[self._key(what)] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([self._key(what), value]) + "\n")

    def _key(self, what: list[Any]) -> str:
        return hashlib.sha256(json.dumps([NUMBERS_VERSION, *what]).encode()).hexdigest()[:24]

    def job(self, cell: Cell, allocator: str, seed: int, *overrides: str) -> Job:
        """What the command would run: `svnup` with these overrides."""
        if (asked := (cell, allocator, seed, *overrides)) in self.jobs:
            return self.jobs[asked]
        model, pruner, sparsity = cell
        sizes = self.sizes
        texts = {"dataset": sizes.n_calibration, "selection": sizes.n_selection, "evaluation": sizes.n_test}
        texts |= {"shapley.game.data": sizes.n_payoff}
        named = {LONG: SEARCH, SUBLAYERS: "shapley"}.get(allocator, allocator)
        base = [f"model={model}", f"pruner={pruner}", f"sparsity={sparsity}", f"allocator={named}", f"seed={seed}"]
        base += ["compare_uniform=off", "model.device=cpu", f"cache_dir={self.cache}"]
        base += [f"{text}.n_seq={n}" for text, n in texts.items()]
        base += [f"model.seq_len={sizes.seq_len}"] if sizes.seq_len != FULL.seq_len else []
        config.register()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", [*base, *overrides])
        return self.jobs.setdefault(asked, config.build(cfg, self.texts))

    def model(self, job: Job, name: str) -> LanguageModel:
        if name not in self.models:
            self.models[name] = job.model.load()
        return self.models[name]

    def entry(self, cell: Cell, allocator: str) -> Entry:
        """The measured entry, from the cache where it is there."""
        lam, cost = None, 0.0
        if allocator in (*CONTROLS, SEARCH, LONG):
            base = self.entry(cell, ROUNDS if allocator == LONG else "shapley")
            lam, cost = base.chosen.partition("=")[2], base.cost
        overrides = self._overrides(cell, allocator, lam, cost)
        job = self.job(cell, allocator, self.sizes.seeds[0], *overrides)
        what = ["entry", allocator, job.key, self.model(job, cell[0]).fingerprint(), len(self.sizes.seeds)]
        found = self.remembered(what)
        if found is None:
            found = self._measure(cell, allocator, overrides)
            self.remember(what, found)
        if allocator in CONTROLS:  # whose amplitude is the one that was chosen for it
            found = found | {"cost": cost}
        parts: dict[str, Any] = {name: np.array(found[name]) for name in ("losses", "profiles")}
        parts |= {"curve": tuple(Tried.from_dict(one) for one in found["curve"])}
        return Entry(cell, allocator, **(found | parts))

    def _overrides(self, cell: Cell, allocator: str, lam: str | None, cost: float) -> list[str]:
        if allocator in TUNED:
            knob = {"alpha_pruning": "epsilon", "atp": "beta"}.get(allocator, "lam")
            return [f"allocator.{knob}=auto", *(OF_SUBLAYERS if allocator == SUBLAYERS else ())]
        if allocator in CONTROLS:
            return [f"allocator.lam={lam}"]
        if allocator in (SEARCH, LONG):  # as many generations as 20 times the cost pays for, and at least one
            search: Any = self.job(cell, SEARCH, 0).allocator
            widths = [search.offspring, *search.survivors]
            lengths = [*search.sequences, self.sizes.n_selection]
            generation = sum(w * loss_cost(cell[1], n, self.sizes) for w, n in zip(widths, lengths, strict=True))
            return [f"allocator.generations={max(1, round(self.sizes.search * cost / generation))}"]
        return []

    def _measure(self, cell: Cell, allocator: str, overrides: list[str]) -> dict[str, Any]:
        chosen, tuning, cost, sizes = "-", Tuning(), 0.0, self.sizes
        losses, profiles = [], []
        for seed in sizes.seeds:
            job = self.job(cell, allocator, seed, *overrides)
            lm, tokens = self.model(job, cell[0]), job.tokens()
            budget = job.budget(lm)
            found = (
                job.scorer.score(lm, Context(tokens, job.cache_dir, replacements(job, lm))) if job.scorer is not None else None
            )
            scores = found.per_unit(budget.n_units) if found is not None else None
            if seed == sizes.seeds[0]:
                trial = trial_of(job, lm, tokens)
                profile = job.allocator.allocate(budget, scores, trial)
                tuning = Tuning.from_dict(trial.to_dict() or {})
                cost = allocation_cost(job, cell[1], found, tuning, lm.n_blocks, sizes)
                if allocator == ROUNDS or isinstance(job.allocator, Tuned):
                    chosen = min(tuning.curve, key=lambda tried: math.inf if tried.loss is None else tried.loss).label
            elif isinstance(job.allocator, Tuned):
                fixed = job.allocator.candidates(budget)[chosen]
                profile = fixed.allocate(budget, scores)
            elif allocator not in PROFILED:
                profile = job.allocator.allocate(budget, scores)
            profile = job.split.divide(lm, profile, job.pruner, tokens)
            losses.append(self.read(job, lm, profile))
            profiles.append(profile.sparsity.tolist())
        return {
            "chosen": chosen if chosen != "-" else ", ".join(o.partition(".")[2] for o in overrides) or "-",
            "losses": losses,
            "profiles": profiles,
            "n_losses": tuning.n_evaluations,
            "cost": cost,
            "curve": [tried.to_dict() for tried in tuning.curve],
        }

    def read(self, job: Job, lm: LanguageModel, profile: SparsityProfile) -> list[float]:
        """NLL per window of test text; the same profile, weights and calibration are pruned once."""
        tokens = job.tokens() if job.pruner.needs_inputs else None
        calibration = tokens_sha256(tokens) if tokens is not None else None
        what = [
            "test",
            lm.fingerprint(),
            repr(job.pruner),
            np.round(profile.sparsity, 12).tolist(),
            calibration,
            self.sizes.n_test,
        ]
        what += [profile.to_dict()["linears"]] if profile.linears is not None else []
        found: list[float] | None = self.remembered(what)
        if found is None:
            (source,) = job.evaluation.sources().values()
            with temporarily_pruned(lm, profile, job.pruner, job.tokens()):
                found = [round(float(v), 9) for v in lm.nll(source.tokens(lm.tokenizer))]
            self.remember(what, found)
        return found


def loss_cost(pruner: str, n_seq: int, sizes: Sizes = FULL) -> float:
    """Of one loss on `n_seq` sequences: pruning runs each block twice over the calibration text, unless it needs no inputs."""
    return (0 if pruner == "magnitude" else 2) + n_seq / sizes.n_calibration


def score_cost(job: Job, scores: Any, n_blocks: int, sizes: Sizes = FULL) -> float:
    """A step of a sublayer counts as half of one of a block."""
    share = sizes.n_payoff / sizes.n_calibration if job.shapley is not None else 1.0
    share /= 2 if job.shapley is not None and job.shapley.game.players == "sublayer" else 1
    return float(scores.cost.n_block_forwards / n_blocks * share)


def round_cost(pruner: str, values: Round, n_blocks: int, sizes: Sizes = FULL) -> float:
    """Of values of a pruned model: its coalitions, and two prunings; of those at the margin a forward and a backward pass, in
    which each forward is made again."""
    if values.n_sequences is not None:
        return 4 * values.n_sequences / sizes.n_calibration
    share = sizes.n_payoff / sizes.n_calibration
    return values.n_block_forwards / n_blocks * share + 2 * loss_cost(pruner, 0, sizes)


def allocation_cost(job: Job, pruner: str, scores: Any, tuning: Tuning, n_blocks: int, sizes: Sizes = FULL) -> float:
    """Of a whole allocation: scores, losses, rounds. A trial prunes nothing; statistics in advance are taken once."""
    cost = score_cost(job, scores, n_blocks, sizes) if scores is not None else 0.0
    trials = [tried for tried in tuning.curve if tried.trial]
    cost += sum(
        loss_cost("magnitude" if tried.trial else pruner, tried.n_seq or sizes.n_selection, sizes) for tried in tuning.curve
    )
    cost += sum(round_cost(pruner, values, n_blocks, sizes) for values in tuning.rounds)
    return cost + (loss_cost(pruner, 0, sizes) if trials else 0.0)


def cells_of(models: Iterable[str], sizes: Sizes, sparsities: Iterable[float]) -> list[Cell]:
    return [(model, pruner, sparsity) for sparsity in sparsities for model in models for pruner in sizes.pruners]


def entries(
    allocators: Iterable[str], cells: Iterable[Cell], search: bool, long: Container[str] = ()
) -> Iterator[tuple[Cell, str]]:
    """`long` has the models and pruners, as model/pruner, that have a long search."""
    for cell in cells:
        asked = {SEARCH: search, LONG: "/".join(cell[:2]) in long}
        for allocator in allocators:
            if allocator not in asked or (asked[allocator] and cell[1:] in SEARCH_CELLS):
                yield cell, allocator


def measure(cache: Path, sizes: Sizes, task: tuple[Cell, str]) -> tuple[tuple[Cell, str], Entry]:
    cell, allocator = task
    torch.set_num_threads(1)
    bench = _benches.setdefault((cache, sizes), Bench(cache, sizes))
    began = time.process_time()
    entry = bench.entry(cell, allocator)
    shown = f"{entry.perplexities.mean():.2f} ({entry.chosen}), {time.process_time() - began:.0f} s of a core"
    print(f"{' '.join(map(str, cell))} {allocator}: {shown}", flush=True)
    return (cell, allocator), entry


_benches: dict[tuple[Path, Sizes], Bench] = {}  # of a worker: its models stay loaded


@contextmanager
def workers(n: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` of so many processes, whose results come in order; 0 stays in this one."""
    if n == 0:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(n) as pool:
        yield pool.imap


def run_all(todo: list[tuple[Cell, str]], cache: Path, n_workers: int, sizes: Sizes = FULL) -> dict[tuple[Cell, str], Entry]:
    """The Shapley budgets first, whose choices and costs controls and searches need."""
    board: dict[tuple[Cell, str], Entry] = {}
    first, last = ([entry for entry in todo if entry[1] == name] for name in ("shapley", LONG))
    for part in (first, [entry for entry in todo if entry not in (*first, *last)], last):
        if part:
            with workers(n_workers) as each:
                board.update(each(partial(measure, cache, sizes), part))
    return {entry: board[entry] for entry in todo}


# -- what the numbers say


def change(entry: Entry, other: Entry) -> tuple[float, float, float, float]:
    """Perplexity of an entry against another's in percent, of their means over seeds; its standard error over seeds, and the
    95 % interval of a bootstrap over seeds and test windows, which both share: differences are paired."""
    mine, theirs = entry.perplexities, other.perplexities
    ratio = mine.mean() / theirs.mean()
    error = (mine - ratio * theirs).std(ddof=1) / math.sqrt(len(mine)) / theirs.mean()
    rng, (n_seeds, n_windows) = np.random.default_rng(0), entry.losses.shape
    seeds, windows = (rng.integers(n, size=(2000, n)) for n in (n_seeds, n_windows))
    one, two = (np.exp(e.losses[seeds[:, :, None], windows[:, None, :]].mean(axis=2)).mean(axis=1) for e in (entry, other))
    low, high = interval(one / two)
    return 100 * (ratio - 1), 100 * error, 100 * (low - 1), 100 * (high - 1)


def ranking(
    board: dict[tuple[Cell, str], Entry], models: Iterable[str], among: Iterable[str], sizes: Sizes = FULL
) -> list[str]:
    """Allocators from the lowest loss on selection text, averaged over models, pruners and the main sparsities."""
    cells = cells_of(models, sizes, sizes.sparsities)

    def least(entry: Entry) -> float:
        """Of the profiles that met the budget, which those with one block pruned do not."""
        return min(one.loss for one in entry.curve if one.loss is not None and not one.label.startswith("layer "))

    mean = {a: np.mean([least(board[cell, a]) for cell in cells]) for a in among if a in sizes.allocators}
    return sorted(mean, key=lambda a: mean[a])


def table(board: dict[tuple[Cell, str], Entry], model: str, sparsity: float, pruners: tuple[str, ...]) -> list[str]:
    """Perplexities of one model at one sparsity; the lowest that was not searched for is bold."""
    lines = ["| allocator | " + " | ".join(f"{p} | vs uniform | cost" for p in pruners) + " |"]
    lines.append("| --- |" + " ---: |" * (3 * len(pruners)))
    names = [a for a in ALLOCATORS if any(((model, p, sparsity), a) in board for p in pruners)]
    least = {
        p: min((a for a in names if a not in (SEARCH, LONG)), key=lambda a: board[(model, p, sparsity), a].losses.mean())
        for p in pruners
    }
    for name in names:
        cells = [name]
        for pruner in pruners:
            entry = board.get(((model, pruner, sparsity), name))
            if entry is None:
                cells += ["-", "-", "-"]
                continue
            shown = f"{entry.perplexities.mean():.2f} ± {entry.perplexities.std(ddof=1):.2f}"
            mean, _, low, high = change(entry, board[(model, pruner, sparsity), "uniform"])
            cells += [
                f"**{shown}**" if name == least[pruner] else shown,
                "" if name == "uniform" else f"{mean:+.1f} % [{low:+.1f}, {high:+.1f}]",
                f"{entry.cost:.0f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def against_rounds(board: dict[tuple[Cell, str], Entry], models: Iterable[str], sparsity: float, sizes: Sizes) -> list[str]:
    """How much more perplexity each allocator leaves than the Shapley budget in rounds."""
    cells = cells_of(models, sizes, [sparsity])
    lines = ["| allocator | " + " | ".join(f"{m}, {p}" for m, p, _ in cells) + " |"]
    lines.append("| --- |" + " ---: |" * len(cells))
    for name in ALLOCATORS:
        if name == ROUNDS or not any((cell, name) in board for cell in cells):
            continue
        shown = []
        for cell in cells:
            if (cell, name) not in board:
                shown.append("-")
                continue
            mean, error, low, high = change(board[cell, name], board[cell, ROUNDS])
            shown.append(f"{mean:+.1f} ± {error:.1f} % [{low:+.1f}, {high:+.1f}]")
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def targets(board: dict[tuple[Cell, str], Entry], models: Iterable[str], sizes: Sizes = FULL) -> list[str]:
    """Who is lowest at 70 % without searching and by how much, also with one budget a block; and how the Shapley budgets stand
    against search."""
    against = [("shapley", SEARCH), (ROUNDS, SEARCH), (SUBLAYERS, SEARCH)]
    against += [(ROUNDS, LONG)] if any(name == LONG for _, name in board) else []
    heads = ["lowest without search", "next", "of one budget a block", "next", *(f"{a} against {b}" for a, b in against)]
    lines = ["| | " + " | ".join(heads) + " |", "| --- |" + " --- |" * 4 + " ---: |" * len(against)]
    for cell in cells_of(models, sizes, [0.7]):
        line = [", ".join(cell[:2])]
        for apart in ((SEARCH, LONG), (SEARCH, LONG, SUBLAYERS)):
            there = [a for a in ALLOCATORS if (cell, a) in board and a not in apart]
            best, following = sorted(there, key=lambda a: board[cell, a].perplexities.mean())[:2]
            mean, error, *_ = change(board[cell, following], board[cell, best])
            line += [best, f"{following}, {mean:.2f} ± {error:.2f} % behind"]
        for name, search in against:
            if (cell, search) in board and (cell, name) in board:
                mean, error, *_ = change(board[cell, name], board[cell, search])
                times = board[cell, search].cost / board[cell, name].cost
                line.append(f"{mean:+.2f} ± {error:.2f} %, search cost {times:.1f} times as much")
            else:
                line.append("-")
        lines.append("| " + " | ".join(line) + " |")
    pairs = [(e, board[cell, "uniform"], name) for (cell, name), e in board.items() if name in CONTROLS]
    for name in CONTROLS:
        found = [(e, u) for e, u, control in pairs if control == name]
        means = sum(e.perplexities.mean() > u.perplexities.mean() for e, u in found)
        single = sum(int((e.perplexities < u.perplexities).sum()) for e, u in found)
        runs = f"{single} of {len(sizes.seeds) * len(found)} single runs are better"
        lines += ["", f"{name}: worse than uniform in {means} of {len(found)} cells; {runs}."]
    worse = [
        f"{name} ({', '.join(map(str, cell))}: {change(e, board[cell, 'uniform'])[0]:+.1f} %)"
        for (cell, name), e in board.items()
        if name not in ("uniform", *CONTROLS) and e.perplexities.mean() > board[cell, "uniform"].perplexities.mean()
    ]
    return [*lines, "", f"Worse than uniform on test text, controls apart: {'; '.join(worse) or 'none'}."]


def choices(board: dict[tuple[Cell, str], Entry], models: Iterable[str], sizes: Sizes) -> list[str]:
    """The knob that the selection text chose, with the number of its losses."""
    cells = [(m, p, s) for m in models for p in sizes.pruners for s in sizes.sparsities]
    lines = ["| allocator | losses | " + " | ".join(f"{m}, {p}, {100 * s:.0f} %" for m, p, s in cells) + " |"]
    lines.append("| --- | ---: |" + " --- |" * len(cells))
    for name in ALLOCATORS:
        found = [board.get((cell, name)) for cell in cells]
        counts = sorted({entry.n_losses for entry in found if entry is not None})
        if not counts:
            continue
        shown = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
        lines.append(f"| {name} | {shown} | " + " | ".join(e.chosen if e else "-" for e in found) + " |")
    return lines


def report(
    board: dict[tuple[Cell, str], Entry],
    dense: dict[str, float],
    models: tuple[str, ...],
    best: list[str],
    sizes: Sizes = FULL,
) -> list[str]:
    machine, length = hardware(), sizes.seq_len
    text = [
        "# Leaderboard: allocators, pruners, sparsities",
        "",
        f"Made by `make study NAME=leaderboard`. {machine.cpu}, one thread a worker, torch {torch.__version__}, float32. "
        f"Calibration {sizes.n_calibration} x {length} tokens, seeds {', '.join(map(str, sizes.seeds))}; selection text "
        f"{sizes.n_selection} x {length}, payoff text {sizes.n_payoff} x {length}; perplexity on the first {sizes.n_test} "
        f"windows of {length} tokens of the test text, mean ± "
        "standard deviation over the seeds.",
        "",
        "'vs uniform': relative change of perplexity, of the means, with the 95 % interval of a paired bootstrap over seeds "
        "and test windows. Cost: of the allocation, choice of its knob included, in forward passes of the whole model over the "
        f"calibration text. Bold: the lowest but for search, which had {sizes.search} times the cost of shapley (search_long: "
        "of shapley_rounds), on the selection text.",
    ]
    for model in models:
        for sparsity in sorted((*sizes.sparsities, *sizes.more_sparsities)):
            if any(cell[0] == model and cell[2] == sparsity for cell, _ in board):
                title = f"{model}, {100 * sparsity:.0f} % (dense {dense[model]:.2f})"
                text += ["", f"## {title}", "", *table(board, model, sparsity, sizes.pruners)]
    pairs = {f"{m}, {p}": (board[(m, p, 0.7), ROUNDS], board[(m, p, 0.7), "uniform"]) for m in models for p in sizes.pruners}
    changes = "; ".join(f"{name} {change(*pair)[0]:+.2f} %" for name, pair in pairs.items())
    paper = "For LLaMA-7B with SparseGPT, another model on another text, arXiv 2505.01731 gives -18.01 %."
    text += ["", f"{ROUNDS} against uniform at 70 %: {changes}. {paper}"]
    text += ["", "## Targets", "", *targets(board, models, sizes)]
    text += ["", f"## Perplexity against that of {ROUNDS}", "", "± standard error over seeds, and the interval."]
    for sparsity in sorted({cell[2] for cell, _ in board}):
        text += ["", f"### {100 * sparsity:.0f} %", "", *against_rounds(board, models, sparsity, sizes)]
    text += ["", "## What was chosen on the selection text", "", *choices(board, models, sizes), ""]
    text += [f"By the loss on selection text, averaged over all cells of {and_(sizes.sparsities)} %: {', '.join(best)}."]
    return text


def and_(sparsities: Iterable[float]) -> str:
    return " and ".join(f"{100 * sparsity:.0f}" for sparsity in sorted(sparsities))


def csv(board: dict[tuple[Cell, str], Entry], seeds: Iterable[int] = FULL.seeds) -> str:
    lines = ["model,pruner,sparsity,allocator,seed,ppl,chosen,n_losses,cost"]
    for (cell, name), entry in board.items():
        for seed, ppl in zip(seeds, entry.perplexities, strict=True):
            lines.append(
                f'{cell[0]},{cell[1]},{cell[2]},{name},{seed},{ppl:.6g},"{entry.chosen}",{entry.n_losses},{entry.cost:.4g}'
            )
    return "\n".join(lines) + "\n"


def draw_front(board: dict[tuple[Cell, str], Entry], models: tuple[str, ...], path: Path, sizes: Sizes = FULL) -> None:
    """Perplexity against cost at 70 %, and the Pareto front; without the controls."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = [a for a in ALLOCATORS if a not in CONTROLS]
    looks = {a: ("os^DvP"[i % 6], colormaps["tab10"](i % 10)) for i, a in enumerate(names)}
    drawing = Figure(figsize=(10, 3.6 * len(models) + 0.6), layout="constrained")
    pruners = [p for p in ("wanda", "sparsegpt") if p in sizes.pruners]
    grid = drawing.subplots(len(models), len(pruners), squeeze=False)
    for row, model in zip(grid, models, strict=True):
        for axes, pruner in zip(row, pruners, strict=True):
            cell, front, least = (model, pruner, 0.7), [], math.inf
            found = {a: board[cell, a] for a in names if (cell, a) in board}
            for entry in sorted(found.values(), key=lambda e: e.cost):
                if (ppl := float(entry.perplexities.mean())) < least:
                    front.append((entry.cost, ppl))
                    least = ppl
            axes.plot(*zip(*front, strict=True), color="0.7", drawstyle="steps-post", zorder=1)
            for name, entry in found.items():
                marker, color = looks[name]
                axes.plot(entry.cost, entry.perplexities.mean(), marker, color=color, label=name, markersize=6, alpha=0.85)
            axes.set_xscale("symlog", linthresh=10)
            axes.set(title=f"{model}, {pruner}, 70 %", ylabel="perplexity (test)")
            axes.set_xlabel("cost of the allocation (forward passes over the calibration text)")
            axes.grid(color="0.92")
    handles, labels = max((axes.get_legend_handles_labels() for axes in grid.flat), key=lambda found: len(found[1]))
    drawing.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    drawing.savefig(path, dpi=110, metadata={"Software": None})


def draw_profiles(board: dict[tuple[Cell, str], Entry], models: tuple[str, ...], path: Path) -> None:
    """Sparsity per block of each allocator at 70 % with Wanda."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = [a for a in ALLOCATORS if a not in ("uniform", *CONTROLS) and any(name == a for _, name in board)]
    drawing = Figure(figsize=(12, 5), layout="constrained")
    for axes, name in zip(drawing.subplots(2, (len(names) + 1) // 2, sharex=True, sharey=True).flat, names, strict=False):
        for model, color in zip(models, ("#3b6ea5", "#c1666b"), strict=False):
            entry = board.get(((model, "wanda", 0.7), name))
            if entry is not None:
                axes.plot(100 * entry.profiles.mean(axis=0), marker="o", markersize=3, color=color, label=model)
        axes.axhline(70, color="0.6", linewidth=0.8, linestyle="--")
        axes.set_title(name, fontsize=9)
        axes.grid(color="0.92")
    drawing.axes[0].legend(fontsize=8)
    drawing.axes[0].xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
    drawing.supxlabel("layer (transformer block, counted from 0)", fontsize=9)
    drawing.supylabel("sparsity (% zeros)", fontsize=9)
    drawing.savefig(path, dpi=110, metadata={"Software": None})


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--workers", type=int, default=2, help="processes of one thread each; 0: this one alone")
    made.add_argument("--models", help=f"separated by commas ({','.join(MODELS)}; quick: {MODELS[0]})")
    made.add_argument("--search", action=argparse.BooleanOptionalAction, default=True, help="with the evolutionary search")
    made.add_argument(
        "--long-search", default="", metavar="MODEL/PRUNER,...", help="one of 20 times the cost of shapley_rounds"
    )
    made.add_argument("--stage", choices=("main", "all"), default="all", help="main: no other sparsities than 0.6 and 0.7")
    options = parse(made, argv)
    sizes = QUICK if options.quick else FULL
    models = tuple(options.models.split(",")) if options.models else MODELS[: 1 if options.quick else None]
    cells = cells_of(models, sizes, sizes.sparsities)
    todo = [*entries(sizes.allocators, cells, options.search, options.long_search.split(","))]
    board = run_all(todo, options.cache, options.workers, sizes)
    best = ranking(board, models, (ROUNDS, *TUNED, "curves"), sizes)
    if options.stage == "all":
        cells = cells_of(models, sizes, sizes.more_sparsities)
        board |= run_all([*entries(("uniform", *best[:5]), cells, False)], options.cache, options.workers, sizes)
    torch.set_num_threads(1)
    bench, dense = Bench(options.cache, sizes), {}
    for model in models:
        job = bench.job((model, "none", 0.7), "uniform", 0)
        lm = bench.model(job, model)
        dense[model] = math.exp(np.mean(bench.read(job, lm, Budget(lm.block_params, 0.0).uniform())))
    publish(options, "leaderboard", report(board, dense, models, best, sizes))
    (options.output / "results" / "tables" / "leaderboard.csv").write_text(csv(board, sizes.seeds), encoding="utf-8")
    draw_front(board, models, figure(options, "leaderboard"), sizes)
    draw_profiles(board, models, figure(options, "profiles"))


if __name__ == "__main__":
    main()

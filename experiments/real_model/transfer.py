"""Do budgets that are chosen on C4 carry over to WikiText-2? Real prunings, and their loss on both texts.

The budgets of `shapley_margins` and of block influence in the finished runs of `make table NAME=smollm2`, one a block, and
budgets between the two. WikiText-2 is read in windows 1 to 32, which are selection text; the table reads those after them.
Writes results/tables/transfer.md as it goes; losses are kept in the cache, so that a killed run goes on where it was.

    python -m experiments.real_model.transfer [--runs results/smollm2] [--datasets FOLDER] [--cells wanda:0.7] [--quick]
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np

from experiments.study import PRUNERS, Known, add_real_model, built_in, made_by, parse, parser, publish, real_model, table, text
from svnup.allocation import Budget
from svnup.data import C4, Role, TokenSource, WikiText2, tokens_sha256
from svnup.model.language_model import LanguageModel
from svnup.naming import allocator_name, identity, pruner_name
from svnup.pruning.walk import Pruner, temporarily_pruned
from svnup.results.store import load
from svnup.types import Floats, Ints, SparsityProfile

CELLS = ["wanda:0.6", "sparsegpt:0.6", "wanda:0.7", "sparsegpt:0.7"]
MARGINS, INFLUENCE = "shapleymargins", "blockinfluence"
TEXTS = ("C4", "WikiText-2")
ROLES: dict[str, Role] = {"calibration": "calibration", "C4": "selection", "WikiText-2": "test"}


def smooth(profile: Floats) -> Floats:
    """Means over a block and its two neighbours, (n_blocks,); the ends are repeated."""
    return np.convolve(np.pad(profile, 1, mode="edge"), np.full(3, 1 / 3), "valid")


def mixes(margins: Floats, influence: Floats) -> dict[str, Floats]:
    """Budgets of the two and between them, (n_blocks,) each."""
    return {
        "block influence": influence,
        "margins": margins,
        "half margins, half influence": (margins + influence) / 2,
        "half smoothed margins, half influence": (smooth(margins) + influence) / 2,
    }


def budgets_of(runs: Path, cell: str) -> dict[str, Floats] | None:
    """The budgets of a cell; None where one of its two runs is not there."""
    pruner, _, sparsity = cell.partition(":")
    found: dict[str, Floats] = {}
    for row in load(runs):
        node = row.config["allocator"]
        if row.status != "finished" or row.profile is None or row.config["sparsity"] != float(sparsity):
            continue
        if pruner_name(dict(row.config)) == pruner:
            found[allocator_name(dict(node))] = np.array(row.profile.sparsity)
    return mixes(found[MARGINS], found[INFLUENCE]) if {MARGINS, INFLUENCE} <= found.keys() else None


def losses(lm: LanguageModel, profile: SparsityProfile, pruner: Pruner, texts: dict[str, Ints]) -> dict[str, float]:
    """The losses of a profile on both texts, in nats per token, by a real pruning."""
    with temporarily_pruned(lm, profile, pruner, texts["calibration"]):
        return {text: float(lm.nll(texts[text]).mean()) for text in TEXTS}


def study(lm: LanguageModel, texts: dict[str, Ints], cells: dict[str, dict[str, Floats]], options: argparse.Namespace) -> None:
    known, fingerprint = Known(options.cache, "transfer"), lm.fingerprint()
    read = {name: tokens_sha256(tokens) for name, tokens in texts.items()}
    rows: list[list[str]] = []
    for cell, profiles in cells.items():
        pruner, sparsity = PRUNERS[cell.partition(":")[0]], float(cell.partition(":")[2])
        budget = Budget(lm.block_params, sparsity)
        first: dict[str, float] = {}
        for name, wish in profiles.items():
            profile = budget.project(wish, budget.bounds(None, None))
            what = [fingerprint, identity(pruner), read, profile.sparsity.tolist()]
            lost = known.measured(what, partial(losses, lm, profile, pruner, texts))
            first = first or lost
            changes = [f"{100 * math.expm1(lost[text] - first[text]):+.1f} %" if lost is not first else "-" for text in TEXTS]
            shown = [f"{math.exp(lost[text]):.2f}" for text in TEXTS]
            rows.append([cell.replace(":", ", "), name, shown[0], changes[0], shown[1], changes[1]])
            publish(options, "transfer", report(options, texts, rows))


def report(options: argparse.Namespace, texts: dict[str, Ints], rows: list[list[str]]) -> list[str]:
    size = {name: f"{tokens.shape[0]} x {tokens.shape[1]} tokens" for name, tokens in texts.items()}
    return [
        "# Budgets chosen on C4, on C4 and on WikiText-2",
        "",
        f"{made_by('make study NAME=transfer', 'one thread')}. Model {options.model_name}, a budget a block, real prunings; "
        f"calibration {size['calibration']} of C4. Perplexity, and its change against block influence, on {size['C4']} of C4's "
        f"selection text and {size['WikiText-2']} of WikiText-2, its first windows.",
        "",
        *table(["cell", "budget", *(head for text in TEXTS for head in (text, "change"))], rows, "llrrrr"),
    ]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    add_real_model(made)
    made.add_argument("--runs", type=Path, metavar="DIR", default=Path("results/smollm2"), help="of make table NAME=smollm2")
    made.add_argument("--cells", type=lambda cells: cells.split(","), default=CELLS, help=f"of {','.join(CELLS)}")
    options = parse(made, argv)
    if options.quick:
        lm, options.model_name = built_in(4), "built in, 4 blocks"
        texts = {name: text(role, 2, 32) for name, role in ROLES.items()}
        cells = {"wanda:0.6": mixes(np.array([0.5, 0.6, 0.7, 0.6]), np.array([0.55, 0.65, 0.65, 0.55]))}
    else:
        found = {cell: budgets_of(options.runs, cell) for cell in options.cells}
        cells = {cell: profiles for cell, profiles in found.items() if profiles is not None}
        if not cells:
            made.error(f"--runs {options.runs}: no finished runs of both budgets; make table NAME=smollm2 first")
        lm = real_model(options)
        of_texts = {"seq_len": 512, "seed": 0, "datasets_dir": options.datasets}
        sources: dict[str, TokenSource] = {
            "calibration": C4(n_seq=16, role="calibration", **of_texts),
            "C4": C4(n_seq=40, role="selection", **of_texts),
            "WikiText-2": WikiText2(n_seq=32, role="test", **of_texts),
        }
        texts = {name: source.tokens(lm.tokenizer) for name, source in sources.items()}
    study(lm, texts, cells, options)


if __name__ == "__main__":
    main()

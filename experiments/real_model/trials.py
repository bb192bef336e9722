"""What a trial by weights pruned in advance says of a real pruning, on a real model.

A trial prunes each linear layer by statistics of the dense model, a real pruning behind blocks that are pruned already. Both
losses, on the same selection text: of the uniform budget, of block influence, and of budgets that `shapley_margins` met on its
way. Writes results/tables/trials.md as it goes; losses are kept in the cache, so that a killed run goes on where it was.

    python -m experiments.real_model.trials [--datasets FOLDER] [--sparsity 0.6] [--pruners wanda,sparsegpt] [--quick]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from experiments.study import (
    PRUNERS,
    add_real_model,
    built_in,
    made_by,
    parse,
    parser,
    publish,
    real_model,
    spearman,
    table,
    text,
)
from svnup.allocation import Budget
from svnup.allocation.maps import ScoreBudget
from svnup.allocation.rounds import ShapleyMargins
from svnup.allocation.splits import UniformSplit
from svnup.allocation.trial import Trial
from svnup.data import C4, Role, TokenSource
from svnup.model.language_model import LanguageModel
from svnup.scoring import Context
from svnup.scoring.published import BlockInfluence
from svnup.types import Ints, SparsityProfile

ROLES: tuple[Role, ...] = ("calibration", "payoff", "selection")


@dataclass(frozen=True)
class Given:
    """A text that is there already."""

    given: Ints

    def tokens(self, tokenizer: object) -> Ints:
        return self.given


@dataclass
class Watched:
    """A trial that keeps the profiles that are tried in advance."""

    trial: Trial
    met: dict[str, SparsityProfile] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trial, name)

    def loss(self, profile: SparsityProfile, label: str = "", n_seq: int | None = None, in_advance: bool = False) -> float:
        if in_advance:
            self.met[label] = profile
        return self.trial.loss(profile, label, n_seq, in_advance)


def study(lm: LanguageModel, texts: dict[Role, Ints], options: argparse.Namespace) -> None:
    budget = Budget(lm.block_params, options.sparsity)
    influence = BlockInfluence().score(lm, Context(texts["calibration"], None, None))  # type: ignore[arg-type]
    payoff, selection = (cast(TokenSource, Given(texts[role])) for role in ("payoff", "selection"))
    rows: list[tuple[str, str, float, float]] = []  # pruner, budget, real loss, loss by trial
    for name in options.pruners:
        trial = Trial(lm, PRUNERS[name], UniformSplit(), texts["calibration"], selection, options.cache, payoff=payoff)
        profiles = {"uniform": budget.uniform(), "block influence": ScoreBudget().allocate(budget, influence)}
        watched = Watched(trial)
        ShapleyMargins(payoff, n_seq=options.n_round, trial_n_seq=None).allocate(budget, None, cast(Trial, watched))
        profiles |= {f"margins, {label}": profile for label, profile in watched.met.items()}
        for label, profile in profiles.items():
            rows.append((name, label, trial.loss(profile, label), trial.loss(profile, label, in_advance=True)))
            publish(options, "trials", report(options, rows))


def report(options: argparse.Namespace, rows: list[tuple[str, str, float, float]]) -> list[str]:
    lines = [
        "# Trials by weights pruned in advance, beside real prunings",
        "",
        f"{made_by('make study NAME=trials', 'one thread')}. Model {options.model_name}, {100 * options.sparsity:g} %, a "
        f"budget a block. Losses in nats per token on {options.n_selection} x {options.seq_len} tokens of selection text; "
        f"calibration {options.n_calibration} x {options.seq_len}. A trial prunes weights by statistics of the dense model, a "
        "real pruning behind blocks that are pruned.",
        "",
        *table(
            ["pruner", "budget", "real pruning", "trial", "error"],
            [[pruner, name, f"{real:.4f}", f"{tried:.4f}", f"{tried - real:+.4f}"] for pruner, name, real, tried in rows],
            "llrrr",
        ),
        "",
        "The error of a difference is how far a trial is off in what a budget loses beyond the uniform one: root mean square "
        "over the other budgets, beside the spread (standard deviation) of the true differences. The rank correlation is over "
        "all budgets.",
        "",
    ]
    summary = []
    for pruner in dict.fromkeys(row[0] for row in rows):
        real, tried = np.array([row[2:] for row in rows if row[0] == pruner]).T
        if len(real) > 2:
            true, seen = real[1:] - real[0], tried[1:] - tried[0]
            error = np.sqrt(np.mean((seen - true) ** 2))
            summary.append([pruner, str(len(real)), f"{error:.4f}", f"{true.std():.4f}", f"{spearman(real, tried):.2f}"])
    return [*lines, *table(["pruner", "budgets", "error of a difference", "spread", "Spearman"], summary, "lrrrr")]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    add_real_model(made)
    made.add_argument("--sparsity", type=float, default=0.6)
    made.add_argument("--pruners", type=lambda names: names.split(","), default=list(PRUNERS))
    options = parse(made, argv)
    if options.quick:
        options.model_name, options.seq_len, options.n_calibration, options.n_selection = "built in, 4 blocks", 32, 2, 2
        options.n_round, lm = 1, built_in(4)
        texts = {role: text(role, 2, 32) for role in ROLES}
    else:
        options.seq_len, options.n_calibration, options.n_selection = 512, 16, 16
        options.n_round = 8
        lm = real_model(options)
        source = {role: C4(seq_len=512, seed=0, n_seq=16, role=role, datasets_dir=options.datasets) for role in ROLES}
        texts = {role: one.tokens(lm.tokenizer) for role, one in source.items()}
    study(lm, texts, options)


if __name__ == "__main__":
    main()

"""NeuronAL's budget over depth: how steep it is goes by how far pruning moves the inputs of linear layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svnup.allocation import Budget, Needs, Trial
from svnup.types import BlockScores, SparsityProfile

LAMBDAS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25)
STEEPEST = 0.25  # is left out from 80 % on


@dataclass(frozen=True)
class Neuronal:
    """Sparsities linear in depth, from S - lambda in the first block to S + lambda in the last, with the lambda whose pruned
    model has the least misalignment (`Trial.misalignment`) on the first `n_seq` calibration sequences.

    Blocks of unequal size are projected onto the exact budget, within 1 % and 99 %.

    Args:
        n_seq: calibration sequences; each lambda prunes the whole model on them once.
        lambdas: that are tried; None takes the released ones, 0.01 to 0.25, at sparsities from 80 % on to 0.2.

    Source: arXiv 2411.07066, block step; the released code was followed (`--neuroal_step block`). Its row step, which gives the
    rows of a matrix sparsities of their own, is left out: here a matrix has one.
    """

    n_seq: int = 8
    lambdas: list[float] | None = None

    @property
    def needs(self) -> Needs:
        return Needs(calibration=self.n_seq)

    def __post_init__(self) -> None:
        if self.n_seq < 1:
            raise ValueError(f"n_seq={self.n_seq}: calibration sequences; choose 1 or more, such as 8")
        if self.lambdas is not None and not (self.lambdas and all(0 <= value <= 0.5 for value in self.lambdas)):
            raise ValueError(f"lambdas={self.lambdas}: differences of sparsity between the middle and an end; choose 0 to 0.5")

    def check(self, budget: Budget) -> None:
        budget.check_pattern(uniform=False)

    def n_losses(self, budget: Budget) -> int:
        return len(self._tried(budget))

    def _tried(self, budget: Budget) -> list[float]:
        usual = [value for value in LAMBDAS if budget.sparsity < 0.8 or value < STEEPEST]
        return usual if self.lambdas is None else self.lambdas

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        assert trial is not None
        depth = np.linspace(-1.0, 1.0, budget.n_units)
        bounds = (min(0.01, budget.sparsity), max(0.99, budget.sparsity))
        best, least = budget.uniform(), np.inf
        for value in self._tried(budget):
            profile = budget.project(budget.sparsity + value * depth, bounds)
            found = trial.misalignment(profile, f"lambda={value:g}", self.n_seq)
            if found < least:
                best, least = profile, found
        return best

"""From scores to a sparsity budget for each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from svnup.allocation.budget import Budget
from svnup.types import BlockScores, Floats, SparsityProfile

__all__ = ["Allocator", "Budget", "Chooser", "Needs", "Trial"]


class Trial(Protocol):
    """What a profile costs on held-out text: all that an allocator knows of `svnup.allocation.trial.Trial`.

    `n_seq`: on the first so many sequences of the text only, or on all where it has fewer. `in_advance`: by weights that are
    pruned in advance, which is cheap and a little off.
    """

    def loss(self, profile: SparsityProfile, label: str = "", n_seq: int | None = None, in_advance: bool = False) -> float:
        """How bad the model pruned by a profile is, in nats per token (NLL or KL); `label` says what is tried."""
        ...

    def losses(
        self,
        tried: Sequence[tuple[str, SparsityProfile]],
        n_seq: int | None = None,
        in_advance: bool = False,
        keep: bool = True,
    ) -> list[float]:
        """The losses of labelled profiles, in their order: at less cost together than one after the other. Who asks but once
        says so by `keep` False: of the statistics by which weights are pruned in advance, those of one block are then held."""
        return [self.loss(profile, label, n_seq, in_advance) for label, profile in tried]

    def calibrate_behind(self, profile: SparsityProfile) -> None:
        """From now on prune in advance by statistics taken behind blocks that a profile prunes, not in the dense model."""

    def took(self, label: str) -> None:
        """Put on record which of the labelled profiles was taken."""

    def shapley_values(self, denser: SparsityProfile, sparser: SparsityProfile) -> Floats:
        """Shapley values (n_units,) in the model pruned by `denser`, where an absent part is pruned by `sparser`."""
        ...

    def marginal_values(
        self, denser: SparsityProfile, sparser: SparsityProfile, first: int, n_seq: int, nodes: int = 1
    ) -> Floats:
        """Aumann-Shapley values (n_units,) between the models pruned by `denser` and by `sparser`, on `n_seq` sequences of the
        payoff text from number `first` on."""
        ...

    def misalignment(self, profile: SparsityProfile, label: str, n_seq: int) -> float:
        """How far pruning by `profile` moves the inputs of linear layers, on the first `n_seq` calibration sequences."""
        ...


@dataclass(frozen=True)
class Needs:
    """What an allocator asks of a job beside the budget."""

    scores: bool = False
    as_fine: bool = True  # budgets finer than blocks need scores as fine; else parts share the score of their block
    selection: bool = False  # text to try profiles on, and the model in memory: it is a `Chooser`
    once: bool = False  # it asks for losses together, once, by weights pruned in advance
    calibration: int = 0  # sequences of the pruner's text to try profiles on, and the model in memory: it is a `Chooser`, too
    n_games: int | None = None  # of blocks in the models that it prunes, after the first; None: any scores will do
    whole_blocks: bool = True  # it leaves to a split what the linear layers of a block get


class Allocator(Protocol):
    """Turns scores into a profile.

    One whose option can be `auto` names it as `tuned_option` and has a `grid(budget)` for it, of which the first value gives
    the uniform profile. One that reads a payoff text of its own has it as `data`.
    """

    @property
    def needs(self) -> Needs: ...

    def check(self, budget: Budget) -> None:
        """Raise ValueError where the budget cannot be met, before any weight is loaded: all parts are of one size there."""
        ...

    def allocate(self, budget: Budget, scores: BlockScores | None = None, trial: Trial | None = None) -> SparsityProfile:
        """Divide the budget by the scores, where there are some, or by trials of what it makes of the model."""
        ...


class Chooser(Allocator, Protocol):
    """An allocator that tries profiles."""

    def n_losses(self, budget: Budget) -> int:
        """How many losses, or misalignments, it asks for, at most."""
        ...

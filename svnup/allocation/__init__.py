"""From scores to a sparsity budget for each block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from svnup.pattern import UNSTRUCTURED
from svnup.types import BlockScores, Floats, Ints, SparsityProfile


class Loss(Protocol):
    """How bad the model pruned by a profile is on held-out text, in nats per token (NLL or KL); `label` says what is tried.

    `n_seq`: on the first so many sequences of the text only, or on all where it has fewer. `trial`: by weights that are pruned
    in advance, which is cheap and a little off.
    """

    def __call__(self, profile: SparsityProfile, label: str = "", n_seq: int | None = None, trial: bool = False) -> float: ...

    def many(self, tried: Sequence[tuple[str, SparsityProfile]], n_seq: int | None = None, trial: bool = False) -> list[float]:
        """The losses of labelled profiles, in their order: at less cost together than one after the other."""
        return [self(profile, label, n_seq, trial) for label, profile in tried]

    def values(self, denser: SparsityProfile, sparser: SparsityProfile) -> Floats:
        """Shapley values of the blocks in the model pruned by `denser`, where an absent block is pruned by `sparser`."""
        ...

    def margins(self, denser: SparsityProfile, sparser: SparsityProfile, first: int, n_seq: int, nodes: int = 1) -> Floats:
        """Aumann-Shapley values of all that has a budget of its own, between the models pruned by `denser` and by `sparser`,
        on `n_seq` sequences of the payoff text from number `first` on."""
        ...


class Allocator(Protocol):
    """Turns scores into a profile; `uniform_only` says that it can serve a fixed N:M pattern.

    `params` has the weights of what gets a budget: of blocks (n,), or of attention and MLP by turns (2n,) where scores and
    budgets are theirs. `loss` is for those that tune or search. One whose option can be `auto` names it as `knob` and has a
    `grid` for it, of which the first value gives the uniform profile.
    """

    uniform_only: ClassVar[bool]

    def check(self, n_blocks: int, sparsity: float, pattern: str) -> None:
        """Raise ValueError where the budget cannot be met, before any weight is loaded."""
        ...

    def allocate(
        self, scores: BlockScores | None, params: Ints, sparsity: float, pattern: str = UNSTRUCTURED, loss: Loss | None = None
    ) -> SparsityProfile: ...


@runtime_checkable
class Chooser(Allocator, Protocol):
    """An allocator that asks for losses: it needs selection text, and the model in memory."""

    def n_losses(self, n_blocks: int, sparsity: float) -> int:
        """How many losses it asks for, at most."""
        ...

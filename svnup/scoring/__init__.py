"""Scores of blocks: Shapley values and published heuristics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from svnup.types import BlockScores, Ints

if TYPE_CHECKING:
    from svnup.game.layer_game import Replacements
    from svnup.model.language_model import LanguageModel
    from svnup.pruning.walk import Pruner


@dataclass(frozen=True)
class Context:
    """What a job gives its scorer.

    Args:
        tokens: calibration text, int64 (n_seq, seq_len).
        cache_dir: the folder of cached payoffs; None for none.
        replacements: makes the pruned replacements of absent blocks with a pruner.
    """

    tokens: Ints
    cache_dir: str | None
    replacements: Callable[[Pruner], Replacements]


class Scorer(Protocol):
    """Scores the blocks of a dense model; a frozen dataclass of its options.

    A scorer may have more: `data`, a text of its own; `granularity`, where it scores other parts than blocks;
    `check_model(lm)`, which raises ValueError where it cannot score a model or its skeleton; and `plan_of(lm)`, the cost where
    the number of blocks does not say it.
    """

    @property
    def needs_inputs(self) -> bool:
        """Whether it reads the calibration text."""
        ...

    def plan(self, n_blocks: int) -> dict[str, int]:
        """The cost of the scores in the units of `Cost`, by name."""
        ...

    def score(self, lm: LanguageModel, context: Context) -> BlockScores:
        """The scores of the blocks, or of their sublayers, with their cost."""
        ...

"""What measures blocks: a Shapley value or a published heuristic."""

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
    """What a job offers its scorer: calibration tokens (n_seq, seq_len), the cache folder, and what makes stand-ins for
    absent blocks with a pruner."""

    tokens: Ints
    cache_dir: str | None
    replacements: Callable[[Pruner], Replacements]


class Scorer(Protocol):
    """Scores the blocks of a model, as it is before pruning; a frozen dataclass of its options."""

    @property
    def needs_inputs(self) -> bool:
        """Whether it reads the calibration tokens."""
        ...

    def plan(self, n_blocks: int) -> dict[str, int]:
        """What the scores cost, in the units of `Cost`."""
        ...

    def score(self, lm: LanguageModel, context: Context) -> BlockScores: ...

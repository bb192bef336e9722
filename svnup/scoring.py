"""Where a job's block scores come from. Light to import: the game is built when it is played."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from svnup.data import TokenSource
from svnup.shapley import Estimator, block_forwards
from svnup.types import Ints, ShapleyValues

if TYPE_CHECKING:
    from svnup.language_model import LanguageModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GameOptions:
    """The layer game of a job: its payoff text, and the options of `svnup.game.LayerGame`."""

    data: TokenSource
    payoff: Literal["neg_nll", "neg_ppl", "recip_ppl"] = "neg_nll"
    cap: Literal["none", "chance"] = "none"


@dataclass(frozen=True)
class ShapleyScorer:
    """Shapley values of the blocks by an estimator on a layer game."""

    estimator: Estimator
    game: GameOptions

    def sources(self) -> dict[str, TokenSource]:
        return {"payoff": self.game.data}

    def check(self, n_blocks: int) -> None:
        self.estimator.check(n_blocks)

    def plan(self, n_blocks: int) -> dict[str, Any]:
        """Evaluations and block-forwards that the values cost when nothing is known yet."""
        from svnup.game import WalkPlan

        coalitions = self.estimator.plan(n_blocks)
        walk = WalkPlan.of(coalitions)
        assert walk.n_block_forwards == block_forwards(coalitions)
        return {
            "evaluations": walk.n_evaluations,
            "block_forwards": walk.n_block_forwards,
            "peak_states": walk.peak_states,
        }

    def score(self, lm: LanguageModel, tokens: Ints, cache_dir: str | None) -> ShapleyValues:
        """Play the game; `tokens`, the calibration text, is not used. Values that the cache knows are not computed again."""
        from svnup.game import LayerGame

        payoff_tokens = self.game.data.tokens(lm.tokenizer)
        game = LayerGame(lm, payoff_tokens, payoff=self.game.payoff, cap=self.game.cap, cache_dir=cache_dir)
        values = self.estimator.estimate(game)
        if len(game.kinds) > 1:
            logger.warning("the Shapley values mix coalition values from several kinds of device: %s", game.kinds)
        return values

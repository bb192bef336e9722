"""Scores by Shapley values of a game whose players are blocks."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from svnup.data import TokenSource
from svnup.scoring import Context
from svnup.shapley import Estimator
from svnup.types import CHOICES, Bools, Players, ShapleyValues

if TYPE_CHECKING:
    from torch import Tensor

    from svnup.game.layer_game import LayerGame, Replacements
    from svnup.game.walk_plan import WalkPlan
    from svnup.model.language_model import LanguageModel
    from svnup.pruning.walk import Pruner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GameOptions:
    """The game of a job: its payoff text, and the options of `svnup.game.layer_game.LayerGame`.

    Args:
        data: the payoff text.
        payoff: the default gave the best budgets on selection text (docs/choosing.md).
        cap: as in LayerGame.
        absence: an absent block is skipped, or pruned: uniformly at the job's sparsity by `pruner`.
        players: blocks or sublayers.
        pruner: of absent blocks.
    """

    data: TokenSource
    payoff: Literal["neg_nll", "neg_ppl", "recip_ppl", "kl", "accuracy"] = "recip_ppl"
    cap: Literal["none", "chance"] = "none"
    absence: Literal["skip", "prune"] = "skip"
    players: Players = "block"
    pruner: Annotated[Any, "pruner"] = None  # a Pruner; importing that protocol would import torch

    def __post_init__(self) -> None:
        if self.payoff == "accuracy" and (self.data.n_seq or CHOICES) < CHOICES:
            raise ValueError(f"data.n_seq={self.data.n_seq}: payoff=accuracy needs at least {CHOICES} sequences")

    def check_gates(self) -> None:
        """Raise ValueError unless the payoff is a smooth function of gates on blocks."""
        for key, fitting in (
            ("payoff", ("neg_nll", "neg_ppl", "recip_ppl")),
            ("cap", ("none",)),
            ("absence", ("skip",)),
            ("players", ("block",)),
        ):
            if getattr(self, key) not in fitting:
                raise ValueError(
                    f"shapley.game.{key}={getattr(self, key)}: gates need {' or '.join(fitting)}; or choose another estimator"
                )

    def n_players(self, n_blocks: int) -> int:
        """Number of players of the game on a model of so many blocks."""
        return n_blocks if self.players == "block" else 2 * n_blocks


@dataclass(frozen=True)
class ShapleyScorer:
    """Shapley values of the blocks by an estimator on a layer game.

    Args:
        estimator: how the values are computed.
        game: the options of the game.
        shard: k/n evaluates only share k of n of the coalitions, and computes no values.
    """

    estimator: Estimator
    game: GameOptions
    shard: str | None = None

    def __post_init__(self) -> None:
        match = re.fullmatch(r"(\d+)/(\d+)", "0/1" if self.shard is None else self.shard)
        if not match or not int(match[1]) < int(match[2]):
            raise ValueError(f"shard={self.shard}: choose k/n with 0 <= k < n, such as 0/4, or null")

    @property
    def needs_inputs(self) -> bool:
        return self.game.absence == "prune" and self.game.pruner.needs_inputs

    @property
    def granularity(self) -> Players:
        """What has a score of its own."""
        return self.game.players

    @property
    def _gated(self) -> bool:
        return getattr(self.estimator, "gated", False)

    def check(self, n_blocks: int) -> None:
        """Raise ValueError unless estimator, game and number of blocks fit together."""
        if self._gated:
            self.game.check_gates()
        if self._gated and self.shard is not None:
            raise ValueError(f"shard={self.shard}: gates evaluate no list of coalitions that could be divided; use shard=null")
        self.estimator.check(self.game.n_players(n_blocks))

    def shard_coalitions(self, n_blocks: int) -> Bools:
        """The coalitions of the shard, bool (m, n_players): neighbours in lexicographic order, so that they share prefixes."""
        coalitions = self.estimator.plan(self.game.n_players(n_blocks))
        k, n = map(int, (self.shard or "0/1").split("/"))
        return np.array_split(coalitions, n)[k]

    def plan(self, n_blocks: int) -> dict[str, int]:
        """The cost of the values (or the shard) with an empty cache, walked depth first, as `counts` has it."""
        from svnup.game.walk_plan import WalkPlan

        return self.counts(WalkPlan.of(self.shard_coalitions(n_blocks), absent_costs=self.game.absence == "prune"))

    def counts(self, walk: WalkPlan) -> dict[str, int]:
        """The cost of a walk over the coalitions, the most hidden states held, and backward passes, by name."""
        counts = {"evaluations": walk.n_evaluations, "block_forwards": walk.n_block_forwards, "peak_states": walk.peak_states}
        return counts | ({"backward_passes": self.n_backward} if self._gated else {})

    @property
    def n_backward(self) -> int:
        """Backward passes of the estimator."""
        return self.estimator.nodes if self._gated else 0  # type: ignore[attr-defined]

    def build_game(self, lm: LanguageModel, replacements: Callable[[Pruner], Replacements], cache_dir: str | None) -> LayerGame:
        """Build the game on a model.

        Args:
            lm: the model.
            replacements: makes the pruned replacements of absent blocks with a pruner.
            cache_dir: the folder of cached payoffs; None for none.
        """
        from svnup.game.layer_game import LayerGame

        options = self.game
        return LayerGame(
            lm,
            options.data.tokens(lm.tokenizer),
            payoff=options.payoff,
            cap=options.cap,
            players=options.players,
            pruned=replacements(options.pruner) if options.absence == "prune" else None,
            cache_dir=cache_dir,
        )

    def score(self, lm: LanguageModel, context: Context) -> ShapleyValues:
        """Estimate the values; payoffs in the cache are not computed again."""
        game = self.build_game(lm, context.replacements, context.cache_dir)
        values = self.estimator.estimate(game)
        if len(game.kinds) > 1:
            logger.warning("the Shapley values mix coalition values from several kinds of device: %s", game.kinds)
        return values.measured(game.kinds, game.walk)

    def reestimate(self, lm: LanguageModel, absent: list[dict[str, Tensor]], cache_dir: str | None) -> ShapleyValues:
        """Estimate the values in a model that has changed, on the same text with the same estimator and the payoff -NLL.

        Args:
            lm: the model; present players have its current weights.
            absent: for each block, the weights of absent players by parameter name.
            cache_dir: the folder of cached payoffs; None for none.
        """
        from svnup.game.layer_game import LayerGame

        tokens = self.game.data.tokens(lm.tokenizer)
        game = LayerGame(lm, tokens, players=self.game.players, pruned=absent, cache_dir=cache_dir)
        return self.estimator.estimate(game).measured(game.kinds, game.walk)

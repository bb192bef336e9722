"""Scores of the experts in each block of a mixture: Shapley values of a game in each block, and how often they are chosen."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from svnup.data import TokenSource
from svnup.progress import stage
from svnup.scoring import Context
from svnup.shapley import MAX_PLAYERS, Estimator
from svnup.shapley.exact import Exact
from svnup.shapley.permutation import Permutation
from svnup.types import Cost, ExpertScores, Floats, Granularity, ShapleyValues

if TYPE_CHECKING:
    from torch import Tensor

    from svnup.model.language_model import LanguageModel

PER_EXPERT = 16  # evaluations of a block with many experts, by default: of n experts these are 8 pairs of orders


@dataclass(frozen=True)
class Shapley:
    """Shapley values of the experts of each block, in a game of their own (`svnup.game.expert_game.ExpertGame`).

    Args:
        data: the payoff text.
        payoff: what a coalition of experts is paid.
        absence: what becomes of the weight by which tokens are routed to an absent expert.
        exact_up_to: values of blocks with so many experts are exact; those of others are sampled by permutations.
        budget: evaluations of a block whose values are sampled; None is 16 for each expert.
        seed: of the permutations.

    Source: our choice; arXiv 2505.01731 takes blocks as players.
    """

    data: TokenSource
    payoff: Literal["neg_nll", "recip_ppl", "kl"] = "recip_ppl"
    absence: Literal["spread", "drop"] = "spread"
    exact_up_to: int = 10
    budget: int | None = None
    seed: int = 0
    needs_inputs: ClassVar[bool] = False
    granularity: ClassVar[Granularity] = "expert"

    def __post_init__(self) -> None:
        if not 0 <= self.exact_up_to <= MAX_PLAYERS:
            raise ValueError(f"exact_up_to={self.exact_up_to}: number of experts; choose 0 to {MAX_PLAYERS}, such as 10")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"budget={self.budget}: evaluations of a block; choose 4 for each expert or more, or null")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: choose 0 or more")

    def plan(self, n_blocks: int) -> dict[str, int]:
        return {}  # which the number of blocks does not say: `plan_of` does

    def check_model(self, lm: LanguageModel) -> None:
        """Raise ValueError unless the experts of a model, or of its skeleton, can be players, and there are enough orders."""
        lm.check_routes()
        for index in mixtures(lm):
            n_experts = len(lm.experts(index))
            self._estimator(n_experts).check(n_experts)

    def plan_of(self, lm: LanguageModel) -> dict[str, int]:
        """The cost of the values of a model, or of its skeleton, with an empty cache: in the units of `Cost`, by name."""
        blocks = mixtures(lm)
        evaluations = {index: len(self._estimator(n).plan(n)) for index in blocks for n in [len(lm.experts(index))]}
        forwards = sum(n * (lm.n_blocks - index) for index, n in evaluations.items())
        return {"evaluations": sum(evaluations.values()), "block_forwards": forwards + max(blocks)}

    def _estimator(self, n_experts: int) -> Estimator:
        if n_experts <= self.exact_up_to:
            return Exact()
        return Permutation(PER_EXPERT * n_experts if self.budget is None else self.budget, self.seed)

    def score(self, lm: LanguageModel, context: Context) -> ExpertScores:
        """Estimate the values; payoffs in the cache are not computed again."""
        from svnup.game.expert_game import ExpertGame

        start, blocks, tokens = time.perf_counter(), mixtures(lm), self.data.tokens(lm.tokenizer)
        weights, found = lm.fingerprint(), list[ShapleyValues]()
        for visit in lm.walk(tokens):
            if (index := visit.index) in blocks:
                entering = [replace(batch) for batch in visit.batches]  # a visit that goes on changes its own
                game = ExpertGame(
                    lm,
                    tokens,
                    index,
                    entering,
                    payoff=self.payoff,
                    absence=self.absence,
                    cache_dir=context.cache_dir,
                    weights=weights,
                )
                found.append(self._estimator(game.n_players).estimate(game))
            if index == blocks[-1]:
                break
        costs, errors = [values.cost for values in found], [values.stderr for values in found]
        counts = ("n_evaluations", "n_block_forwards", "n_new_evaluations", "n_new_block_forwards")
        cost = Cost(**{name: sum(getattr(one, name) for one in costs) for name in counts}, seconds=time.perf_counter() - start)
        before = blocks[-1]  # block-forwards that lead to the last of these blocks
        cost = replace(
            cost,
            n_block_forwards=cost.n_block_forwards + before,
            n_new_block_forwards=cost.n_new_block_forwards + before,
        )
        stderr = None if any(error is None for error in errors) else np.concatenate([e for e in errors if e is not None])
        methods = ", ".join(dict.fromkeys(values.method for values in found))
        method = f"Shapley of experts ({methods}, payoff={self.payoff}, absence={self.absence})"
        return _scores(lm, [values.values for values in found], method, cost, stderr)


@dataclass(frozen=True)
class Frequency:
    """How much each expert is used: its share of what the router of its block gives to the calibration tokens.

    Args:
        of: shares of the routes' weights (`weight`), or of the routes (`tokens`).

    Source: the usual criterion of pruning experts; the control of `Shapley`.
    """

    of: Literal["weight", "tokens"] = "weight"
    needs_inputs: ClassVar[bool] = True
    granularity: ClassVar[Granularity] = "expert"

    def plan(self, n_blocks: int) -> dict[str, int]:
        return {"block_forwards": n_blocks}

    def check_model(self, lm: LanguageModel) -> None:
        """Raise ValueError unless the experts of a model, or of its skeleton, are called with the routes of tokens."""
        lm.check_routes()

    def score(self, lm: LanguageModel, context: Context) -> ExpertScores:
        import torch

        from svnup.model.linears import rerouted

        start, blocks, shares = time.perf_counter(), mixtures(lm), list[Floats]()
        with stage("scores", lm.n_blocks, "blocks") as advance:
            for visit in lm.walk(context.tokens):
                experts = lm.experts(visit.index)
                used = np.zeros(len(experts))

                def see(numbers: list[int], index: Tensor, weights: Tensor, used: Floats = used) -> Tensor:
                    given = weights.double() if self.of == "weight" else torch.ones_like(weights, dtype=torch.float64)
                    real = index < len(numbers)
                    found = torch.bincount(index[real], given[real], len(numbers))
                    used[numbers] += found.cpu().numpy()
                    return weights

                with rerouted(visit.block, experts, see):
                    visit.run(advance=True)
                if visit.index in blocks:
                    shares.append(used / used.sum())
                advance(1)
        cost = Cost(n_block_forwards=lm.n_blocks, n_new_block_forwards=lm.n_blocks, seconds=time.perf_counter() - start)
        return _scores(lm, shares, f"Frequency(of={self.of})", cost)


def mixtures(lm: LanguageModel) -> list[int]:
    """The blocks that have experts; raises ValueError where none has."""
    blocks = [index for index in range(lm.n_blocks) if lm.experts(index)]
    if not blocks:
        raise ValueError(f"{type(lm.model).__name__} has no experts; use an allocator of blocks, such as allocator=shapley")
    return blocks


def _scores(lm: LanguageModel, values: Iterable[Floats], method: str, cost: Cost, stderr: Floats | None = None) -> ExpertScores:
    """Scores of values for each block that has experts, (n_experts,) each."""
    named = [(index, expert) for index in mixtures(lm) for expert in lm.experts(index)]
    blocks, experts = np.array([index for index, _ in named]), tuple(expert for _, expert in named)
    return ExpertScores(np.concatenate([*values]), method, cost=cost, blocks=blocks, experts=experts, stderr=stderr)

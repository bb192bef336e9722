"""How a block's budget is divided among its linear layers. Light to import: torch comes when a score is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from svnup import distributed
from svnup.allocation.budget import Scale, split_block
from svnup.progress import stage
from svnup.scoring.published import wanda_scores
from svnup.shapley import all_coalitions, exact_values
from svnup.types import Bools, Floats, Ints, Share, SparsityProfile

if TYPE_CHECKING:
    from torch import Tensor

    from svnup.model.language_model import LanguageModel, Visit
    from svnup.pruning.walk import Pruner

MAX_LINEARS = 12  # of a block, whose coalitions are enumerated


class Split(Protocol):
    """Divides each block's budget; `needs_inputs` says whether it reads calibration text, `trial` whether it prunes for it,
    `needs_errors` whether that pruning has to measure errors."""

    needs_inputs: ClassVar[bool]
    trial: ClassVar[bool]
    needs_errors: ClassVar[bool]
    uniform: ClassVar[bool]

    def divide(self, lm: LanguageModel, profile: SparsityProfile, pruner: Pruner, tokens: Ints) -> SparsityProfile: ...


@dataclass(frozen=True)
class UniformSplit:
    """Every linear gets the sparsity of its block; where the profile is of sublayers or linear layers, that of its part."""

    needs_inputs: ClassVar[bool] = False
    trial: ClassVar[bool] = False
    needs_errors: ClassVar[bool] = False
    uniform: ClassVar[bool] = True

    def divide(self, lm: LanguageModel, profile: SparsityProfile, pruner: Pruner, tokens: Ints) -> SparsityProfile:
        return profile if len(profile.sparsity) == lm.n_blocks else _joined(lm, profile)


@dataclass(frozen=True)
class ErrorSplit:
    """Linear layers that pruning hurts more keep more, by their relative reconstruction errors in a trial pruning.

    Densities are linear in the scaled errors with amplitude `lam`, exact at each block's sparsity. Source: our choice.
    """

    lam: float = 0.05
    scale: Scale = "log"
    needs_inputs: ClassVar[bool] = True
    trial: ClassVar[bool] = True
    needs_errors: ClassVar[bool] = True
    uniform: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_amplitude(self.lam)

    def divide(self, lm: LanguageModel, profile: SparsityProfile, pruner: Pruner, tokens: Ints) -> SparsityProfile:
        from svnup.pruning.walk import temporarily_pruned

        with temporarily_pruned(lm, profile, pruner, tokens) as report:
            errors = {(r.block, r.name): r.error or 0.0 for r in report.per_linear}
        errors = distributed.from_first(lambda: errors)  # of several processes each has measured them on its own share
        return _divided(lm, profile, errors, self.lam, self.scale)


@dataclass(frozen=True)
class OutliersSplit:
    """Linear layers with more outliers keep more.

    Outliers are the share of |W_ij| * ||X_j||_2 above `threshold` times its mean in the matrix, on dense activations.

    Source: the outlier ratio of OWL (arXiv 2310.05175, equation 2), here for a linear instead of a block.
    """

    lam: float = 0.05
    scale: Scale = "raw"
    threshold: float = 5.0
    needs_inputs: ClassVar[bool] = True
    trial: ClassVar[bool] = False
    needs_errors: ClassVar[bool] = False
    uniform: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_amplitude(self.lam)
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold}: a multiple of the mean; choose a positive number, such as 5")

    def divide(self, lm: LanguageModel, profile: SparsityProfile, pruner: Pruner, tokens: Ints) -> SparsityProfile:
        import torch

        ratios = {}
        with torch.inference_mode():
            for visit in lm.walk(tokens):
                for name, scores in wanda_scores(visit).items():
                    ratios[visit.index, name] = float((scores > self.threshold * scores.mean()).double().mean())
        return _divided(lm, profile, ratios, self.lam, self.scale)


@dataclass(frozen=True)
class ShapleySplit:
    """Linear layers that their block can spare least keep more: by the Shapley values of a game inside each block.

    Its players are the block's linear layers, of which an absent one has the weights of a trial pruning by the profile. Its
    payoff is minus the squared error of the block's output, in shares of the output's square, on the dense model's inputs of
    `n_seq` calibration sequences. All coalitions of k linear layers are evaluated: 2^k forward passes over these sequences, and
    a pruning. Scores are values per weight. Raises ValueError for a block of more than 12 linear layers.

    Source: our choice; in arXiv 2505.01731 the players are blocks.
    """

    lam: float = 0.05
    scale: Scale = "log"
    n_seq: int = 8
    needs_inputs: ClassVar[bool] = True
    trial: ClassVar[bool] = True
    needs_errors: ClassVar[bool] = False
    uniform: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_amplitude(self.lam)
        if self.n_seq < 1:
            raise ValueError(f"n_seq={self.n_seq}: calibration sequences for the game of linear layers; choose 1 or more")

    def divide(self, lm: LanguageModel, profile: SparsityProfile, pruner: Pruner, tokens: Ints) -> SparsityProfile:
        import torch

        from svnup.pruning.walk import pruned_weights

        if (most := max(len(lm.linears(index)) for index in range(lm.n_blocks))) > MAX_LINEARS:
            raise ValueError(f"split=shapley: needs 2^{most} evaluations for {most} linear layers of a block; use split=error")
        absent = pruned_weights(lm, profile, pruner, tokens)
        values: dict[tuple[int, str], float] = {}
        with torch.inference_mode(), stage("linears", lm.n_blocks, "blocks") as advance:
            for visit in lm.walk(tokens[: self.n_seq]):
                of_block = exact_values(_output_errors(visit, absent[visit.index], all_coalitions(len(visit.linears))))
                sizes = [linear.weight.numel() for linear in visit.linears.values()]
                values |= {(visit.index, n): v / size for n, v, size in zip(visit.linears, of_block, sizes, strict=True)}
                advance(1)
        return _divided(lm, profile, values, self.lam, self.scale)


def _output_errors(visit: Visit, absent: dict[str, Tensor], coalitions: Bools) -> Floats:
    """Payoffs (m,) of coalitions of the block's linear layers (m, k); the block advances."""
    from svnup.model.linears import by_linear, by_parameter

    pruned = by_linear(visit.linears, absent)
    inputs = [replace(batch) for batch in visit.batches]
    visit.run(advance=True)
    total = sum(float(batch.hidden.double().square().sum()) for batch in visit.batches)
    payoffs = np.zeros(len(coalitions))
    for row, present in enumerate(coalitions):
        weights = by_parameter(
            visit.linears, {n: pruned[n] for n, here in zip(visit.linears, present, strict=True) if not here}
        )
        for before, after in zip(inputs, visit.batches, strict=True):
            out = visit.lm.run_block(visit.index, before, weights=weights)
            payoffs[row] -= float((out.hidden.double() - after.hidden.double()).square().sum()) / total
    return payoffs


def _joined(lm: LanguageModel, profile: SparsityProfile) -> SparsityProfile:
    """The profile of blocks, with what each linear gets, of one of sublayers or of linear layers."""
    parts = lm.budget_units(lm.granularity_of(profile.params))
    if len(parts) != len(profile.sparsity):
        raise ValueError(
            f"a profile of {len(profile.sparsity)} blocks cannot prune {lm.n_blocks} blocks; use one of this model"
        )
    blocks: list[dict[str, Share]] = [{} for _ in range(lm.n_blocks)]
    for (index, linears), sparsity in zip(parts, profile.sparsity, strict=True):
        blocks[index] |= {name: Share(float(sparsity), linear.weight.numel()) for name, linear in linears.items()}
    mean = [np.average([s.sparsity for s in b.values()], weights=[s.size for s in b.values()]) for b in blocks]
    return SparsityProfile(np.array(mean), lm.block_params, profile.target, profile.pattern, linears=tuple(blocks))


def _check_amplitude(lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ValueError(f"lam={lam}: an amplitude of densities; choose 0 to 1, such as 0.05")


def _divided(
    lm: LanguageModel, profile: SparsityProfile, scores: Mapping[tuple[int, str], float], lam: float, scale: Scale
) -> SparsityProfile:
    blocks = []
    for index in range(lm.n_blocks):
        sizes = {name: linear.weight.numel() for name, linear in lm.linears(index).items()}
        of_block = np.array([scores[index, name] for name in sizes])
        if scale == "log" and not of_block.max() > 0:  # nothing to tell the linear layers apart
            of_block = np.zeros(len(sizes))
        shares = split_block(of_block, np.array([*sizes.values()]), float(profile.sparsity[index]), lam, scale)
        blocks.append({name: Share(float(s), size) for s, (name, size) in zip(shares, sizes.items(), strict=True)})
    return replace(profile, linears=tuple(blocks))

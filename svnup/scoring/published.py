"""Published heuristics that score blocks: OWL, DLP, LSA, AlphaPruning, block influence."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from svnup.progress import stage
from svnup.scoring import Context
from svnup.types import BlockScores, Cost, Floats, Granularity, Players

if TYPE_CHECKING:
    from torch import Tensor

    from svnup.model.language_model import LanguageModel, Visit

BINS = 100


# -- one small class for each heuristic; all score the dense model


@dataclass(frozen=True)
class Owl:
    """Outlier ratio of each block: the fraction of its Wanda scores above `m` times their mean; higher: denser.

    The Wanda scores |W_ij| ||X_j||_2 of all linear layers of a block are taken together, on dense activations. The budget is
    `ScoreBudget` with scale raw and amplitude 0.08, as in the released code.

    Args:
        m: outliers exceed this multiple of the mean.

    Source: arXiv 2310.05175, section 3; the released code compares with the mean of the block too.
    """

    m: float = 5.0
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.m > 0:
            raise ValueError(f"m={self.m}: outliers exceed so many times the mean; choose 3 to 10")

    def plan(self, n_blocks: int) -> dict[str, int]:
        return {"block_forwards": n_blocks}

    def score(self, lm: LanguageModel, context: Context) -> BlockScores:
        def ratio(scores: list[Tensor]) -> float:
            n = sum(s.numel() for s in scores)
            threshold = self.m * sum(float(s.double().sum()) for s in scores) / n
            return sum(int((s > threshold).sum()) for s in scores) / n

        return _walked(lm, context, f"Owl(m={self.m:g})", lambda visit: [ratio([*wanda_scores(visit).values()])])


@dataclass(frozen=True)
class Dlp:
    """Relative importance of each block, 1 - u_l / sum(u), with u_l the mean or median of its Wanda scores; higher: denser.

    Wanda scores are as for `Owl`. The budget is `ScoreBudget` with scale raw and amplitude 0.15.

    Args:
        statistic: mean, or median (of an even number the lower one).

    Source: arXiv 2505.23807, section 3. The text has the median and the released code the mean, which is our default.
    """

    statistic: Literal["mean", "median"] = "mean"
    needs_inputs: ClassVar[bool] = True

    def plan(self, n_blocks: int) -> dict[str, int]:
        return {"block_forwards": n_blocks}

    def score(self, lm: LanguageModel, context: Context) -> BlockScores:
        import torch

        def middle(scores: list[Tensor]) -> float:
            if self.statistic == "median":
                return float(torch.cat([s.flatten() for s in scores]).median())
            return sum(float(s.double().sum()) for s in scores) / sum(s.numel() for s in scores)

        found = _walked(lm, context, f"Dlp({self.statistic})", lambda visit: [middle([*wanda_scores(visit).values()])])
        return BlockScores(1 - found.values / found.values.sum(), found.method, cost=found.cost)


@dataclass(frozen=True)
class Lsa:
    """Relative importance of each part, 1 - E / sum(E), E the mean over its linear layers of `least_error`; higher: denser.

    E says how little the outputs of a linear layer have to change where a `share` of its weights is pruned: a part that
    changes little has few weights that matter, and those much. Inputs are those of the dense model. The budget is
    `CountBudget`.

    Args:
        share: of the weights of each output row that are pruned.
        group: consecutive inputs from which a row loses its share before the next ones are looked at.
        granularity: what has a score: blocks, sublayers, experts or linear layers.

    Source: LSA, ICLR 2026 (openreview xq3lza5IjN), whose released code was followed, and a note on its text that agrees with
    it. The code scores blocks, attention and MLP, or each linear layer. Ours: a last group that is narrower loses its own
    share, and experts.
    """

    share: float = 0.5
    group: int = 128
    granularity: Granularity = "block"
    needs_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share:g}: of the weights of a row; choose between 0 and 1, such as 0.5")
        if self.group < 2:
            raise ValueError(f"group={self.group}: consecutive inputs; choose 2 or more, such as 128")

    def plan(self, n_blocks: int) -> dict[str, int]:
        return {"block_forwards": n_blocks}

    def score(self, lm: LanguageModel, context: Context) -> BlockScores:
        from svnup.model.linears import matrix
        from svnup.pruning.sparsegpt import SparseGPT
        from svnup.pruning.walk import Inputs

        parts = lm.budget_units(self.granularity)

        def of_block(visit: Visit) -> list[float]:
            inputs = Inputs(visit.linears, SparseGPT(), n_first=0)  # whose statistics are the Gram matrix
            inputs.collect(visit, advance=True)
            errors = {
                name: least_error(matrix(m), inputs.stats(name).mean(), self.share, self.group)
                for name, m in visit.linears.items()
            }
            return [float(np.mean([errors[name] for name in linears])) for index, linears in parts if index == visit.index]

        found = _walked(lm, context, f"Lsa({self.share:g})", of_block)
        if not (np.isfinite(found.values).all() and found.values.sum() > 0):
            raise ValueError("stage scores: the errors of linear layers are all zero or not finite; try model.dtype=float32")
        return BlockScores(1 - found.values / found.values.sum(), found.method, cost=found.cost)


def least_error(weight: Tensor, gram: Tensor, share: float, group: int) -> float:
    """How much the outputs of a linear layer change, squared and summed over outputs, where of each row a share of the weights
    of every `group` consecutive inputs is pruned: those that add least, one after the other, to r G r^T of the pruned ones.

    Args:
        weight: (d_out, d_in).
        gram: G = X^T X / n_tokens, float32 (d_in, d_in).
        share: fraction of each group, rounded down.
        group: the last one may be narrower.

    Source: the released code of LSA; arithmetic is in float32 there, too.
    """
    import torch

    w, total = weight.float(), 0.0
    adds = w.square() * gram.diagonal()
    for start in range(0, w.shape[1], group):
        here = slice(start, start + group)
        own, added, between = w[:, here], adds[:, here], gram[here, here]
        gone = torch.zeros_like(own)
        for _ in range(int(share * own.shape[1])):
            least, at = added.min(1, keepdim=True)
            total += float(least.double().sum())
            weights = own.gather(1, at)
            added += 2 * own * weights * between[at[:, 0]]
            added.scatter_(1, at, torch.inf)
            gone.scatter_(1, at, weights)
        rest = slice(start + group, None)
        adds[:, rest] += 2 * w[:, rest] * (gone @ gram[here, rest])
    return total


@dataclass(frozen=True)
class BlockInfluence:
    """Block influence, 1 - the mean over tokens of cos(h_l, h_(l+1)) of hidden states before and after a block; higher: denser.

    Args:
        granularity: `sublayer` scores attention and MLP of each block; raises ValueError unless a block runs the one and then
            the other.

    Source: ShortGPT, arXiv 2403.03853, equation 1, which removes blocks of low influence. Our deviation: a budget is made of
    it, and sublayers have an influence.
    """

    granularity: Players = "block"
    needs_inputs: ClassVar[bool] = True

    def plan(self, n_blocks: int) -> dict[str, int]:
        return {"block_forwards": n_blocks * (2 if self.granularity == "sublayer" else 1)}

    def score(self, lm: LanguageModel, context: Context) -> BlockScores:
        import torch
        from torch.nn.functional import cosine_similarity

        from svnup.model.blocks import hidden_of

        def cosine(before: Tensor, after: Tensor) -> Tensor:
            """Mean cosine over the tokens of each sequence, (b, s, d) to float64 (b,)."""
            return cosine_similarity(before.float(), after.float(), dim=-1).double().mean(1).cpu()

        def of_block(visit: Visit) -> list[float]:
            cosines: list[Tensor] = []

            def see(block: Any, args: Any, out: Any) -> None:
                cosines.append(cosine(args[0], hidden_of(out)))

            hook = visit.block.register_forward_hook(see)
            try:
                visit.run(advance=True)
            finally:
                hook.remove()
            return [float(1 - torch.cat(cosines).mean())]

        def of_sublayers(visit: Visit) -> list[float]:
            cosines: tuple[list[Tensor], list[Tensor]] = ([], [])
            ends: list[Tensor] = []
            for batch in visit.batches:
                middle = lm.run_block(visit.index, batch, unit="attention")
                end = lm.run_block(visit.index, middle, unit="mlp")
                cosines[0].append(cosine(batch.hidden, middle.hidden))
                cosines[1].append(cosine(middle.hidden, end.hidden))
                ends = ends or [end.hidden]
            visit.run(advance=True)
            whole = visit.batches[0].hidden
            if not torch.allclose(whole.float(), ends[0].float(), rtol=1e-2, atol=1e-2 * float(whole.abs().max())):
                raise ValueError(
                    f"allocator.granularity=sublayer: block {visit.index} does not run attention, then MLP; use "
                    "allocator.granularity=block"
                )
            return [float(1 - torch.cat(of_sublayer).mean()) for of_sublayer in cosines]

        measure = of_sublayers if self.granularity == "sublayer" else of_block
        return _walked(lm, context, "BlockInfluence", measure, self.plan(lm.n_blocks)["block_forwards"])


@dataclass(frozen=True)
class AlphaPruning:
    """Mean over each block's linear layers of the power-law exponent of the spectrum of W^T W (`hill`); higher: sparser.

    Heavy tails, with small exponents, mark well-trained blocks. It reads no text. The budget is `Ratios`.

    Source: arXiv 2410.10912, section 3.
    """

    needs_inputs: ClassVar[bool] = False

    def plan(self, n_blocks: int) -> dict[str, int]:
        return {}

    def score(self, lm: LanguageModel, context: Context) -> BlockScores:
        import torch

        start = time.perf_counter()
        values = []
        for index in range(lm.n_blocks):
            lm.load_block(index)
            exponents = []
            for name, linear in lm.linears(index).items():
                spectrum = torch.linalg.svdvals(linear.weight.detach().float()).double().square().cpu().numpy()
                try:
                    exponents.append(hill(spectrum))
                except ValueError as error:
                    raise ValueError(f"stage scores: block {index}, {name}: {error}; choose another allocator") from error
            values.append(np.mean(exponents))
        cost = Cost(seconds=time.perf_counter() - start)
        return BlockScores(np.array(values), "AlphaPruning", "sparser", cost)


def hill(eigenvalues: Floats) -> float:
    """Hill estimate of the power-law exponent in the tail of a spectrum: 1 + k / sum over the k tail values of ln(x_i / x_min).

    x_min is the smallest eigenvalue in or above the fullest of 100 equal bins of log10(x). Eigenvalues that are numerically
    zero are left out.

    Args:
        eigenvalues: float64 (n,).

    Raises:
        ValueError: all eigenvalues, or all of the tail, are equal.

    Source: the fix-finger of arXiv 2410.10912, section 3. The released code searches further, for the smallest
    Kolmogorov-Smirnov distance among eigenvalues up to 1.5 times that peak; we follow the text.
    """
    x = np.sort(np.asarray(eigenvalues, dtype=np.float64))
    x = x[x > 1e-12 * x[-1]]
    if not len(x) or x[0] == x[-1]:
        raise ValueError("its singular values are all equal, so that their spectrum has no tail")
    logs = np.log10(x)
    counts, edges = np.histogram(logs, BINS)
    tail = logs[logs >= edges[np.argmax(counts)]]
    steps = np.log(10) * (tail - tail[0]).sum()
    if steps <= 0:
        raise ValueError("its largest singular values are all equal, so that their spectrum has no tail")
    return float(1 + len(tail) / steps)


def wanda_scores(visit: Visit) -> dict[str, Tensor]:
    """Wanda scores |W_ij| ||X_j||_2 of each linear layer of a visited block by name, float32 (d_out, d_in); runs the block."""
    from svnup.model.linears import matrix
    from svnup.pruning.walk import Inputs
    from svnup.pruning.wanda import Wanda

    inputs = Inputs(visit.linears, Wanda())
    inputs.collect(visit, advance=True)
    return {name: matrix(m).float().abs() * inputs.stats(name).squares.sqrt() for name, m in visit.linears.items()}


def _walked(
    lm: LanguageModel,
    context: Context,
    method: str,
    measure: Callable[[Visit], list[float]],
    n_block_forwards: int | None = None,
) -> BlockScores:
    """Scores from a walk over the dense model.

    Args:
        method: its name and options.
        measure: the scores of a visited block, which it runs.
        n_block_forwards: what all calls of `measure` cost; None is one block-forward each.
    """
    import torch

    start = time.perf_counter()
    with torch.inference_mode(), stage("scores", lm.n_blocks, "blocks") as advance:
        values: list[float] = []
        for visit in lm.walk(context.tokens):
            values += measure(visit)
            advance(1)
    n_forwards = lm.n_blocks if n_block_forwards is None else n_block_forwards
    cost = Cost(n_block_forwards=n_forwards, n_new_block_forwards=n_forwards, seconds=time.perf_counter() - start)
    return BlockScores(np.array(values), method, cost=cost)

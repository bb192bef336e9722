"""DSnoT: dynamic sparse, no training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from svnup.machines import Work
from svnup.pattern import Pattern
from svnup.pruning.masks import all_finite, without, zeroed
from svnup.pruning.refit import check_base
from svnup.pruning.walk import Pruner, Total, workspace


@dataclass
class InputMoments:
    """Moments of each input over all observed tokens, and the statistics of the base pruner.

    Args:
        mean: float32 (d_in,).
        deviations: sums of squared deviations from the mean, float32 (d_in,).
        base: statistics of the base pruner.
        n_tokens: number of observed tokens.
    """

    mean: Tensor
    deviations: Tensor
    base: Any
    n_tokens: int = 0

    @property
    def fallback(self) -> str | None:
        return getattr(self.base, "fallback", None)

    def add_up(self, total: Total) -> None:
        n = int(total(torch.tensor(self.n_tokens)))
        mean = total(self.mean * (self.n_tokens / max(1, n)))
        self.deviations = total(self.deviations + self.n_tokens * (self.mean - mean).square())
        self.mean, self.n_tokens = mean, n
        if self.base is not None:
            self.base.add_up(total)


@dataclass(frozen=True)
class DSnoT:
    """Refine another pruner's mask by swaps within an output row that restore its expected output; kept weights stay dense.

    The expected error of row i is the sum of W_ij E[X_j] over its pruned weights. Each cycle grows the pruned weight with the
    largest sign(error) W_ij E[X_j] / Var[X_j], and prunes the kept one with the smallest Wanda score |W_ij| ||X_j||_2 among
    those with sign(error) W_ij E[X_j] < 0. In N:M both are of one group: the best weight to grow of any group that has one to
    prune. A row is finished when |error| <= threshold, no pair is left, a swap would not reduce |error|, or after max_cycles;
    no weight is swapped twice. So the expected error never grows; the reconstruction error can.

    As in the paper, E and Var are over all tokens and every linear layer is refined. The released code takes sums over a
    sequence for E against the same threshold of 0.1, the mean of Var within batches, and no MLP by default, and goes on if the
    sign condition leaves nothing to prune; in N:M it has no sign condition, but ends a row where the sign of the error would
    change. That a swap must reduce |error| is our deviation: without it, the largest swaps make errors near zero larger. A
    variance counts as at least float32 eps times the mean square, so that constant inputs can be compared.

    Args:
        base: the pruner that makes the mask.
        max_cycles: the most swaps of a row.
        threshold: of |error|, in units of the output.

    Source: Zhang et al. 2023 (arXiv 2310.08915), section 3.2.
    """

    base: Pruner
    pattern: str = "unstructured"
    max_cycles: int = 50
    threshold: float = 0.1
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_base(self.base, self.pattern)
        if self.max_cycles < 1:
            raise ValueError(f"max_cycles={self.max_cycles}: choose at least 1")
        if self.threshold < 0:
            raise ValueError(f"threshold={self.threshold}: choose an error of the output that is small enough, such as 0.1")

    def new_stats(self, weight: Tensor) -> InputMoments:
        zeros = torch.zeros(2, weight.shape[1], dtype=torch.float32, device=weight.device)
        return InputMoments(zeros[0], zeros[1], self.base.new_stats(weight))

    def observe(self, stats: InputMoments, x: Tensor) -> None:
        self.base.observe(stats.base, x)
        if len(x) == 0:
            return
        variance, mean = torch.var_mean(x.float(), 0, correction=0)
        n, total = len(x), stats.n_tokens + len(x)
        step = mean - stats.mean
        stats.deviations += n * variance + step.square() * (stats.n_tokens * n / total)
        stats.mean += step * (n / total)
        stats.n_tokens = total

    def workspace(self, d_out: int, d_in: int) -> int:
        """Bytes that `prune` takes for one matrix, as measured."""
        return max(4 * 13 * d_out * d_in, workspace(self.base, d_out, d_in))

    def work(self, d_out: int, d_in: int, sparsity: float) -> Work:
        """All cycles with all rows, of which many are finished early."""
        return Work(moved=4.0 * (20 + 15 * self.max_cycles) * d_out * d_in, calls=25 * self.max_cycles)

    def prune(self, weight: Tensor, stats: InputMoments, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        gone = zeroed(self.base.prune(weight, stats.base, sparsity), sparsity, self.pattern)
        variance = stats.deviations / stats.n_tokens
        squares = variance + stats.mean.square()
        if not all_finite(squares):
            raise ValueError("nan or infinity in the statistics of the inputs")
        variance = torch.maximum(variance, squares * torch.finfo().eps).clamp(min=torch.finfo().tiny)
        self._swap(
            gone, weight.float(), stats.mean, variance, squares.sqrt(), Pattern.parse(self.pattern).group or weight.shape[1]
        )
        return without(weight, gone)

    def _swap(self, gone: Tensor, w: Tensor, mean: Tensor, variance: Tensor, norms: Tensor, m: int) -> None:
        """Swap entries of the mask in place, within every m consecutive inputs of a row, in all rows at once."""
        shares = w * mean
        grow = (shares / variance).masked_fill(~gone, 0)
        shed, wanda = shares.masked_fill(gone, 0), w.abs() * norms
        error = shares.double().masked_fill(~gone, 0).sum(1)
        rows = (error.abs() > self.threshold).nonzero().squeeze(1)
        for _ in range(self.max_cycles):
            if not len(rows):
                return
            sign = error[rows, None].sign().float()
            price, at = wanda[rows].masked_fill(sign * shed[rows] >= 0, torch.inf).unflatten(1, (-1, m)).min(2)
            gain = (sign * grow[rows]).unflatten(1, (-1, m)).masked_fill(price.isinf()[:, :, None], 0)
            best, grown = gain.flatten(1).max(1, keepdim=True)
            pruned = grown // m * m + at.gather(1, grown // m)
            after = error[rows] + (shares[rows].gather(1, pruned) - shares[rows].gather(1, grown)).squeeze(1)
            better = (best.squeeze(1) > 0) & (after.abs() < error[rows].abs())
            rows, grown, pruned, after = rows[better], grown[better, 0], pruned[better, 0], after[better]
            error[rows] = after
            gone[rows, grown], gone[rows, pruned] = False, True
            grow[rows, grown], shed[rows, pruned] = 0, 0
            rows = rows[after.abs() > self.threshold]

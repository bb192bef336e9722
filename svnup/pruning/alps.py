"""ALPS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svnup.machines import Work
from svnup.pruning.masks import smallest
from svnup.pruning.sparsegpt import Hessian, cholesky


@dataclass(frozen=True)
class ALPS:
    """Find mask and weights D together by ADMM, then improve the weights on the mask by conjugate gradients.

    The objective is min tr((W - D) H (W - D)^T) within the budget.

    H = X^T X / n_tokens + damp * mean(diag) I, with inputs scaled so that its diagonal is 1. Per iteration
    B = (W H - V + rho D) (H + rho I)^-1, D = the largest of B + V / rho within the budget of the whole matrix, or of each group
    of M inputs, V += rho (B - D). Every third iteration counts the changes s of the mask since the last count: with k kept
    weights, rho grows by 1.3 where s >= 0.1 k, by 1.2 where s >= 0.005 k, else by 1.1; at s = 0 or after `iterations` it ends.
    Then `cg_iterations` of conjugate gradients on the mask, with diagonal preconditioning, all rows at once, start at D: in the
    objective they never do worse than D. All is float32, except for the eigenvectors of H in float64. Weights of dead inputs
    are zeroed first. Raises ValueError if H cannot be factorised.

    Source: Meng et al. 2024 (arXiv 2406.07831), algorithms 1 and 2 and the penalties of section 3.2. The released code also
    starts again with a smaller rho where the first masks hardly change, ends at s < 0.0003 k after 30 iterations, and takes the
    mask from B at the end.
    """

    pattern: str = "unstructured"
    damp: float = 0.01
    rho: float = 0.1
    iterations: int = 300
    cg_iterations: int = 10
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("damp", "rho", "iterations"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")
        if self.cg_iterations < 0:
            raise ValueError(f"cg_iterations={self.cg_iterations}: choose 0 or more")

    def new_stats(self, weight: Tensor) -> Hessian:
        return Hessian.empty(weight)

    def observe(self, stats: Hessian, x: Tensor) -> None:
        stats.add(x)

    def workspace(self, d_out: int, d_in: int) -> int:
        """Bytes that `prune` takes for one matrix, as measured."""
        return 4 * (18 * d_out * d_in + 14 * d_in**2)

    def work(self, d_out: int, d_in: int, sparsity: float) -> Work:
        """All iterations, of which few jobs need all, and the eigenvectors of the Hessian in float64."""
        of_weights, of_hessian = 2.0 * d_out * d_in**2, 2.0 * d_in**3
        products = {
            "float32": of_weights * (self.iterations + self.cg_iterations + 2),
            "float64": of_hessian * self.iterations / 3,
        }
        passes = 40 * self.iterations + 15 * self.cg_iterations  # over the weights, with the k-th score of each iteration
        return Work(products, solved=20 * d_in**3, moved=4.0 * passes * d_out * d_in, calls=25 * self.iterations)

    def prune(self, weight: Tensor, stats: Hessian, sparsity: float) -> Tensor:
        if sparsity == 0:
            return weight
        spectrum, dead = stats.factored(self.damp, scaled_spectrum)
        w = weight.float() * spectrum.norms
        gone, d = self._admm(w, spectrum, dead, sparsity)
        if not gone.any():
            return weight
        return (conjugate_gradients(w, d, gone, spectrum.h, self.cg_iterations) / spectrum.norms).to(weight.dtype)

    def _admm(self, w: Tensor, spectrum: Spectrum, dead: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
        """The pruned weights, bool (d_out, d_in), and the matrix with these zeroed."""

        def project(b: Tensor) -> tuple[Tensor, Tensor]:
            gone = smallest(b.abs().masked_fill(dead, -1), sparsity, self.pattern, "matrix")
            return gone, b.masked_fill(gone, 0)

        values, vectors = spectrum.values, spectrum.vectors
        rho, wh, v = self.rho, w @ spectrum.h, torch.zeros_like(w)
        gone, d = project(w)
        before, n_kept = gone, int((~gone).sum())
        for iteration in range(1, self.iterations + 1):
            if iteration % 3 == 1:
                inverse = (vectors / (values + rho) @ vectors.T).float()
            b = (wh - v + rho * d) @ inverse
            gone, d = project(b + v / rho)
            v += rho * (b - d)
            if iteration % 3 == 0:
                changes = int((gone != before).sum())
                if changes == 0:
                    break
                rho *= 1.3 if changes >= 0.1 * n_kept else 1.2 if changes >= 0.005 * n_kept else 1.1
                before = gone
        return gone, d


@dataclass
class Spectrum:
    """A Hessian with unit diagonal and its eigendecomposition.

    Args:
        norms: square roots of the former diagonal, float32 (d_in,).
        h: the scaled Hessian, float32 (d_in, d_in).
        values: eigenvalues, float64 (d_in,).
        vectors: eigenvectors in columns, float64 (d_in, d_in).
    """

    norms: Tensor
    h: Tensor
    values: Tensor
    vectors: Tensor


def scaled_spectrum(h: Tensor) -> Spectrum | None:
    """The spectrum of a Hessian (d_in, d_in); None if it has no Cholesky factor."""
    if cholesky(h) is None:
        return None
    norms = h.diagonal().sqrt()
    scaled = h / norms / norms[:, None]
    return Spectrum(norms, scaled, *torch.linalg.eigh(scaled.double()))


def conjugate_gradients(w: Tensor, d: Tensor, gone: Tensor, h: Tensor, iterations: int) -> Tensor:
    """Reduce tr((W - D) H (W - D)^T) over D on its support, starting at D; each row has a step length of its own.

    Args:
        w: dense weights, (d_out, d_in).
        d: weights to start from, (d_out, d_in).
        gone: where D stays zero, bool (d_out, d_in).
        h: the Hessian, (d_in, d_in).
        iterations: number of steps.
    """
    rest = ((w - d) @ h).masked_fill_(gone, 0)
    direction, size = rest, rest.square().sum(1, keepdim=True)
    for _ in range(iterations):
        ahead = (direction @ h).masked_fill_(gone, 0)
        curvature = (direction * ahead).sum(1, keepdim=True)
        step = torch.where(curvature > 0, size / curvature, 0)  # a converged row stays as it is
        d = d + step * direction
        rest = rest - step * ahead
        size, last = rest.square().sum(1, keepdim=True), size
        direction = rest + torch.where(last > 0, size / last, 0) * direction
    return d

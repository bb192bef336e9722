"""No pruning: the control that leaves every weight as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class Nothing:
    """Keeps all weights; the achieved sparsity is that of the model and is not checked."""

    pattern: str = "unstructured"
    needs_inputs: ClassVar[bool] = False
    prunes: ClassVar[bool] = False

    def new_stats(self, weight: Tensor) -> None:
        return None

    def observe(self, stats: None, x: Tensor) -> None:
        return None

    def prune(self, weight: Tensor, stats: None, sparsity: float) -> Tensor:
        return weight

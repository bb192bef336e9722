"""No pruning, the control that leaves every weight as it is, and no recovery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from svnup.model.language_model import LanguageModel


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


@dataclass(frozen=True)
class NoRecovery:
    """Blocks stay as they are pruned."""

    batch_tokens: ClassVar[None] = None
    n_passes: ClassVar[int] = 0

    def beside(self, lm: LanguageModel, tokens: np.ndarray | Tensor) -> None:
        return None

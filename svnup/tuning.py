"""The loss on held-out text by which allocators that tune or search choose a profile."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from svnup.game import Memo
from svnup.language_model import LanguageModel
from svnup.types import Ints, SparsityProfile

logger = logging.getLogger(__name__)


class HeldOutLoss:
    """Mean next-token NLL in nats on selection text of the model while `pruned` has pruned it by a profile.

    `text` gives the tokens (n_seq, seq_len) when the first loss is asked for. Losses are kept under `cache_dir` by model, text,
    profile and `name`, which says how profiles are pruned: jobs of a sweep share them and a killed one goes on. A loss that is
    not finite is infinite.
    """

    def __init__(
        self,
        lm: LanguageModel,
        pruned: Callable[[SparsityProfile], AbstractContextManager[Any]],
        text: Callable[[], Ints],
        name: str,
        cache_dir: str | Path,
    ) -> None:
        self._lm, self._pruned, self._text, self._name, self._cache_dir = lm, pruned, text, name, cache_dir
        self._calls: list[dict[str, Any]] = []
        self._n_new, self._seconds = 0, 0.0

    @cached_property
    def _tokens(self) -> Ints:
        return self._text()

    @cached_property
    def _memo(self) -> Memo:
        tokens = hashlib.sha256(self._tokens.tobytes()).hexdigest()
        identity = json.dumps([self._lm.fingerprint(), self._name, tokens, list(self._tokens.shape)])
        folder = Path(self._cache_dir) / "losses" / hashlib.sha256(identity.encode()).hexdigest()[:32]
        return Memo(folder, self._lm.device.type)

    def __call__(self, profile: SparsityProfile, label: str = "") -> float:
        start = time.perf_counter()
        same = profile.to_dict() | {"sparsity": np.round(profile.sparsity, 12).tolist(), "requested": None}
        key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        if key not in self._memo.values:
            with self._pruned(profile):
                nll = float(np.mean(self._lm.nll(self._tokens)))
            self._memo.add(key, nll if math.isfinite(nll) else math.inf)
            self._n_new += 1
        loss = self._memo.values[key]
        logger.info("%s: loss %.4f on the selection text", label or "tried", loss)
        self._calls.append({"label": label, "loss": loss if math.isfinite(loss) else None})
        self._seconds += time.perf_counter() - start
        return loss

    def to_dict(self) -> dict[str, Any] | None:
        """The whole curve, in the order in which it was asked for, and what it cost; None where nothing was tried."""
        if not self._calls:
            return None
        counts = {"n_evaluations": len(self._calls), "n_new_evaluations": self._n_new, "n_sequences": len(self._tokens)}
        return {"curve": self._calls, **counts, "seconds": self._seconds}

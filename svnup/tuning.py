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
    not finite is infinite. Asked for `n_seq`, it is that of the first sequences only, kept apart.
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
        self._targets: set[float] = set()
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

    def __call__(self, profile: SparsityProfile, label: str = "", n_seq: int | None = None) -> float:
        start = time.perf_counter()
        tokens = self._tokens[:n_seq]
        part = {"n_seq": len(tokens)} if len(tokens) < len(self._tokens) else {}
        same = profile.to_dict() | {"sparsity": np.round(profile.sparsity, 12).tolist(), "requested": None} | part
        key = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()
        if key not in self._memo.values:
            with self._pruned(profile):
                nll = float(np.mean(self._lm.nll(tokens)))
            self._memo.add(key, nll if math.isfinite(nll) else math.inf)
            self._n_new += 1
        loss = self._memo.values[key]
        logger.info("%s: loss %.4f on %d sequences of the selection text", label or "tried", loss, len(tokens))
        self._calls.append({"label": label, "loss": loss if math.isfinite(loss) else None} | part)
        self._targets.add(round(profile.target, 9))
        self._seconds += time.perf_counter() - start
        return loss

    def to_dict(self) -> dict[str, Any] | None:
        """The whole curve, in the order in which it was asked for, and what it cost; None where nothing was tried.

        Losses on part of the text carry its `n_seq`; `best` is the least loss on all of it by the end of each label, none where
        profiles of different budgets were tried, of which none is best; `n_full_evaluations` weighs evaluations by their share
        of the text (every one of them prunes the whole model).
        """
        if not self._calls:
            return None
        least, best = math.inf, {}
        for call in self._calls if len(self._targets) == 1 else []:
            if "n_seq" not in call and call["loss"] is not None:
                least = best[call["label"]] = min(least, call["loss"])
        n_read = sum(call.get("n_seq", len(self._tokens)) for call in self._calls)
        counts = {"n_evaluations": len(self._calls), "n_new_evaluations": self._n_new, "n_sequences": len(self._tokens)}
        return {
            "curve": self._calls,
            "best": [{"label": label, "loss": loss} for label, loss in best.items()],
            **counts,
            "n_full_evaluations": n_read / len(self._tokens),
            "seconds": self._seconds,
        }

"""How good a model is: perplexity under a written-down protocol, and the gate that a known dense number must pass."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from svnup import NUMBERS_VERSION
from svnup.data import Role, TokenSource
from svnup.types import Ints, Metric, Metrics

if TYPE_CHECKING:
    from svnup.language_model import LanguageModel

logger = logging.getLogger(__name__)

DENSE_TOLERANCE = 0.02


def perplexity(lm: LanguageModel, tokens: Ints) -> float:
    """exp of the mean over windows of the mean next-token NLL in nats, on tokens (n_windows, seq_len).

    Raises ValueError where the loss is nan or infinite. Source: the protocol of the field's scripts (arXiv 2301.00774).
    """
    nll = float(np.mean(lm.nll(tokens)))
    if not math.isfinite(nll) or nll > 700:
        raise ValueError(f"stage evaluation: the loss is {nll}, so there is no perplexity; try model.dtype=float32")
    return math.exp(nll)


@dataclass(frozen=True)
class NoEvaluation:
    """Measures nothing."""

    def sources(self) -> list[TokenSource]:
        return []

    def run(self, lm: LanguageModel) -> Metrics:
        return Metrics()

    def dense(self, lm: LanguageModel, cache_dir: str | Path) -> Metrics:
        return Metrics()


@dataclass(frozen=True)
class Perplexity:
    """Perplexity on each data set, in non-overlapping windows of `seq_len` of its text for `role`, all or the first `n_seq`."""

    datasets: list[TokenSource]
    seq_len: int
    n_seq: int | None = None
    role: Role = "test"

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("datasets=[]: name at least one data set, or choose evaluation=none")
        names = [source.name for source in self.datasets]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"datasets={names}: two numbers would be called {twice}/ppl; evaluate them in two runs")

    def sources(self) -> list[TokenSource]:
        return self.datasets

    def run(self, lm: LanguageModel) -> Metrics:
        """Metrics `<dataset>/ppl` (`<dataset>.<role>/ppl` on other text than the test text), each with its protocol."""
        metrics = Metrics()
        for source in self.datasets:
            tokens = source.tokens(lm.tokenizer)
            name = source.name if source.role == "test" else f"{source.name}.{source.role}"
            metrics[f"{name}/ppl"] = Metric(perplexity(lm, tokens), _protocol(source, tokens))
        return metrics

    def dense(self, lm: LanguageModel, cache_dir: str | Path) -> Metrics:
        """The same on the model as it is, measured once per model, evaluation and kind of device, then read from the cache."""
        protocols = [_protocol(s, s.tokens(lm.tokenizer)) for s in self.datasets]
        identity = [lm.fingerprint(), protocols, lm.device.type, NUMBERS_VERSION]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        path = Path(cache_dir) / "dense" / f"{key}.json"
        if path.is_file():
            return Metrics.from_dict(json.loads(path.read_text(encoding="utf-8")))
        metrics = self.run(lm)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(metrics.to_dict()), encoding="utf-8")
        temporary.replace(path)
        return metrics


def check_dense(dense: Metrics, known: list[dict[str, Any]], gate: Literal["error", "warn", "off"], model: str) -> None:
    """Compare dense perplexities with known ones of the same data set and seq_len; off by more than 2 % raises ValueError.

    A known row with a `model` holds only for the model of that name.
    """
    for name, metric in dense.items():
        for row in known:
            same = (row["dataset"], row["seq_len"]) == (metric.protocol["dataset"], metric.protocol["seq_len"])
            same = same and row.get("model", model) == model
            complete = metric.protocol["role"] == "test" and metric.protocol["complete"]
            if gate == "off" or not same or not complete or abs(metric.value / row["ppl"] - 1) <= DENSE_TOLERANCE:
                continue
            text = (
                f"protocol_gate={gate}: the dense {name} is {metric.value:.4g} where {row['ppl']:g} is known "
                f"({row['source']}), at seq_len {row['seq_len']}: check checkpoint, tokenizer, data, or set protocol_gate=warn"
            )
            if gate == "error":
                raise ValueError(text)
            logger.warning(text)


def _protocol(source: TokenSource, tokens: Ints) -> dict[str, Any]:
    return {
        "dataset": source.name,
        "role": source.role,
        "text": source.fingerprint(),
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest()[:16],
        "seq_len": int(tokens.shape[1]),
        "n_windows": int(tokens.shape[0]),
        "n_tokens": int(tokens.size),
        "complete": source.n_seq is None,
        "mean": "over windows of the mean over their seq_len - 1 targets",
    }

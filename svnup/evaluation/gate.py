"""The protocol gate: a known dense model must have its known perplexity."""

from __future__ import annotations

import logging
from typing import Any, Literal

from svnup.types import Metric, Metrics

logger = logging.getLogger(__name__)
DENSE_TOLERANCE = 0.02


def check_dense(dense: Metrics, known: list[dict[str, Any]], gate: Literal["error", "warn", "off"], model: str) -> None:
    """Compare dense perplexities with known ones of the same data set and sequence length.

    Args:
        dense: the metrics of the dense model.
        known: rows {dataset, seq_len, ppl, source}; one with a `model` holds for the model of that name only, and `n_windows`
            helps to say what differs.
        gate: what a deviation of more than 2 % does: `error` raises, `warn` logs it, `off` does nothing.
        model: the name of the model.

    Raises:
        ValueError: a perplexity deviates and the gate is `error`, or the dense model has no perplexity.
    """
    for name, metric in dense.items():
        if metric.reason is not None:
            raise ValueError(f"stage dense: no {name} of the dense model ({metric.reason}); try model.dtype=float32")
        for row in known:
            same = (row["dataset"], row["seq_len"]) == (metric.protocol["dataset"], metric.protocol.get("seq_len"))
            same = same and row.get("model", model) == model
            complete = metric.protocol["role"] == "test" and metric.protocol["complete"]
            if gate == "off" or not same or not complete or abs(metric.value / row["ppl"] - 1) <= DENSE_TOLERANCE:
                continue
            text = (
                f"protocol_gate={gate}: the dense {name} is {metric.value:.4g} ({metric.value / row['ppl'] - 1:+.1%}) where "
                f"{row['ppl']:g} is known ({row['source']}), at seq_len {row['seq_len']}: {_what_differs(metric, row, model)}, "
                "or set protocol_gate=warn"
            )
            if gate == "error":
                raise ValueError(text)
            logger.warning(text)


def _what_differs(metric: Metric, row: dict[str, Any], model: str) -> str:
    """What differs from the protocol of a known dense perplexity, and what to check."""
    ours, known = metric.protocol.get("n_windows"), row.get("n_windows")
    if known is None or ours is None:
        return f"data set and length are the same; check the checkpoint ({model}), its tokenizer and dtype"
    if ours != known:
        return (
            f"its text has {ours} windows where {known} are known; check the tokenizer of {model} and the revision of the data"
        )
    return f"its text has the {known} windows that are known, so weights differ; check the checkpoint ({model}) and its dtype"

"""The gate: a dense model must have its known perplexity."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

from svnup.types import Metric, Metrics

if TYPE_CHECKING:
    pass

logger = logging.getLogger(__name__)
DENSE_TOLERANCE = 0.02


def check_dense(dense: Metrics, known: list[dict[str, Any]], gate: Literal["error", "warn", "off"], model: str) -> None:
    """Compare dense perplexities with known ones of the same data set and seq_len; off by more than 2 %, or no number at all,
    raises ValueError.

    A known row with a `model` holds only for the model of that name; `n_windows`, where it says how many its text has, tells
    whether the tokens can be the same.
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
    """Of what could be compared with a known dense perplexity, what is not the same, and where to look."""
    ours, known = metric.protocol.get("n_windows"), row.get("n_windows")
    if known is None or ours is None:
        return f"data set and length are the same; check the checkpoint ({model}), its tokenizer and dtype"
    if ours != known:
        return (
            f"its text has {ours} windows where {known} are known; check the tokenizer of {model} and the revision of the data"
        )
    return f"its text has the {known} windows that are known, so weights differ; check the checkpoint ({model}) and its dtype"

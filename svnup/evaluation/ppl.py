"""Perplexity."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from svnup.data import Role, TokenSource
from svnup.evaluation.protocol import Check, Evaluation, NoNumberError, measured_once, text_protocol, unchecked
from svnup.types import Floats, Ints, Metric, Metrics

if TYPE_CHECKING:
    from svnup.model.language_model import LanguageModel


def perplexity(lm: LanguageModel, tokens: Ints) -> float:
    """Perplexity: exp of the mean over windows of the mean NLL of the next token in nats.

    Args:
        lm: the model.
        tokens: int64 (n_windows, seq_len).

    Raises:
        NoNumberError: the loss is nan or infinite.

    Source: the protocol of the released scripts of SparseGPT (arXiv 2301.00774) and its successors.
    """
    return _exp_of_mean(lm.nll(tokens))


def _exp_of_mean(losses: Floats) -> float:
    nll = float(np.mean(losses))
    if not math.isfinite(nll) or nll > 700:
        raise NoNumberError(f"the loss is {nll}, so there is no perplexity")
    return math.exp(nll)


@dataclass(frozen=True)
class Perplexity(Evaluation):
    """Perplexity on each of some data sets, in non-overlapping windows of the text.

    Args:
        datasets: the texts by the name of their metric.
        seq_len: tokens of a window, of data sets that do not set it.
        n_seq: number of windows, of data sets that do not set it; None is all.
        skip: windows to leave out at the beginning, of data sets that do not set it.
        role: of the text, of data sets that do not set it.

    Raises:
        ValueError: there is no data set, or a name has other characters than letters, digits, - and _.
    """

    datasets: dict[str, TokenSource]
    seq_len: int
    n_seq: int | None = None
    skip: int = 0
    role: Role = "test"

    def __post_init__(self) -> None:
        if not self.datasets:
            raise ValueError("datasets=[]: name at least one data set, or choose evaluation=none")
        if wrong := next((name for name in self.datasets if not re.fullmatch(r"[\w-]+", name)), None):
            raise ValueError(f"datasets={wrong}: its number would be called {wrong}/ppl; use letters, digits, - and _")

    def sources(self) -> dict[str, TokenSource]:
        return {f"datasets.{name}": source for name, source in self.datasets.items()}

    def run(self, lm: LanguageModel) -> Metrics:
        """Metrics `<name>/ppl`, or `<name>.<role>/ppl` on other text than the test text, each with its protocol.

        A perplexity that is not finite is nan with its reason.
        """
        metrics = Metrics()
        for called, source in self.datasets.items():
            tokens = source.tokens(lm.tokenizer)
            name = called if source.role == "test" else f"{called}.{source.role}"
            losses, protocol = lm.nll(tokens), text_protocol(source, tokens)
            try:
                metrics[f"{name}/ppl"] = Metric(_exp_of_mean(losses), protocol, window_nll=losses.tolist())
            except NoNumberError as error:
                metrics[f"{name}/ppl"] = Metric(math.nan, protocol, str(error))
        return metrics

    def dense(self, lm: LanguageModel, cache_dir: str | Path, check: Check = unchecked) -> Metrics:
        protocols = {name: text_protocol(s, s.tokens(lm.tokenizer)) for name, s in self.datasets.items()}
        return measured_once(lm, protocols, cache_dir, lambda lm: Perplexity.run(self, lm), check)

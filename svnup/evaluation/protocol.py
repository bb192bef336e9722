"""What a model is judged by, under a written-down protocol."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from svnup import NUMBERS_VERSION, distributed
from svnup.claims import claimed, holder
from svnup.data import TokenSource, tokens_sha256
from svnup.files import SEAL, sealed, set_aside, unsealed, write_text
from svnup.types import Ints, Metrics

if TYPE_CHECKING:
    from svnup.model.language_model import LanguageModel

logger = logging.getLogger(__name__)
Check = Callable[[Metrics], None]


class NoNumberError(ValueError):
    """What was measured is nan or infinite."""


def unchecked(metrics: Metrics) -> None:
    """Take them as they are."""


class Evaluation(Protocol):
    """What a model is judged by: texts to be tokenized, tasks of lm-eval, or nothing."""

    from_hub: ClassVar[bool] = False  # besides its texts
    needs_whole_model: ClassVar[bool] = False

    def sources(self) -> dict[str, TokenSource]:
        """The texts that it reads, by the option that holds them."""
        return {}

    def fingerprints(self) -> dict[str, str]:
        """What its other inputs are by content, by the key under which they were configured."""
        return {}

    def check(self, lm: LanguageModel, tokenizer: Any) -> None:
        """Read the other inputs for a model of which there is only the skeleton; raises ValueError with the option at fault."""

    def run(self, lm: LanguageModel) -> Metrics:
        """The metrics of a model as it is now."""
        ...

    def dense(self, lm: LanguageModel, cache_dir: str | Path, check: Check = unchecked) -> Metrics:
        """The same, measured once per model, evaluation and kind of device, then read from the cache; `check` sees it, the
        perplexities before tasks that take longer."""
        ...


@dataclass(frozen=True)
class NoEvaluation(Evaluation):
    """Measures nothing."""

    def run(self, lm: LanguageModel) -> Metrics:
        return Metrics()

    def dense(self, lm: LanguageModel, cache_dir: str | Path, check: Check = unchecked) -> Metrics:
        return Metrics()


def measured_once(
    lm: LanguageModel, protocols: Any, cache_dir: str | Path, run: Callable[[Any], Metrics], check: Check
) -> Metrics:
    """The metrics of a model under the given protocols, from the cache if they have been measured on such a device; checked."""
    identity = [lm.fingerprint(), protocols, lm.device.type, NUMBERS_VERSION]
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(cache_dir) / "dense" / f"{key}.json"
    metrics = distributed.from_first(lambda: _kept(path))
    if metrics is None:
        claim = path.with_suffix(".claim")

        def waiting() -> None:
            logger.info("dense numbers are computed by %s: this process waits for them", holder(claim) or "another process")

        with claimed(claim, waiting) if distributed.is_first() else contextlib.nullcontext():
            metrics = distributed.from_first(lambda: _kept(path))  # as another process may have left them meanwhile
            if metrics is None:
                metrics = run(lm)
                if distributed.is_first() and not any(metric.reason for metric in metrics.values()):
                    write_text(path, json.dumps(sealed({"metrics": metrics.to_dict()})))
    check(metrics)
    return metrics


def _kept(path: Path) -> Metrics | None:
    """The metrics in a file of the cache; None where there are none, or they are damaged, which then are set aside."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Metrics.from_dict(unsealed(data)["metrics"] if SEAL in data else data)  # earlier versions have no checksum
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("%s: damaged (%s); set aside as %s, and measured again", path, error, set_aside(path).name)
        return None


def text_protocol(source: TokenSource, tokens: Ints) -> dict[str, Any]:
    return {
        "dataset": source.name,
        "role": source.role,
        "text": source.fingerprint(),
        "tokens_sha256": tokens_sha256(tokens)[:16],
        "seq_len": int(tokens.shape[1]),
        "n_windows": int(tokens.shape[0]),
        "n_tokens": int(tokens.size),
        **({"skip": source.skip} if source.skip else {}),
        "complete": source.n_seq is None and not source.skip,
        "mean": "over windows of the mean over their seq_len - 1 targets",
    }

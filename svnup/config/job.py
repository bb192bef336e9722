"""One experiment, with every part built and checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from svnup import NUMBERS_VERSION
from svnup.allocation import Allocator, Budget
from svnup.allocation.maps import Compare
from svnup.allocation.splits import Split
from svnup.config.construction import error_context
from svnup.data import TokenSource, tokens_sha256
from svnup.evaluation.protocol import Evaluation
from svnup.files import at_home
from svnup.machines import Machine
from svnup.model.source import Model
from svnup.naming import allocator_name, code_from_outside, moving_numbers, named, pruner_name
from svnup.pattern import Pattern
from svnup.results.tracker import Tracker
from svnup.scoring import Scorer
from svnup.scoring.shapley import ShapleyScorer
from svnup.types import Granularity, Ints, Offload, SaveFormat, SelectionLoss

if TYPE_CHECKING:
    from svnup.model.language_model import LanguageModel
    from svnup.pruning.walk import Pruner, Recovery

Gate = Literal["error", "warn", "off"]


@dataclass(frozen=True)
class Components:
    """The components of a job but its pruner and its recovery, whose import takes torch: what can be checked at once."""

    model: Model
    dataset: TokenSource
    scorer: Scorer | None
    allocator: Allocator
    selection: TokenSource | None
    split: Split
    evaluation: Evaluation
    tracker: Tracker

    @property
    def shapley(self) -> ShapleyScorer | None:
        """The scorer if it evaluates a game: only then are there shards and a payoff text."""
        return self.scorer if isinstance(self.scorer, ShapleyScorer) else None

    def sources(self) -> dict[str, TokenSource]:
        """Every text by the key under which it was configured."""
        texts = {"dataset": self.dataset}
        if self.shapley is not None:
            texts["shapley.game.data"] = self.shapley.game.data
        for key, reader in (("allocator", self.allocator), ("allocator.scorer", self.scorer)):
            if (payoff := getattr(reader, "data", None)) is not None:
                texts[f"{key}.data"] = payoff
        texts |= {"selection": self.selection} if self.selection is not None else {}
        return texts | {f"evaluation.{option}": source for option, source in self.evaluation.sources().items()}

    @property
    def from_hub(self) -> bool:
        """Whether anything may be asked of the hub."""
        with error_context("evaluation"):
            online = self.evaluation.from_hub
        return online or self.model.from_hub or any(source.from_hub for source in self.sources().values())


@dataclass(frozen=True)
class Job(Components):
    """One experiment, with every part built and checked; `config` is the resolved configuration and `key` its hash."""

    pruner: Pruner
    recovery: Recovery
    sparsity: float
    pattern: str
    seed: int
    protocol_gate: Gate
    selection_loss: SelectionLoss
    compare_uniform: Compare
    results_dir: str
    cache_dir: str
    datasets_dir: str | None
    force: bool
    dry_run: bool
    hardware: str
    offload: Offload
    save_model: bool
    save_format: SaveFormat
    save_masks: bool
    config: dict[str, Any]
    key: str
    machine: Machine  # of the name in `hardware`
    not_compared: str | None = None  # why the budget is not compared with the uniform one, where that was asked

    @property
    def name(self) -> str:
        """Readable, for people: model, pruner, allocator, sparsity."""
        pattern = "" if self.pattern == "unstructured" else f" {self.pattern}"
        methods = f"{pruner_name(self.config)} {allocator_name(self.config['allocator'])}"
        return f"{self.model.name} {methods} {self.sparsity:g}{pattern}"

    def sources(self) -> dict[str, TokenSource]:
        """Every text that the job reads, by the key under which it was configured."""
        return {key: source for key, source in super().sources().items() if key != "dataset" or self.calibrates}

    def fingerprints(self) -> dict[str, str]:
        """What the inputs are by content, without loading them: a finished job with other inputs runs again."""
        prints = {"weights": self.model.fingerprint()} | {k: s.fingerprint() for k, s in self.sources().items()}
        path = self.config["allocator"].get("path")
        if path is not None:
            prints["allocator.path"] = hashlib.sha256(at_home("allocator.path", path).read_bytes()).hexdigest()
        return prints | self.evaluation.fingerprints() | code_from_outside(_counting(self.config))

    def texts(self) -> dict[str, dict[str, Any]]:
        """What was read of each text, by the key of its source, for the record: after `check_texts`, which reads them."""
        read = {key: source.tokens(self.model.tokenizer) for key, source in self.sources().items()}
        return {
            key: {"tokens_sha256": tokens_sha256(ids)[:16], "n_seq": len(ids), "seq_len": ids.shape[1]}
            for key, ids in read.items()
        }

    @property
    def granularity(self) -> Granularity:
        """What has a budget of its own."""
        return typing.cast(Granularity, self.config["allocator"].get("granularity", "block"))

    def budget(self, lm: LanguageModel) -> Budget:
        """What the allocator divides among the parts of a model."""
        return Budget(lm.budget_params(self.granularity), self.sparsity, self.pattern)

    @property
    def game_prunes(self) -> bool:
        return self.shapley is not None and self.shapley.game.absence == "prune"

    @property
    def shard(self) -> str | None:
        """The share of its game's coalitions that it evaluates, without anything else, such as 0/4; None: it is a whole job."""
        return self.shapley.shard if self.shapley is not None else None

    @property
    def calibrates(self) -> bool:
        """Whether anything reads the calibration text."""
        scorer_reads = self.scorer is not None and self.scorer.needs_inputs
        others = self.recovery.n_passes > 0 or self.split.needs_inputs or self.allocator.needs.calibration
        return bool(self.pruner.needs_inputs or scorer_reads or others)

    def tokens(self) -> Ints:
        """The calibration tokens; none where neither pruner nor scorer reads any."""
        if not self.calibrates:
            return np.zeros((0, self.dataset.seq_len), dtype=np.int64)
        return self.dataset.tokens(self.model.tokenizer)

    @cached_property
    def skeleton(self) -> LanguageModel:
        """The model without weights, which has the shapes that they will have."""
        with error_context("model"):
            return self.model.skeleton()

    def load(self, scratch: Path | None = None) -> LanguageModel:
        """The model, with its blocks where they wait; raises ValueError with the key at fault."""
        with error_context("model", ("offload",)):
            return self.model.load(self.offload, scratch)

    def check_texts(self) -> None:
        """Read every text and task, before any weight is loaded; raises ValueError with the key at fault."""
        with error_context("model"):
            tokenizer = self.model.tokenizer
        known = self.skeleton.n_embeddings
        for key, source in self.sources().items():
            with error_context(key), self._or_not_compared(key):
                highest = int(source.tokens(tokenizer).max())
            if highest >= known:
                raise ValueError(
                    f"model={self.model.name}: its tokenizer gives token {highest} in the text of {key}, the model has {known} "
                    "embeddings; use the tokenizer that the model was trained with"
                )
        with error_context("evaluation"):
            self.evaluation.check(self.skeleton, tokenizer)

    @contextlib.contextmanager
    def _or_not_compared(self, key: str) -> Iterator[None]:
        """A text that only a comparison reads can be done without."""
        try:
            yield
        except ValueError as error:
            if key == "selection" and self.allocator.needs.once:
                raise ValueError(f"{error}; or add compare_uniform=off, which reads no selection text") from error
            raise

    def check_shapes(self) -> LanguageModel:
        """Check pattern, budget and lengths against the real shapes of the model; returns the skeleton that has them."""
        from svnup.model.linears import matrix
        from svnup.pruning.walk import check_profile

        lm = self.skeleton
        self._check_lengths(lm)
        group = Pattern.parse(self.pattern).group
        linears = [(i, name, m) for i in range(lm.n_blocks) for name, m in lm.linears(i).items()]
        if not linears:
            raise ValueError(f"model={self.model.name}: its blocks have no linear layers to prune; choose another model")
        for index, name, linear in linears if group is not None else []:
            if (width := matrix(linear).shape[1]) % group:  # type: ignore[operator]
                raise ValueError(_does_not_divide(self.pattern, f"the {width} inputs of block {index}, {name}"))
        if self.scorer is None and not (self.allocator.needs.selection or self.allocator.needs.calibration):
            with error_context("allocator"):
                check_profile(lm, self.allocator.allocate(self.budget(lm)))
        if getattr(self.scorer, "granularity", "block") == "sublayer":
            key = "shapley.game.players" if self.shapley is not None else "allocator.granularity"
            with _errors_named(key):
                for index in range(lm.n_blocks):
                    lm.sublayers(index)
        if self.granularity != "block":
            with _errors_named("allocator.granularity"):
                self.budget(lm)
        if (check := getattr(self.scorer, "check_model", None)) is not None:
            with error_context("allocator.scorer", ("allocator",)):
                check(lm)
        return lm

    def _check_lengths(self, lm: LanguageModel) -> None:
        longest = lm.max_positions
        for name, source in self.sources().items():
            given = f"{name.partition('.datasets')[0]}.seq_len={source.seq_len}"
            if longest is not None and source.seq_len > longest:
                raise ValueError(
                    f"{given}: the model has {longest} positions; choose at most that, for all texts by model.seq_len={longest}"
                )
            if longest is None and (reason := lm.why_too_long(source.seq_len)) is not None:
                raise ValueError(
                    f"{given}: too long for the model ({reason}); choose a shorter one, for all texts by model.seq_len=..."
                )


@contextlib.contextmanager
def _errors_named(key: str) -> Iterator[None]:
    """Context in which a ValueError of the model, about players or units, names the key that asked for them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(re.sub(r"\b(players|granularity)=", f"{key}=", str(error))) from None


def config_key(config: dict[str, Any], chooses: bool) -> str:
    """Hash of a resolved configuration without what cannot change a number, and of the version of the numbers.

    `chooses`: the selection text and the loss on it count.
    """
    kept = _counting(config)
    if chooses:
        kept["selection"] = moving_numbers(config | {"dataset": config["selection"]})["dataset"]
    if chooses and config["selection_loss"] != "nll":  # as it was before there was a choice
        kept["selection_loss"] = config["selection_loss"]
    text = json.dumps([NUMBERS_VERSION, named(kept)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _counting(config: dict[str, Any]) -> dict[str, Any]:
    """What can change a number of a job that chooses nothing."""
    kept = moving_numbers(config)
    if scorer := kept["allocator"].get("scorer"):
        kept["allocator"] = kept["allocator"] | {"scorer": {k: v for k, v in scorer.items() if k != "shard"}}
    if kept["allocator"].get("compare_uniform") == "off":  # as it was before there was a choice
        kept["allocator"] = {k: v for k, v in kept["allocator"].items() if k != "compare_uniform"}
    return kept


def _does_not_divide(pattern: str, what: str) -> str:
    return f"pattern={pattern}: its M does not divide {what}; choose an M that does, or pattern=unstructured"

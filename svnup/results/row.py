"""All that a table, a figure or a repeat needs of one job."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Required, Self, TypedDict

from svnup.files import sealed, unsealed
from svnup.naming import KEY
from svnup.results.stored import Stored, plain
from svnup.secrets import redacted

SCHEMA_VERSION = 1
# A run that is `running` whose process is not there any more is read as `dead`; `interrupted` was by its user or the system.
Status = Literal["running", "finished", "failed", "interrupted", "dead"]
NOT_REDACTED = ("status", "config_key", "fingerprints", "process", "schema_version")  # fingerprints are compared


# -- the configuration, which stays as it was composed: what readers ask of it


class Method(TypedDict, total=False):
    _target_: Required[str]
    base: Method


class Game(TypedDict, total=False):
    data: dict[str, Any]
    payoff: str
    pruner: Method | None


class ScorerNode(TypedDict, total=False):
    _target_: Required[str]
    game: Game


class AllocatorNode(TypedDict, total=False):
    _target_: Required[str]
    scorer: ScorerNode | None


class ModelNode(TypedDict, total=False):
    pretrained_model_name_or_path: str
    model_type: str


class Config(TypedDict, total=False):
    """The configuration of a job, with what names it."""

    model: Required[ModelNode]
    pruner: Required[Method]
    allocator: Required[AllocatorNode]
    sparsity: Required[float]
    pattern: Required[str | int]
    seed: Required[int]
    dataset: dict[str, Any]
    split: Method
    recovery: Method
    evaluation: dict[str, Any]
    tracker: dict[str, Any]


# -- where a result comes from


@dataclass(frozen=True)
class Hardware(Stored):
    """The machine: `cores` that the process could use, `threads` of torch, memory in bytes."""

    cpu: str | None
    cores: int | None
    threads: int | None = None
    memory_bytes: int | None = None
    gpus: tuple[str, ...] = ()
    gpu_memory_bytes: tuple[int, ...] = ()
    cuda: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class OutsideCode(Stored):
    """A package from outside svnup: its targets in the configuration, version, hash of all its files, where it lay, and the git
    state of its folder."""

    targets: tuple[str, ...] = ()
    version: str | None = None
    sha256: str | None = None
    folder: str | None = None
    git: str | None = None
    dirty: bool | None = None
    diff_sha256: str | None = None
    untracked: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TextRead(Stored):
    """A text that was read."""

    tokens_sha256: str | None = None
    n_seq: int | None = None
    seq_len: int | None = None


@dataclass(frozen=True)
class Dequantized(Stored):
    """What weights were dequantized from: a GGUF file, a file of a package, or a checkpoint by its own configuration.

    `tensors` is the number of tensors by their type.
    """

    gguf_file: str | None = None
    file: str | None = None
    package: str | None = None
    quantization: str | None = None
    sha256: str | None = None
    tensors: Mapping[str, int] = field(default_factory=dict)
    quantization_config: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Provenance(Stored):
    """Where a result came from: command, seeds, texts, code and what of it was not committed, machine, processes of the job.

    `numbers` is the version of the numbers, of results that do not tell it 2. A sweep that is made up, as for a table, has none
    of all this.
    """

    command: str = ""
    overrides: tuple[str, ...] = ()
    name: str | None = None
    sweep: str | None = None
    processes: int = 1
    seed: int | None = None
    numbers: int = 2
    seeds: Mapping[str, int | None] = field(default_factory=dict)
    texts: Mapping[str, TextRead] = field(default_factory=dict)
    dequantized_from: Dequantized | None = None
    code_sha256: str | None = None
    git: str | None = None
    dirty: bool | None = None
    diff: str | None = None
    diff_sha256: str | None = None
    untracked: tuple[str, ...] | None = None
    outside: Mapping[str, OutsideCode] | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    hardware: Hardware | None = None
    environment: Mapping[str, str] | None = None
    pythonpath: str | None = None
    cwd: str | None = None
    started: str | None = None


@dataclass(frozen=True)
class Process(Stored):
    """Where a run is running."""

    host: str
    pid: int


# -- what was measured


@dataclass(frozen=True)
class Protocol(Stored):
    """How a number was measured: on windows of a text, on items of a task, or as a mean over `tasks`.

    Numbers are compared only where all keys agree, also those that no reader asks for.
    """

    dataset: str | None = None
    role: str | None = None
    tokens_sha256: str | None = None
    seq_len: int | None = None
    n_windows: int | None = None
    skip: int = 0  # windows of the text before the first that was read
    complete: bool | None = None  # the whole text, or all items
    num_fewshot: int | None = None
    n_items: int | None = None
    limit: int | None = None
    unit: str | None = None
    add_bos_token: bool | None = None
    tasks: Mapping[str, Mapping[str, Any]] | None = None


@dataclass(frozen=True)
class Measured(Stored):
    """A number and its protocol; None only with a `reason` (`svnup.types.Metric` where it is measured)."""

    value: float | None
    protocol: Protocol
    reason: str | None = None
    stderr: float | None = None
    secondary: bool = False
    window_nll: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Sparsity(Stored):
    """The fraction of zeros that was asked for, and that of the pruned weights."""

    target: float
    actual: float
    pattern: str | None = None


@dataclass(frozen=True)
class LinearShare(Stored):
    """A linear layer's part of its block's budget: its sparsity and its number of weights."""

    sparsity: float
    size: int


@dataclass(frozen=True)
class Profile(Stored):
    """The budget (`svnup.types.SparsityProfile`), with the `actual` sparsity of each block.

    `not_compared` says why the budget was not compared with the uniform one.
    """

    sparsity: tuple[float, ...]
    target: float
    params: tuple[int, ...] = ()
    pattern: str | None = None
    requested: tuple[float, ...] | None = None
    linears: tuple[Mapping[str, LinearShare], ...] | None = None
    actual: tuple[float | None, ...] | None = None
    not_compared: str | None = None


@dataclass(frozen=True)
class Scores(Stored):
    """Scores of the blocks (`svnup.types.BlockScores`, `ShapleyValues`), or of experts, which are then named with the `blocks`
    that have them (`ExpertScores`), with their cost (`svnup.types.Cost`)."""

    values: tuple[float, ...]
    method: str
    higher_is: Literal["denser", "sparser"] = "denser"
    stderr: tuple[float, ...] | None = None
    v_empty: float | None = None
    v_full: float | None = None
    stopped: str | None = None
    kinds: tuple[str, ...] = ()
    walk: str | None = None
    n_evaluations: int = 0
    n_block_forwards: int = 0
    n_new_evaluations: int = 0
    n_new_block_forwards: int = 0
    seconds: float = 0.0
    n_backward_passes: int = 0
    efficiency_gap: float | None = None
    blocks: tuple[int, ...] = ()
    experts: tuple[str, ...] = ()

    def of_blocks(self, n_blocks: int) -> list[float] | None:
        """A score for each of the model's blocks, of several parts of a block their sum; None where that is not known."""
        if self.blocks:
            if len(self.blocks) != len(self.values) or not all(0 <= block < n_blocks for block in self.blocks):
                return None
            sums = [0.0] * n_blocks
            for block, value in zip(self.blocks, self.values, strict=True):
                sums[block] += value
            return sums
        if not self.values or len(self.values) % n_blocks:
            return None
        each = len(self.values) // n_blocks
        return [sum(self.values[each * i : each * (i + 1)]) for i in range(n_blocks)]


@dataclass(frozen=True)
class Tried(Stored):
    """A profile that was tried and its loss, None where it is infinite.

    `n_seq`: the loss is that of the first sequences only; `trial`: it is by weights pruned in advance.
    """

    label: str = ""
    loss: float | None = None
    n_seq: int | None = None
    trial: bool = False

    @property
    def on_all(self) -> bool:
        """Whether the loss is that of the whole text, by weights that were pruned."""
        return self.n_seq is None and not self.trial


@dataclass(frozen=True)
class Round(Stored):
    """Values of a pruned model, which a method asked for on its way: of a game, or by backward passes on `n_sequences`."""

    method: str
    values: tuple[float | None, ...]
    n_sequences: int | None = None
    n_block_forwards: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Tuning(Stored):
    """What was tried, and what it cost (`svnup.allocation.trial.Trial.to_dict`): losses on held-out text of the kind `nll` or
    `kl`, in nats per token; or the `misalignment` on calibration text, which has no unit."""

    kind: str = "nll"
    curve: tuple[Tried, ...] = ()  # in the order in which it was tried
    best: tuple[Tried, ...] | None = None  # empty: nothing that was tried can be compared
    n_evaluations: int = 0
    n_new_evaluations: int = 0
    n_sequences: int | None = None
    n_full_evaluations: float | None = None
    n_calibration_block_forwards: int | None = None
    n_selection_block_forwards: float | None = None
    n_block_forwards: int = 0  # of earlier versions
    n_backward_passes: int = 0  # of earlier versions
    taken: str | None = None
    n_payoff_sequences: int | None = None
    seconds: float = 0.0
    kinds: tuple[str, ...] = ()
    rounds: tuple[Round, ...] = ()

    @property
    def of_losses(self) -> bool:
        """Whether the curve has losses on selection text."""
        return self.kind != "misalignment"


@dataclass(frozen=True)
class PrunedLinear(Stored):
    """What became of one linear layer (`svnup.types.LinearReport`)."""

    block: int | None = None
    name: str | None = None
    n_zeros: int | None = None
    size: int | None = None
    error: float | None = None
    seconds: float = 0.0
    fallback: str | None = None
    sparsity: float | None = None


@dataclass(frozen=True)
class RecoveredBlock(Stored):
    """What refitting did to one block (`svnup.types.RecoveredBlock`)."""

    block: int | None = None
    error_before: float | None = None
    error_after: float | None = None
    n_steps: int | None = None
    seconds: float = 0.0
    taken: bool = True


@dataclass(frozen=True)
class Pruning(Stored):
    """What pruning did (`svnup.types.PruneReport`); `seconds` by stage."""

    per_linear: tuple[PrunedLinear, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    recovered: tuple[RecoveredBlock, ...] | None = None


@dataclass(frozen=True)
class Stage(Stored):
    """The seconds of a stage, and the peak of memory until its end."""

    seconds: float
    peak_memory_bytes: int | None = None


# -- the row


@dataclass(frozen=True)
class ResultRow(Stored):
    """Everything a table, a figure or a repeat of one job needs: the content of its result.json.

    `scores` are those of a method that is not a Shapley value. `not_finite` says by dotted key what stands as null, since it is
    nan or infinite.
    """

    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)
    status: Status
    config_key: str
    config: Annotated[dict[str, Any], Config]
    provenance: Provenance
    fingerprints: Mapping[str, str]
    metrics: Mapping[str, Measured] = field(default_factory=dict)
    dense: Mapping[str, Measured] = field(default_factory=dict)
    sparsity: Sparsity | None = None
    profile: Profile | None = None
    shapley: Scores | None = None
    scores: Scores | None = None
    tuning: Tuning | None = None
    pruning: Pruning | None = None
    stages: Mapping[str, Stage] | None = None
    peak_memory_bytes: int | None = None
    seconds: float = 0.0
    error: str | None = None
    process: Process | None = None
    not_finite: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version={self.schema_version}: this svnup reads version {SCHEMA_VERSION}")
        if self.more:
            raise ValueError(f"{', '.join(self.more)}: results of version {SCHEMA_VERSION} have no such key")
        if not isinstance(self.config_key, str) or not KEY.fullmatch(self.config_key):
            raise ValueError(f"config_key={self.config_key!r}: names files of its run, so it must be one plain word")

    def finished(self, **measured: Any) -> Self:
        """The row with what its job has measured, as JSON values by field.

        JSON holds no number that is not finite: each is null, and `not_finite` says what it was.
        """
        found: dict[str, str] = {}
        finite = {name: _finite(value, name, found) for name, value in measured.items()}
        return self.from_dict(self.to_dict() | finite | {"status": "finished", "not_finite": found or None})

    def to_json(self) -> str:
        """The row without secrets in its texts, as JSON."""
        return json.dumps(self.without_secrets(), indent=1, allow_nan=False) + "\n"

    def sealed_json(self) -> str:
        """The content of result.json: the same with a checksum."""
        return json.dumps(sealed(self.without_secrets()), indent=1, allow_nan=False) + "\n"

    def without_secrets(self) -> dict[str, Any]:
        """Nested JSON values without secrets in their texts."""
        return {name: part if name in NOT_REDACTED else redacted(part) for name, part in self.to_dict().items()}

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError, with the key at fault, where the text is not a result, or not that of its checksum."""
        return cls.from_dict(plain(unsealed(json.loads(text))))


def _finite(node: Any, key: str, found: dict[str, str]) -> Any:
    """Nested JSON values with None for each number that is not finite; `found` takes their keys, and what they were."""
    if isinstance(node, float) and not math.isfinite(node):
        found[key] = str(float(node))
        return None
    if isinstance(node, dict):
        return {name: _finite(value, f"{key}.{name}", found) for name, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_finite(value, f"{key}.{i}", found) for i, value in enumerate(node)]
    return node

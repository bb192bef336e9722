"""What a result is made of where it lies in a file, so that one from elsewhere is either whole or left out.

Keys of which a reader asks nothing are not named here, and keys may be added; what is named has its type, and is there where it
is `Required`.
"""

from __future__ import annotations

import re
import sys
import types
import typing
from typing import Any, Literal, Required, TypedDict

Numbers = list[float | None]  # null: not finite
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
LARGEST = sys.float_info.max  # a whole number beyond it is none that Python makes a float of


# A run that is `running` whose process is not there any more is read as `dead`; `interrupted` was by its user or the system.
Status = Literal["running", "finished", "failed", "interrupted", "dead"]


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
    evaluation: dict[str, Any]
    tracker: dict[str, Any]


class Hardware(TypedDict, total=False):
    cpu: Required[str | None]
    cores: Required[int | None]
    gpus: Required[list[str]]
    threads: int


class Provenance(TypedDict, total=False):
    """Where a result came from; a sweep that a row was made up in, as for a table, has none of it."""

    command: str
    overrides: list[str]
    name: str | None
    sweep: str | None
    cwd: str | None
    numbers: int
    hardware: Hardware
    versions: dict[str, str | None]
    environment: dict[str, str]
    dequantized_from: dict[str, Any] | None
    outside: dict[str, dict[str, Any]] | None
    untracked: list[str] | None
    diff: str | None


class OnWindows(TypedDict, total=False):
    """The protocol of a perplexity."""

    n_windows: Required[int]
    seq_len: Required[int]
    role: Required[str]
    skip: int


class OnItems(TypedDict, total=False):
    """The protocol of an accuracy, or of a mean over tasks."""

    num_fewshot: Required[int]
    complete: Required[bool]
    limit: int | None
    n_items: int
    tasks: dict[str, dict[str, Any]]
    add_bos_token: bool | None


class MetricEntry(TypedDict, total=False):
    value: Required[float | None]
    protocol: Required[OnWindows | OnItems]
    reason: str
    stderr: float
    secondary: bool
    window_nll: list[float]


class Sparsity(TypedDict, total=False):
    target: float
    actual: Required[float]


class Profile(TypedDict, total=False):
    sparsity: Required[list[float]]
    actual: Numbers | None


class Cost(TypedDict, total=False):
    n_evaluations: int
    n_new_evaluations: int
    n_block_forwards: int
    n_backward_passes: int
    seconds: float


class Values(Cost, total=False):
    values: Required[Numbers]
    stderr: Numbers | None
    method: Required[str]


class Tried(TypedDict, total=False):
    label: str
    loss: float | None


class Tuning(Cost, total=False):
    curve: list[Tried]


class LinearEntry(TypedDict, total=False):
    fallback: str | None
    error: float | None
    block: int
    name: str


class Pruning(TypedDict, total=False):
    per_linear: list[LinearEntry]
    seconds: dict[str, float]


class Stage(TypedDict, total=False):
    seconds: Required[float]
    peak_memory_bytes: int | None


class Process(TypedDict):
    """Where a run is running."""

    host: Required[str]
    pid: Required[int]


class Result(TypedDict, total=False):
    """The JSON of a `ResultRow`."""

    status: Required[Status]
    config_key: Required[str]
    config: Required[Config]
    provenance: Required[Provenance]
    fingerprints: Required[dict[str, str]]
    metrics: dict[str, MetricEntry]
    dense: dict[str, MetricEntry]
    sparsity: Sparsity | None
    profile: Profile | None
    shapley: Values | None
    scores: Values | None
    tuning: Tuning | None
    pruning: Pruning | None
    stages: dict[str, Stage] | None
    peak_memory_bytes: int | None
    seconds: float
    error: str | None
    process: Process | None
    not_finite: dict[str, str] | None


def check(data: Any) -> None:
    """Raise ValueError, with the key at fault, where parsed JSON is not that of a result."""
    if wrong := _wrong(data, Result, ""):
        raise ValueError(wrong)


def plain(node: Any) -> Any:
    """Parsed JSON with every control character as it is written, `\\x1b`, so that no untrusted text drives a terminal.

    The difference to a commit stays as it is, which is never printed.
    """
    if isinstance(node, dict):
        return {plain(name): value if name == "diff" else plain(value) for name, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", node) if isinstance(node, str) else node


def _wrong(value: Any, hint: Any, key: str) -> str | None:
    """Why a value of JSON is not of a type, None where it is."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return None
    if origin is Required:
        return _wrong(value, args[0], key)
    if origin in (typing.Union, types.UnionType):
        found = [_wrong(value, arg, key) for arg in args]
        return None if None in found else max(filter(None, found), key=len)  # the one that looked deepest
    if typing.is_typeddict(hint):
        if not isinstance(value, dict):
            return f"{key}: must be an object"
        hints = typing.get_type_hints(hint, include_extras=True)
        needed = [name for name, of in hints.items() if typing.get_origin(of) is Required]
        if lacking := [name for name in needed if name not in value]:
            return f"{key}: lacks {', '.join(lacking)}".removeprefix(": ")
        return next((w for k in hints if k in value and (w := _wrong(value[k], hints[k], f"{key}.{k}".lstrip(".")))), None)
    if origin is list or origin is dict:
        if not isinstance(value, origin):
            return f"{key}: must be {'a list' if origin is list else 'an object'}"
        entries = value.items() if isinstance(value, dict) else enumerate(value)
        return next((w for k, entry in entries if (w := _wrong(entry, args[-1], f"{key}.{k}"))), None)
    if origin is Literal:
        return None if value in args else f"{key}: must be one of {', '.join(args)}"
    if hint is float:
        return None if _is_number(value) else f"{key}: must be a number"
    if hint is int:
        return None if _is_number(value) and isinstance(value, int) else f"{key}: must be a whole number"
    return None if type(value) is hint else f"{key}: must be {'null' if hint is types.NoneType else hint.__name__}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST

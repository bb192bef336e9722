"""All that a table, a figure or a repeat needs of one job."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

from svnup.files import unsealed
from svnup.naming import KEY
from svnup.results import stored
from svnup.secrets import redacted

SCHEMA_VERSION = 1


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


@dataclass(frozen=True)
class ResultRow:
    """Everything a table, a figure or a repeat of one job needs, as nested JSON values."""

    status: stored.Status
    config_key: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    fingerprints: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, Any] = field(default_factory=dict)
    sparsity: dict[str, Any] | None = None
    profile: dict[str, Any] | None = None
    shapley: dict[str, Any] | None = None
    scores: dict[str, Any] | None = None  # of a method that is not a Shapley value
    tuning: dict[str, Any] | None = None
    pruning: dict[str, Any] | None = None
    stages: dict[str, Any] | None = None  # by name: seconds, and peak memory until its end
    peak_memory_bytes: int | None = None
    seconds: float = 0.0
    error: str | None = None
    process: dict[str, Any] | None = None  # of a run that is running: its host, and its pid there
    not_finite: dict[str, str] | None = None  # by dotted key: what stands as null, since it is nan or infinite
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version={self.schema_version}: this svnup reads version {SCHEMA_VERSION}")
        if not isinstance(self.config_key, str) or not KEY.fullmatch(self.config_key):
            raise ValueError(f"config_key={self.config_key!r}: names files of its run, so it must be one plain word")

    def finite(self) -> Self:
        """The row with null for each number that is not finite, which JSON cannot hold; `not_finite` says what it was."""
        found: dict[str, str] = {}
        measured = {k: _finite(v, k, found) for k, v in vars(self).items() if k not in ("config", "provenance")}
        return replace(self, **measured | {"not_finite": found or None})

    def redacted(self) -> Self:
        """The row without secrets in its texts; its fingerprints are compared, and stay."""
        kept = ("status", "config_key", "fingerprints", "process", "schema_version")
        return replace(self, **{name: redacted(value) for name, value in vars(self).items() if name not in kept})

    def to_json(self) -> str:
        return json.dumps({"schema_version": self.schema_version} | vars(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError or TypeError where the text is not that of a result, or of its checksum, whoever wrote it."""
        data = stored.plain(unsealed(json.loads(text)))
        stored.check(data)
        return cls(**data)

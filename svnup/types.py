"""What packages exchange: frozen values, checked on construction. Only the standard library and numpy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from svnup.pattern import UNSTRUCTURED, Pattern

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Offload = Literal["none", "cpu", "disk"]
SaveFormat = Literal["dense", "bitmask"]
SelectionLoss = Literal["nll", "kl"]
Players = Literal["block", "sublayer"]  # of a game, and what has scores
Granularity = Literal["block", "sublayer", "expert", "linear"]  # of budgets
LOCAL_COPY = "@sha256:"  # in a fingerprint: between the name of a data set of the hub and the content of the copy that was read
CHOICES = 4  # endings that the accuracy payoff of a game tells apart


def _vector(values: Any, name: str) -> Floats:
    vector = np.array(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
        raise ValueError(f"{name} must be a non-empty vector of finite numbers, not {values!r}")
    vector.setflags(write=False)
    return vector


def player_names(n_blocks: int) -> list[str]:
    """Names of the players of a sublayer game, in their order."""
    return [f"{block} {part}" for block in range(n_blocks) for part in ("attention", "mlp")]


@dataclass(frozen=True)
class Cost:
    """What a method's scores cost: its full cost whatever was already known, and what this run had to add.

    Units: evaluations are LM-head passes over the payoff batch, block-forwards are passes of one block (or sublayer, where
    these are the players) over it, backward passes go through the whole model and recompute its forward.
    """

    n_evaluations: int = 0
    n_block_forwards: int = 0
    n_new_evaluations: int = 0
    n_new_block_forwards: int = 0
    seconds: float = 0.0
    n_backward_passes: int = 0


@dataclass(frozen=True)
class BlockScores:
    """One score per block, with the direction in which it asks for weights.

    `values` has shape (n,); `higher_is` says whether a block with a higher score should be kept 'denser' or 'sparser'.
    """

    values: Floats
    method: str
    higher_is: Literal["denser", "sparser"] = "denser"
    cost: Cost = field(default_factory=Cost)
    stored_as: ClassVar[str] = "scores"  # the field of a result

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _vector(self.values, f"scores of {self.method}"))
        if self.higher_is not in ("denser", "sparser"):
            raise ValueError(f"higher_is={self.higher_is!r}: choose 'denser' or 'sparser'")

    def per_unit(self, n_units: int, blocks: Sequence[int] | None = None) -> BlockScores:
        """The same scores for each part with one budget.

        Those of several players of a part are summed, as of attention and MLP where blocks have budgets; parts that are finer
        than the players get that of their block, whose index `blocks` (n_units,) has.
        """
        if len(self.values) == n_units:
            return self
        if n_units > len(self.values) and blocks is not None:
            values = self.values[list(blocks)]
        else:
            values = self.values.reshape(n_units, -1).sum(axis=1)
        return BlockScores(values, self.method, self.higher_is, self.cost)

    def to_dict(self) -> dict[str, Any]:
        """As nested JSON values: the fields of `cost` stand beside the others."""
        out = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items() if k != "cost"}
        return out | asdict(self.cost)


@dataclass(frozen=True)
class ShapleyValues(BlockScores):
    """Shapley values of the blocks: `values` (n,) in units of the payoff, `stderr` (n,) where the method has one.

    `efficiency_gap` = sum of values - (v_full - v_empty): about 0 for exact values and permutations, reported for windows.
    `stopped` says why an estimator that converges stopped, `kinds` on which kinds of device coalitions were evaluated.
    `walk` is the order in which new coalitions were walked, and why; None where none was new.
    """

    stderr: Floats | None = None
    v_empty: float = 0.0
    v_full: float = 0.0
    stopped: str | None = None
    kinds: tuple[str, ...] = ()
    walk: str | None = None
    stored_as: ClassVar[str] = "shapley"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stderr is not None:
            object.__setattr__(self, "stderr", _vector(self.stderr, f"standard errors of {self.method}"))
            if len(self.stderr) != len(self.values):
                raise ValueError(f"{len(self.stderr)} standard errors for {len(self.values)} values of {self.method}")
        if not (math.isfinite(self.v_empty) and math.isfinite(self.v_full)):
            raise ValueError(f"payoffs of the empty and the full coalition must be finite: {self.v_empty}, {self.v_full}")

    def measured(self, kinds: list[str], walk: str | None) -> Self:
        """The values with how their coalitions were evaluated."""
        return replace(self, kinds=tuple(kinds), walk=walk)

    @property
    def efficiency_gap(self) -> float:
        return float(self.values.sum() - (self.v_full - self.v_empty))

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"efficiency_gap": self.efficiency_gap}


@dataclass(frozen=True)
class ExpertScores(BlockScores):
    """Scores of the experts of each block that has some: `values` (n,), of all of them; they compare within a block.

    `blocks` (n,) has the block of each, `experts` its name there, `stderr` (n,) is given where the method has one for all.
    `units` (n,), once it is known, is the index of its budget among those of a job.
    """

    blocks: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    experts: tuple[str, ...] = ()
    stderr: Floats | None = None
    units: Ints | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.blocks) == len(self.experts) == len(self.values):
            raise ValueError(f"{len(self.values)} scores of {len(self.experts)} experts in {len(self.blocks)} blocks")

    def per_unit(self, n_units: int, blocks: Sequence[int] | None = None) -> ExpertScores:
        """The same scores with their `units`: of each block the experts come last, whose index `blocks` (n_units,) has."""
        at = np.asarray(blocks)
        units = [np.flatnonzero(at == block)[-np.sum(self.blocks == block) :] for block in np.unique(self.blocks)]
        return replace(self, units=np.concatenate(units))

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().to_dict().items() if k != "units"}


@dataclass(frozen=True)
class Share:
    """A linear's part of its block's budget: its sparsity and its number of weights."""

    sparsity: float
    size: int


@dataclass(frozen=True)
class SparsityProfile:
    """Sparsity per block: `sparsity` (n,) fractions of zeros, `params` (n,) prunable weights per block.

    `linears`, where the linear layers of a block differ, gives each its `Share` by name. Under a pattern 'mixed:M' `sparsity`
    is in steps of 1/M, and `requested` (n,) is the budget that was rounded to them. The parameter-weighted mean of the budget
    equals `target` to 1e-6 (rounded to steps: to a step of the largest block), or construction raises ValueError.
    """

    sparsity: Floats
    params: Ints
    target: float
    pattern: str = UNSTRUCTURED
    requested: Floats | None = None
    linears: tuple[dict[str, Share], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", _vector(self.sparsity, "a sparsity profile"))
        params = np.array(self.params, dtype=np.int64)
        params.setflags(write=False)
        object.__setattr__(self, "params", params)
        if params.shape != self.sparsity.shape or (params <= 0).any():
            raise ValueError(f"a profile of {len(self.sparsity)} blocks needs as many positive params, not {params}")
        if (self.sparsity < 0).any() or (self.sparsity > 1).any():
            raise ValueError(f"sparsities must lie in [0, 1]: {self.sparsity}")
        tolerance = 1e-6
        pattern = Pattern.parse(self.pattern)
        if pattern.group is not None and pattern.mixed:
            steps = self.sparsity * pattern.group
            if self.requested is None or np.abs(steps - steps.round()).max() > 1e-9:
                raise ValueError(f"pattern={self.pattern}: needs sparsities in steps of 1/{pattern.group}: {self.sparsity}")
            tolerance = float(params.max()) / (pattern.group * float(params.sum()))
        if self.requested is not None:
            object.__setattr__(self, "requested", _vector(self.requested, "a requested sparsity profile"))
            if self.requested.shape != self.sparsity.shape:
                raise ValueError(f"{len(self.requested)} requested sparsities for {len(self.sparsity)} blocks")
            self._check_mean(self.requested, 1e-6)
        self._check_mean(self.sparsity, tolerance)
        self._check_linears()

    def _check_mean(self, sparsity: Floats, tolerance: float) -> None:
        mean = float(np.average(sparsity, weights=self.params))
        if not abs(mean - self.target) <= tolerance + 1e-12:
            raise ValueError(f"the profile's mean sparsity is {mean:.8f}, its target {self.target:.8f}")

    def _check_linears(self) -> None:
        if self.linears is None:
            return
        if Pattern.parse(self.pattern).group is not None:
            raise ValueError(f"pattern={self.pattern}: the linear layers of a block share its N; use pattern=unstructured")
        if len(self.linears) != len(self.sparsity):
            raise ValueError(f"linear layers of {len(self.linears)} blocks in a profile of {len(self.sparsity)}")
        for index, shares in enumerate(self.linears):
            sizes = sum(share.size for share in shares.values())
            zeros = sum(share.sparsity * share.size for share in shares.values())
            inside = all(0 <= share.sparsity <= 1 for share in shares.values())
            if sizes != self.params[index] or not inside or abs(zeros / sizes - self.sparsity[index]) > 1e-6:
                raise ValueError(
                    f"block {index}: its linear layers have {sizes} weights and mean sparsity {zeros / max(1, sizes):.8f}, "
                    f"the block {self.params[index]} and {self.sparsity[index]:.8f}"
                )

    def of(self, block: int, linear: str) -> float:
        """The sparsity asked of a linear."""
        return float(self.sparsity[block]) if self.linears is None else self.linears[block][linear].sparsity

    def levels(self, block: int) -> tuple[float, ...]:
        """All that is asked of a block: its sparsity, or those of its linear layers."""
        shares = self.linears[block].values() if self.linears is not None else None
        return (float(self.sparsity[block]),) if shares is None else tuple(share.sparsity for share in shares)

    @property
    def mean(self) -> float:
        return float(np.average(self.sparsity, weights=self.params))

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "sparsity": self.sparsity.tolist(),
            "params": self.params.tolist(),
            "target": self.target,
            "pattern": self.pattern,
        }
        if self.requested is not None:
            out["requested"] = self.requested.tolist()
        if self.linears is not None:
            out["linears"] = [{name: asdict(share) for name, share in block.items()} for block in self.linears]
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        sparsity, linears = data["sparsity"], data.get("linears")
        if linears is not None:
            linears = tuple({name: Share(**share) for name, share in block.items()} for block in linears)
        pattern = data.get("pattern", UNSTRUCTURED)
        return cls(sparsity, data["params"], data["target"], pattern, data.get("requested"), linears)


@dataclass(frozen=True)
class LinearReport:
    """One pruned linear: achieved `sparsity` (zeros / size), relative reconstruction `error`, `seconds`.

    `error` = ||X (W - W')^T||^2 / ||X W^T||^2 on the first calibration tokens; None where the pruner needs no inputs.
    `fallback` says what had to be done otherwise than asked, which keeps the numbers of the run out of tables.
    """

    block: int
    name: str
    n_zeros: int
    size: int
    error: float | None
    seconds: float
    fallback: str | None = None

    @property
    def sparsity(self) -> float:
        return self.n_zeros / self.size


@dataclass(frozen=True)
class RecoveredBlock:
    """A block whose kept weights were refitted to the outputs of the dense model's block, in `n_steps`.

    The errors are squared errors of the block's outputs on the calibration text, relative to the square of what the dense
    model's block adds to its inputs; where refitting did not lower it, or there was none, the pruned weights stayed: `taken`
    is False.
    """

    block: int
    error_before: float
    error_after: float
    n_steps: int
    seconds: float
    taken: bool = True


@dataclass(frozen=True)
class PruneReport:
    """What pruning did, per linear and overall; `seconds` by stage, `peak_memory_bytes` of device or process until then.

    `recovered` has the blocks that were refitted; None where no recovery was asked for.
    """

    per_linear: tuple[LinearReport, ...]
    seconds: dict[str, float]
    peak_memory_bytes: int
    recovered: tuple[RecoveredBlock, ...] | None = None

    @property
    def sparsity(self) -> float:
        """Overall fraction of zeros among the prunable weights, as counted in the written weights."""
        return sum(r.n_zeros for r in self.per_linear) / sum(r.size for r in self.per_linear)

    def recovery_errors(self) -> tuple[float, float]:
        """The mean errors of the recovered blocks before and after; there is one at least."""
        blocks = self.recovered or ()
        return float(np.mean([b.error_before for b in blocks])), float(np.mean([b.error_after for b in blocks]))

    def block_sparsity(self, n_blocks: int) -> Floats:
        zeros, sizes = np.zeros(n_blocks), np.zeros(n_blocks)
        for r in self.per_linear:
            zeros[r.block] += r.n_zeros
            sizes[r.block] += r.size
        return zeros / sizes

    def to_dict(self) -> dict[str, Any]:
        return {
            "per_linear": [asdict(r) | {"sparsity": r.sparsity} for r in self.per_linear],
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak_memory_bytes,
            **({"recovered": [asdict(r) for r in self.recovered]} if self.recovered is not None else {}),
        }


@dataclass(frozen=True)
class Metric:
    """A number and the protocol under which it was measured; nan only with a `reason`.

    `stderr` in the unit of the value, where the number is a mean over items; a `secondary` number is kept, and is in no table.
    `window_nll` (n_windows,): of a perplexity, the mean NLL of each window in nats per token, in the order of the text.
    """

    value: float
    protocol: dict[str, Any]
    reason: str | None = None
    stderr: float | None = None
    secondary: bool = False
    window_nll: list[float] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) and self.reason is None:
            raise ValueError(f"a metric must be finite or say why it is not: {self.value} under {self.protocol}")

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {"value": self.value if self.reason is None else None, "protocol": self.protocol}
        given = {
            "reason": self.reason,
            "stderr": self.stderr,
            "secondary": self.secondary or None,
            "window_nll": self.window_nll,
        }
        return out | {name: value for name, value in given.items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls(**data | {"value": math.nan if data["value"] is None else data["value"]})


class Metrics(dict[str, Metric]):
    """Metrics by name, `<dataset>/<metric>`."""

    def to_dict(self) -> dict[str, Any]:
        return {name: metric.to_dict() for name, metric in self.items()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        return cls({name: Metric.from_dict(metric) for name, metric in data.items()})

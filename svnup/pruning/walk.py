"""Prune a model block by block with a pruner, which sees one weight matrix at a time."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from svnup import distributed
from svnup.memory import peak_memory, synchronize
from svnup.model.blocks import StopForward
from svnup.model.language_model import LanguageModel, Visit
from svnup.model.linears import Linear, expert_of, matrix, routed_to_all, watched
from svnup.progress import stage
from svnup.pruning.masks import all_finite, n_zeros
from svnup.pruning.packed import apply_masks, save_masks
from svnup.types import LinearReport, PruneReport, RecoveredBlock, SparsityProfile

logger = logging.getLogger(__name__)
__all__ = ["Inputs", "Pruner", "Recovery", "apply_masks", "prune_model", "pruned_weights", "save_masks", "temporarily_pruned"]
ERROR_TOKENS = 2048
Total = Callable[[Tensor], Tensor]  # a tensor as its sum over the processes of a job, in place


class Pruner(Protocol):
    """Zeroes weights of one matrix (d_out, d_in), given statistics of its inputs; a frozen dataclass of its options.

    A pruner that takes more memory for a matrix than eight float32 copies has a method `workspace(d_out, d_in) -> bytes`, and
    one that does more with it than scores and a mask, or with a Hessian SparseGPT's update, `work(d_out, d_in, sparsity)`: a
    `svnup.machines.Work`, beside that of its `base` if it has one.
    Statistics may have an attribute `fallback`, which says how pruning deviated from what was asked; None if it did not; and a
    method `add_up(total)`, which makes statistics of all text of those of its parts, of which each process of a job has read
    one: `total(tensor)` is the sum over all of them. Without it each process reads all of the text.

    Attributes:
        needs_inputs: whether it reads statistics of inputs.
        prunes: False only for the control that keeps all weights.
    """

    needs_inputs: ClassVar[bool]
    prunes: ClassVar[bool]

    @property
    def pattern(self) -> str:
        """Where zeros may be: unstructured, N:M or mixed:M."""
        ...

    def new_stats(self, weight: Tensor) -> Any:
        """Empty statistics of the inputs of a matrix (d_out, d_in); linear layers that read the same input share them."""
        ...

    def observe(self, stats: Any, x: Tensor) -> None:
        """Add inputs (tokens, d_in) to statistics."""
        ...

    def prune(self, weight: Tensor, stats: Any, sparsity: float) -> Tensor:
        """The pruned matrix, of the same shape and dtype; the weights themselves at sparsity 0.

        Args:
            weight: (d_out, d_in).
            stats: the statistics after all calibration text; None if the pruner needs none.
            sparsity: fraction of zeros, in [0, 1].

        Raises:
            ValueError: the matrix cannot be pruned, such as for a Hessian without a factor.
        """
        ...


class Refits(Protocol):
    """Refits the blocks of one model, which a walk prunes one after the other."""

    def advance(self, visit: Visit) -> None:
        """See the visited block while it is dense."""
        ...

    def refit(self, visit: Visit) -> RecoveredBlock:
        """Change the kept weights of the visited block, which is pruned, before it is run for the next one.

        Raises:
            ValueError: it cannot be refitted.
        """
        ...


class Recovery(Protocol):
    """What is done to a block after it is pruned; a frozen dataclass of its options."""

    @property
    def batch_tokens(self) -> int | None:
        """Tokens of a micro-batch of the walk; None for as many as ever."""
        ...

    @property
    def n_passes(self) -> int:
        """Forward passes of the blocks over the calibration text that it takes, a backward one counted as two; 0: it does
        nothing."""
        ...

    def beside(self, lm: LanguageModel, tokens: np.ndarray | Tensor) -> Refits | None:
        """What refits the blocks of a model that is about to be pruned, with calibration tokens; None does nothing."""
        ...


def workspace(pruner: Pruner, d_out: int, d_in: int) -> int:
    """Bytes that pruning a matrix (d_out, d_in) takes beside the matrix and its statistics."""
    own = getattr(pruner, "workspace", None)
    return own(d_out, d_in) if own is not None else 8 * d_out * d_in * 4


def adds_up(pruner: Pruner) -> bool:
    """Whether statistics of parts of a text make those of all of it, so that processes can share it out."""
    base = getattr(pruner, "base", None)
    own = pruner.needs_inputs and hasattr(pruner.new_stats(torch.zeros(1, 1)), "add_up")
    return own and (base is None or not base.needs_inputs or adds_up(base))


class Inputs:
    """Statistics and first tokens of the inputs of a block's linear layers, once per distinct input.

    An expert reads the tokens that are routed to it. Where these are fewer than the inputs of a matrix, so that the outputs on
    them do not determine it, the matrix gets the statistics of all tokens that enter the experts, as if all were routed to this
    expert; where the experts' module takes no routes, those of uncorrelated inputs of equal size. `fallback` says so.

    Args:
        linears: the linear layers of the block by name.
        pruner: makes the statistics.
        n_first: how many of the first tokens to keep; the experts of a block share this number.
    """

    def __init__(self, linears: dict[str, Linear], pruner: Pruner, n_first: int = ERROR_TOKENS) -> None:
        self._linears, self._pruner, self._n_first = linears, pruner, n_first
        self._experts = {name: expert for name, m in linears.items() if (expert := expert_of(name, m)) is not None}
        self._n_first_of_expert = n_first // max(1, len(set(self._experts.values())))
        self._reads: dict[str, str] = {}  # linear layer -> the first one that reads the same input
        self._stats: dict[str, Any] = {}
        self._first: dict[str, Tensor] = {}
        self._n_tokens: dict[str, int] = {}  # that were routed to an expert
        self._fallbacks: dict[str, str] = {}
        self._current: list[tuple[str, Tensor]] = []
        self._calls, self._n_calls = 0, 0  # of linear layers: in this batch so far, in a run of the block

    def reads(self, name: str) -> str:
        """The first linear layer that reads the same input."""
        return self._reads[name]

    def stats(self, name: str) -> Any:
        """The statistics of a linear layer's inputs."""
        return self._stats[self._reads[name]]

    def first_tokens(self, name: str) -> Tensor:
        """The first inputs of a linear layer, (at most n_first, d_in)."""
        return self._first[self._reads[name]]

    def fallback(self, name: str) -> str | None:
        """How the statistics of a linear layer, or the pruning by them, deviate from what was asked; None if they do not."""
        said = (self._fallbacks.get(name), getattr(self.stats(name), "fallback", None))
        return "; ".join(text for text in said if text is not None) or None

    @property
    def short_of_tokens(self) -> list[str]:
        """The linear layers of experts that saw fewer tokens than they have inputs."""
        return list(self._fallbacks)

    def collect(self, visit: Visit, advance: bool) -> None:
        """Run the visited block on its inputs and gather the statistics.

        Args:
            visit: the block.
            advance: keep the outputs as inputs of the next block; if not, the block is run only up to its last linear layer.

        Raises:
            ValueError: a linear layer is never called, or those of one name of no expert; or experts multiply otherwise than
                their parameters say.
        """
        self._observe(visit, advance and not self._experts)
        if visit.shared:
            self._add_up(self._linears)
        seen = {self._kind(name) for name in self._reads}  # an expert may well get no token, but not all of them
        if unseen := {name for name in self._linears if self._kind(name) not in seen}:
            raise ValueError(f"block {visit.index}: no input ever reached {sorted(unseen)}")
        if self._experts:
            self._complete(visit, advance)

    def _add_up(self, names: Iterable[str]) -> None:
        """Add up what all processes have seen of these linear layers, each in its share of the text."""
        for reads in distributed.gathered(self._reads):
            self._reads = reads | self._reads  # experts, which no token of this share may have reached
        leaders = [name for name in self._linears if name in names and self._reads.get(name) == name]
        counts = distributed.total(np.array([self._n_tokens.get(name, 0) for name in leaders]))
        for name, n_tokens in zip(leaders, counts, strict=True):
            if n_tokens == 0:  # in none of them
                continue
            weight, self._n_tokens[name] = matrix(self._linears[name]), int(n_tokens)
            if name not in self._stats:
                self._stats[name], self._first[name] = self._pruner.new_stats(weight), weight.new_zeros(0, weight.shape[1])
            self._stats[name].add_up(distributed.added)

    def _kind(self, name: str) -> str:
        """The name of a linear layer, without the number of its expert."""
        return re.sub(r"\.\d+\b", "", name) if name in self._experts else name

    def _observe(self, visit: Visit, advance: bool) -> None:
        names = {module: name for name, module in self._linears.items() if isinstance(module, torch.nn.Module)}
        # Modules are seen where they are called; what is none, or is multiplied without a call (Mamba), in torch's products.
        watch = len(names) < len(self._linears) or visit.lm.has_others(visit.index)
        stop_early = not advance and not watch  # experts are called as often as tokens are routed to them
        called: set[str] = set()  # and not yet left

        def see(module: Any, args: Any) -> None:
            if watch:
                called.add(names[module])
            self._see(names[module], args[0])
            self._calls += 1
            if self._calls == self._n_calls and stop_early:
                self._next_batch()
                raise StopForward

        def leave(module: Any, args: Any, out: Any) -> None:
            called.discard(names[module])

        def multiplied(name: str, rows: Tensor) -> None:
            if name not in called:
                self._reads[name] = name
                self._observe_rows(name, rows)

        hooks = [m.register_forward_pre_hook(see) for m in names]
        if watch:
            hooks += [m.register_forward_hook(leave) for m in names]
        hooks.append(visit.block.register_forward_hook(lambda *_: self._next_batch()))
        try:
            with watched(self._linears, multiplied) if watch else nullcontext():
                visit.run(advance)
        finally:
            for hook in hooks:
                hook.remove()

    def _complete(self, visit: Visit, advance: bool) -> None:
        """Give experts that saw too few tokens other statistics, and run the block once more where it has to be."""
        few = {}
        for name in self._experts:
            n_tokens, d_in = self._n_tokens.get(self._reads.get(name, name), 0), matrix(self._linears[name]).shape[1]
            if n_tokens < d_in:
                few[name] = f"{n_tokens} tokens were routed to this expert, fewer than the {d_in} inputs"
        if not few:
            if advance:
                visit.run(advance)
            return
        for name in few:
            for known in (self._stats, self._first, self._n_tokens):
                known.pop(name, None)
            self._reads[name] = name
        with routed_to_all({name: self._linears[name] for name in few}, self._observe_rows):
            visit.run(advance)
        if visit.shared:
            self._add_up(few)
        for name, reason in few.items():
            rule = "all tokens that enter the experts"
            if name not in self._stats:
                rule = "uncorrelated inputs of equal size"
                for x in _unit_inputs(matrix(self._linears[name])):
                    self._observe_rows(name, x)
            self._fallbacks[name] = f"{reason}; pruned by the statistics of {rule}"

    def _next_batch(self) -> None:
        self._n_calls, self._calls = self._calls, 0
        self._current.clear()

    def _see(self, name: str, x: Tensor) -> None:
        leader = next((other for other, seen in self._current if seen is x), name)
        assert self._reads.setdefault(name, leader) == leader, f"{name} changed its input between batches"
        if leader != name:
            return
        self._current.append((name, x))
        self._observe_rows(name, x.reshape(-1, x.shape[-1]))

    def _observe_rows(self, name: str, rows: Tensor) -> None:
        n_first = self._n_first_of_expert if name in self._experts else self._n_first
        if name not in self._stats:
            self._stats[name] = self._pruner.new_stats(matrix(self._linears[name]))
            self._first[name] = rows[:n_first].clone()
        elif name in self._experts and len(self._first[name]) < n_first:
            self._first[name] = torch.cat([self._first[name], rows[: n_first - len(self._first[name])]])
        self._n_tokens[name] = self._n_tokens.get(name, 0) + len(rows)
        self._pruner.observe(self._stats[name], rows)


def _unit_inputs(weight: Tensor) -> Iterator[Tensor]:
    """One input (tokens, d_in) for each of the inputs of a matrix, which is 1 while the others are 0."""
    d_in = weight.shape[1]
    for start in range(0, d_in, ERROR_TOKENS):
        places = torch.arange(start, min(start + ERROR_TOKENS, d_in), device=weight.device)
        yield torch.nn.functional.one_hot(places, d_in).to(weight.dtype)


@torch.no_grad()
def prune_model(
    lm: LanguageModel,
    profile: SparsityProfile,
    pruner: Pruner,
    tokens: np.ndarray | Tensor,
    recovery: Recovery | None = None,
    told: str = "pruning",
) -> PruneReport:
    """Prune a model in place, block after block; the statistics of a block are taken behind pruned blocks.

    Args:
        lm: the model; changed.
        profile: the sparsity of each block, or of its linear layers.
        pruner: prunes each matrix.
        tokens: calibration text, int64 (n_seq, seq_len); unused if neither pruner nor recovery needs inputs.
        recovery: is applied to each block once it is pruned, before the next one is; zeros stay zeros.
        told: name of the stage where its progress is shown.

    Returns:
        Zeros, reconstruction error and time of each linear layer.

    Raises:
        ValueError: the profile does not fit the model; or, with the name of the linear layer, a factorisation fails, a weight
            becomes nan or infinite, or the number of zeros is not that of the rounding rule; or a block cannot be refitted.
    """
    check_profile(lm, profile)
    refits = recovery.beside(lm, tokens) if recovery is not None else None
    key = _key(profile, pruner, recovery if refits is not None else None, tokens) if lm.offloaded else ""
    clock = {"inputs": 0.0, "prune": 0.0} | ({} if refits is None else {"recovery": 0.0})
    start = time.perf_counter()
    reports: list[LinearReport] = []
    recovered: list[RecoveredBlock] = []
    size = recovery.batch_tokens if recovery is not None else None
    shared = refits is None and 1 < distributed.n_processes() <= len(tokens) and adds_up(pruner)
    own = tokens[distributed.share(len(tokens))] if shared else tokens
    batches = lm.entering(own, size) if pruner.needs_inputs or refits is not None else []
    with stage(told, lm.n_blocks, "blocks") as advance:
        for visit in lm.walk(batches, shared=shared):
            if refits is not None:
                with _timed(clock, "recovery"):
                    refits.advance(visit)
            note = lm.restore_block(visit.index, key)
            if note is None:
                of_block, refitted = _prune_block(visit, profile, pruner, clock), None
                if refits is not None and any(profile.levels(visit.index)):
                    with _timed(clock, "recovery"):
                        refitted = refits.refit(visit)
                for p in lm.linear_parameters(visit.index).values():  # GPUs may round, and train, each in its own way
                    distributed.as_first(p.data)
                if refitted is not None:
                    of_block = [replace(report, n_zeros=_n_zeros(visit.linears[report.name].weight)) for report in of_block]
                made = {"linears": [asdict(report) for report in of_block], "recovered": refitted and asdict(refitted)}
                lm.store_block(visit.index, key, json.dumps(made))
            else:  # pruned by a process that was interrupted
                made = json.loads(note)
                of_block = [LinearReport(**report) for report in made["linears"]]
                refitted = made["recovered"] and RecoveredBlock(**made["recovered"])
            reports += of_block
            recovered += [refitted] if refitted else []
            errors = [report.error for report in of_block if report.error is not None]
            advance(1, **{"error": sum(errors) / len(errors)} if errors else {})
    total = time.perf_counter() - start
    seconds = clock | {"rerun": total - sum(clock.values()), "total": total}
    return PruneReport(tuple(reports), seconds, peak_memory(lm.device), tuple(recovered) if refits is not None else None)


def check_profile(lm: LanguageModel, profile: SparsityProfile) -> None:
    """Raise ValueError if a profile does not have the blocks and linear layers of this model."""
    if len(profile.sparsity) != lm.n_blocks:
        raise ValueError(f"a profile of {len(profile.sparsity)} blocks cannot prune {lm.n_blocks} blocks")
    for index, shares in enumerate(profile.linears or ()):
        if {name: share.size for name, share in shares.items()} != _sizes(lm, index):
            raise ValueError(f"a profile of linear layers {list(shares)} cannot prune block {index} with {_sizes(lm, index)}")


def _sizes(lm: LanguageModel, index: int) -> dict[str, int]:
    return {name: linear.weight.numel() for name, linear in lm.linears(index).items()}


def _prune_block(
    visit: Visit, profile: SparsityProfile, pruner: Pruner, clock: dict[str, float], errors: bool = True
) -> list[LinearReport]:
    sparsity = {name: profile.of(visit.index, name) for name in visit.linears}
    if not any(sparsity.values()):  # the block stays dense, and no statistics are needed
        if pruner.needs_inputs:
            with _timed(clock, "inputs"):
                visit.run(advance=True)
        return [_kept(visit, name, 0.0 if pruner.needs_inputs else None) for name in visit.linears]
    inputs = Inputs(visit.linears, pruner)
    if pruner.needs_inputs:
        with _timed(clock, "inputs"):  # a block that stays as it is need not run twice
            inputs.collect(visit, advance=not pruner.prunes)
    if short := inputs.short_of_tokens:
        logger.warning(
            "block %d: %d matrices of experts saw fewer tokens than they have inputs, such as %s; they are pruned by the "
            "statistics of more; for all by their own, use more calibration text (dataset.n_seq)",
            visit.index,
            len(short),
            short[0],
        )
    with _timed(clock, "prune"):
        return [_prune_linear(visit, name, pruner, inputs, sparsity[name], errors) for name in visit.linears]


def _kept(visit: Visit, name: str, error: float | None) -> LinearReport:
    weight = visit.linears[name].weight
    return LinearReport(visit.index, name, _n_zeros(weight), weight.numel(), error, 0.0)


def _key(profile: SparsityProfile, pruner: Pruner, recovery: Recovery | None, tokens: np.ndarray | Tensor) -> str:
    """Identifies the pruning that made a stored block."""
    text = json.dumps([profile.to_dict(), repr(pruner), repr(recovery), list(tokens.shape)])
    return hashlib.sha256(text.encode() + np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()


@contextmanager
def temporarily_pruned(
    lm: LanguageModel, profile: SparsityProfile, pruner: Pruner, tokens: np.ndarray | Tensor
) -> Iterator[PruneReport]:
    """Context in which the model is pruned; afterwards it has its former weights.

    Its progress is that of a trial pruning. Args and Raises as `prune_model`; also raises ValueError if the model is
    offloaded, since both versions are in memory.
    """
    with _weights_restored(lm, range(lm.n_blocks)):
        yield prune_model(lm, profile, pruner, tokens, told="trial pruning")


@contextmanager
def block_pruned(visit: Visit, profile: SparsityProfile, pruner: Pruner) -> Iterator[None]:
    """Context in which the visited block is pruned as by `prune_model`; the walk goes on with the outputs of the pruned block.

    Behind the last block that the profile prunes, calibration inputs are no longer needed, and the batches of the walk are
    cleared. Raises ValueError as `prune_model` and `temporarily_pruned`.
    """
    last = max((index for index in range(visit.lm.n_blocks) if any(profile.levels(index))), default=-1)
    if visit.index > last:
        visit.batches.clear()
    with _weights_restored(visit.lm, [visit.index]):
        _prune_block(visit, profile, pruner, {"inputs": 0.0, "prune": 0.0}, errors=False)
        if visit.index == last:
            visit.batches.clear()
        elif not visit.advanced:
            visit.run(advance=True)
        yield


@contextmanager
def _weights_restored(lm: LanguageModel, blocks: Iterable[int]) -> Iterator[None]:
    """Context after which the linear layers of these blocks have their former weights."""
    if lm.offloaded:
        raise ValueError("offload: pruned and dense weights do not fit side by side; use offload=none")
    parameters = [p for index in blocks for p in lm.linear_parameters(index).values()]
    with torch.inference_mode(False):  # gradients cannot pass tensors of inference mode
        dense = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        for p, weight in zip(parameters, dense, strict=True):
            p.data = weight


def pruned_weights(
    lm: LanguageModel, profile: SparsityProfile, pruner: Pruner, tokens: np.ndarray | Tensor
) -> list[dict[str, Tensor]]:
    """The pruned weights of each block by parameter name; the model keeps its own. Args and Raises as `temporarily_pruned`."""
    with temporarily_pruned(lm, profile, pruner, tokens):
        return [{name: p.data for name, p in lm.linear_parameters(i).items()} for i in range(lm.n_blocks)]


def _prune_linear(visit: Visit, name: str, pruner: Pruner, inputs: Inputs, sparsity: float, errors: bool) -> LinearReport:
    start = time.perf_counter()
    weight, full_name = matrix(visit.linears[name]), f"block {visit.index}, {name}"
    zeros_before = _n_zeros(weight)
    try:
        pruned = pruner.prune(weight, inputs.stats(name) if pruner.needs_inputs else None, sparsity)
    except ValueError as error:
        raise ValueError(f"stage pruning: {full_name}: {error}") from error
    if not all_finite(pruned):
        raise ValueError(f"stage pruning: {full_name}: the pruned weights are not all finite")
    error_ratio = None
    if errors and pruner.needs_inputs:
        first = inputs.first_tokens(name)
        error_ratio = _error(first, weight, pruned) if len(first) else None
    weight.copy_(pruned)
    zeros, asked = _n_zeros(weight), n_zeros(sparsity, weight.numel())
    # More zeros than asked: kept weights were zero before, or too small for the dtype after an update. Fewer zeros are a bug.
    if pruner.prunes and not asked <= zeros <= asked + zeros_before + weight.numel() // 1000:
        raise ValueError(f"stage pruning: {full_name}: {zeros} zeros where {asked} were asked for")
    fallback = inputs.fallback(name) if pruner.needs_inputs else None
    if fallback is not None and name not in inputs.short_of_tokens:
        logger.warning("%s: %s", full_name, fallback)
    return LinearReport(visit.index, name, zeros, weight.numel(), error_ratio, time.perf_counter() - start, fallback)


def _n_zeros(weight: Tensor) -> int:
    return weight.numel() - int(weight.count_nonzero())


def _error(x: Tensor, weight: Tensor, pruned: Tensor) -> float:
    """Reconstruction error ||X (W - W')^T||^2 / ||X W^T||^2 on inputs X (tokens, d_in); 0 if the dense output is zero.

    In float32, or in float64 if squares exceed the range of float32; it is not finite only if inputs or weights are not.
    """
    before, error = _squares(x.float(), weight.float()), _squares(x.float(), (weight - pruned).float())
    if not (before.isfinite() and error.isfinite()):
        before, error = _squares(x.double(), weight.double()), _squares(x.double(), weight.double() - pruned.double())
    return float(error / before) if before != 0 else 0.0


def _squares(x: Tensor, weight: Tensor) -> Tensor:
    return (x @ weight.T).square().sum()


@contextmanager
def _timed(clock: dict[str, float], name: str) -> Iterator[None]:
    synchronize()
    start = time.perf_counter()
    yield
    synchronize()
    clock[name] += time.perf_counter() - start

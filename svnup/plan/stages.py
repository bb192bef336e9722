"""The stages of a job before it runs: what each does, and the memory it takes on the device and on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, cast

import torch

from svnup import distributed
from svnup.allocation import Chooser
from svnup.allocation.rounds import ShapleyMargins
from svnup.game.coalition_game import TOGETHER, state_bytes
from svnup.game.layer_game import planned_walk
from svnup.game.walk_plan import WalkPlan
from svnup.machines import HERE, Machine, Work
from svnup.memory import resident
from svnup.model.language_model import BATCH_TOKENS, HEAD_TOKENS, LanguageModel, pick_device
from svnup.model.linears import Linear, expert_of, matrix
from svnup.plan.counting import Pass, count_pass, count_statistics, routed
from svnup.pruning.advance import MAX_BYTES
from svnup.pruning.walk import ERROR_TOKENS, Pruner, adds_up, workspace
from svnup.shapley import block_forwards
from svnup.types import CHOICES, Bools, Offload

if TYPE_CHECKING:
    from svnup.config import Job
    from svnup.data import TokenSource

FLOAT = 4
# Bytes that pruning moves for each weight of a matrix, as measured (experiments/benchmarks/pruning_cost.py).
SELECTION = 220  # scores, the k-th of them, and a mask
SORTING = 380  # more where a GPU sorts the rows of a matrix
COLUMNS = 60  # the columns of a block one after the other, in caches for the most part
CHECKS = 60  # zeros before and after, finite, copied into the model
CALLS_OF_COLUMN = 1.5
CALLS_OF_BLOCK = 30  # of columns on a GPU, whose host waits for the mask of each
# Seconds of a column of the kernel that prunes a block of them on a GPU: it waits for the columns before. As measured
# (results/benchmarks/gpu.md): 1.5 microseconds of 4,096 rows, 2.5 of 11,008.
COLUMN_OF_KERNEL = 2e-6


@dataclass(frozen=True)
class Stage:
    """One stage of a job.

    Args:
        name: as in the result's `stages`.
        steps: what it does, by a name for each part.
        device: bytes at the peak on the device; on a CPU those of the process.
        host: the same on the host of a GPU; 0 where the device is the CPU.
    """

    name: str
    steps: Mapping[str, Work]
    device: float
    host: float = 0.0

    @property
    def work(self) -> Work:
        return sum(self.steps.values(), Work())


@dataclass(frozen=True)
class Plan:
    """What a job will cost.

    Args:
        counts: of its blocks, weights and evaluations, by name.
        weights: bytes of the model.
        stages: in their order.
        machine: by whose rates times are estimated.
        not_counted: what takes time that no stage here has.
        walk: the order in which a game walks its coalitions, and why; None without a game.
        processes: that share the job; what is planned is the work of one of them, the most that one has.
    """

    counts: Mapping[str, int]
    weights: float
    stages: tuple[Stage, ...]
    machine: Machine
    not_counted: tuple[str, ...] = ()
    walk: str | None = None
    processes: int = 1

    @property
    def work(self) -> Work:
        return sum((stage.work for stage in self.stages), Work())

    @property
    def peak(self) -> float:
        """Bytes on the device at the peak, about; on a CPU those of the process, with Python and its libraries."""
        return max(stage.device for stage in self.stages)

    @property
    def host_peak(self) -> float:
        """Bytes on the host of a GPU at the peak, about; 0 where the device is the CPU."""
        return max(stage.host for stage in self.stages)

    def seconds(self, stage: str | None = None) -> tuple[float, float]:
        """The least and the most seconds of a stage, or of all."""
        spans = [self.machine.seconds(one.work) for one in self.stages if stage in (None, one.name)]
        return sum(low for low, _ in spans), sum(high for _, high in spans)


def plan(job: Job, machine: Machine | None = None) -> Plan:
    """The plan of a job; without a machine by the rates of the one that the job names."""
    return JobCounts(job, machine or machine_of(job)).plan()


def machine_of(job: Job) -> Machine:
    """The machine that a job names, measured if it is this one; raises ValueError where it has not the device of the job."""
    given, machine = job.model.device, job.machine
    if job.hardware != HERE:
        if given != "auto" and given.partition(":")[0] != machine.device:
            kind = "GPU" if machine.device == "cuda" else "CPU"
            raise ValueError(
                f"model.device={given}: hardware={job.hardware} is a {kind}; use model.device={machine.device}, or auto"
            )
        if machine.tf32 and torch.get_float32_matmul_precision() != "highest":
            machine = replace(machine, float32=machine.tf32)
        return machine if machine.process is not None else replace(machine, process=float(resident()))
    return _measured(tuple(vars(machine).items()), pick_device(given).type, dtype_of(job))


@cache
def _measured(rates: tuple[tuple[str, object], ...], device: str, dtype: str) -> Machine:
    return Machine(**dict(rates)).filled(device, dtype)  # type: ignore[arg-type]


def dtype_of(job: Job) -> str:
    """The dtype that the weights of a job's model will have."""
    given = job.model.dtype
    kept = job.skeleton.model.config.dtype if given == "auto" else getattr(torch, given)
    return str(kept or torch.float32).removeprefix("torch.")


def power_of_two(n_bytes: int) -> int:
    """The least power of two that is not less: torch's pinned memory comes in such pieces."""
    return 1 << (n_bytes - 1).bit_length()


@dataclass(frozen=True)
class JobCounts:
    """The work of the steps of a job on one kind of device, and the bytes that they take.

    Args:
        processes: that share the job.
    """

    job: Job
    machine: Machine
    processes: int = field(default_factory=distributed.n_started)
    _passes: dict[tuple[int, int], Pass] = field(default_factory=dict)
    _known: dict[tuple[str, tuple[int, ...], torch.dtype, int], tuple[Work, int]] = field(default_factory=dict)

    def plan(self) -> Plan:
        """The stages with their peaks, and what was counted for them."""
        counts = {"blocks": self.lm.n_blocks, "prunable weights": int(self.lm.block_params.sum())}
        if left := self.lm.left_alone():
            counts["weights of blocks that are not pruned"] = sum(left.values())
        counts |= self._counts()
        of_a_shard = (self._loading, self._scores)
        of_all = (self._loading, self._dense, self._scores, self._allocation, self._pruning, self._evaluation)
        stages = [stage() for stage in (of_all if self.job.shard is None else of_a_shard)]
        walk = self._game[1] if self.job.shapley is not None else None
        found = tuple(s for s in stages if s is not None)
        return Plan(counts, self.weights, found, self.machine, self._not_counted(), walk, self.processes)

    # -- shapes

    @cached_property
    def lm(self) -> LanguageModel:
        """The model without weights, in the dtype that they will have."""
        lm = self.job.skeleton
        lm.model.to(getattr(torch, dtype_of(self.job)))  # on the meta device, where this costs nothing
        return lm

    @property
    def offload(self) -> Offload:
        return self.job.offload

    @property
    def _gpu(self) -> bool:
        return self.machine.device == "cuda"

    @cached_property
    def _size(self) -> int:
        size: int = getattr(torch, self.lm.dtype).itemsize
        return size

    @cached_property
    def _width(self) -> int:
        return int(self.lm.model.config.get_text_config().hidden_size)

    @cached_property
    def weights(self) -> int:
        """Bytes of the model."""
        return sum(p.numel() * p.element_size() for p in self.lm.model.parameters())

    @cached_property
    def _in_blocks(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.lm.blocks.parameters())

    @cached_property
    def _largest_block(self) -> int:
        sizes: list[int] = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in self.lm.blocks]
        return max(sizes)

    def _batch(self, n_seq: int, seq_len: int) -> tuple[int, int]:
        """Sequences of a micro-batch, and their length."""
        return max(1, min(n_seq, BATCH_TOKENS[self.machine.device or "cpu"] // seq_len)), seq_len

    def _pass(self, n_seq: int, seq_len: int) -> Pass:
        key = self._batch(n_seq, seq_len)
        if key not in self._passes:
            self._passes[key] = count_pass(self.lm, *key)
        return self._passes[key]

    # -- work

    def through(self, n_seq: int, seq_len: int) -> Work:
        """All blocks on a text."""
        return self._pass(n_seq, seq_len).through(n_seq * seq_len)

    def head(self, n_tokens: float) -> Work:
        """The losses of the next tokens: the head, and a softmax in float32 over the vocabulary."""
        vocabulary = self.lm.vocab_size
        moved = n_tokens * vocabulary * (2 * self._size + 4 * FLOAT)
        return Work({self.lm.dtype: 2.0 * self._width * vocabulary * n_tokens}, moved=moved, calls=12 * n_tokens / HEAD_TOKENS)

    def judged(self) -> Work:
        """All blocks and the head on the texts that a job is judged by, and the blocks loaded once for each."""
        out = Work()
        for source in self.job.evaluation.sources().values():
            n_seq, seq_len = source.tokens(self.job.model.tokenizer).shape
            n_batches = math.ceil(n_seq / self._batch(n_seq, seq_len)[0])
            part = self._most(n_batches) / n_batches
            text = self.through(n_seq, seq_len) + self.head(n_seq * seq_len) + self._parked(n_seq * seq_len, 2)
            out += text * part + self.loaded(1)
        return out

    def _most(self, n: int) -> int:
        """The most of n things that one process has."""
        return math.ceil(n / self.processes)

    def _part(self, pruner: Pruner) -> float:
        """The most of the calibration text that one process reads for the statistics of a pruner."""
        n_seq = self.job.dataset.n_seq or 0
        shared = 1 < self.processes <= n_seq and self.job.recovery.n_passes == 0 and adds_up(pruner)
        return self._most(n_seq) / n_seq if shared else 1.0

    def loaded(self, times: float) -> Work:
        """Offloaded blocks, each loaded to the device so many times."""
        if not self._waits:
            return Work()
        n_bytes = times * self._in_blocks
        if self.offload == "disk":
            return Work(uploaded=n_bytes * self._gpu, read=n_bytes)
        return Work(sent=n_bytes * self._gpu)

    def _hidden(self, n_tokens: int) -> int:
        """Bytes of the hidden states of a text at one depth."""
        return n_tokens * self._width * self._size

    def _parked(self, n_tokens: int, times: float) -> Work:
        """Hidden states of a text that wait off the device, read or written so many times at each block."""
        if not self._waits:
            return Work()
        n_bytes = times * self.lm.n_blocks * self._hidden(n_tokens)
        return Work(copied=n_bytes * self._gpu, read=n_bytes * (self.offload == "disk"))

    @property
    def _waits(self) -> bool:
        """Whether blocks wait elsewhere: on a CPU `offload=cpu` is where they are anyway."""
        return self.offload == "disk" or (self.offload == "cpu" and self._gpu)

    def fingerprint(self) -> Work:
        """Every weight hashed once, which names what is cached: from the device, or in the host's memory if it waits there."""
        on_disk = self.offload == "disk"
        here = self.weights - self._in_blocks * (self._waits and not on_disk)
        return Work(read=self.weights, copied=here * self._gpu) + (self.loaded(1) if on_disk else Work())

    def pruning(self, pruner: Pruner, errors: bool = True) -> dict[str, Work]:
        """One pruning of the whole model, by its steps."""
        n_seq, seq_len = (self.job.dataset.n_seq or 0), self.job.dataset.seq_len
        n_tokens, steps = n_seq * seq_len, dict[str, Work]()
        if pruner.needs_inputs and n_tokens:
            passes, part = 2 - 1 / self.lm.n_blocks if pruner.prunes else 1, self._part(pruner)
            steps["passes"] = (self.through(n_seq, seq_len) * passes + self._parked(n_tokens, 3)) * part
            steps["statistics"] = self._statistics(pruner, n_seq, seq_len) * part
            steps["factorisation"] = self._factorisation(pruner)
        steps["selection and update"] = self._selection(pruner) if pruner.prunes else Work()
        first = min(ERROR_TOKENS, n_tokens) if errors and pruner.needs_inputs else 0
        checked = sum(self._routed(name, m) * m.weight.numel() for _, name, m in self._linears)
        steps["errors and checks"] = Work({"float32": 4.0 * first * checked}, moved=CHECKS * checked)
        steps["passes"] = steps.get("passes", Work()) + self.loaded(2)  # and written
        return {name: work for name, work in steps.items() if work.flop or work.n_bytes}

    @cached_property
    def _linears(self) -> list[tuple[int, str, Linear]]:
        return [(i, name, m) for i in range(self.lm.n_blocks) for name, m in self.lm.linears(i).items()]

    def _leaders(self, n_seq: int, seq_len: int) -> list[tuple[int, str, Linear]]:
        """The linear layers that read an input of their own, or the first one that reads it."""
        reads = self._pass(n_seq, seq_len).reads
        return [(i, name, m) for i, name, m in self._linears if reads[i].get(name, name) == name]

    def _routed(self, name: str, linear: Linear) -> float:
        """The share of the tokens that a linear layer reads."""
        return routed(self.lm) if expert_of(name, linear) is not None else 1.0

    def _statistics(self, pruner: Pruner, n_seq: int, seq_len: int) -> Work:
        rows, length = self._batch(n_seq, seq_len)
        out = Work()
        for _, name, linear in self._leaders(n_seq, seq_len):
            work, _ = self._observed(pruner, linear, rows * length)
            out += work * (self._routed(name, linear) * n_seq / rows)
        return out

    def _observed(self, pruner: Pruner, linear: Linear, n_tokens: int) -> tuple[Work, int]:
        """What a pruner does to observe so many inputs of a linear layer, and the bytes of its statistics."""
        key = (repr(pruner), tuple(matrix(linear).shape), linear.weight.dtype, n_tokens)
        if key not in self._known:
            weight = torch.empty(key[1], dtype=key[2], device="meta")
            self._known[key] = count_statistics(pruner, weight, n_tokens)
        return self._known[key]

    def _has_hessian(self, pruner: Pruner, linear: Linear) -> bool:
        return self._observed(pruner, linear, 1)[1] >= FLOAT * matrix(linear).shape[1] ** 2

    def _factorisation(self, pruner: Pruner) -> Work:
        """A Cholesky factor and its inverse of each Hessian, n^3 / 3 and n^3 operations."""
        out = Work()
        for _, _, linear in self._leaders(self.job.dataset.n_seq or 0, self.job.dataset.seq_len):
            if self._has_hessian(pruner, linear):
                d_in = matrix(linear).shape[1]
                out += Work(solved=4 / 3 * d_in**3, moved=12 * FLOAT * d_in**2, calls=20)
        return out

    def _selection(self, pruner: Pruner) -> Work:
        out, known = Work(), dict[tuple[int, ...], Work]()
        for _, _, linear in self._linears:
            shape = tuple(matrix(linear).shape)
            if shape not in known:
                known[shape] = self._work_of_prune(pruner, linear)
            out += known[shape]
        return out

    def _work_of_prune(self, pruner: Pruner, linear: Linear) -> Work:
        """What pruning one matrix does beyond a factorisation, which layers share: as the pruner says, if it does.

        If not: scores and a mask, and with a Hessian the update of the columns to the right, column after column; on a GPU one
        kernel prunes a block of them.
        """
        d_out, d_in = matrix(linear).shape
        own = getattr(pruner, "work", None)
        if own is not None:
            out: Work = own(d_out, d_in, self.job.sparsity)
            base = getattr(pruner, "base", None)
            return out if base is None else out + self._work_of_prune(base, linear)
        if not self._has_hessian(pruner, linear):
            return Work(moved=(SELECTION + SORTING * self._gpu) * d_out * d_in, calls=30)
        columns = Work({"float32": 1.0 * d_out * d_in**2}, moved=(SELECTION + COLUMNS) * d_out * d_in)
        if self._gpu:
            return columns + Work(stalls=CALLS_OF_BLOCK / 128 * d_in, chained=COLUMN_OF_KERNEL * d_in)
        return columns + Work(calls=CALLS_OF_COLUMN * d_in)

    def game(self, coalitions: Bools) -> tuple[WalkPlan, str, Work]:
        """The walk of the job's game over coalitions, its order and the reason in words, and what it does.

        Of several processes each walks neighbours among the coalitions.
        """
        coalitions = coalitions[: self._most(len(coalitions))]
        scorer = self.job.shapley
        assert scorer is not None
        data, players = scorer.game.data, scorer.game.n_players(self.lm.n_blocks)
        n_seq, seq_len = (data.n_seq or 0) * (CHOICES if scorer.game.payoff == "accuracy" else 1), data.seq_len
        held = self._held(self._hidden(n_seq * seq_len))
        walk, order = planned_walk(coalitions, scorer.game.absence == "prune", held, self._waits)
        forwards = walk.n_block_forwards / players  # of all blocks
        work = self.through(n_seq, seq_len) * forwards + self.head(n_seq * seq_len) * walk.n_evaluations
        return walk, order, work + self.loaded(walk.n_loads / players)

    @cached_property
    def _game(self) -> tuple[WalkPlan, str, Work]:
        assert self.job.shapley is not None
        return self.game(self.job.shapley.shard_coalitions(self.lm.n_blocks))

    def _held(self, per_state: float) -> int:
        """How many hidden states a walk may hold, as `max_states` has it; at least 2."""
        known = self.machine.memory if self._gpu else None
        free = max(0.0, known - self._model_here) if known is not None else None
        return max(2, int(state_bytes(free) // max(1, per_state)))

    def whole(self, n_seq: int, seq_len: int) -> Work:
        """All blocks and the head on a text."""
        return self.through(n_seq, seq_len) + self.head(n_seq * seq_len)

    def later_rounds(self) -> dict[str, Work]:
        """The games of an allocator in models that it prunes, with both prunings of each."""
        scorer, needs = self.job.shapley, self.job.allocator.needs
        if scorer is None or not needs.n_games:
            return {}
        data, again = scorer.game.data, scorer.estimator.plan(scorer.game.n_players(self.lm.n_blocks))
        forwards = block_forwards(again, absent_costs=True) / scorer.game.n_players(self.lm.n_blocks)
        text = (data.n_seq or 0, data.seq_len)
        game = self.through(*text) * forwards + self.head(text[0] * text[1]) * len(again) + self.fingerprint()
        pruned = sum(self.pruning(self.job.pruner, errors=False).values(), Work())
        return {"games of later rounds": game * needs.n_games, "pruning for them": pruned * (2 * needs.n_games)}

    def margins(self) -> tuple[dict[str, Work], float]:
        """The rounds of an allocator by values at the margin: their work by step, and the bytes that they hold at most."""
        job, rounds = self.job, self.job.allocator
        if not isinstance(rounds, ShapleyMargins):
            return {}, 0.0
        assert job.selection is not None
        payoff = (min(rounds.n_seq, rounds.data.n_seq or rounds.n_seq), rounds.data.seq_len)
        n_seq, seq_len = job.selection.tokens(job.model.tokenizer).shape
        pruned, again = self.pruning(job.pruner, errors=False), rounds.rounds if rounds.refresh else 1
        selection = pruned.pop("selection and update", Work())
        statistics = sum(pruned.values(), Work()) * (1 if rounds.refresh else 0.5)  # of the dense model: one pass, not two
        n_bytes = int(self.lm.block_params.sum()) * self._size
        state = self._hidden(math.prod(payoff))
        n_batches = math.ceil(payoff[0] / self._batch(*payoff)[0])
        groups = math.ceil((self.lm.n_blocks + 1) / self._held(state))  # that memory asks for
        groups = math.ceil(n_batches / max(1, n_batches // groups))  # of whole micro-batches, as `margins._together`
        times = 2 if 2 * n_bytes <= MAX_BYTES else 4 * rounds.nodes * groups  # both versions of a block, there and back
        value = self.through(*payoff) * 4 + self.head(math.prod(payoff)) * 3  # forward, once more, and backward
        trial = self.whole(min(rounds.trial_n_seq or n_seq, n_seq), seq_len)
        steps = {
            "statistics in advance": statistics * again,
            "weights in advance": selection * (rounds.rounds * (times + rounds.refresh)),
            "values at the margin": value * (rounds.rounds * rounds.nodes),
            "trials of rounds": (trial + selection) * rounds.rounds,
        }
        largest = int(self.lm.block_params.max())
        held: float = min(3 * rounds.rounds * n_bytes, MAX_BYTES)
        held += self._statistics_bytes(of_all=True) if job.pruner.needs_inputs else 0
        held += state * min(self.lm.n_blocks + 1, self._held(state)) + largest * (2 * self._size + 3 * FLOAT) + self._judging
        return {name: work for name, work in steps.items() if work.flop or work.n_bytes}, held

    def losses(self) -> Work:
        """The losses on selection text that an allocator asks for, at most."""
        job, needs = self.job, self.job.allocator.needs
        if not needs.selection:
            return Work()
        assert job.selection is not None
        count = cast(Chooser, job.allocator).n_losses(job.budget(self.lm))
        n_seq, seq_len = job.selection.tokens(job.model.tokenizer).shape
        pruned = self.pruning(job.pruner, errors=False)
        statistics = sum((pruned.pop(name, Work()) for name in ("passes", "statistics", "factorisation")), Work())
        if needs.once:  # by statistics of the dense model, in one pass
            statistics = statistics * 0.5
        out = self.whole(n_seq, seq_len) * count + sum(pruned.values(), Work()) * count
        return out + statistics * (1 if needs.once else count) + self.fingerprint()

    # -- stages

    def _loading(self) -> Stage:
        kept = self.weights - (self._in_blocks if self.offload == "disk" else 0)
        moved = self.weights - (self._in_blocks if self._waits else 0)
        pinned = self._in_blocks * (self._waits and self.offload == "cpu")
        work = Work(read=kept, copied=moved * self._gpu, uploaded=pinned)
        return self._stage("load", {"weights": work}, 0.0, waiting=0, host=kept)

    def _dense(self) -> Stage | None:
        if not self._is_judged:
            return None
        checks = self.loaded(2)  # a few tokens through all blocks, twice
        steps = {"weights hashed": self.fingerprint() + checks, "text": self.judged()}
        return self._stage("dense", steps, self._judging, self._judged_states)

    def _evaluation(self) -> Stage | None:
        if not self._is_judged:
            return None
        return self._stage("evaluation", {"text": self.judged()}, self._judging, self._judged_states)

    @property
    def _is_judged(self) -> bool:
        return bool(self.job.evaluation.sources())

    def _scores(self) -> Stage | None:
        job, steps = self.job, dict[str, Work]()
        if job.scorer is None:
            return None
        if (data := getattr(job.scorer, "data", None)) is not None:
            return self._coalitions_of_experts(data)
        if job.shapley is None:  # a walk over the dense model, with a score of every weight
            n_seq, seq_len = job.dataset.n_seq or 0, job.dataset.seq_len
            read = job.calibrates and job.scorer.needs_inputs
            steps["passes"] = self.through(n_seq, seq_len) + self._parked(n_seq * seq_len, 2) if read else Work()
            steps["passes"] += self.loaded(1)
            n_weights = int(self.lm.block_params.sum())
            steps["scores"] = Work(moved=SELECTION * n_weights) if read else self._spectra()
            held = self._states * self._states_stay + self._activations + 2 * int(self.lm.block_params.max()) * FLOAT
            return self._stage("scores", steps, held)
        if job.game_prunes:
            steps["pruned blocks"] = sum(self.pruning(job.shapley.game.pruner, errors=False).values(), Work())
        walk, _, steps["coalitions"] = self._game
        data = job.shapley.game.data
        whole = self.whole(data.n_seq or 0, data.seq_len)
        steps["coalitions"] += whole * (job.shapley.game.payoff in ("kl", "recip_ppl"))
        steps["weights hashed"] = self.fingerprint()
        batch, beside = self._batch(data.n_seq or 0, data.seq_len), 0
        if backward := job.shapley.n_backward:  # with the forward, which is repeated block by block
            loads = 2 * backward * math.ceil((data.n_seq or 0) / batch[0])
            steps["backward passes"] = whole * (4 * backward) + self.loaded(loads)
            beside = (self.lm.n_blocks + 1) * self._hidden(math.prod(batch)) + 2 * self._activations
        replacements = int(self.lm.block_params.sum()) * self._size * (2 if job.allocator.needs.n_games else job.game_prunes)
        payoff = job.shapley.game.payoff
        n_states = walk.peak_states + (payoff in ("kl", "recip_ppl"))  # those of the dense model
        n_tokens = (data.n_seq or 0) * data.seq_len * (CHOICES if payoff == "accuracy" else 1)
        states = max(n_states * self._hidden(n_tokens), beside)
        return self._stage("scores", steps, states + replacements + self._judging)

    def _scores_cost(self) -> dict[str, int]:
        """What scores cost that are no values of a layer game: by the model where the number of its blocks is not enough."""
        scorer = self.job.scorer
        assert scorer is not None
        plan_of = getattr(scorer, "plan_of", None)
        return scorer.plan(self.lm.n_blocks) if plan_of is None else plan_of(self.lm)

    def _coalitions_of_experts(self, data: TokenSource) -> Stage:
        """Games of experts: a coalition is run on the payoff text from its block on, and shares nothing with others."""
        cost, n_seq = self._scores_cost(), data.n_seq or 0
        part = self._most(cost["evaluations"]) / cost["evaluations"]
        through = self.through(n_seq, data.seq_len) * (cost["block_forwards"] / self.lm.n_blocks)
        work = through + self.head(n_seq * data.seq_len) * cost["evaluations"]
        together = TOGETHER if self._waits else 1
        steps = {
            "coalitions": work * part + self.loaded(cost["block_forwards"] / self.lm.n_blocks / together),
            "weights hashed": self.fingerprint(),
        }
        return self._stage("scores", steps, (together + 3) * self._hidden(n_seq * data.seq_len) + self._judging)

    def _spectra(self) -> Work:
        """Singular values of every matrix, by which a scorer that reads no text judges: some 4 n^2 m operations each."""
        shapes = [sorted(matrix(m).shape) for _, _, m in self._linears]
        return Work(solved=sum(4.0 * short**2 * long for short, long in shapes))

    def _allocation(self) -> Stage | None:
        job, steps, needs = self.job, dict[str, Work](), self.job.allocator.needs
        if needs.selection:
            steps["losses on selection text"] = self.losses()
        steps |= self.later_rounds()
        margins, held_by_margins = self.margins()
        steps |= margins
        if job.split.trial:
            steps["trial pruning"] = sum(self.pruning(job.pruner).values(), Work())
        elif job.split.needs_inputs:
            steps["passes"] = self.through(job.dataset.n_seq or 0, job.dataset.seq_len)
        if needs.calibration:
            steps["trials on calibration text"] = self._trials_of_calibration()
        if not steps:
            return None
        held = self._pruning_bytes + int(self.lm.block_params.sum()) * self._size * (job.split.trial or bool(needs.n_games))
        if needs.selection:
            tuning = self._tuning_states()
            held = max(held, tuning + max(self._pruning_bytes - self._states + self._largest_block, self._judging))
        held = max(held, held_by_margins)
        return self._stage("allocation", steps, held)

    def _trials_of_calibration(self) -> Work:
        """Prunings by the calibration text whose inputs of linear layers are read before and after, at most on all of it."""
        job = self.job
        count, share = cast(Chooser, job.allocator).n_losses(job.budget(self.lm)), 1.0
        n_seq = job.dataset.n_seq or 0
        if n_seq:
            share = min(1.0, job.allocator.needs.calibration / n_seq)
        steps = self.pruning(job.pruner, errors=False)
        text = steps.pop("passes", Work()) + steps.pop("statistics", Work())
        text += self.through(n_seq, job.dataset.seq_len) * 2  # the norms of inputs, dense and pruned
        return (text * share + sum(steps.values(), Work())) * count

    def _pruning(self) -> Stage:
        steps, held = self.pruning(self.job.pruner), self._pruning_bytes
        if n_passes := self.job.recovery.n_passes:
            steps["recovery"] = self.through(self.job.dataset.n_seq or 0, self.job.dataset.seq_len) * n_passes
            masters = 4 * FLOAT * int(self.lm.block_params.max())  # with their gradients and both moments of AdamW
            own = 3 * self._states * self._states_stay + 3 * self._activations + masters + self._largest_block
            held = max(held, own)
        sets = 3 if n_passes else 1  # with the outputs and inputs of the dense model
        return self._stage("pruning", steps, held, sets * self._waiting_states)

    def _not_counted(self) -> tuple[str, ...]:
        return ("lm-eval's tasks",) if self.job.evaluation.needs_whole_model else ()

    def _counts(self) -> dict[str, int]:
        job, needs, out = self.job, self.job.allocator.needs, dict[str, int]()
        if (needs.selection or needs.calibration) and job.shard is None:
            out["tuning evaluations"] = cast(Chooser, job.allocator).n_losses(job.budget(self.lm))
        if job.shapley is not None:
            out |= {f"shapley {k.replace('_', ' ')}": v for k, v in job.shapley.counts(self._game[0]).items()}
        elif job.scorer is not None:
            out |= {f"scores' {k.replace('_', ' ')}": v for k, v in self._scores_cost().items()}
        if job.shapley is not None and needs.n_games and job.shard is None:
            again = job.shapley.estimator.plan(job.shapley.game.n_players(self.lm.n_blocks))
            out["evaluations of later rounds"] = needs.n_games * len(again)
            out["block forwards of later rounds"] = needs.n_games * block_forwards(again, absent_costs=True)
        return out

    # -- memory

    def _stage(self, name: str, steps: Mapping[str, Work], held: float, waiting: int | None = None, host: float = 0.0) -> Stage:
        """A stage that holds so many bytes beside the model.

        Args:
            name: of the stage.
            steps: its work.
            held: bytes on the device.
            waiting: those of the hidden states that `offload=cpu` keeps on a GPU's host; None: those of the calibration text.
            host: bytes of the model on that host, where they are more than usual.
        """
        process, here = self.machine.process or 0.0, self._model_here
        if not self._gpu:
            return Stage(name, steps, process + here + held)
        states = self._waiting_states if waiting is None else waiting
        usual = {"none": 0, "cpu": self.weights + states, "disk": self._largest_block + self._pinned_block}[self.offload]
        return Stage(name, steps, here + held, process + max(host, usual))

    @cached_property
    def _model_here(self) -> int:
        """Bytes of the model that are on the device at a time."""
        if not self._waits:
            return self.weights
        return self.weights - self._in_blocks + 2 * self._largest_block  # one is read or written, or comes ahead

    @cached_property
    def _states(self) -> int:
        """Hidden states of the calibration text."""
        n_tokens = (self.job.dataset.n_seq or 0) * self.job.dataset.seq_len
        return int(self._hidden(n_tokens) * self._part(self.job.pruner)) if self.job.calibrates else 0

    @cached_property
    def _pinned_block(self) -> int:
        """The most bytes of pinned memory that a block takes on its way from a disk to a GPU."""
        return max(sum(power_of_two(p.numel() * p.element_size()) for p in block.parameters()) for block in self.lm.blocks)

    @cached_property
    def _waiting_states(self) -> int:
        """Those of the calibration text, in pinned memory."""
        if not self.job.calibrates:
            return 0
        n_seq = math.ceil((self.job.dataset.n_seq or 0) * self._part(self.job.pruner))
        return self._pinned(n_seq, self.job.dataset.seq_len)

    def _pinned(self, n_seq: int, seq_len: int) -> int:
        """Bytes of the hidden states of a text in torch's pinned memory, of which a micro-batch takes a power of two."""
        rows, _ = self._batch(n_seq, seq_len)
        return math.ceil(n_seq / rows) * power_of_two(self._hidden(rows * seq_len))

    @cached_property
    def _judged_states(self) -> int:
        """Those of the longest text that a job is judged by, of which a process has its share."""
        shapes = [source.tokens(self.job.model.tokenizer).shape for source in self.job.evaluation.sources().values()]
        return max((self._pinned(self._most(n_seq), seq_len) for n_seq, seq_len in shapes), default=0)

    @property
    def _states_stay(self) -> bool:
        """Whether they are on the device: where blocks and states wait takes the same memory, unless that is a disk."""
        return self.offload == "none" or (self.offload == "cpu" and not self._gpu)

    @cached_property
    def _activations(self) -> int:
        texts = [(s.n_seq or 2**31, s.seq_len) for s in self.job.sources().values()]
        return max((self._pass(*text).activations for text in texts), default=0)

    @cached_property
    def _judging(self) -> float:
        """A micro-batch in blocks, and logits of its tokens in float32, thrice."""
        batches = [math.prod(self._batch(s.n_seq or 2**31, s.seq_len)) for s in self.job.sources().values()]
        return self._activations + 3 * min(HEAD_TOKENS, max(batches, default=0)) * self.lm.vocab_size * FLOAT

    @cached_property
    def _pruning_bytes(self) -> float:
        statistics = self._statistics_bytes() if self.job.pruner.needs_inputs else 0
        shapes = {tuple(matrix(m).shape) for _, _, m in self._linears}
        solving = max(workspace(self.job.pruner, *shape) for shape in shapes)
        return self._states * self._states_stay + self._activations + statistics + solving

    def _statistics_bytes(self, of_all: bool = False) -> int:
        """What a pruner gathers for a block, with the first tokens of each distinct input; or for all, without these."""
        n_tokens = (self.job.dataset.n_seq or 0) * self.job.dataset.seq_len
        totals, largest = [0] * self.lm.n_blocks, [0] * self.lm.n_blocks
        n_experts = [len({expert_of(n, m) for n, m in self.lm.linears(i).items()} - {None}) for i in range(self.lm.n_blocks)]
        for index, name, linear in self._leaders(self.job.dataset.n_seq or 0, self.job.dataset.seq_len):
            gathered, d_in = self._observed(self.job.pruner, linear, 1)[1], matrix(linear).shape[1]
            share = n_experts[index] if expert_of(name, linear) is not None else 1
            hessian = gathered >= FLOAT * d_in**2
            totals[index] += gathered * (2 if hessian else 1)  # a Hessian is kept with its factor
            largest[index] = max(largest[index], gathered * hessian)
            totals[index] += 0 if of_all else min(ERROR_TOKENS, n_tokens) // share * d_in * self._size
        return (
            sum(totals) if of_all else max(total - own for total, own in zip(totals, largest, strict=True))
        )  # which are in `workspace`

    def _tuning_states(self) -> float:
        job, needs = self.job, self.job.allocator.needs
        assert job.selection is not None
        read = self._hidden(job.selection.tokens(job.model.tokenizer).size)
        per_state = read + self._states * job.pruner.needs_inputs
        return per_state * (2 if needs.once else min(self.lm.n_blocks + 1, self._held(per_state)))

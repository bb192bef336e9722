"""What a profile costs on held-out text, or moves on calibration text, by which allocators that try profiles choose one."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svnup import NUMBERS_VERSION, distributed
from svnup.allocation.margins import marginal_values
from svnup.allocation.splits import Split
from svnup.data import TokenSource, tokens_sha256
from svnup.game.coalition_game import max_states
from svnup.game.walk_plan import WalkPlan
from svnup.memo import Memo
from svnup.model.language_model import LanguageModel, MicroBatch, Visit
from svnup.naming import identity
from svnup.progress import stage
from svnup.pruning.advance import PrunedInAdvance, pruned_in_passing
from svnup.pruning.walk import Inputs, Pruner, block_pruned, check_profile, pruned_weights, temporarily_pruned
from svnup.pruning.wanda import Wanda
from svnup.scoring.shapley import ShapleyScorer
from svnup.types import Floats, Ints, SelectionLoss, SparsityProfile

logger = logging.getLogger(__name__)


class Trial:
    """What a profile costs: the loss in nats per token, on selection text, of the model pruned by it.

    The losses are those of `prune_model` and `LanguageModel.nll` (or `token_kl`), bit for bit; one that is not finite is
    infinite. Asked for `n_seq`, a loss is that of the first sequences only; one `in_advance` is that of weights pruned by
    statistics of the dense model (`PrunedInAdvance`): one forward pass and no calibration. All are kept under `cache_dir`, by
    model, text, profile and how it is pruned: jobs of a sweep share them and a killed one goes on. Nothing is read before it
    is asked for.

    Profiles that are asked for together are walked depth first: blocks that they begin with in common are pruned and run once,
    and one block at a time is not dense.

    Args:
        split: divides the budgets of a profile's blocks among their linear layers, before it is pruned.
        calibration: text that the pruner and the split read, int64 (n_seq, seq_len).
        selection: the text of the losses.
        payoff: the text of marginal values; needed for these alone.
        shapley: estimates values in pruned models; needed for their Shapley values alone.
        kind: `nll`, the mean negative log-likelihood of the next token; `kl`, the mean divergence KL(dense || pruned) of the
            predictions, with the dense model's last hidden states kept.
        state_bytes: that hidden states at the inputs of blocks take at most (None: as in a game), beyond which they are
            computed again.

    Raises:
        ValueError: when asked, where a block cannot be pruned, and where the model is offloaded.
    """

    def __init__(
        self,
        lm: LanguageModel,
        pruner: Pruner,
        split: Split,
        calibration: Ints,
        selection: TokenSource | None,
        cache_dir: str | Path,
        *,
        payoff: TokenSource | None = None,
        shapley: ShapleyScorer | None = None,
        kind: SelectionLoss = "nll",
        state_bytes: int | None = None,
    ) -> None:
        self._lm, self._pruner, self._split, self._calibration = lm, pruner, split, calibration
        self._selection, self._payoff, self._shapley = selection, payoff, shapley
        self._cache_dir, self._state_bytes = cache_dir, state_bytes
        self._kind, self._dense_states = kind, dict[int, list[MicroBatch]]()  # by the number of sequences
        self._calls: list[dict[str, Any]] = []
        self._rounds: list[dict[str, Any]] = []
        self._aligned: list[dict[str, Any]] = []
        self._n_aligned = 0  # sequences that misalignments are measured on
        self._targets: set[float] = set()
        self._kinds: set[str] = set()  # of device, on which losses were measured
        self._n_new, self._seconds = 0, 0.0
        self._n_calibration, self._n_selection = 0, 0.0  # block-forwards
        self._n_payoff = 0  # sequences through a backward pass
        self._taken: str | None = None
        self._behind: SparsityProfile | None = None

    @cached_property
    def _tokens(self) -> Ints:
        assert self._selection is not None
        return self._selection.tokens(self._lm.tokenizer)

    @cached_property
    def _memo(self) -> Memo:
        calibration, tokens = map(tokens_sha256, (self._calibration, self._tokens))
        how = f"{identity(self._pruner)} {identity(self._split)} {calibration} {NUMBERS_VERSION}"
        kind = [] if self._kind == "nll" else [self._kind]
        text = json.dumps([self._lm.fingerprint(), how, tokens, list(self._tokens.shape), *kind])
        folder = Path(self._cache_dir) / "losses" / hashlib.sha256(text.encode()).hexdigest()[:32]
        return Memo(folder, self._lm.device.type)

    @cached_property
    def _in_advance(self) -> PrunedInAdvance:
        return PrunedInAdvance(self._lm, self._pruner, self._calibration, behind=self._behind)

    def calibrate_behind(self, profile: SparsityProfile) -> None:
        """From now on take the statistics of what is pruned in advance behind blocks that are pruned by a profile."""
        self._behind = self._divide(profile)
        self.__dict__.pop("_in_advance", None)

    @property
    def _statistics(self) -> dict[str, Any]:
        """What tells these statistics from those of the dense model."""
        return {} if self._behind is None else {"behind": _key(self._behind, {})}

    def _divide(self, profile: SparsityProfile) -> SparsityProfile:
        return self._split.divide(self._lm, profile, self._pruner, self._calibration)

    def loss(self, profile: SparsityProfile, label: str = "", n_seq: int | None = None, in_advance: bool = False) -> float:
        """The loss of a profile; `label` says what is tried."""
        return self.losses([(label, profile)], n_seq, in_advance)[0]

    def losses(
        self,
        tried: Sequence[tuple[str, SparsityProfile]],
        n_seq: int | None = None,
        in_advance: bool = False,
        keep: bool = True,
    ) -> list[float]:
        """The losses of labelled profiles, in their order; unless `keep`, statistics of one block at a time are held."""
        start = time.perf_counter()
        tokens = self._tokens[:n_seq]
        part: dict[str, Any] = {"n_seq": len(tokens)} if len(tokens) < len(self._tokens) else {}
        part |= {"trial": True, **self._statistics} if in_advance else {}
        keys = [_key(profile, part) for _, profile in tried]
        new = {key: profile for key, (_, profile) in zip(keys, tried, strict=True)}

        def measure(missing: list[str]) -> None:
            before = self._lm.n_block_runs
            divided = [self._divide(new[key]) for key in missing]
            for profile in divided:
                check_profile(self._lm, profile)
            if in_advance and not keep:
                self._measure_in_passing(missing, divided, tokens)
            else:
                self._measure(missing, divided, tokens, in_advance)
            self._n_calibration += self._lm.n_block_runs - before

        with self._counted():
            self._memo.share(new, measure, "losses on selection text")
        losses = [self._memo.values[key] for key in keys]
        if not (kinds := {self._memo.kinds[key] for key in keys}) <= self._kinds:
            self._kinds |= kinds
            if len(self._kinds) > 1:
                logger.warning("the losses on selection text are of several kinds of device: %s", sorted(self._kinds))
        for (label, profile), loss in zip(tried, losses, strict=True):
            logger.info("%s: loss %.4f on %d sequences of the selection text", label or "tried", loss, len(tokens))
            told = {name: value for name, value in part.items() if name != "behind"}
            self._calls.append({"label": label, "loss": loss if math.isfinite(loss) else None} | told)
            self._targets.add(round(profile.target, 9))
        self._seconds += time.perf_counter() - start
        return losses

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count what the block does in all processes of the job."""
        before = self._counts
        yield
        if distributed.n_processes() > 1:
            counts = before + distributed.total(self._counts - before)
            self._n_new, self._n_calibration, self._n_payoff = map(int, counts[:3])
            self._n_selection = float(counts[3])

    @property
    def _counts(self) -> Floats:
        return np.array([self._n_new, self._n_calibration, self._n_payoff, self._n_selection], dtype=np.float64)

    def took(self, label: str) -> None:
        """Put on record which of the labelled profiles was taken."""
        self._taken = label

    def shapley_values(self, denser: SparsityProfile, sparser: SparsityProfile) -> Floats:
        """Shapley values (n_units,) where a present block or sublayer is pruned by `denser` and an absent one by `sparser`."""
        assert self._shapley is not None
        start, before = time.perf_counter(), self._lm.n_block_runs
        present, absent = self._divide(denser), self._divide(sparser)
        replacements = pruned_weights(self._lm, absent, self._pruner, self._calibration)
        with temporarily_pruned(self._lm, present, self._pruner, self._calibration):
            found = self._shapley.reestimate(self._lm, replacements, str(self._cache_dir))
        self._n_calibration += self._lm.n_block_runs - before
        self._seconds += time.perf_counter() - start
        self._rounds.append(found.to_dict())
        return found.per_unit(len(denser.sparsity)).values

    def marginal_values(
        self, denser: SparsityProfile, sparser: SparsityProfile, first: int, n_seq: int, nodes: int = 1
    ) -> Floats:
        """Aumann-Shapley values (n_units,) of what has a budget of its own, by weights pruned in advance: a present part is
        pruned by `denser`, an absent one by `sparser`, and the payoff is minus this loss on `n_seq` sequences of the payoff
        text, from number `first` on, round its end. Kept under `cache_dir`, as losses are."""
        assert self._payoff is not None
        start, text = time.perf_counter(), self._payoff.tokens(self._lm.tokenizer)
        tokens = text.take(range(first, first + min(n_seq, len(text))), axis=0, mode="wrap")
        digest: dict[str, Any] = {
            "tokens": tokens_sha256(tokens),
            "nodes": nodes,
            "sparser": _key(sparser, {}),
            **self._statistics,
        }
        parts = self._lm.budget_units(self._lm.granularity_of(denser.params))

        def measure() -> Iterator[float]:
            present, absent = (partial(self._in_advance.block, profile=self._divide(p)) for p in (denser, sparser))
            before = self._lm.n_block_runs
            found = marginal_values(self._lm, present, absent, tokens, self._kind, nodes)
            self._n_calibration += self._lm.n_block_runs - before
            self._n_payoff += len(tokens) * nodes
            return (sum(found[index, linear] for linear in linears) for index, linears in parts)

        with self._counted():
            values = self._memo.together(_key(denser, digest), len(parts), measure, "marginal values")
        seconds = time.perf_counter() - start
        self._seconds += seconds
        self._rounds.append(
            {"method": "AumannShapley", "values": values.tolist(), "n_sequences": len(tokens), "seconds": seconds}
        )
        return values

    def misalignment(self, profile: SparsityProfile, label: str, n_seq: int) -> float:
        """How far pruning by a profile moves the inputs of linear layers, on the first `n_seq` calibration sequences.

        With a the norms (d_in,) over all tokens of the inputs of a linear layer in a dense block, and b those once the block is
        pruned, both behind blocks that are pruned, it is the sum over all linear layers of ||a / sum(a) - b / sum(b)|| / d_in.

        Source: the neuron alignment of arXiv 2411.07066, as its released code has it.
        """
        start, before, total = time.perf_counter(), self._lm.n_block_runs, 0.0
        tokens = self._calibration[:n_seq]
        divided = self._divide(profile)
        check_profile(self._lm, divided)
        with torch.inference_mode():
            for visit in self._lm.walk(tokens):
                if not any(divided.levels(visit.index)):
                    continue
                again = Visit(self._lm, visit.index, list(map(replace, visit.batches)))
                dense = _norms(visit)
                with block_pruned(visit, divided, self._pruner):
                    pruned = _norms(again)
                total += sum(float((dense[name] - b).norm()) / len(b) for name, b in pruned.items())
        found = total if math.isfinite(total) else math.inf
        logger.info("%s: misalignment %.4g on %d calibration sequences", label, found, len(tokens))
        self._aligned.append({"label": label, "loss": found if math.isfinite(found) else None})
        self._n_aligned = len(tokens)
        self._n_calibration += self._lm.n_block_runs - before
        self._seconds += time.perf_counter() - start
        return found

    @torch.inference_mode()
    def _measure(self, keys: list[str], profiles: list[SparsityProfile], tokens: Ints, in_advance: bool) -> None:
        lm = self._lm
        rows = [[profile.levels(index) for index in range(lm.n_blocks)] for profile in profiles]
        # The sparser first: of those that begin alike it then prunes farthest, and calibrates for the others as far as they go.
        order = sorted(range(len(rows)), key=rows.__getitem__, reverse=True)
        codes = {level: code for code, level in enumerate({level for row in rows for level in row})}
        calibrates = self._pruner.needs_inputs and not in_advance
        calibration = list(lm.micro_batches(self._calibration)) if calibrates else []
        selection = list(lm.micro_batches(tokens))
        held = max_states(lm, calibration + selection, self._state_bytes)
        steps = WalkPlan.of(np.array([[codes[level] for level in rows[i]] for i in order]), absent_costs=True, max_states=held)
        stack = {0: (calibration, selection)}
        with stage("profiles", len(profiles), "profiles") as advance:
            for i, start, kept in zip(order, steps.resume, steps.kept, strict=True):
                of_calibration, states = stack[start]
                stack = {depth: s for depth, s in stack.items() if kept >> depth & 1}
                inputs = list(map(replace, of_calibration))  # which the walk moves on
                for index, weights in self._blocks(profiles[i], inputs, start, in_advance):
                    states = [lm.run_block(index, batch, weights=weights) for batch in states]
                    if kept >> (index + 1) & 1:
                        stack[index + 1] = (list(map(replace, inputs)), states)
                    self._n_selection += len(tokens) / len(self._tokens)
                self._keep(keys[i], self._loss(states, selection))
                advance(1)

    @torch.inference_mode()
    def _measure_in_passing(self, keys: list[str], profiles: list[SparsityProfile], tokens: Ints) -> None:
        """By weights pruned in advance, in one pass over the calibration text, with states of every profile beside it."""
        lm = self._lm
        selection = list(lm.micro_batches(tokens))
        states = [selection for _ in profiles]
        for index, pruned in pruned_in_passing(lm, self._pruner, self._calibration):
            for i, profile in enumerate(profiles):
                weights = pruned(profile)
                states[i] = [lm.run_block(index, batch, weights=weights) for batch in states[i]]
                self._n_selection += len(tokens) / len(self._tokens)
        for key, of_profile in zip(keys, states, strict=True):
            self._keep(key, self._loss(of_profile, selection))

    def _keep(self, key: str, loss: float) -> None:
        self._memo.add(key, loss if math.isfinite(loss) else math.inf)
        self._n_new += 1

    def _blocks(
        self, profile: SparsityProfile, inputs: list[MicroBatch], start: int, in_advance: bool
    ) -> Iterator[tuple[int, dict[str, Tensor] | None]]:
        """Each block from `start` on with the weights to run it with; None: its own, which are pruned while it is run."""
        if in_advance:
            yield from ((index, self._in_advance.block(index, profile)) for index in range(start, self._lm.n_blocks))
            return
        for visit in self._lm.walk(inputs, start):
            with block_pruned(visit, profile, self._pruner):
                yield visit.index, None

    def _loss(self, states: list[MicroBatch], selection: list[MicroBatch]) -> float:
        """Of batches behind the last block; `selection` are the same before the first."""
        if self._kind == "kl":
            losses = list(map(self._lm.token_kl, states, self._dense(selection)))
        else:
            losses = list(map(self._lm.token_nll, states))
        return float(np.mean(torch.cat([loss.double().mean(1).cpu() for loss in losses]).numpy()))

    def _dense(self, selection: list[MicroBatch]) -> list[MicroBatch]:
        """The batches behind the last block of the dense model, outside the counts."""
        n_seq = sum(len(batch.tokens) for batch in selection)
        if n_seq not in self._dense_states:
            self._dense_states[n_seq] = [self._lm.run_blocks(batch) for batch in selection]
        return self._dense_states[n_seq]

    def to_dict(self) -> dict[str, Any] | None:
        """The whole curve, in the order in which it was asked for, and what it cost; None where nothing was tried.

        Losses on part of the text carry its `n_seq`, those by weights pruned in advance `trial`; `best` is the least of the
        others by the end of each label, none where profiles of different budgets were tried, of which none is best;
        `n_full_evaluations` weighs evaluations by their share of the text; `rounds` has the values of pruned models that were
        asked for, with the cost of their games; `taken` is the label of the profile that was taken, where one was compared with
        the uniform one. Block-forwards are those that were made, for what was new: a block on the whole
        text, or a share of one; with the calibration of rounds and of trial prunings.
        """
        if not self._calls:
            return self._misalignments() if self._aligned else None
        least, best = math.inf, {}
        for call in self._calls if len(self._targets) == 1 else []:
            if not {"n_seq", "trial"} & call.keys() and call["loss"] is not None:
                least = best[call["label"]] = min(least, call["loss"])
        n_read = sum(call.get("n_seq", len(self._tokens)) for call in self._calls)
        counts = {"n_evaluations": len(self._calls), "n_new_evaluations": self._n_new, "n_sequences": len(self._tokens)}
        return {
            "kind": self._kind,
            "curve": self._calls,
            "best": [{"label": label, "loss": loss} for label, loss in best.items()],
            **counts,
            "n_full_evaluations": n_read / len(self._tokens),
            "n_calibration_block_forwards": self._n_calibration,
            "n_selection_block_forwards": self._n_selection,
            **({"taken": self._taken} if self._taken is not None else {}),
            **({"n_payoff_sequences": self._n_payoff} if self._n_payoff else {}),
            "seconds": self._seconds,
            "kinds": sorted(self._kinds),
            **({"rounds": self._rounds} if self._rounds else {}),
        }

    def _misalignments(self) -> dict[str, Any]:
        """The same of misalignments, whose kind is `misalignment`."""
        counts = dict.fromkeys(("n_evaluations", "n_new_evaluations"), len(self._aligned))
        return {
            "kind": "misalignment",
            "curve": self._aligned,
            "best": [min(self._aligned, key=lambda tried: math.inf if tried["loss"] is None else tried["loss"])],
            **counts,
            "n_sequences": self._n_aligned,
            "n_calibration_block_forwards": self._n_calibration,
            "seconds": self._seconds,
        }


def _norms(visit: Visit) -> dict[str, Tensor]:
    """The norms of the inputs of each linear layer of a visited block over all tokens, as shares of their sum, (d_in,)."""
    inputs = Inputs(visit.linears, Wanda(), n_first=0)
    inputs.collect(visit, advance=False)
    norms = {name: inputs.stats(name).squares.sqrt().double() for name in visit.linears}
    return {name: a / (a.sum() if a.any() else 1) for name, a in norms.items()}


def _key(profile: SparsityProfile, part: dict[str, Any]) -> str:
    same = profile.to_dict() | {"sparsity": np.round(profile.sparsity, 12).tolist(), "requested": None} | part
    return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

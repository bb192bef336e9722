"""The layer game: blocks are players, and the payoff of a coalition is how well the model works with these blocks alone."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from svnup.game.coalition_game import TOGETHER, Cap, CoalitionGame, Payoff, max_states
from svnup.game.walk_plan import WalkPlan
from svnup.model.language_model import LanguageModel, MicroBatch, Unit
from svnup.progress import stage
from svnup.types import CHOICES, Bools, Floats, Players

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Player:
    """A block, or the attention or MLP of one.

    Args:
        block: index of the block.
        unit: the whole block, its attention or its MLP.
        absent: weights by parameter name that it computes with when absent; None skips it.
    """

    block: int
    unit: Unit
    absent: Weights | None


@dataclass(frozen=True)
class Replacements:
    """Pruned replacements of the blocks, with which absent blocks compute.

    Args:
        weights: for each block, pruned weights by parameter name.
        name: identifies them in the key of the game.
    """

    weights: list[Weights]
    name: str


class LayerGame(CoalitionGame):
    """A cooperative game on the blocks of a model; calling it maps coalitions, bool (m, n_players), to payoffs, float64 (m,).

    With NLL the mean over sequences of their mean NLL per token, in nats, the payoffs are

    - `neg_nll`: -NLL;
    - `neg_ppl`: -exp(NLL);
    - `recip_ppl`: exp(NLL of the full coalition - NLL);
    - `kl`: -KL(full coalition || coalition) of the predictions per token;
    - `accuracy`: how often the true ending of a sequence (its last quarter) is likelier than those of the next three.

    Coalitions are walked over shared prefixes: depth first, or, where blocks are offloaded, breadth first in groups. A payoff
    is computed once and kept in an append-only memo. A skipped block still passes on what later blocks read from it beside
    hidden states (Gemma 3n: shared keys and values).

    Args:
        lm: the model.
        tokens: payoff text, int64 (n_seq, seq_len).
        payoff: one of the above.
        cap: `chance` bounds payoffs from below by that of guessing.
        players: blocks, or `sublayer`: attention and MLP of each block, 2 n_blocks players in the order in which they run.
        pruned: for each block, pruned weights by parameter name: an absent player computes with these. None skips absent
            players (identity). Both versions stay in memory and nothing is copied.
        cache_dir: the folder of the memo; None keeps it in memory.
        state_bytes: bytes of hidden states of prefixes to keep; beyond them states are computed again.

    Attributes:
        n_evaluations: coalitions that this object has evaluated, with those of other processes of its job.
        n_block_forwards: block-forwards (or sublayer-forwards) that it took. Neither counts `v_empty`, nor the one forward of
            the full coalition that `kl` and `recip_ppl` need.
        key: changes with whatever changes a payoff.
        walk: the order in which new coalitions were walked, and why; None where none was new.

    Raises:
        ValueError: a loss is not finite, the blocks are offloaded and `pruned` is given, or the options do not fit the model.

    Source: arXiv 2505.01731 (blocks as players of a cooperative game); payoffs, caps and the pruned game are our choices.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokens: np.ndarray | Tensor,
        *,
        payoff: Payoff = "neg_nll",
        cap: Cap = "none",
        players: Players = "block",
        pruned: list[Weights] | Replacements | None = None,
        cache_dir: str | Path | None = None,
        state_bytes: int | None = None,
    ) -> None:
        tokens = torch.as_tensor(tokens)
        if pruned is not None and lm.offloaded:
            raise ValueError("offload: pruned blocks beside the dense ones need both in memory; use offload=none")
        if pruned is not None and not isinstance(pruned, Replacements):
            pruned = Replacements(pruned, _digest(pruned))
        self.absent_costs = pruned is not None
        self._players = _make_players(lm, players, pruned.weights if pruned is not None else None)
        self._state_bytes = state_bytes
        if payoff == "accuracy" and len(tokens) < CHOICES:
            raise ValueError(f"payoff=accuracy: needs at least {CHOICES} sequences, not {len(tokens)}; add more payoff text")
        name = pruned.name if pruned is not None else None
        super().__init__(lm, tokens, len(self._players), payoff, cap, cache_dir, pruned=name, players=players)
        self.walk: str | None = None

    @torch.inference_mode()
    def _walk(self, coalitions: Bools) -> int:
        """Evaluate distinct coalitions, in lexicographic order, as `WalkPlan` says; returns the number of block-forwards.

        An offloaded block is loaded once for as many coalitions as there is memory for their hidden states.
        """
        held, runs = max_states(self.lm, self._batches, self._state_bytes), self._runs_absent
        plan, self.walk = planned_walk(coalitions, runs, held, self.lm.offloaded)
        forwards = 0
        stack = {0: self._batches}
        with stage("coalitions", plan.n_evaluations, "coalitions") as advance:
            for group, start, kept in zip(plan.groups, plan.resume, plan.kept, strict=True):
                rows = coalitions[group]
                states = {rows[0, :start].tobytes(): stack[start]}  # by the prefix of the coalitions that have them
                stack = {depth: s for depth, s in stack.items() if kept >> depth & 1}
                for index in range(start, self.n_players):
                    for prefix, branch in groupby(rows, lambda row: row[:index].tobytes()):  # noqa: B023
                        before = states.pop(prefix)
                        for present in sorted({bool(row[index]) for row in branch}):
                            after = before
                            if present or runs[index]:
                                after = self._step(self._players[index], before, present)
                                forwards += 1
                            states[prefix + np.bool_(present).tobytes()] = after
                    if kept >> (index + 1) & 1:
                        stack[index + 1] = states[rows[-1, : index + 1].tobytes()]
                for row in rows:
                    self._memo.add(self._name(row), self._payoff_of(states.pop(row.tobytes()), self._name(row)))
                    advance(1)
        return forwards

    @property
    def _runs_absent(self) -> Bools:
        """Which players, bool (n_players,), are run when absent: pruned ones, and those whose state later blocks read."""
        writes = np.array([player.block in self.lm.writers for player in self._players])
        return writes | self.absent_costs

    def _step(self, player: Player, states: list[MicroBatch], present: bool) -> list[MicroBatch]:
        weights = None if present else player.absent
        out = [self.lm.run_block(player.block, batch, unit=player.unit, weights=weights) for batch in states]
        if present or player.absent is not None:
            return out
        return [replace(batch, state=o.state) for batch, o in zip(states, out, strict=True)]

    @cached_property
    def _states_of_all(self) -> list[MicroBatch]:
        """Outputs of the full coalition, the reference of `kl` and `recip_ppl`; not counted."""
        with torch.inference_mode():
            states = self._batches
            for player in self._players:
                states = self._step(player, states, present=True)
            return states

    # -- gates

    def gate_gradient(self, gate: float) -> Floats:
        """Derivative of the payoff by a gate g on each block, h + g (block(h) - h), float64 (n_players,).

        It takes one forward and one backward pass; activations are recomputed block by block. Kept as payoffs are.

        Args:
            gate: the value of all gates, in [0, 1].

        Raises:
            ValueError: the payoff is not a smooth function of the loss, players are sublayers or pruned when absent, or the
                model passes more between blocks than one residual stream.
        """
        if self.payoff not in ("neg_nll", "neg_ppl", "recip_ppl") or self.cap != "none":
            raise ValueError(
                f"payoff={self.payoff}, cap={self.cap}: gates need payoff=neg_nll, neg_ppl or recip_ppl and cap=none"
            )
        if self.absent_costs or self._players[0].unit != "block":
            raise ValueError("gates are defined for absence=skip and players=block; choose these, or another estimator")
        name = f"gate {gate!r}"
        return self._memo.together(name, self.n_players, lambda: self._measure_gates(gate), "gradients of this game")

    def _measure_gates(self, gate: float) -> Floats:
        total, n_sequences, nll = np.zeros(self.n_players), len(self.tokens), 0.0
        with torch.no_grad():
            batches = list(self.lm.micro_batches(self.tokens))
        if self.lm.writers or batches[0].hidden.ndim != 3:
            raise ValueError(
                f"{type(self.lm.model).__name__}: gates need one residual stream, and nothing else, between blocks; "
                "choose another estimator"
            )
        for batch in batches:
            loss, gradient = self._gate_gradient(batch, gate)
            total += gradient * len(batch.tokens) / n_sequences
            nll += loss * len(batch.tokens) / n_sequences
        if not (math.isfinite(nll) and np.isfinite(total).all()):
            raise ValueError(
                f"stage gates: the loss at gate {gate:g} is {nll} or its gradient not finite; try model.dtype=float32"
            )
        outer = {"neg_nll": -1.0, "neg_ppl": -math.exp(nll)}.get(self.payoff)
        return total * (-math.exp(self._nll_of_all - nll) if outer is None else outer)

    def _gate_gradient(self, batch: MicroBatch, gate: float) -> tuple[float, Floats]:
        states = [batch.hidden]
        with torch.no_grad():
            for index in range(self.n_players):
                update = self.lm.run_block(index, replace(batch, hidden=states[-1])).hidden - states[-1]
                states.append(states[-1] + gate * update)
        # The sum of the losses: gradients of their mean would vanish in float16. The head runs on one sequence at a time.
        last, losses, slopes = states.pop(), [], []
        for tokens, hidden in zip(batch.tokens.split(1), last.split(1), strict=True):
            with torch.enable_grad():
                hidden = hidden.detach().requires_grad_()
                loss = self.lm.token_nll(MicroBatch(tokens, hidden, [])).sum()
                slopes += torch.autograd.grad(loss, hidden)
            losses.append(loss.detach().double())
        slope, n_targets = torch.cat(slopes), batch.tokens[:, 1:].numel()
        gradient = np.zeros(self.n_players)
        for index in reversed(range(self.n_players)):
            with torch.enable_grad():
                hidden = states.pop().detach().requires_grad_()
                update = self.lm.run_block(index, replace(batch, hidden=hidden)).hidden - hidden
                gradient[index] = float((slope.double() * update.detach().double()).sum())
                (slope,) = torch.autograd.grad(hidden + gate * update, hidden, slope)
        return float(torch.stack(losses).sum()) / n_targets, gradient / n_targets


def _make_players(lm: LanguageModel, players: Players, pruned: list[Weights] | None) -> list[Player]:
    def absent(index: int, modules: dict[str, nn.Module] | None) -> Weights | None:
        if pruned is None or modules is None:
            return pruned[index] if pruned is not None else None
        return {name: w for name, w in pruned[index].items() if name.partition(".")[0] in modules}

    if players == "block":
        return [Player(i, "block", absent(i, None)) for i in range(lm.n_blocks)]
    made = []
    for index in range(lm.n_blocks):
        modules = lm.sublayers(index)
        made += [
            Player(index, "attention", absent(index, modules["attention"])),
            Player(index, "mlp", absent(index, modules["mlp"])),
        ]
    _check_sequential(lm)
    return made


@torch.inference_mode()
def _check_sequential(lm: LanguageModel) -> None:
    """Raise ValueError unless attention and then MLP give the output of the block; in parallel blocks they do not."""
    probe = torch.arange(16, device=lm.device).remainder(lm.vocab_size)[None]
    (batch,) = lm.micro_batches(probe)
    if lm.writers:
        raise ValueError(
            f"players=sublayer: block {min(lm.writers)} passes more than hidden states to later blocks; use players=block"
        )
    for index in range(lm.n_blocks):
        whole = lm.run_block(index, batch)
        try:
            halves = lm.run_block(index, lm.run_block(index, batch, unit="attention"), unit="mlp")
        except (RuntimeError, TypeError) as error:  # a block that needs more of a sublayer than its output
            raise ValueError(
                f"players=sublayer: block {index} cannot run without one of its sublayers ({error}); use players=block"
            ) from error
        expected, found = whole.hidden.float(), halves.hidden.float()
        if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise ValueError(f"players=sublayer: block {index} does not run attention, then MLP; use players=block")
        batch = whole


def _digest(pruned: list[Weights]) -> str:
    total = hashlib.sha256()
    for weights in pruned:
        for name, tensor in sorted(weights.items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def planned_walk(coalitions: Bools, runs_absent: bool | Bools, held: int, offloaded: bool) -> tuple[WalkPlan, str]:
    """The walk of a game over coalitions, and its order in words with the reason.

    Args:
        coalitions: bool (m, n_players), distinct and in lexicographic order.
        runs_absent: whether absent players are run, all or each.
        held: how many hidden states of the text there is memory for.
        offloaded: whether blocks are loaded to the device one at a time, which is what is slow then.
    """
    together = min(TOGETHER, max(1, held // 2)) if offloaded else 1
    plan = WalkPlan.of(coalitions, runs_absent, held - together + 1, together)
    why = "blocks stay on the device"
    if offloaded:
        why = "a block is loaded once for a group" if together > 1 else "no memory for the hidden states of a group"
    return plan, f"{plan.order}: {why}"

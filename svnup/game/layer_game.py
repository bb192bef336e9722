"""The layer game: transformer blocks are players, the payoff of a coalition is how well the model works with these blocks."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from svnup import NUMBERS_VERSION
from svnup.game.walk_plan import WalkPlan
from svnup.memo import Memo
from svnup.model.language_model import LanguageModel, MicroBatch, Unit
from svnup.progress import stage
from svnup.types import CHOICES, Bools, Floats, Players

Payoff = Literal["neg_nll", "neg_ppl", "recip_ppl", "kl", "accuracy"]
Cap = Literal["none", "chance"]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Player:
    """A block, or the attention or MLP of one, and what stands in for it when it is absent: None skips it."""

    block: int
    unit: Unit
    absent: Weights | None


@dataclass(frozen=True)
class Replacements:
    """What absent blocks compute with: per block, weights by parameter name; `name` identifies them in the game's key."""

    weights: list[Weights]
    name: str


class LayerGame:
    """Payoffs of coalitions of blocks: bool (m, n_players) to float64 (m,).

    `tokens` (n_seq, seq_len) is the payoff text. Payoffs, with NLL the mean over sequences of the mean over their next
    tokens in nats: `neg_nll` = -NLL, `neg_ppl` = -exp(NLL), `recip_ppl` = exp(NLL of all players - NLL), `kl` = -KL(predictions
    of all players, of the coalition) per token, `accuracy` = how often the true end of a sequence (its last quarter) is
    likelier than the ends of the next three. `cap=chance` lets no payoff be worse than guessing.

    An absent player is skipped (identity), or with `pruned` (per block, pruned weights by parameter name) computes with these
    instead of its own; both versions stay in memory and nothing is copied. `players=sublayer`: attention and MLP apart, 2n
    players in the order in which they act. What an absent block leaves for later ones beside hidden states, such as the keys
    and values that blocks of Gemma 3n read from another, it still leaves, since these have none of their own.

    Coalitions are walked depth first over shared prefixes, each evaluated once ever: values go to an append-only memo under
    `cache_dir` (None: in memory only) as they come. Hidden states of prefixes take at most `state_bytes`, beyond which they
    are computed again. `n_evaluations` and `n_block_forwards` (or sublayer-forwards) count the work done by this object;
    `v_empty`, the payoff of nobody, is a reference and is not counted, nor is the one forward pass of all players that kl and
    recip_ppl compare with. `key` changes with whatever changes a value. Raises ValueError where a loss is not finite.

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
        self.lm, self.tokens = lm, torch.as_tensor(tokens)
        self.payoff, self.cap = payoff, cap
        if pruned is not None and lm.offloaded:
            raise ValueError("offload: pruned blocks beside the dense ones need both in memory; use offload=none")
        if pruned is not None and not isinstance(pruned, Replacements):
            pruned = Replacements(pruned, _digest(pruned))
        self.absent_costs = pruned is not None
        self._players = _make_players(lm, players, pruned.weights if pruned is not None else None)
        self.n_players = len(self._players)
        self.n_evaluations = self.n_block_forwards = 0
        self._state_bytes = state_bytes
        if payoff == "accuracy" and len(self.tokens) < CHOICES:
            raise ValueError(
                f"payoff=accuracy: needs at least {CHOICES} sequences, not {len(self.tokens)}; add more payoff text"
            )
        identity = {
            "weights": lm.fingerprint(),
            "pruned": pruned.name if pruned is not None else None,
            "tokens": hashlib.sha256(self.tokens.numpy().astype(np.int64).tobytes()).hexdigest(),
            "shape": list(self.tokens.shape),
            "payoff": payoff,
            "cap": cap,
            "players": players,
            "numbers": NUMBERS_VERSION,
        }
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        self._kinds: set[str] = set()
        folder = Path(cache_dir) / "games" / self.key if cache_dir is not None else None
        self._memo = Memo(folder, f"{lm.device.type}/{lm.dtype}")

    def __call__(self, coalitions: Bools) -> Floats:
        rows = np.asarray(coalitions)
        if rows.dtype != np.bool_ or rows.ndim != 2 or rows.shape[1] != self.n_players:
            raise ValueError(f"coalitions must be bool (m, {self.n_players}), not {rows.dtype} {rows.shape}")
        missing = [row for row in np.unique(rows, axis=0) if _name(row) not in self._memo.values]
        if missing:
            self.n_evaluations += len(missing)
            self.n_block_forwards += self._walk(np.array(missing))
        names = [_name(row) for row in rows]
        self._kinds |= {self._memo.kinds[name] for name in names}
        return np.array([self._memo.values[name] for name in names])

    @property
    def v_empty(self) -> float:
        """The payoff of the coalition of no player."""
        nobody = np.zeros((1, self.n_players), dtype=bool)
        if _name(nobody[0]) not in self._memo.values:
            self._walk(nobody)
        return self._memo.values[_name(nobody[0])]

    @property
    def kinds(self) -> list[str]:
        """The kinds of device and dtype of the values that were asked for, such as cpu/float32."""
        return sorted(self._kinds)

    @torch.inference_mode()
    def _walk(self, coalitions: Bools) -> int:
        """Evaluate distinct coalitions (in lexicographic order) depth first; returns the number of block-forwards."""
        held, runs = max_states(self.lm, self._batches, self._state_bytes), self._runs_absent
        steps, forwards = WalkPlan.of(coalitions, runs, held), 0
        stack = {0: self._batches}
        with stage("coalitions", steps.n_evaluations, "coalitions") as advance:
            for row, start, kept in zip(coalitions, steps.resume, steps.kept, strict=True):
                states = stack[start]
                stack = {depth: s for depth, s in stack.items() if kept >> depth & 1}
                for index in range(start, self.n_players):
                    if row[index] or runs[index]:
                        states = self._step(self._players[index], states, present=bool(row[index]))
                        forwards += 1
                    if kept >> (index + 1) & 1:
                        stack[index + 1] = states
                self._memo.add(_name(row), self._payoff_of(states, _name(row)))
                advance(1)
        return forwards

    @property
    def _runs_absent(self) -> Bools:
        """Which players (n_players,) are run even where they are absent: as stand-ins, or for what they leave for others."""
        leaves = np.array([player.block in self.lm.writers for player in self._players])
        return leaves | self.absent_costs

    def _step(self, player: Player, states: list[MicroBatch], present: bool) -> list[MicroBatch]:
        weights = None if present else player.absent
        out = [self.lm.run_block(player.block, batch, unit=player.unit, weights=weights) for batch in states]
        if present or player.absent is not None:
            return out
        return [replace(batch, state=o.state) for batch, o in zip(states, out, strict=True)]

    @cached_property
    def _batches(self) -> list[MicroBatch]:
        with torch.inference_mode():
            tokens = _with_choices(self.tokens) if self.payoff == "accuracy" else self.tokens
            return list(self.lm.micro_batches(tokens))

    # -- payoffs

    def _payoff_of(self, states: list[MicroBatch], name: str) -> float:
        if self.payoff == "kl":
            kl = self._mean(list(map(self.lm.token_kl, states, self._states_of_all)), name)
            return -min(kl, self._chance_nll) if self.cap == "chance" else -kl
        if self.payoff == "accuracy":
            accuracy = self._accuracy(states, name)
            return max(accuracy, 1 / CHOICES) if self.cap == "chance" else accuracy
        return self._of_nll(self._mean(list(map(self.lm.token_nll, states)), name))

    def _of_nll(self, nll: float) -> float:
        if self.cap == "chance":
            nll = min(nll, self._chance_nll)
        if self.payoff == "neg_nll":
            return -nll
        return -math.exp(nll) if self.payoff == "neg_ppl" else math.exp(self._nll_of_all - nll)

    def _mean(self, losses: list[Tensor], name: str) -> float:
        mean = float(torch.cat([loss.double().mean(1) for loss in losses]).mean())
        if not math.isfinite(mean) or (self.payoff == "neg_ppl" and mean > 700):  # exp would overflow
            raise ValueError(
                f"stage coalitions: the loss of coalition {name} is {mean}; a wider dtype (model.dtype=float32 or bfloat16) "
                "may help, or the model is broken"
            )
        return mean

    def _accuracy(self, states: list[MicroBatch], name: str) -> float:
        """Rows come as CHOICES endings of each sequence, the true one first."""
        losses = list(map(self.lm.token_nll, states))
        self._mean(losses, name)
        ending = self.tokens.shape[1] // 4
        scores = torch.cat(losses)[:, -ending:].double().sum(1).view(-1, CHOICES)
        return float((scores[:, 0] < scores[:, 1:].min(1).values).double().mean())

    @cached_property
    def _chance_nll(self) -> float:
        return math.log(self.lm.vocab_size)

    @cached_property
    def _states_of_all(self) -> list[MicroBatch]:
        """Hidden states after all players, outside the counts: the reference of kl and recip_ppl."""
        with torch.inference_mode():
            states = self._batches
            for player in self._players:
                states = self._step(player, states, present=True)
            return states

    @cached_property
    def _nll_of_all(self) -> float:
        with torch.inference_mode():
            return self._mean(list(map(self.lm.token_nll, self._states_of_all)), "of all players")

    # -- gates

    def gate_gradient(self, gate: float) -> Floats:
        """Derivative (n_players,) of the payoff by a gate on each block's residual update, h + g (block(h) - h), where all
        gates are `gate`. One forward and one backward pass; activations are recomputed block by block.

        Raises ValueError for payoffs that are no smooth function of the loss, sublayers, the pruned game, and models where more
        passes between blocks than one residual stream.
        """
        if self.payoff not in ("neg_nll", "neg_ppl", "recip_ppl") or self.cap != "none":
            raise ValueError(
                f"payoff={self.payoff}, cap={self.cap}: gates need payoff=neg_nll, neg_ppl or recip_ppl and cap=none"
            )
        if self.absent_costs or self._players[0].unit != "block":
            raise ValueError("gates are defined for absence=skip and players=block; choose these, or another estimator")
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
        # The sum of the losses, not their mean, whose slopes would vanish in float16; a sequence at a time through the head.
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
        parts = lm.sublayers(index)
        made += [
            Player(index, "attention", absent(index, parts["attention"])),
            Player(index, "mlp", absent(index, parts["mlp"])),
        ]
    _check_sequential(lm)
    return made


@torch.inference_mode()
def _check_sequential(lm: LanguageModel) -> None:
    """Attention then MLP must be the whole block, which it is not where the two run side by side."""
    probe = torch.arange(16, device=lm.device).remainder(lm.vocab_size)[None]
    (batch,) = lm.micro_batches(probe)
    if lm.writers:
        raise ValueError(
            f"players=sublayer: block {min(lm.writers)} leaves more than hidden states for later blocks; use players=block"
        )
    for index in range(lm.n_blocks):
        whole = lm.run_block(index, batch)
        try:
            halves = lm.run_block(index, lm.run_block(index, batch, unit="attention"), unit="mlp")
        except (RuntimeError, TypeError) as error:  # of a block that wants more of its parts than what they add
            raise ValueError(
                f"players=sublayer: block {index} cannot do without a part ({error}); use players=block"
            ) from error
        expected, found = whole.hidden.float(), halves.hidden.float()
        if not torch.allclose(expected, found, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
            raise ValueError(f"players=sublayer: block {index} does not run attention, then MLP; use players=block")
        batch = whole


def _with_choices(tokens: Tensor) -> Tensor:
    """Each sequence with its own ending (last quarter), then with those of the next ones: (n, s) to (CHOICES n, s)."""
    ending = tokens.shape[1] // 4
    variants = [torch.cat([tokens[:, :-ending], tokens.roll(-shift, 0)[:, -ending:]], 1) for shift in range(CHOICES)]
    return torch.stack(variants, 1).reshape(-1, tokens.shape[1])


def _digest(pruned: list[Weights]) -> str:
    total = hashlib.sha256()
    for weights in pruned:
        for name, tensor in sorted(weights.items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def max_states(lm: LanguageModel, batches: list[MicroBatch], budget: int | None = None) -> int:
    """How many hidden states of all `batches` may be held at a time in `budget` bytes (None: `state_bytes`), at least the first
    and the last; what is dropped is computed again by the same operations, so this moves no number."""
    per_state = sum(b.hidden.numel() * b.hidden.element_size() for b in batches)
    return max(2, (state_bytes(lm.device) if budget is None else budget) // per_state)


def state_bytes(device: torch.device) -> int:
    """How many bytes of hidden states a walk may hold: half of a GPU's free memory, or 8 GiB."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2**33


def _name(coalition: Bools) -> str:
    return "".join("1" if present else "0" for present in coalition)

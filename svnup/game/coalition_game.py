"""What the games on a language model share: payoffs by what its last block returns, and the memo that keeps them."""

from __future__ import annotations

import hashlib
import json
import math
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from svnup import NUMBERS_VERSION, distributed
from svnup.data import tokens_sha256
from svnup.memo import Memo
from svnup.memory import free_memory
from svnup.model.language_model import LanguageModel, MicroBatch
from svnup.types import CHOICES, Bools, Floats

Payoff = Literal["neg_nll", "neg_ppl", "recip_ppl", "kl", "accuracy"]
Cap = Literal["none", "chance"]
TOGETHER = 32  # coalitions of an offloaded model that are walked breadth first; what a kill loses, and what hides the loads


class CoalitionGame(ABC):
    """A game on a model; calling it maps coalitions, bool (m, n_players), to payoffs, float64 (m,), each computed once.

    A game says how coalitions are run and what the full one gives; `svnup.game.layer_game.LayerGame` says what payoffs are.

    Args:
        lm: the model.
        tokens: payoff text, int64 (n_seq, seq_len).
        n_players: number of players.
        payoff: what a coalition is paid.
        cap: `chance` bounds payoffs from below by that of guessing.
        cache_dir: the folder of the memo; None keeps it in memory.
        weights: fingerprint of the model, where it is known.
        identity: what else changes a payoff, by name.

    Attributes:
        n_evaluations: coalitions that this object has evaluated, with those of other processes of its job.
        n_block_forwards: block-forwards that it took.
        key: changes with whatever changes a payoff.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokens: Tensor,
        n_players: int,
        payoff: Payoff,
        cap: Cap,
        cache_dir: str | Path | None,
        weights: str | None = None,
        **identity: Any,
    ) -> None:
        self.lm, self.tokens = lm, tokens
        self.payoff, self.cap = payoff, cap
        self.n_players = n_players
        self.n_evaluations = self.n_block_forwards = 0
        identity |= {
            "weights": weights if weights is not None else lm.fingerprint(),
            "tokens": tokens_sha256(tokens.numpy().astype(np.int64)),
            "shape": list(tokens.shape),
            "payoff": payoff,
            "cap": cap,
            "numbers": NUMBERS_VERSION,
        }
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        self._kinds: set[str] = set()
        folder = Path(cache_dir) / "games" / self.key if cache_dir is not None else None
        self._memo = Memo(folder, f"{lm.device.type}/{lm.dtype}")

    @abstractmethod
    def _walk(self, coalitions: Bools) -> int:
        """Evaluate distinct coalitions, in lexicographic order, into the memo; returns the number of block-forwards."""

    @property
    @abstractmethod
    def _states_of_all(self) -> list[MicroBatch]:
        """Outputs of the full coalition, the reference of `kl` and `recip_ppl`; not counted."""

    @staticmethod
    def _name(coalition: Bools) -> str:
        """The name of a coalition in the memo."""
        return "".join("1" if present else "0" for present in coalition)

    def __call__(self, coalitions: Bools) -> Floats:
        rows = np.asarray(coalitions)
        if rows.dtype != np.bool_ or rows.ndim != 2 or rows.shape[1] != self.n_players:
            raise ValueError(f"coalitions must be bool (m, {self.n_players}), not {rows.dtype} {rows.shape}")
        distinct = {self._name(row): row for row in np.unique(rows, axis=0)}

        counts = np.zeros(2)

        def evaluate(missing: list[str]) -> None:
            counts[:] += len(missing), self._walk(np.array([distinct[name] for name in missing]))

        self._memo.share(distinct, evaluate, "coalitions of this game")
        n_new, n_forwards = distributed.total(counts).astype(int).tolist()
        self.n_evaluations += n_new
        self.n_block_forwards += n_forwards
        names = [self._name(row) for row in rows]
        self._kinds |= {self._memo.kinds[name] for name in names}
        return np.array([self._memo.values[name] for name in names])

    @property
    def v_empty(self) -> float:
        """The payoff of the empty coalition."""
        empty = np.zeros((1, self.n_players), dtype=bool)
        self._memo.share([self._name(empty[0])], lambda _: self._walk(empty), "coalitions of this game")
        return self._memo.values[self._name(empty[0])]

    @property
    def kinds(self) -> list[str]:
        """Devices and dtypes of the payoffs given so far, such as cpu/float32."""
        return sorted(self._kinds)

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
        """Accuracy on batches with CHOICES endings of each sequence, the true one first."""
        losses = list(map(self.lm.token_nll, states))
        self._mean(losses, name)
        ending = self.tokens.shape[1] // 4
        scores = torch.cat(losses)[:, -ending:].double().sum(1).view(-1, CHOICES)
        return float((scores[:, 0] < scores[:, 1:].min(1).values).double().mean())

    @cached_property
    def _chance_nll(self) -> float:
        return math.log(self.lm.vocab_size)

    @cached_property
    def _nll_of_all(self) -> float:
        with torch.inference_mode():
            return self._mean(list(map(self.lm.token_nll, self._states_of_all)), "of all players")


def _with_choices(tokens: Tensor) -> Tensor:
    """Each sequence with its own ending (its last quarter) and those of the next ones, (n, s) to (CHOICES n, s)."""
    ending = tokens.shape[1] // 4
    variants = [torch.cat([tokens[:, :-ending], tokens.roll(-shift, 0)[:, -ending:]], 1) for shift in range(CHOICES)]
    return torch.stack(variants, 1).reshape(-1, tokens.shape[1])


def max_states(lm: LanguageModel, batches: list[MicroBatch], budget: int | None = None) -> int:
    """How many copies of the hidden states of all batches a walk may hold; at least 2, the first and the last.

    What is dropped is computed again by the same operations, so this moves no number.

    Args:
        batches: the micro-batches of a text.
        budget: bytes for all copies; None takes `state_bytes`.
    """
    per_state = sum(b.hidden.numel() * b.hidden.element_size() for b in batches)
    return max(2, (state_bytes(free_memory(lm.device)) if budget is None else budget) // per_state)


def state_bytes(free: float | None) -> int:
    """Bytes of hidden states that a walk may hold: half of what is free on a GPU that has the model; None (a CPU): 8 GiB."""
    return int(free // 2) if free is not None else 2**33

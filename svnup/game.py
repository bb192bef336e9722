"""The layer game: transformer blocks are players, the payoff of a coalition is how well the model works with these blocks."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import socket
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from torch import Tensor

from svnup import NUMBERS_VERSION
from svnup.language_model import LanguageModel, MicroBatch
from svnup.progress import stage
from svnup.shapley import branch_points
from svnup.types import Bools, Floats, Ints

logger = logging.getLogger(__name__)

Payoff = Literal["neg_nll", "neg_ppl", "recip_ppl"]
Cap = Literal["none", "chance"]


class LayerGame:
    """Payoffs of coalitions of blocks, an absent block being skipped: bool (m, n_players) to float64 (m,).

    `tokens` (n_seq, seq_len) is the payoff text. Payoffs, with NLL the mean over sequences of the mean over their next
    tokens in nats: `neg_nll` = -NLL, `neg_ppl` = -exp(NLL), `recip_ppl` = exp(NLL of all blocks - NLL). `cap=chance` takes
    the NLL to be at most ln V. Coalitions are walked depth first over shared prefixes, each evaluated once ever: values go
    to an append-only memo under `cache_dir` (None: in memory only) as they come.

    `n_evaluations` and `n_block_forwards` count the work done by this object; `v_empty`, the payoff of nobody, is a
    reference that costs one head pass and no block-forward, and is not counted. `key` changes with whatever changes a value.
    Raises ValueError where a loss is not finite.

    Source: arXiv 2505.01731 (blocks as players of a cooperative game); the payoffs are our choices.
    """

    absent_costs = False

    def __init__(
        self,
        lm: LanguageModel,
        tokens: np.ndarray | Tensor,
        *,
        payoff: Payoff = "neg_nll",
        cap: Cap = "none",
        cache_dir: str | Path | None = None,
    ) -> None:
        self.lm, self.tokens = lm, torch.as_tensor(tokens)
        self.payoff, self.cap = payoff, cap
        self.n_players = lm.n_blocks
        self.n_evaluations = self.n_block_forwards = 0
        identity = {
            "weights": lm.fingerprint(),
            "tokens": hashlib.sha256(self.tokens.numpy().astype(np.int64).tobytes()).hexdigest(),
            "shape": list(self.tokens.shape),
            "payoff": payoff,
            "cap": cap,
            "absence": "skip",
            "players": "block",
            "numbers": NUMBERS_VERSION,
        }
        self.key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        kind = f"{lm.device.type}/{lm.dtype}"
        self._memo = Memo(Path(cache_dir) / "games" / self.key if cache_dir is not None else None, kind)

    def __call__(self, coalitions: Bools) -> Floats:
        rows = np.asarray(coalitions)
        if rows.dtype != np.bool_ or rows.ndim != 2 or rows.shape[1] != self.n_players:
            raise ValueError(f"coalitions must be bool (m, {self.n_players}), not {rows.dtype} {rows.shape}")
        missing = [row for row in np.unique(rows, axis=0) if _name(row) not in self._memo.values]
        if missing:
            self.n_evaluations += len(missing)
            self.n_block_forwards += self._walk(np.array(missing))
        return np.array([self._memo.values[_name(row)] for row in rows])

    @property
    def v_empty(self) -> float:
        """The payoff of the coalition of no block."""
        nobody = np.zeros((1, self.n_players), dtype=bool)
        if _name(nobody[0]) not in self._memo.values:
            self._walk(nobody)
        return self._memo.values[_name(nobody[0])]

    @property
    def kinds(self) -> list[str]:
        """The kinds of device and dtype whose values this game has used, such as cpu/float32."""
        return sorted(self._memo.kinds)

    @torch.inference_mode()
    def _walk(self, coalitions: Bools) -> int:
        """Evaluate distinct coalitions (in lexicographic order) depth first; returns the number of block-forwards."""
        steps = WalkPlan.of(coalitions)
        forwards = 0
        stack: dict[int, list[Tensor]] = {0: [batch.hidden for batch in self._batches]}
        with stage("coalitions", steps.n_evaluations, "coalitions") as advance:
            for row, start, kept in zip(coalitions, steps.starts, steps.kept, strict=True):
                states = stack[start]
                stack = {depth: s for depth, s in stack.items() if kept >> depth & 1}
                for block in range(start, self.n_players):
                    if row[block]:
                        states = [self.lm.run_block(block, h, b) for h, b in zip(states, self._batches, strict=True)]
                        forwards += 1
                    if kept >> (block + 1) & 1:
                        stack[block + 1] = states
                self._memo.add(_name(row), self._value(self._nll(states, _name(row))))
                advance(1)
        return forwards

    @cached_property
    def _batches(self) -> list[MicroBatch]:
        with torch.inference_mode():
            return list(self.lm.micro_batches(self.tokens))

    def _nll(self, states: list[Tensor], name: str) -> float:
        losses = [self.lm.token_nll(h, b).double().mean(1) for h, b in zip(states, self._batches, strict=True)]
        nll = float(torch.cat(losses).mean())
        if not math.isfinite(nll):
            raise ValueError(
                f"stage coalitions: the loss of coalition {name} is {nll}; a wider dtype (model.dtype=float32 or bfloat16) "
                "may help, or the model is broken"
            )
        return nll

    def _value(self, nll: float) -> float:
        if self.cap == "chance":
            nll = min(nll, math.log(self.lm.vocab_size))
        if self.payoff == "neg_nll":
            return -nll
        return -math.exp(nll) if self.payoff == "neg_ppl" else math.exp(self._nll_of_all - nll)

    @cached_property
    def _nll_of_all(self) -> float:
        with torch.inference_mode():
            return float(self.lm.nll(self.tokens).mean())


@dataclass(frozen=True)
class WalkPlan:
    """A depth-first walk over distinct coalitions in lexicographic order, and what it costs.

    `starts` is the depth at which each coalition leaves the one before; bit d of `kept` says that the hidden states at depth
    d are still needed after that coalition; `peak_states` is the largest number of different hidden states held at a time.
    """

    starts: list[int]
    kept: list[int]
    n_evaluations: int
    n_block_forwards: int
    peak_states: int

    @classmethod
    def of(cls, coalitions: Bools) -> WalkPlan:
        starts = branch_points(coalitions)
        kept = [0] * len(coalitions)
        for i in range(len(coalitions) - 2, -1, -1):
            branch = int(starts[i + 1])
            kept[i] = kept[i + 1] & ((1 << branch) - 1) | 1 << branch
        fresh = (np.arange(coalitions.shape[1]) >= starts[:, None]) & coalitions
        peak = max((_n_states(row, mask) for row, mask in zip(coalitions, kept, strict=True)), default=0)
        return cls(starts.tolist(), kept, len(coalitions), int(fresh.sum()), peak + 1)


def _n_states(row: Bools, kept: int) -> int:
    """Different hidden states among the kept depths of a coalition: an absent block hands on the same one."""
    depths: Ints = np.concatenate([[0], np.cumsum(row)])
    return len({int(depths[d]) for d in range(len(depths)) if kept >> d & 1})


def _name(coalition: Bools) -> str:
    return "".join("1" if present else "0" for present in coalition)


class Memo:
    """Coalition values on disk: append-only JSON lines, one file per process, merged on read.

    Each line carries its coalition, value, kind of device and a checksum; a torn or changed line is dropped with a warning.
    """

    def __init__(self, folder: Path | None, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.values: dict[str, float] = {}
        self.kinds: set[str] = set()
        self._file: IO[str] | None = None
        dropped = 0
        others: dict[str, tuple[float, str]] = {}
        for path in sorted(folder.glob("*.jsonl")) if folder is not None and folder.is_dir() else []:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                entry = _parse(line)
                if entry is None:
                    dropped += 1
                elif entry[2] == kind:
                    self.values.setdefault(entry[0], entry[1])
                else:
                    others.setdefault(entry[0], entry[1:])
        if self.values:
            self.kinds.add(kind)
        for name, (value, other) in others.items():
            if name not in self.values:
                self.values[name] = value
                self.kinds.add(other)
        if dropped:
            logger.warning("%d damaged lines in %s were dropped; their coalitions are evaluated again", dropped, folder)

    def add(self, name: str, value: float) -> None:
        self.values[name] = value
        self.kinds.add(self.kind)
        if self.folder is None:
            return
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            self._file = path.open("a", encoding="utf-8")
            if torn:  # a process of the same number died here
                self._file.write("\n")
        line = {"coalition": name, "value": value, "kind": self.kind}
        self._file.write(json.dumps(line | {"crc": _checksum(line)}) + "\n")
        self._file.flush()


def _checksum(line: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(line, sort_keys=True).encode())


def _parse(line: str) -> tuple[str, float, str] | None:
    try:
        entry = json.loads(line)
        crc = entry.pop("crc")
        if crc == _checksum(entry):
            return str(entry["coalition"]), float(entry["value"]), str(entry["kind"])
    except (ValueError, KeyError, TypeError, AttributeError):
        pass  # torn: counted by the caller
    return None

"""The command line in tests: a small job, and the built-in text read once for all jobs of a process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from svnup.data import Docs

RANDOM = [
    "model=random",
    "model.num_hidden_layers=3",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_attention_heads=2",
]
SMALL = [
    *RANDOM,
    "model.seq_len=32",
    "dataset.n_seq=4",
    "evaluation.n_seq=4",
    "shapley.game.data.n_seq=2",
    "compare_uniform=off",  # which tests of it turn on
]
SMALL_W2 = [*SMALL, "shapley.window=2"]

_read, _known = Docs.read, {}


class Done(NamedTuple):
    code: int
    out: str
    err: str


def read_once(source: Docs, tokenizer: Any) -> Any:
    """The built-in text takes a second to tokenize; the jobs in this process share it."""
    key = (source, tokenizer.name_or_path)
    if key not in _known:
        _known[key] = _read(source, tokenizer)
    return _known[key]


def last_row() -> Any:
    """The newest result under the working folder."""
    return json.loads(max(Path("results").glob("runs/*/result.json"), key=lambda p: p.stat().st_mtime).read_text())

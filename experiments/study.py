"""What studies share: their options, their model and texts, and where a table and a figure go.

`--quick` takes every step of a study on a few blocks and a few short sequences, in seconds: it shows that the study still
runs. Its numbers say nothing, so they go to a folder of their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from svnup.data import Docs, Role
from svnup.language_model import LanguageModel
from svnup.model.loading import read_tokenizer
from svnup.model.source import BUILT_IN_FOLDER
from svnup.types import Floats, Ints

QUICK = Path("results") / "quick"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every study; more can be added."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cache", type=Path, metavar="DIR", help="of what was measured (results/cache; quick: in its output)")
    made.add_argument("--output", type=Path, metavar="DIR", help="of results/tables and docs/figures (.; quick: results/quick)")
    made.add_argument("--quick", action="store_true", help="every step at its least size, in seconds; the numbers say nothing")
    return made


def parse(made: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options as given, with the folders that follow from them."""
    options = made.parse_args(argv)
    options.output = options.output or (QUICK if options.quick else Path())
    options.cache = options.cache or (options.output / "cache" if options.quick else Path("results") / "cache")
    return options


def built_in(n_blocks: int | None = None) -> LanguageModel:
    """The built-in model on the CPU, or its first blocks alone."""
    lm = LanguageModel.load(str(BUILT_IN_FOLDER), dtype="float32", device="cpu")
    if n_blocks is None:
        return lm
    lm.model.set_submodule(lm.blocks_path, lm.blocks[:n_blocks])
    lm.model.config.num_hidden_layers = n_blocks
    return LanguageModel(lm.model, lm.tokenizer)


@lru_cache(maxsize=32)
def text(role: Role, n_seq: int | None, seq_len: int = 256, seed: int = 0) -> Ints:
    """Tokens of the built-in text by the built-in tokenizer, int64 (n_seq, seq_len); None takes all of it."""
    return Docs(n_seq=n_seq, seq_len=seq_len, role=role, seed=seed).tokens(read_tokenizer(str(BUILT_IN_FOLDER)))


def segment_means(losses: Floats, n_segments: int) -> Floats:
    """Means over contiguous segments of windows, (..., n_windows) -> (..., n_segments): what a bootstrap draws from, since
    neighbouring windows are not independent."""
    return np.stack([part.mean(axis=-1) for part in np.array_split(losses, n_segments, axis=-1)], axis=-1)


def interval(drawn: Floats) -> tuple[float, float]:
    """The 95 % interval of what a bootstrap has drawn, (n_draws,)."""
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def publish(options: argparse.Namespace, name: str, lines: Sequence[str]) -> None:
    """Write results/tables/NAME.md, of which the first line is the title; it says so where a run was quick."""
    table = options.output / "results" / "tables" / f"{name}.md"
    table.parent.mkdir(parents=True, exist_ok=True)
    note = ["", "A quick run, which only shows that the study runs: these numbers say nothing."] if options.quick else []
    table.write_text("\n".join([lines[0], *note, *lines[1:]]).rstrip() + "\n", encoding="utf-8")


def figure(options: argparse.Namespace, name: str) -> Path:
    """Where docs/figures/NAME.png goes."""
    path: Path = options.output / "docs" / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

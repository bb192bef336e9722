"""What studies share: options, model and texts, jobs, a memory of what was measured, and how a table is written.

`--quick` takes every step of a study on a few blocks and a few short sequences, in seconds: it shows that the study still
runs. Its numbers say nothing, so they go to a folder of their own. How a study is made of these: experiments/template/run.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from svnup import NUMBERS_VERSION, config
from svnup.data import Docs, Role
from svnup.language_model import LanguageModel
from svnup.model import smollm2
from svnup.model.loading import read_tokenizer
from svnup.model.source import BUILT_IN_FOLDER, Pretrained
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import Pruner
from svnup.pruning.wanda import Wanda
from svnup.reports.grid import Cell, Grid
from svnup.results.provenance import hardware
from svnup.types import Floats, Ints

QUICK = Path("results") / "quick"
PRUNERS: dict[str, Pruner] = {"wanda": Wanda(), "sparsegpt": SparseGPT()}


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


def add_real_model(made: argparse.ArgumentParser) -> None:
    """Add the options of a study of a real model: its checkpoint, and local copies of data sets."""
    made.add_argument("--model", metavar="FOLDER", default=smollm2.NAME, help="a checkpoint (what `make smollm2` brings)")
    made.add_argument("--datasets", metavar="FOLDER", help="local copies of data sets (the hub)")
    made.add_argument("--device", default="cpu", help="such as cuda")


def real_model(options: argparse.Namespace) -> LanguageModel:
    """The model of these options in float32; `options.model_name` is what a table calls it."""
    options.model_name = Path(options.model).name
    return Pretrained(pretrained_model_name_or_path=options.model, dtype="float32", device=options.device).load()


def built_in(n_blocks: int | None = None, folder: Path = BUILT_IN_FOLDER) -> LanguageModel:
    """The built-in model on the CPU, or the one in another folder, or its first blocks alone."""
    lm = LanguageModel.load(str(folder), dtype="float32", device="cpu")
    if n_blocks is None:
        return lm
    lm.model.set_submodule(lm.blocks_path, lm.blocks[:n_blocks])
    lm.model.config.num_hidden_layers = n_blocks
    return LanguageModel(lm.model, lm.tokenizer)


@lru_cache(maxsize=32)
def text(role: Role, n_seq: int | None, seq_len: int = 256, seed: int = 0) -> Ints:
    """Tokens of the built-in text by the built-in tokenizer, int64 (n_seq, seq_len); None takes all of it."""
    return Docs(n_seq=n_seq, seq_len=seq_len, role=role, seed=seed).tokens(read_tokenizer(str(BUILT_IN_FOLDER)))


def job(*overrides: str, texts: config.Texts | None = None) -> config.Job:
    """The job that the command would run with these overrides; `texts` holds what earlier jobs have read."""
    return config.build(config.composed(*overrides), texts)


class Known:
    """What was measured once ever: a JSON line each, in a file per process, so that a killed study goes on where it was."""

    def __init__(self, cache: Path, name: str) -> None:
        self.folder = cache / name
        self._values: dict[str, Any] = {}
        for path in (cache / f"{name}.jsonl", *sorted(self.folder.glob("*.jsonl"))):
            for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
                try:
                    key, value = json.loads(line)
                    self._values[key] = value
                except ValueError:
                    continue  # torn by a kill: computed again

    def get(self, what: list[Any]) -> Any:
        """What was measured, or None; `what` says of what it is a measurement: all that could move it."""
        return self._values.get(self._key(what))

    def add(self, what: list[Any], value: Any) -> None:
        """Remember a measurement, which JSON can hold."""
        self._values[self._key(what)] = value
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([self._key(what), value]) + "\n")

    def measured(self, what: list[Any], measure: Callable[[], Any]) -> Any:
        """What is known, or what `measure` returns, from now on known."""
        if (found := self.get(what)) is None:
            self.add(what, found := measure())
        return found

    @staticmethod
    def _key(what: list[Any]) -> str:
        return hashlib.sha256(json.dumps([NUMBERS_VERSION, *what]).encode()).hexdigest()[:24]


def spearman(a: Floats, b: Floats) -> float:
    """The rank correlation."""
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def mean_and_spread(values: Sequence[float] | Floats, digits: int = 2) -> str:
    """The mean, ± standard deviation where there is more than one."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def made_by(command: str, cores: str | None = None) -> str:
    """The beginning of the line below a title: the command, and on what it ran; `cores` is in words, all of them where None."""
    import torch

    machine = hardware()
    cores = cores or f"{machine.cores} cores"
    return f"Made by `{command}`. {machine.cpu}, {cores}, torch {torch.__version__}, float32"


def table(head: Sequence[str], lines: Iterable[Sequence[str]], align: str = "") -> list[str]:
    """The lines of a table in Markdown; `align` has an l or an r for each column."""
    cells = [[Cell(text) for text in line] for line in lines]
    return Grid([(name,) for name in head], cells, align=align).render("markdown").splitlines()


def table_file(options: argparse.Namespace, name: str) -> Path:
    """Where results/tables/NAME goes."""
    path: Path = options.output / "results" / "tables" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


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
    note = ["", "A quick run, which only shows that the study runs: these numbers say nothing."] if options.quick else []
    text = "\n".join([lines[0], *note, *lines[1:]]).rstrip() + "\n"
    table_file(options, f"{name}.md").write_text(text, encoding="utf-8")


def figure(options: argparse.Namespace, name: str) -> Path:
    """Where docs/figures/NAME.png goes."""
    path: Path = options.output / "docs" / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path

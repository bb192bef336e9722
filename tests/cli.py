"""The command line in tests: a small job, commands in this process and in one of their own, and what they leave behind."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra._internal.hydra import Hydra

from svnup import data
from svnup.cli import results as results_cli
from svnup.cli.run import CONFIG_NAME, main
from svnup.files import unsealed

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
HERE = ["results_dir=results", "cache_dir=cache"]

# Copies of this process, which have everything imported. A copy makes torch's pool of threads anew where it first needs it,
# and two of its threads that do so at once may find none ("Invalid thread pool!"); so it is done before there are two.
FORK: Any = multiprocessing.get_context("fork")
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(torch.get_num_threads()))

# -- commands


class Done(NamedTuple):
    code: int
    out: str
    err: str


def at_home(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Until the patch is undone commands work in a folder, without a hub and with a cache of their own."""
    patch.chdir(folder)
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("XDG_CACHE_HOME", str(folder / "xdg"))


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """main() changes the environment, the arguments and the logger of its process, which is this one."""
    logger, env, argv = logging.getLogger("svnup"), os.environ.get("HYDRA_FULL_ERROR"), sys.argv
    before = logger.handlers[:], logger.propagate, logger.level
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
        sys.argv = argv
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if env is not None:
            os.environ["HYDRA_FULL_ERROR"] = env


@contextlib.contextmanager
def tokenized_once() -> Iterator[None]:
    """The built-in texts take a second each; tokenizers of the same content share what came out."""
    encode, known = data._encode, dict[tuple[str, str], Any]()

    def encode_once(tokenizer: Any, text: str) -> Any:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if len(text) < 100_000 or backend is None:
            return encode(tokenizer, text)
        key = (text, backend.to_str())
        if key not in known:
            known[key] = encode(tokenizer, text)
        return known[key].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_encode", encode_once)
        yield


_get_mode = Hydra.get_mode


def mode_of(hydra: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Hydra composes a job once more beforehand, to learn its `hydra.mode`, which nothing but these overrides can set."""
    setting = ("experiment=", "hydra", "+hydra", "++hydra")
    asked = config_name != CONFIG_NAME or any(o.startswith(setting) for o in overrides)
    return _get_mode(hydra, config_name, overrides) if asked else None


def _called(run: Callable[[], int]) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with as_it_was(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run()
    return Done(code, out.getvalue(), err.getvalue())


def command(*args: str) -> Done:
    """`svnup` with these arguments, in this process."""

    def run() -> int:
        sys.argv = ["svnup", *args]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Hydra, "get_mode", mode_of)  # a third of what most commands of the tests cost
            return main()

    return _called(run)


def results(*args: str) -> Done:
    """`svnup-results` with these arguments, in this process; what processes print that it starts is not caught."""
    return _called(lambda: results_cli.main(list(args)))


def process(*args: str, cwd: Path, module: bool = True, **env: str) -> Done:
    """The command in a process of its own: `python -m svnup`, or the console script beside this interpreter."""
    told = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
    told.pop("HYDRA_FULL_ERROR", None)
    program = [sys.executable, "-m", "svnup"] if module else [str(Path(sys.executable).with_name("svnup"))]
    done = subprocess.run([*program, *args], cwd=cwd, env=told, capture_output=True, text=True, timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def forked(run: Callable[[], object]) -> int:
    """Run a function in a copy of this process, which has everything imported; its exit code, -9 where it was killed."""

    def alone() -> None:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # what catches them is in the other process
        run()

    copy = FORK.Process(target=alone)
    copy.start()
    copy.join()
    return int(copy.exitcode)


# -- what they leave behind


def rows(results: str | Path = "results") -> list[dict[str, Any]]:
    """Every result of a folder."""
    return [json.loads(p.read_text()) for p in sorted(Path(results).glob("runs/*/result.json"))]


def only_row(results: str | Path = "results") -> dict[str, Any]:
    (row,) = rows(results)
    return row


def last_row() -> Any:
    """The newest result under the working folder, without its checksum."""
    newest = max(Path("results").glob("runs/*/result.json"), key=lambda p: p.stat().st_mtime)
    return unsealed(json.loads(newest.read_text()))


def run_folder(results: str | Path = "results") -> Path:
    (folder,) = Path(results).glob("runs/*")
    return folder


def memo_lines(cache: Path) -> list[dict[str, Any]]:
    """Whole lines of every memo file."""
    lines = [line for p in cache.glob("games/*/*.jsonl") for line in p.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]

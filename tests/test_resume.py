"""A real process, killed again and again, ends with the very values of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from cli import FORK

from svnup.game import LayerGame
from svnup.model.source import Random
from svnup.shapley.exact import Exact

TOKENS = np.random.default_rng(0).integers(0, 2048, (1, 16))


def values(cache: Path | None) -> tuple[np.ndarray, int]:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 12}
    game = LayerGame(Random(device="cpu", **shape).load(), TOKENS, cache_dir=cache)  # type: ignore[arg-type]
    return Exact().estimate(game).values, game.n_evaluations


def work(cache: Path) -> None:
    values(cache)


def memo_lines(cache: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in cache.rglob("*.jsonl"))


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    expected, everything = values(None)
    assert everything == 2**12
    draw, kills = random.Random(0), 0
    while kills < 20:
        before = memo_lines(tmp_path)
        process = FORK.Process(target=work, args=(tmp_path,))
        process.start()
        while process.is_alive() and memo_lines(tmp_path) == before:
            time.sleep(0.002)  # so that each life adds something, and the kill falls somewhere in the work
        time.sleep(draw.random() * 0.03)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            kills += 1
        process.join()
        assert memo_lines(tmp_path) < everything, f"finished after {kills} kills: the game is too small for this machine"
    lines = memo_lines(tmp_path)
    found, new = values(tmp_path)
    assert new >= everything - lines
    np.testing.assert_array_equal(found, expected)
    assert values(tmp_path)[1] == 0

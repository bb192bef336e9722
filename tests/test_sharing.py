"""Several processes that need the same values: each is measured once."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli import FORK

from svnup.claims import claimed_of, holder, holders
from svnup.evaluation.protocol import measured_once, unchecked
from svnup.game import LayerGame
from svnup.memo import Memo
from svnup.shapley.exact import Exact
from svnup.shapley.gates import Gates
from svnup.types import Metric, Metrics

NAMES = [f"value {i}" for i in range(12)]


def in_two(work, *args):
    """Run a function in two processes at once; what each has put into the queue."""
    queue = FORK.Queue()
    both = [FORK.Process(target=work, args=(queue, *args)) for _ in range(2)]
    for process in both:
        process.start()
    found = [queue.get(timeout=60) for _ in both]
    for process in both:
        process.join()
    return found


def measuring(memo, done, pause=0.01):
    def measure(names):
        for name in names:
            time.sleep(pause)
            memo.add(name, float(name.split()[-1]))
            done.append(name)

    return measure


# -- games


def play(queue, lm, cache):
    game = LayerGame(lm, np.arange(40).reshape(2, 20), cache_dir=cache)
    add = game._memo.add

    def slowly(*args):
        time.sleep(0.005)
        add(*args)

    game._memo.add = slowly
    values = Exact().estimate(game).values
    queue.put((game.n_evaluations, game.n_block_forwards, values.tolist()))


def test_two_jobs_with_one_game_walk_it_once(tmp_path, random_model):
    lm = random_model(6)
    alone = LayerGame(lm, np.arange(40).reshape(2, 20))
    expected = Exact().estimate(alone).values.tolist()
    (first, second) = in_two(play, lm, tmp_path)
    assert first[0] + second[0] == 2**6 == alone.n_evaluations
    assert min(first[1], second[1]) == 0, "one of them makes all forwards"
    assert max(first[1], second[1]) == alone.n_block_forwards
    assert first[2] == second[2] == expected


def differentiate(queue, lm, cache):
    game = LayerGame(lm, np.arange(40).reshape(2, 20), cache_dir=cache)
    measure, passes = game._measure_gates, []
    game._measure_gates = lambda gate: (passes.append(gate), time.sleep(0.02), measure(gate))[-1]
    queue.put((passes, Gates(nodes=3).estimate(game).values.tolist()))


def test_two_jobs_with_one_game_make_its_backward_passes_once(tmp_path, random_model):
    lm = random_model(3)
    expected = Gates(nodes=3).estimate(LayerGame(lm, np.arange(40).reshape(2, 20))).values.tolist()
    (first, second) = in_two(differentiate, lm, tmp_path)
    assert len({*first[0], *second[0]}) == len(first[0] + second[0]) == 3
    assert first[1] == second[1] == expected
    assert in_two(differentiate, lm, tmp_path) == [([], expected)] * 2, "nor later once more"


# -- any values


def share(queue, folder, names):
    memo, done = Memo(folder, "cpu"), []
    memo.share(names, measuring(memo, done), "numbers")
    queue.put((os.getpid(), done, [memo.values[name] for name in names]))


def test_values_that_overlap_are_divided(tmp_path):
    queue = FORK.Queue()
    parts = [NAMES[:8], NAMES[4:]]
    both = [FORK.Process(target=share, args=(queue, tmp_path, part)) for part in parts]
    for process in both:
        process.start()
    found = [queue.get(timeout=60) for _ in both]
    assert sorted(found[0][1] + found[1][1]) == sorted(NAMES), "each once"
    assert sorted(found[0][2] + found[1][2]) == sorted([*map(float, range(8)), *map(float, range(4, 12))])
    for process in both:
        process.join()
    assert list((tmp_path / "claims").iterdir()) == []


def test_what_a_killed_process_was_measuring_is_measured(tmp_path, caplog):
    def forever(folder):
        memo = Memo(folder, "cpu")
        memo.share(NAMES, measuring(memo, [], pause=0.3), "numbers")

    holding = FORK.Process(target=forever, args=(tmp_path,))
    holding.start()
    memo, done = Memo(tmp_path, "cpu"), []
    while not list(tmp_path.glob("*.jsonl")):
        time.sleep(0.01)

    def kill(*_):
        os.kill(holding.pid, signal.SIGKILL)
        holding.join()

    before = signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    with caplog.at_level(logging.INFO, "svnup"):
        memo.share(NAMES, measuring(memo, done), "numbers")
    signal.signal(signal.SIGALRM, before)
    assert 0 < len(done) < len(NAMES), "what it had written is taken"
    assert set(memo.values) == set(NAMES)
    told = [record.getMessage() for record in caplog.records]
    assert [f"process {holding.pid} of " in line for line in told] == [True], "one line"
    assert not list((tmp_path / "claims").iterdir())


def test_a_failure_leaves_no_claim(tmp_path):
    memo = Memo(tmp_path, "cpu")

    def fail(names):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        memo.share(NAMES, fail, "numbers")
    done = []
    memo.share(NAMES, measuring(memo, done, 0), "numbers")
    assert done == NAMES


def test_a_claim_without_signs_of_life_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("svnup.claims.LEASE", 0.3)
    (tmp_path / "x").write_text("host=elsewhere\npid=5\n")
    (tmp_path / "y").hardlink_to(tmp_path / "x")
    (tmp_path / "z").write_text("host=elsewhere\npid=6\n")
    assert set(holders(tmp_path / "x")) == {"process 5 of elsewhere"}
    assert [path.name for path in tmp_path.iterdir()] == ["z"], "with all that the same process held"


def test_without_links_nobody_is_kept_from_his_work(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with claimed_of(tmp_path, ["a"]) as mine, claimed_of(tmp_path / "other", ["a"]) as theirs:
        assert mine == theirs == ["a"]
        assert holder(tmp_path / "a") is None


# -- dense numbers


def measure_dense(queue, cache):
    calls = []

    def measure(_):
        calls.append(1)
        time.sleep(0.3)
        return Metrics({"docs/ppl": Metric(12.5, {"n_windows": 3, "seq_len": 8, "role": "test"})})

    lm = SimpleNamespace(device=torch.device("cpu"), fingerprint=lambda: "f")
    value = measured_once(lm, {}, cache, measure, unchecked)["docs/ppl"].value
    queue.put((value, len(calls)))


def test_dense_numbers_are_measured_by_one(tmp_path: Path):
    found = in_two(measure_dense, tmp_path)
    assert sorted(found) == [(12.5, 0), (12.5, 1)]
    assert [p.suffix for p in (tmp_path / "dense").iterdir()] == [".json"]

"""One thread, no network, and the models that tests share."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ["WANDB_ERROR_REPORTING"] = "false"  # from a thread that outlives the test, of disabled runs, too

import models
import numpy as np
import pytest
import torch
from cli import SMALL_W2, Done, at_home, command, tokenized_once
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, settings

from svnup.model.source import BUILT_IN, Pretrained

torch.set_num_threads(1)
settings.register_profile(
    "svnup", deadline=None, derandomize=True, max_examples=40, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("svnup")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test with many cases that is marked `thinned(n)` every n-th is of the quick part; the others are slow."""
    cases = Counter()
    for item in items:
        if (mark := item.get_closest_marker("thinned")) is not None:
            if cases[item.parent, item.originalname] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[item.parent, item.originalname] += 1


@pytest.fixture(autouse=True, scope="session")
def _long_texts_are_tokenized_once():
    with tokenized_once():
        yield


def _shared_state():
    """What the tests of a process share, and a test must leave as it was."""
    logger = logging.getLogger("svnup")
    return {
        "Hydra": GlobalHydra.instance().is_initialized(),
        "folder": os.getcwd(),
        "arguments": sys.argv,
        "HYDRA_FULL_ERROR": os.environ.get("HYDRA_FULL_ERROR"),
        "logging": (logger.handlers[:], logger.propagate, logger.level),
        "torch": (torch.get_default_dtype(), torch.is_grad_enabled()),
    }


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    """A test that leaves something behind fails itself, and not one that runs after it."""
    before = _shared_state()
    yield
    assert _shared_state() == before


@pytest.fixture(scope="session")
def random_model():
    """Makes small random models in memory, for tests that change them."""
    return models.random_model


@pytest.fixture(scope="session")
def lm():
    """A small random Llama of 4 blocks, shared: never change its weights."""
    return models.random_model()


@pytest.fixture(scope="session")
def tiny():
    """The built-in trained model of 12 blocks, shared: never change its weights."""
    return Pretrained(pretrained_model_name_or_path=BUILT_IN, dtype="float32", device="cpu").load()


@pytest.fixture(scope="session")
def tokens():
    """Random token ids, int64 (3, 24)."""
    return np.random.default_rng(7).integers(5, 2048, size=(3, 24))


@pytest.fixture
def own_place(tmp_path, monkeypatch):
    """An empty working folder for commands, with a cache beside it."""
    at_home(monkeypatch, tmp_path)


@pytest.fixture
def svnup(own_place):
    """Runs the command in an empty folder, on small texts."""

    def run(*args: str) -> Done:
        return command(*SMALL_W2, "selection.n_seq=3", *args)

    return run


@pytest.fixture
def svnup_on(own_place):
    """Runs the command on a checkpoint in an empty folder: (exit code, errors)."""

    def run(folder, *args: str) -> tuple[int, str]:
        texts = ["dataset=docs", "dataset@shapley.game.data=docs", "dataset@selection=docs", "model.test_text=docs"]
        job = ["model=pretrained", f"model.pretrained_model_name_or_path={folder}", "model.seq_len=32", *texts]
        done = command(*job, "allocator=uniform", "dataset.n_seq=2", "evaluation.n_seq=2", *args)
        return done.code, done.err

    return run


@pytest.fixture(scope="session")
def nobody():
    """The number of a process that has died."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid

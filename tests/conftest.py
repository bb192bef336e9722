"""One thread, no network, and the models that tests share."""

from __future__ import annotations

import logging
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import numpy as np
import pytest
import torch
from cli import SMALL_W2, read_once
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, settings

from svnup.__main__ import main
from svnup.data import Docs
from svnup.model import BUILT_IN, Pretrained, Random

torch.set_num_threads(1)
settings.register_profile(
    "svnup", deadline=None, derandomize=True, max_examples=40, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("svnup")


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


def make_random_model(n_blocks=4, *, model_type="llama", seed=0, louder=6.0, dtype="float32"):
    """A small random model; `louder` scales the matrices of its blocks, so that each block makes a difference to the loss."""
    heads = {"num_key_value_heads": 2} if model_type == "llama" else {}
    lm = Random(
        model_type=model_type,
        num_hidden_layers=n_blocks,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        max_position_embeddings=256,
        seed=seed,
        dtype=dtype,
        device="cpu",
        **heads,
    ).load()
    with torch.no_grad():
        for index in range(n_blocks):
            for linear in lm.linears(index).values():
                linear.weight.mul_(louder)
    return lm


@pytest.fixture(scope="session")
def random_model():
    """Makes small random models in memory, for tests that change them."""
    return make_random_model


@pytest.fixture(scope="session")
def lm():
    """A small random Llama of 4 blocks, shared: never change its weights."""
    return make_random_model()


@pytest.fixture(scope="session")
def tiny():
    """The built-in trained model of 12 blocks, shared: never change its weights."""
    return Pretrained(pretrained_model_name_or_path=BUILT_IN, dtype="float32", device="cpu").load()


@pytest.fixture(scope="session")
def tokens():
    """Random token ids, int64 (3, 24)."""
    return np.random.default_rng(7).integers(5, 2048, size=(3, 24))


@pytest.fixture
def svnup(tmp_path, monkeypatch, capsys):
    """Runs the command in an empty folder, on small texts: (exit code, output, errors)."""
    monkeypatch.setattr(Docs, "read", read_once)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    logger = logging.getLogger("svnup")
    before = (logger.handlers[:], logger.propagate, logger.level)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["svnup", *SMALL_W2, "selection.n_seq=3", *args])
        code = main()
        return (code, *capsys.readouterr())

    yield run
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture
def svnup_on(monkeypatch, capsys, tmp_path):
    """Runs the command on a checkpoint in an empty folder: (exit code, errors)."""
    monkeypatch.setattr(Docs, "read", read_once)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    logger = logging.getLogger("svnup")
    before = (logger.handlers[:], logger.propagate, logger.level)

    def run(folder, *args):
        texts = ["dataset=docs", "dataset@shapley.game.data=docs", "dataset@selection=docs", "model.test_text=docs"]
        job = ["svnup", "model=pretrained", f"model.pretrained_model_name_or_path={folder}", "model.seq_len=32", *texts]
        monkeypatch.setattr(sys, "argv", [*job, "allocator=uniform", "dataset.n_seq=2", "evaluation.n_seq=2", *args])
        capsys.readouterr()
        return main(), capsys.readouterr().err

    yield run
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])

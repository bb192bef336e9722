"""The walk over families: what it finds of one type of each architecture is what the committed table says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("families_run", ROOT / "experiments" / "families" / "run.py")
walk = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = walk
SPEC.loader.exec_module(walk)

KINDS = {
    "rotary, gated MLP": "llama",
    "fused linears that store the transpose": "gpt2",
    "blocks that return lists": "openai-gpt",
    "learned positions with an offset": "opt",
    "biases instead of positions": "bloom",
    "attention and MLP side by side": "gpt_neox",
    "one norm for both": "phi",
    "several layer types": "gemma2",
    "layer types, norms of queries and keys": "gemma3_text",
    "shared keys and values, several streams": "gemma3n_text",
    "shared keys and values": "gemma4_text",
    "fused gates": "phi3",
    "norms after": "olmo2",
    "multipliers": "granite",
    "a parent that takes no tokens": "bert",
    "a decoder of an encoder": "bart",
    "a head that reads more": "doge",
    "low-rank keys": "deepseek_v3, dense",
    "prefix before the text": "cpmant",
    "experts": "mixtral",
    "state spaces": "mamba",
    "two streams": "reformer",
    "modules in lists apart": "xlm",
}


@pytest.fixture(scope="module")
def committed():
    return walk.read(ROOT / "results" / "tables" / "families.csv")


def test_the_committed_table_knows_every_family(committed):
    assert set(committed) == set(walk.families())
    written = (ROOT / "results" / "tables" / "families.md").read_text(encoding="utf-8")
    rows = [committed[name] for name in sorted(committed)]
    assert written.partition("| family |")[2] == walk.markdown(rows).partition("| family |")[2]
    assert sum(row["verdict"] == "works" for row in rows) >= 60
    assert {row[check] for row in rows if row["verdict"] != "not built" for check in walk.CHECKS} <= {"equal", "refused"}
    assert not [row["family"] for row in rows if row["verdict"] == "wrong"]
    assert all(row["reason"] for row in rows if row["verdict"] != "works")


QUICK = ("openai-gpt", "reformer")


@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in KINDS.values()])
def test_an_architecture_does_what_the_table_says(family, committed):
    row = walk.examine(family)
    assert row["verdict"] == committed[family]["verdict"], row
    if row["verdict"] == "works":
        assert {row[check] for check in walk.CHECKS} == {"equal"}


def test_what_differs_and_what_fails_is_no_success(monkeypatch):
    """A loader that loses a weight, and a game whose code breaks."""
    load = walk.load

    def loses(folder, **options):
        lm = load(folder, **options)
        if options.get("offload") == "cpu":
            with torch.no_grad():
                lm.linears(1)["self_attn.q_proj"].weight[0, 0] += 0.5
        return lm

    class Broken:
        def __init__(self, *args):
            raise KeyError("keys")

    monkeypatch.setattr(walk, "load", loses)
    monkeypatch.setattr(walk, "LayerGame", Broken)
    row = walk.examine("llama")
    assert row["verdict"] == "wrong"
    assert row["cpu"].startswith("differs by")
    assert row["order"] == row["shards"] == "KeyError"
    assert row["none"] == row["disk"] == row["walk"] == row["reload"] == "equal"
    assert "order: KeyError: 'keys'" in row["reason"]


def test_a_row_survives_a_process_that_dies(monkeypatch, tmp_path):
    monkeypatch.setattr(walk, "examine", lambda family: sys.exit(3))
    row = walk.apart("llama", 60)
    assert (row["family"], row["verdict"]) == ("llama", "wrong")
    walk.write(tmp_path / "t.csv", {"llama": row})
    assert walk.read(tmp_path / "t.csv")["llama"]["reason"] == row["reason"]
    assert "| llama |  | wrong |" in (tmp_path / "t.md").read_text(encoding="utf-8")

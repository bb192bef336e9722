"""Perplexity by its protocol, the dense number measured once, and the gate of known numbers."""

import json
import logging
import math
from typing import Any

import numpy as np
import pytest
import torch

from svnup.data import Docs, TextFile
from svnup.evaluation.gate import check_dense
from svnup.evaluation.ppl import Perplexity, perplexity
from svnup.evaluation.protocol import NoEvaluation, NoNumberError
from svnup.language_model import LanguageModel
from svnup.model.source import Random
from svnup.types import Metric, Metrics

SHAPE = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}


def make(family: str = "llama", **options: Any) -> LanguageModel:
    return Random(model_type=family, device="cpu", **(SHAPE | options)).load()


def some_tokens(n: int = 5, seq_len: int = 24) -> np.ndarray:
    return np.random.default_rng(3).integers(5, 2048, (n, seq_len))


def docs(**options: Any) -> Perplexity:
    """The test text's first windows."""
    source = Docs(**({"n_seq": 4, "seq_len": 32, "role": "test"} | options))
    return Perplexity({source.name: source}, source.seq_len, source.n_seq, source.role)


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """How often `LanguageModel.nll` ran, one entry per call."""
    calls: list[int] = []
    nll = LanguageModel.nll

    def spy(self: LanguageModel, tokens: Any) -> Any:
        calls.append(len(tokens))
        return nll(self, tokens)

    monkeypatch.setattr(LanguageModel, "nll", spy)
    return calls


# -- the number


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_perplexity_is_that_of_transformers(family):
    """exp of the mean of the losses that the model's own code gives window by window."""
    lm, tokens = make(family), some_tokens()
    with torch.inference_mode():
        losses = [lm.model(torch.tensor(row)[None], labels=torch.tensor(row)[None]).loss.item() for row in tokens]
    assert perplexity(lm, tokens) == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert np.std(losses) > 1e-3, "windows differ, or the mean would say nothing"


def test_perplexity_from_the_logits():
    """The definition: mean over windows of the mean over their seq_len - 1 targets, then exp."""
    lm, tokens = make(), torch.tensor(some_tokens(3, 10))
    with torch.inference_mode():
        log_p = lm.model(tokens).logits.double().log_softmax(-1)
    nll = -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert nll.shape == (3, 9)
    assert perplexity(lm, tokens.numpy()) == pytest.approx(nll.mean(1).mean().exp().item(), rel=1e-5)


def test_windows_do_not_see_each_other():
    lm, tokens = make(), some_tokens(4)
    alone = [perplexity(lm, tokens[i : i + 1]) for i in range(4)]
    assert perplexity(lm, tokens) == pytest.approx(math.exp(np.mean(np.log(alone))), rel=1e-6)
    assert perplexity(lm, tokens[::-1].copy()) == pytest.approx(perplexity(lm, tokens), rel=1e-9)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told(broken, tmp_path):
    """Of a pruned model that is a result; of a dense one nothing could follow."""
    lm = make()
    lm.blocks[1].mlp.down_proj.weight[0, 0] = broken
    with pytest.raises(NoNumberError, match=r"^the loss is nan"):
        perplexity(lm, some_tokens())
    metric = docs().run(lm)["docs/ppl"]
    assert math.isnan(metric.value)
    assert metric.reason == "the loss is nan, so there is no perplexity"
    dense = docs().dense(lm, tmp_path)
    with pytest.raises(ValueError, match=r"^stage dense: no docs/ppl of the dense model .*model\.dtype=float32"):
        check_dense(dense, [], "off", "m")
    assert not list(tmp_path.rglob("*.json"))


def test_a_perplexity_that_overflows_is_told(monkeypatch):
    monkeypatch.setattr(LanguageModel, "nll", lambda self, tokens: np.full(len(tokens), 800.0))
    with pytest.raises(NoNumberError, match=r"^the loss is 800"):
        perplexity(make(), some_tokens())


# -- metrics and their protocol


def test_protocol_of_a_metric():
    lm = make()
    metrics = docs().run(lm)
    assert set(metrics) == {"docs/ppl"}
    tokens = Docs(n_seq=4, seq_len=32, role="test").tokens(lm.tokenizer)
    assert metrics["docs/ppl"].value == perplexity(lm, tokens)
    assert metrics["docs/ppl"].window_nll == lm.nll(tokens).tolist()
    protocol = metrics["docs/ppl"].protocol
    assert {k: protocol[k] for k in ("dataset", "role", "seq_len", "n_windows", "n_tokens", "complete")} == {
        "dataset": "docs",
        "role": "test",
        "seq_len": 32,
        "n_windows": 4,
        "n_tokens": 128,
        "complete": False,
    }
    assert protocol["text"] == Docs(n_seq=1, seq_len=2, role="test").fingerprint()
    assert json.loads(json.dumps(protocol)) == protocol


def test_protocols_tell_texts_windows_and_lengths_apart(tmp_path):
    lm = make()

    def protocol(**options: Any) -> dict[str, Any]:
        (metric,) = docs(**options).run(lm).values()
        return metric.protocol

    variants = [protocol(), protocol(n_seq=5), protocol(seq_len=16, n_seq=8), protocol(role="selection"), protocol(skip=1)]
    assert len({json.dumps(p, sort_keys=True) for p in variants}) == 5
    assert variants[-1]["skip"] == 1
    assert not protocol(n_seq=None, skip=1)["complete"], "a known dense perplexity is that of the whole text"
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"The value of {name} is returned to the caller of this function. " * 20)
    files = [
        Perplexity({"mine": TextFile(path=str(tmp_path / f"{n}.txt"), n_seq=None, seq_len=16, role="test")}, 16) for n in "ab"
    ]
    one, two = (f.run(lm)["mine/ppl"].protocol for f in files)
    assert one["text"] != two["text"]
    assert one["complete"]


def test_text_of_another_role_never_passes_for_a_test_result():
    assert set(docs(role="selection").run(make())) == {"docs.selection/ppl"}


def test_several_data_sets(tmp_path):
    (tmp_path / "a.txt").write_text("Return the value. " * 60)
    mine = TextFile(path=str(tmp_path / "a.txt"), n_seq=None, seq_len=32, role="test")
    both = Perplexity({"docs": Docs(n_seq=4, seq_len=32, role="test"), "mine": mine}, 32)
    lm = make()
    metrics = both.run(lm)
    assert set(metrics) == {"docs/ppl", "mine/ppl"}
    assert metrics["docs/ppl"].value == docs().run(lm)["docs/ppl"].value != metrics["mine/ppl"].value


def test_two_text_files_do_not_overwrite_each_other(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"The value of {name}. " * 60)
    sources = {n: TextFile(path=str(tmp_path / f"{n}.txt"), n_seq=None, seq_len=32, role="test") for n in "ab"}
    metrics = Perplexity(sources, 32).run(make())
    assert metrics["a/ppl"].protocol["text"] != metrics["b/ppl"].protocol["text"]
    with pytest.raises(ValueError, match=r"^datasets=a/b: its number would be called a/b/ppl"):
        Perplexity({"a/b": sources["a"]}, 32)


def test_no_evaluation(tmp_path):
    assert NoEvaluation().run(make()) == NoEvaluation().dense(make(), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^datasets=\[\]: .*evaluation=none"):
        Perplexity({}, 32)


# -- the dense number


def test_the_dense_number_is_measured_once(tmp_path, forwards):
    lm = make()
    first = docs().dense(lm, tmp_path)
    assert forwards == [4]
    assert docs().dense(make(), tmp_path) == first
    assert forwards == [4], "the same model loaded again is the same model"
    assert first == docs().run(lm)
    assert [p.suffix for p in (tmp_path / "dense").iterdir()] == [".json"]


def test_the_dense_number_belongs_to_model_and_evaluation(tmp_path, forwards):
    docs().dense(make(), tmp_path)
    docs(n_seq=5).dense(make(), tmp_path)
    docs(seq_len=16).dense(make(), tmp_path)
    docs(role="selection").dense(make(), tmp_path)
    docs().dense(make(seed=1), tmp_path)
    docs().dense(make(dtype="bfloat16"), tmp_path)
    lm = make()
    lm.blocks[0].mlp.up_proj.weight[0, 0] += 1e-3
    docs().dense(lm, tmp_path)
    assert len(forwards) == 7
    docs().dense(lm, tmp_path / "another cache")
    assert len(forwards) == 8
    assert len(list((tmp_path / "dense").iterdir())) == 7


def dense(value: float, **protocol: Any) -> Metrics:
    full = {"dataset": "wikitext2", "role": "test", "seq_len": 2048, "complete": True} | protocol
    return Metrics({"wikitext2/ppl": Metric(value, full)})


KNOWN = [
    {"dataset": "wikitext2", "seq_len": 2048, "ppl": 5.68, "source": "a paper"},
    {"dataset": "wikitext2", "seq_len": 4096, "ppl": 5.12, "source": "a paper"},
]


def test_the_gate_lets_the_known_number_pass(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("svnup"), "propagate", True)
    for value in (5.68, 5.68 * 1.019, 5.68 * 0.981):
        check_dense(dense(value), KNOWN, "error", "llama")
    check_dense(dense(5.12, seq_len=4096), KNOWN, "error", "llama")
    check_dense(dense(99.0), [], "error", "llama")
    check_dense(Metrics(), KNOWN, "error", "llama")
    assert caplog.records == []


@pytest.mark.parametrize("value", [5.68 * 1.021, 5.68 * 0.979, 5.12])
def test_the_gate_stops_another_number(value):
    with pytest.raises(ValueError, match=r"^protocol_gate=error: the dense wikitext2/ppl .* 5\.68 is known \(a paper\).*=warn"):
        check_dense(dense(value), KNOWN, "error", "llama")


def test_the_gate_can_warn_or_be_off(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("svnup"), "propagate", True)
    check_dense(dense(9.0), KNOWN, "warn", "llama")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "wikitext2/ppl is 9" in record.getMessage()
    caplog.clear()
    check_dense(dense(9.0), KNOWN, "off", "llama")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("n_windows", "known", "says"),
    [
        (166, 166, r"\(\+58\.5%\) .* has the 166 windows that are known, so weights differ; check the checkpoint \(llama\)"),
        (141, 166, r"has 141 windows where 166 are known; check the tokenizer of llama"),
        (166, None, r"data set and length are the same; check the checkpoint \(llama\), its tokenizer and dtype"),
    ],
)
def test_the_gate_says_what_differs(n_windows, known, says):
    row = KNOWN[0] | ({"n_windows": known} if known else {})
    with pytest.raises(ValueError, match=says):
        check_dense(dense(9.0, n_windows=n_windows), [row], "error", "llama")


@pytest.mark.parametrize("other", [{"dataset": "c4"}, {"seq_len": 1024}, {"role": "selection"}, {"complete": False}], ids=str)
def test_the_gate_compares_like_with_like(other):
    with pytest.raises(ValueError, match=r"5\.68 is known"):
        check_dense(dense(9.0), KNOWN, "error", "llama")
    check_dense(dense(9.0, **other), KNOWN, "error", "llama")


def test_a_known_number_of_one_model_holds_for_that_model_only():
    known = [KNOWN[0] | {"model": "svnup/tiny"}]
    check_dense(dense(9.0), known, "error", "results/runs/abc/model")
    with pytest.raises(ValueError, match=r"5\.68 is known"):
        check_dense(dense(9.0), known, "error", "svnup/tiny")

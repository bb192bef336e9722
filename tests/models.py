"""Models of random weights, of every family, that are loud enough for each block to make a difference."""

from __future__ import annotations

from typing import Any

import torch

from svnup.model.language_model import LanguageModel, make_config
from svnup.model.source import Random

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
OPT = {k: v for k, v in SHAPE.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": 32}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "opt": ("opt", OPT),
    "opt_post_norm_projected": ("opt", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "mistral_window": ("mistral", GROUPED | {"sliding_window": 4}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2_mixed": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 4, "layer_types": MIXED}),
    "qwen3": ("qwen3", GROUPED),
    "gemma": ("gemma", GROUPED),
    "gemma2_mixed": ("gemma2", GROUPED | {"sliding_window": 4, "layer_types": MIXED, "query_pre_attn_scalar": 8}),
    "gemma3_text_mixed": ("gemma3_text", GROUPED | {"sliding_window": 4, "layer_types": MIXED, "query_pre_attn_scalar": 8}),
    "gpt_neox": ("gpt_neox", SHAPE),
    "gpt_neox_serial": ("gpt_neox", SHAPE | {"use_parallel_residual": False}),
    "phi3": ("phi3", {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "phi": ("phi", SHAPE),
    "falcon": ("falcon", SHAPE | {"new_decoder_architecture": False}),
    "bloom": ("bloom", {"vocab_size": 97, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "gptj": ("gptj", {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 8}),
    "gpt2": ("gpt2", {"vocab_size": 97, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}),
}


def family_model(family: str, **changes: Any) -> LanguageModel:
    """A model of 4 blocks of a family in FAMILIES, without a tokenizer; `changes` of its configuration."""
    kind, shape = FAMILIES[family]
    lm = LanguageModel.random(make_config(kind, **(shape | changes)), None, seed=0, device="cpu")
    with torch.no_grad():  # loud enough for every block and every mask to matter
        for name, p in lm.model.named_parameters():
            if p.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                p.mul_(6)
    return lm


def random_model(
    n_blocks: int = 4, *, model_type: str = "llama", seed: int = 0, louder: float = 6.0, dtype: str = "float32"
) -> LanguageModel:
    """A model with the built-in tokenizer, as `model=random` makes it; `louder` scales the matrices of its blocks."""
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

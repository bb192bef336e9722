"""Does svnup give the right numbers on every causal family that the installed transformers knows? Makes and tries a tiny model of each.

Of each family in transformers' mapping for causal language models it makes a random model of four blocks, saves it, and compares
svnup with plain transformers, always to the last bit: the logits of the model as it is loaded with offload=none, cpu and disk
and from a bitmask checkpoint; the values of coalitions in one order, in the other, and in two shards; and the logits after
pruning, saving and reloading. A family may be refused instead, by one line. What differs is named check by check.

Writes results/tables/families.csv as it goes, and families.md from it. A killed run goes on where it was: delete the csv, or
name families, to have them tried again.

    python experiments/families/run.py [FAMILY ...] [--output results/tables/families.csv] [--seconds 120]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from svnup.allocation import Uniform
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.pruning import prune_model
from svnup.pruning.wanda import Wanda

OUTPUT = Path("results/tables/families.csv")
N_BLOCKS, VOCABULARY = 4, 99
TOKENS = np.random.default_rng(3).integers(3, VOCABULARY - 3, size=(3, 24))
CHECKS = ("none", "cpu", "disk", "bitmask", "walk", "order", "shards", "reload")
FIELDS = ("family", "class", "verdict", *CHECKS, "reason")

# What the sizes of a configuration become, by the words of their names, the first that fits. The order matters.
SMALL: list[tuple[str, Any]] = [
    (
        r"^(num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|encoder_layers|num_encoder_layers)$",
        N_BLOCKS,
    ),
    (r"^(vocab_size|vocab_size_per_layer_input|text_vocab_size|audio_vocab_size)$", VOCABULARY),
    (r"^(num_key_value_heads|num_kv_heads|multi_query_group_num|swa_num_key_value_heads|.*_key_value_heads)$", 2),
    (r"^(num_attention_heads|n_heads?|num_heads|.*attention_heads|.*_num_heads)$", 4),
    (
        r"^(hidden_size|d_model|n_embd|embed_dim|dim|dim_model|word_embed_proj_dim|embedding_size|emb_dim|n_embed|model_dim)$",
        32,
    ),
    (r"^(attention_hidden_size|hidden_dim|lru_width|input_embedding_size|output_embedding_size)$", 32),
    (r"^(hidden_size_per_layer_input|laurel_rank|adapter_rank)$", 8),
    (
        r"^(intermediate_size|ffn_dim|n_inner|dim_ff|dff|d_ff|feed_forward_size|block_ff_dim|ffn_hidden_size|.*_ffn_dim|.*intermediate_size)$",
        48,
    ),
    (r"^(head_dim|kv_channels|d_kv|d_head|.*_head_dim|dim_head|qk_nope_head_dim|v_head_dim|attention_head_size)$", 8),
    (r"^(qk_rope_head_dim|rotary_dim)$", 4),
    (r"^(q_lora_rank|kv_lora_rank|o_lora_rank|.*_lora_rank)$", 16),
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts)$", 4),
    (r"^(num_experts_per_tok|num_experts_per_token|moe_k|moe_top_k|top_k_experts|moe_topk)$", 2),
    (r"^(n_group|topk_group|n_groups)$", 1),
    (r"^(sliding_window|sliding_window_size|window_size|attention_window_size|attention_window)$", 8),
    (r"^(max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|max_target_positions)$", 64),
    (r"^(num_kv_shared_layers)$", 2),
    (r"^(mamba_d_state|state_size|d_state)$", 8),
    (r"^(mamba_n_heads|mamba_num_heads|n_mamba_heads)$", 4),
    (r"^(mamba_d_head|mamba_head_dim|mamba_headdim)$", 16),
]
# What cannot be told from names: relations between sizes that a family insists on.
OWN: dict[str, dict[str, Any]] = {}


def shrunk(config: PretrainedConfig) -> dict[str, Any]:
    """The arguments of a small configuration of the same class: sizes by their names, lists by the number of blocks."""
    given = {k: v for k, v in config.to_diff_dict().items()} | config.to_dict()
    depth = next(
        (d for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if (d := getattr(config, k, None))), None
    )
    small: dict[str, Any] = {}
    for key, value in given.items():
        if key.endswith("_token_id") or key.endswith("_token_index"):
            small[key] = (
                {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(key, VOCABULARY - 1)
                if value is not None
                else None
            )
        elif isinstance(value, list) and depth and len(value) == depth:
            small[key] = _each_kind(value)
        elif (size := next((s for pattern, s in SMALL if re.match(pattern, key)), None)) is not None:
            if isinstance(value, int) and not isinstance(value, bool):
                small[key] = size if value else value
    return small


def _each_kind(per_block: list[Any]) -> list[Any]:
    """Four entries of a list per block, with as many of its kinds as there is room for."""
    kinds = list(dict.fromkeys(map(repr, per_block)))[:N_BLOCKS]
    first = [per_block[list(map(repr, per_block)).index(kind)] for kind in kinds]
    return [first[i % len(first)] for i in range(N_BLOCKS)]


def tiny_config(family: str) -> PretrainedConfig:
    """A configuration of the family with four blocks of a few thousand weights."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    arguments = shrunk(default)
    for name in getattr(default, "sub_configs", {}):
        if isinstance(sub := getattr(default, name, None), PretrainedConfig):
            arguments[name] = shrunk(sub)
    arguments |= OWN.get(family, {})
    if default.get_text_config() is default and getattr(default, "num_key_value_heads", 0) == getattr(
        default, "num_attention_heads", 1
    ):
        arguments["num_key_value_heads"] = 4
    return kind(**{k: v for k, v in arguments.items() if k not in ("model_type", "transformers_version")})


def make(family: str, folder: Path) -> str:
    """Save a tiny random model of the family; returns the name of its class."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    n = sum(p.numel() for p in model.parameters())
    if n > 30_000_000:
        raise ValueError(f"{n:,} parameters are not tiny")
    with torch.no_grad():  # loud enough for every block to matter
        for name, p in model.named_parameters():
            if p.ndim == 2 and "emb" not in name and "wte" not in name and "wpe" not in name:
                p.mul_(4)
    model.save_pretrained(folder)
    return type(model).__name__


class NoTokenizer:
    """Texts are tokens here."""

    def save_pretrained(self, folder: Path) -> None:
        return None


def load(folder: Path, **options: Any) -> LanguageModel:
    return LanguageModel.load(str(folder), tokenizer=NoTokenizer(), dtype="float32", device="cpu", **options)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.as_tensor(TOKENS), use_cache=False).logits


def plain(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def compared(found: Any, expected: Any) -> str:
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return "not finite"
    return "equal" if np.array_equal(found, expected) else f"differs by {np.abs(found - expected).max():.2g}"


def coalitions(n: int) -> np.ndarray:
    """All blocks, each left out, and a few more."""
    more = np.random.default_rng(0).random((4, n)) < 0.6
    return np.unique(np.concatenate([np.ones((1, n)), 1 - np.eye(n), more]).astype(bool), axis=0)


def in_order(folder: Path, rows: np.ndarray, one_by_one: bool) -> np.ndarray:
    game = LayerGame(load(folder), TOKENS)
    return np.concatenate([game(row[None]) for row in rows]) if one_by_one else game(rows)


def tried(folder: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The checks by name, in order."""
    expected = plain(folder)

    def of_game() -> np.ndarray:
        return in_order(folder, coalitions(N_BLOCKS), one_by_one=False)

    def walk() -> str:
        """The loss by blocks is the model's own, up to the rounding of products of other sizes."""
        rows = torch.as_tensor(TOKENS)
        own = -expected.double().log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].mean(1).numpy()
        found = load(folder).nll(TOKENS)
        return "equal" if np.allclose(found, own, rtol=1e-5, atol=1e-5) else compared(found, own)

    def bitmask() -> str:
        load(folder).save(scratch / "bitmask", "bitmask")
        return compared(logits(load(scratch / "bitmask").model), expected)

    def order() -> str:
        rows = coalitions(N_BLOCKS)
        return compared(in_order(folder, rows[::-1], one_by_one=True)[::-1], of_game())

    def shards() -> str:
        rows, values = coalitions(N_BLOCKS), np.zeros(len(coalitions(N_BLOCKS)))
        for part in (slice(0, None, 2), slice(1, None, 2)):
            values[part] = in_order(folder, rows[part], one_by_one=False)
        return compared(values, of_game())

    def reload() -> str:
        lm = load(folder)
        prune_model(lm, Uniform().allocate(None, lm.block_params, 0.5, "unstructured"), Wanda(), TOKENS)
        lm.save(scratch / "pruned")
        again = load(scratch / "pruned")
        if (said := compared(plain(scratch / "pruned"), logits(lm.model))) != "equal":
            return f"logits {said}"
        return compared(again.nll(TOKENS), lm.nll(TOKENS))

    for where in ("none", "cpu", "disk"):
        yield where, lambda where=where: compared(logits(load(folder, offload=where).model), expected)
    yield "bitmask", bitmask
    yield "walk", walk
    yield "order", order
    yield "shards", shards
    yield "reload", reload


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def examine(family: str) -> dict[str, str]:
    """The row of a family."""
    row = {"family": family}
    with tempfile.TemporaryDirectory(prefix="svnup-families-") as place:
        folder, scratch = Path(place) / "model", Path(place)
        try:
            row["class"] = make(family, folder)
            checks = list(tried(folder, scratch))
        except Exception as error:  # of a library, on a guess of ours
            return row | {"verdict": "not built", "reason": f"{type(error).__name__}: {one_line(error)}"}
        reasons: list[str] = []
        for name, check in checks:
            try:
                row[name] = check()
            except ValueError as error:
                row[name] = "refused"
                reasons.append(one_line(error))
            except Exception as error:  # what a user would see as a traceback
                row[name] = type(error).__name__
                reasons.append(f"{name}: {type(error).__name__}: {one_line(error)}")
    said = {row[name] for name in CHECKS}
    bad = said - {"equal", "refused"}
    row["verdict"] = "wrong" if bad else "works" if said == {"equal"} else "refused" if said == {"refused"} else "in part"
    return row | {"reason": "; ".join(dict.fromkeys(reasons))}


def _examine_into(family: str, pipe: Any) -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        pipe.send(examine(family))


def apart(family: str, seconds: float) -> dict[str, str]:
    """The row of a family, found by a process of its own: one that hangs or dies costs its row."""
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_examine_into, args=(family, there))
    process.start()
    there.close()
    try:
        if here.poll(seconds):
            return here.recv()
        return {"family": family, "verdict": "wrong", "reason": f"not done after {seconds:g} s"}
    except EOFError:
        return {"family": family, "verdict": "wrong", "reason": "the process died"}
    finally:
        process.kill()
        process.join()


def families() -> list[str]:
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def read(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["family"]: row for row in csv.DictReader(file)}


def write(path: Path, rows: dict[str, dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="try these again; default: all that are not in the csv")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seconds", type=float, default=120, help="time for one family")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = read(options.output)
    todo = options.families or [name for name in families() if name not in rows]
    for k, family in enumerate(todo):
        rows[family] = apart(family, options.seconds)
        write(options.output, rows)
        print(
            f"{k + 1}/{len(todo)} {family}: {rows[family]['verdict']} {rows[family].get('reason', '')[:150]}",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    main()

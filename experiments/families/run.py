"""Are svnup's numbers right on every causal family that the installed transformers knows? Tries a tiny model of each.

Of each family in transformers' mapping for causal language models it makes a random model of four blocks, saves it, and
compares svnup with plain transformers, to the last bit: the logits of the model as it is loaded with offload=none, cpu and
disk and from a bitmask checkpoint; the loss by blocks (here up to rounding); the values of coalitions in one order, in the
other, and in two shards; and the logits after pruning, saving and reloading. Families of experts are tried a second time with
dense blocks, where their configuration has that. A family may be refused instead, by one line; what differs is named.

Writes results/tables/families.csv as it goes, and families.md beside it. A killed run goes on where it was, and a finished one
has nothing to do: name families to have them tried again, or `--again` for all.

    python experiments/families/run.py [FAMILY ...] [--again] [--output results/tables/families.csv] [--seconds 120]
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import multiprocessing
import re
import sys
import tempfile
import traceback
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import svnup
from svnup.allocation import Budget
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.walk import Pruner, prune_model
from svnup.pruning.wanda import Wanda
from svnup.types import Offload

OUTPUT = Path("results/tables/families.csv")
N_BLOCKS, VOCABULARY = 4, 99
TOKENS = np.random.default_rng(3).integers(3, VOCABULARY - 3, size=(3, 24))
LOADING = ("none", "cpu", "disk", "bitmask")
CHECKS = (*LOADING, "walk", "order", "shards", "reload")
VERDICTS = {
    "works": "every check is equal",
    "in part": "some checks are equal, others are refused by a line",
    "refused": "a line says why no loss, value or calibration can be computed",
    "wrong": "a check differs, or ends in an error that is no line for people",
    "not built": "the tiny model could not be made, or plain transformers cannot run it on tokens alone",
}
FIELDS = ("family", "class", "verdict", *CHECKS, "reason")

# What the sizes of a configuration become, by the first pattern that fits their names.
SMALL: list[tuple[str, int]] = [
    (r"(num_hidden_layers|n_layers?|num_layers|(num_)?(decoder|encoder)_layers)", N_BLOCKS),
    (r"(.*_)?vocab_size.*|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"num_key_value_heads|num_kv_heads|multi_query_group_num|.*_key_value_heads", 2),
    (r"num_attention_heads|n_heads?|num_heads|.*attention_heads|.*_num_heads|mamba_n_heads|mamba_num_heads|n_mamba_heads", 4),
    (r"hidden_size|d_model|n_embd|embed_dim|dim|dim_model|word_embed_proj_dim|embedding_size|emb_dim|n_embed|model_dim", 32),
    (r"attention_hidden_size|hidden_dim|lru_width|input_embedding_size|output_embedding_size", 32),
    (r"hidden_size_per_layer_input|laurel_rank|adapter_rank", 8),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size)|n_inner|dim_ff|dff|d_ff|feed_forward_size|block_ff_dim", 48),
    (r"mamba_d_head|mamba_head_?dim", 16),
    (r"(.*_)?head_dim|kv_channels|d_kv|d_head|dim_head|attention_head_size", 8),
    (r"rotary_dim", 4),
    (r".*_lora_rank", 16),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_moe_experts", 4),
    (r"num_experts_per_tok(en)?|moe_k|moe_top_k|top_k_experts|moe_topk", 2),
    (r"n_group|topk_group|n_groups|num_expert_group", 1),
    (r"sliding_window(_size)?|window_size|attention_window(_size)?", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_sequence_length|max_seq_len|max_target_positions", 64),
    (r"num_kv_shared_layers", 2),
    (r"mamba_d_state|state_size|d_state", 8),
]
UNSET = {"num_key_value_heads": 4, "head_dim": 8, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1}
UNSET |= {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4}
# What names do not tell: how sizes have to fit each other, and what a family has no default for.
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 16},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "reformer": {"attn_layers": ["local", "lsh"] * 2, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "hybrid_layer_ids": [1, 3], "mamba_headdim": 16},
    "zaya": {"num_experts_per_tok": 1},
}
# What makes all blocks of a family of experts dense.
DENSE: dict[str, Any] = {
    "first_k_dense_replace": N_BLOCKS,
    "num_dense_layers": N_BLOCKS,
    "mlp_only_layers": list(range(N_BLOCKS)),
    "mlp_layer_types": ["dense"] * N_BLOCKS,
}


def shrunk(config: PretrainedConfig, unset: bool) -> dict[str, Any]:
    """The arguments of a small configuration of the same class; `unset` gives a value to what has none, too."""
    given, depth = config.to_dict(), getattr(config, "num_hidden_layers", None)
    small: dict[str, Any] = {}
    for key, value in given.items():
        size = next((size for pattern, size in SMALL if re.fullmatch(pattern, key)), None)
        if key.endswith(("_token_id", "_token_index")):
            ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            small[key] = None if value is None else ids.get(key, VOCABULARY - 1)
        elif isinstance(value, list) and len(value) == depth:
            small[key] = _each_kind(value)
        elif size is not None and value and isinstance(value, int) and not isinstance(value, bool):
            small[key] = size
        elif value is None and unset and key in UNSET:
            small[key] = UNSET[key]
    if "is_decoder" in given:
        small["is_decoder"] = True
    if given.get("num_key_value_heads") and given["num_key_value_heads"] == given.get("num_attention_heads"):
        small["num_key_value_heads"] = small["num_attention_heads"]
    return small


def _each_kind(per_block: list[Any]) -> list[Any]:
    """Four entries of a list per block, with as many of its kinds as there is room for."""
    kinds = {repr(entry): entry for entry in per_block}
    return [list(kinds.values())[i % len(kinds)] for i in range(N_BLOCKS)]


def tiny_config(family: str, dense: bool = False, unset: bool = False) -> PretrainedConfig:
    """A configuration of the family with four blocks of a few thousand weights."""
    kind = CONFIG_MAPPING[family]
    default = kind()
    arguments = shrunk(default, unset)
    for name in getattr(default, "sub_configs", {}):
        if isinstance(sub := getattr(default, name, None), PretrainedConfig):
            text = sub is default.get_text_config()
            arguments[name] = shrunk(sub, unset) | ({} if text else {"num_hidden_layers": 2})
            arguments[name] |= {k: v for k, v in DENSE.items() if dense and text and hasattr(sub, k)}
    arguments |= OWN.get(family, {}) | {k: v for k, v in DENSE.items() if dense and hasattr(default, k)}
    return kind(**{k: v for k, v in arguments.items() if k not in ("model_type", "transformers_version")})


def tiny_model(family: str, dense: bool) -> Any:
    """A random model of the family."""
    torch.manual_seed(0)
    try:
        return AutoModelForCausalLM.from_config(tiny_config(family, dense), dtype=torch.float32).eval()
    except (TypeError, ValueError, AttributeError):  # some sizes have no default
        return AutoModelForCausalLM.from_config(tiny_config(family, dense, unset=True), dtype=torch.float32).eval()


def make(family: str, folder: Path) -> str:
    """Save a tiny random model of a family, or of one and `, dense`; returns the name of its class."""
    name, _, dense = family.partition(", ")
    model = tiny_model(name, bool(dense))
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


def pruned(folder: Path, pruner: Pruner) -> LanguageModel:
    lm = load(folder)
    prune_model(lm, Budget(lm.block_params, 0.5).uniform(), pruner, TOKENS)
    return lm


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=torch.as_tensor(TOKENS), use_cache=False).logits
    return out


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


def tried(folder: Path, scratch: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """The checks by name, in order."""
    expected, rows = plain(folder), coalitions(N_BLOCKS)

    @functools.cache
    def lm() -> LanguageModel:
        return load(folder)

    @functools.cache
    def values() -> np.ndarray:
        return LayerGame(load(folder), TOKENS)(rows)

    def walk() -> str:
        """The loss by blocks is the model's own, up to the rounding of products of other sizes."""
        text = torch.as_tensor(TOKENS)
        own = -expected.double().log_softmax(-1)[:, :-1].gather(-1, text[:, 1:, None])[..., 0].mean(1).numpy()
        found = lm().nll(TOKENS)
        return "equal" if np.allclose(found, own, rtol=1e-5, atol=1e-5) else compared(found, own)

    def order() -> str:
        game = LayerGame(lm(), TOKENS)
        return compared(np.concatenate([game(row[None]) for row in rows[::-1]])[::-1], values())

    def shards() -> str:
        parts = np.zeros(len(rows))
        for part in (slice(0, None, 2), slice(1, None, 2)):
            parts[part] = LayerGame(lm(), TOKENS)(rows[part])
        return compared(parts, values())

    def bitmask() -> str:
        sparse = pruned(folder, Magnitude())
        sparse.save(scratch / "bitmask", "bitmask")
        return compared(logits(load(scratch / "bitmask").model), logits(sparse.model))

    def offloaded(where: Offload) -> str:
        return compared(logits(load(folder, offload=where).model), expected)

    def reload() -> str:
        sparse = pruned(folder, Wanda())
        sparse.save(scratch / "pruned")
        if (said := compared(plain(scratch / "pruned"), logits(sparse.model))) != "equal":
            return f"logits {said}"
        return compared(load(scratch / "pruned").nll(TOKENS), sparse.nll(TOKENS))

    yield "none", lambda: compared(logits(lm().model), expected)
    for where in typing.get_args(Offload)[1:]:
        yield where, functools.partial(offloaded, where)
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
            except Exception as error:
                raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
                line = isinstance(error, ValueError) and raised.is_relative_to(Path(svnup.__file__).parent)
                row[name] = "refused" if line else type(error).__name__  # what a user would see as a traceback
                reasons.append(one_line(error) if line else f"{name}: {type(error).__name__}: {one_line(error)}")
    said, run = {row[name] for name in CHECKS}, {row[name] for name in CHECKS if name not in LOADING}
    wrong = said - {"equal", "refused"}
    row["verdict"] = "wrong" if wrong else "works" if said == {"equal"} else "refused" if run == {"refused"} else "in part"
    return row | {"reason": "; ".join(dict.fromkeys(reasons))}


def _examine_into(family: str, pipe: Any) -> None:
    torch.set_num_threads(1)  # makes torch's pool of threads anew: threads that do so at the same time may find none
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
            out: dict[str, str] = here.recv()
            return out
        return {"family": family, "verdict": "wrong", "reason": f"not done after {seconds:g} s"}
    except EOFError:
        return {"family": family, "verdict": "wrong", "reason": "the process died"}
    finally:
        process.kill()
        process.join()


def families() -> list[str]:
    """All names of families, those that can be dense instead of a mixture of experts twice."""
    names = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return names + [f"{name}, dense" for name in names if _may_be_dense(CONFIG_MAPPING[name])]


def _may_be_dense(kind: type[PretrainedConfig]) -> bool:
    kinds = [kind, *(sub for sub in kind.sub_configs.values() if hasattr(sub, "__dataclass_fields__"))]
    return any(key in kind.__dataclass_fields__ for kind in kinds for key in DENSE)


def read(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row["family"]: row for row in csv.DictReader(file)}


def write(path: Path, rows: dict[str, dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = [rows[name] for name in sorted(rows)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    path.with_suffix(".md").write_text(markdown(ordered), encoding="utf-8")


def markdown(rows: list[dict[str, str]]) -> str:
    """The table for people: what works, and of everything else why not."""
    counts = Counter(row["verdict"] for row in rows)
    lines = [
        "# Causal families of transformers",
        "",
        f"A tiny random model of each family that transformers {transformers.__version__} knows, tried by `make families`: "
        + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
        + ".",
        "",
        "| verdict | meaning |",
        "| --- | --- |",
        *(f"| {verdict} | {meaning} |" for verdict, meaning in VERDICTS.items()),
        "",
        "The checks: logits with offload=none, cpu, disk and from a bitmask checkpoint, against plain transformers; the loss "
        "block by block; coalition values in any order and in shards; prune, save and reload.",
        "",
        "| family | class | verdict | which checks, and why |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        odd = [f"{name}: {row[name]}" for name in CHECKS if row.get(name) not in ("equal", None, "")]
        told = "; ".join(odd) if row["verdict"] in ("wrong", "in part") else ""
        why = ". ".join(part for part in (told, row.get("reason", "")) if part).replace("|", "\\|")
        lines.append(f"| {row['family']} | {row.get('class', '')} | {row['verdict']} | {why} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="try these again; default: all that are not in the csv")
    parser.add_argument("--again", action="store_true", help="try all again")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--seconds", type=float, default=120, help="time for one family")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {} if options.again else read(options.output)
    todo = options.families or [name for name in families() if name not in rows]
    for k, family in enumerate(todo):
        rows[family] = row = apart(family, options.seconds)
        write(options.output, rows)
        said = f"{k + 1}/{len(todo)} {family}: {row['verdict']}. {row.get('reason', '')[:150]}"
        print(said, file=sys.stderr, flush=True)
    sys.exit(any(row["verdict"] == "wrong" for row in rows.values()))


if __name__ == "__main__":
    main()

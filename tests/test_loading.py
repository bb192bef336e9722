"""Every form of checkpoint is the model that plain transformers makes of it, in memory and on disk, or is refused in a line."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES
from models import family_model as random_family
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    FineGrainedFP8Config,
)
from transformers.utils import logging as transformers_logging

from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.model.loading import Loader
from svnup.pruning import apply_masks, save_masks
from svnup.pruning.walk import prune_model
from svnup.pruning.wanda import Wanda
from svnup.types import SparsityProfile

TEXT = np.random.default_rng(11).integers(10, 97, size=(2, 12))
WAYS = ("none", "disk")


class NoTokenizer:
    def save_pretrained(self, folder):
        return None


def load(folder, offload="none", **options):
    return LanguageModel.load(str(folder), tokenizer=NoTokenizer(), device="cpu", offload=offload, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(TEXT)).logits


def edit_json(folder: Path, **values: Any) -> None:
    """Set names of config.json; those of None go."""
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8")) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}), "utf-8")


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write other tensors in place of those of the one file that a checkpoint has."""
    file = folder / "model.safetensors"
    save_file({n: t.clone().contiguous() for n, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def without(*parts: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


# -- forms of checkpoints, each made in a folder of a random model of a family


def single(family: str, folder: Path, **changes: Any) -> None:
    random_family(family, **changes).model.save_pretrained(folder)


def shards(family: str, folder: Path) -> None:
    random_family(family).model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def bfloat16(family: str, folder: Path) -> None:
    random_family(family).model.to(torch.bfloat16).save_pretrained(folder)


def no_dtype(family: str, folder: Path) -> None:
    bfloat16(family, folder)
    edit_json(folder, dtype=None, torch_dtype=None)


def base_model(family: str, folder: Path) -> None:
    random_family(family, tie_word_embeddings=False).model.base_model.save_pretrained(folder)


def tied_base_model(family: str, folder: Path) -> None:
    random_family(family, tie_word_embeddings=True).model.base_model.save_pretrained(folder)


def without_prefix(family: str, folder: Path) -> None:
    """As GPT-2 and BLOOM are on the hub."""
    lm = random_family(family)
    lm.model.save_pretrained(folder)
    edit(folder, lambda tensors: {n.removeprefix(f"{lm.model.base_model_prefix}."): t for n, t in tensors.items()})


def tied(family: str, folder: Path) -> None:
    single(family, folder, tie_word_embeddings=True)


def tied_but_both_stored(family: str, folder: Path) -> None:
    """And not the same: transformers goes by what is stored."""
    single(family, folder, tie_word_embeddings=False)
    edit_json(folder, tie_word_embeddings=True)


def tied_by_the_head(family: str, folder: Path) -> None:
    tied_but_both_stored(family, folder)
    edit(folder, without("embed_tokens.weight", "wte.weight", "embed_in.weight"))


def fp8(family: str, folder: Path) -> None:
    """Linears of blocks in eight bits, with a scale for each tile of 16 x 16."""
    bfloat16(family, folder)

    def quantized(tensors):
        out = {}
        for name, t in tensors.items():
            if "layers." not in name or t.dim() != 2:
                out[name] = t
                continue
            tiles = t.float().view(t.shape[0] // 16, 16, t.shape[1] // 16, 16)
            scale = tiles.abs().amax((1, 3), keepdim=True) / 448
            out[name] = (tiles / scale).view(t.shape).to(torch.float8_e4m3fn)
            out[f"{name}_scale_inv"] = scale[:, 0, :, 0].float()
        return out

    edit(folder, quantized)
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    edit_json(folder, quantization_config=method)


def fp8_unsaid(family: str, folder: Path) -> None:
    fp8(family, folder)
    edit_json(folder, quantization_config=None)


def gptq(family: str, folder: Path) -> None:
    single(family, folder)
    edit_json(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def fewer_layers_said(family: str, folder: Path) -> None:
    single(family, folder)
    edit_json(folder, num_hidden_layers=3, layer_types=None)


def more_layers_said(family: str, folder: Path) -> None:
    single(family, folder)
    edit_json(folder, num_hidden_layers=5, layer_types=None)


def other_width_said(family: str, folder: Path) -> None:
    single(family, folder)
    edit_json(folder, intermediate_size=64)


def classifier(family: str, folder: Path) -> None:
    config = random_family(family, tie_word_embeddings=False).model.config
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


def more_biases(family: str, folder: Path) -> None:
    single(family, folder)
    edit(folder, lambda ts: ts | {"model.layers.1.self_attn.o_proj.bias": torch.ones(32)})


def other_norms(family: str, folder: Path) -> None:
    single(family, folder)
    edit(folder, lambda ts: ts | {"model.layers.0.self_attn.q_extra_norm.weight": torch.ones(8)})


def no_last_norm(family: str, folder: Path) -> None:
    single(family, folder)
    edit(folder, without("model.norm.weight"))


def a_head_for_later_tokens(family: str, folder: Path) -> None:
    single(family, folder)
    edit(folder, lambda ts: ts | {"mtp.layers.0.proj.weight": torch.ones(3, 3), "v_head.bias": torch.ones(1)})


def stale_buffers(family: str, folder: Path) -> None:
    single(family, folder)
    old = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-9),
    }
    edit(folder, lambda ts: ts | old)


def bitmask(family: str, folder: Path) -> None:
    lm = random_family(family)
    lm.tokenizer = NoTokenizer()
    lm.save(folder, "bitmask")


def pickled(family: str, folder: Path) -> None:
    single(family, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


QUICK = ("llama", "gpt2", "gemma3_text_mixed")
EVERY = [*QUICK, *(pytest.param(f, marks=pytest.mark.slow) for f in ("opt", "gpt_neox", "bloom", "phi3", "qwen2"))]
FORMS = [(form, family, None) for form in (single, shards, bfloat16, no_dtype, tied_base_model, tied) for family in QUICK]
FORMS += [(without_prefix, family, None) for family in ("llama", "gpt2", "bloom", "opt")]
FORMS += [(tied_but_both_stored, family, None) for family in ("llama", "gpt_neox", "gpt2")]
FORMS += [(tied_by_the_head, family, None) for family in ("llama", "gpt_neox", "gpt2")]
FORMS += [(form, "llama", None) for form in (fp8, a_head_for_later_tokens, stale_buffers)]
FORMS += [(base_model, family, r"lacks (lm_head|embed_out)\.weight, .*causal") for family in ("llama", "gpt_neox", "opt")]
FORMS += [
    (fp8_unsaid, "llama", r"has model\.layers\.0\.\S+_scale_inv, .* and 25 more tensors, which .* does not have"),
    (gptq, "llama", r"quantized by gptq.*choose the checkpoint that was quantized"),
    (fewer_layers_said, "llama", r"has model\.layers\.3\..* and 6 more tensors, which .* does not have"),
    (fewer_layers_said, "gpt_neox", r"has gpt_neox\.layers\.3\..* does not have"),
    (more_layers_said, "llama", r"lacks model\.layers\.4\..* and 6 more tensors"),
    (
        other_width_said,
        "llama",
        r"down_proj\.weight has shape \[32, 48\].*\[32, 64\] by config\.json, and so differ 11 more",
    ),
    (classifier, "llama", r"lacks lm_head\.weight"),
    (more_biases, "llama", r"has model\.layers\.1\.self_attn\.o_proj\.bias, which the model"),
    (other_norms, "llama", r"has model\.layers\.0\.self_attn\.q_extra_norm\.weight, which the model"),
    (no_last_norm, "llama", r"lacks model\.norm\.weight, which the model needs"),
]
NAMES = [f"{form.__name__}-{family}" for form, family, _ in FORMS]


def plain(folder: Path) -> Any:
    """As transformers loads it, dequantized on any machine."""
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text("utf-8"))
    options = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if quantized else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("form", "family", "refusal"), FORMS, ids=NAMES)
def test_a_form_of_checkpoint_is_read_alike_or_refused(form, family, refusal, tmp_path):
    form(family, tmp_path / "m")
    if refusal is None:
        expected = logits(plain(tmp_path / "m"))
        models = [load(tmp_path / "m", way) for way in WAYS]
        for lm in models:
            assert torch.equal(logits(lm.model), expected)
            assert not any(b.is_meta for b in lm.model.buffers())
        assert models[0].fingerprint() == models[1].fingerprint()
        Loader(source=str(tmp_path / "m")).check()
        return
    loader = Loader(source=str(tmp_path / "m"))
    for read in (loader.check, lambda: load(tmp_path / "m"), lambda: load(tmp_path / "m", "disk")):
        with pytest.raises(ValueError, match=refusal) as error:
            read()
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("family", EVERY)
def test_bits_and_what_is_saved_of_a_model_on_disk_are_the_model(family, tmp_path):
    bitmask(family, tmp_path / "bits")
    single(family, tmp_path / "plain")
    lm = load(tmp_path / "plain")
    for way in WAYS:
        other = load(tmp_path / "bits", way)
        assert other.fingerprint() == lm.fingerprint()
        assert torch.equal(logits(other.model), logits(lm.model))
    for number, form in enumerate(("dense", "bitmask")):
        other.save(tmp_path / form, form)
        assert load(tmp_path / form, WAYS[number]).fingerprint() == lm.fingerprint()
    assert torch.equal(logits(plain(tmp_path / "dense")), logits(lm.model))


def test_eight_bits_are_plain_weights_once_they_are_read(tmp_path):
    fp8("llama", tmp_path / "m")
    lm, disk = (load(tmp_path / "m", way) for way in WAYS)
    for number, one in enumerate((lm, disk)):
        prune_model(one, SparsityProfile([0.5] * 4, one.block_params, 0.5), Wanda(), TEXT)
        one.save(tmp_path / f"{number}")
        config = json.loads((tmp_path / f"{number}" / "config.json").read_text("utf-8"))
        assert "quantization_config" not in config
        assert load(tmp_path / f"{number}").fingerprint() == one.fingerprint()
    assert lm.fingerprint() == disk.fingerprint()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_left_out_is_told_in_one_line(way, tmp_path, caplog, monkeypatch):
    """Of ours alone: the library has a report of many lines, for people at a terminal."""
    a_head_for_later_tokens("llama", tmp_path / "m")
    monkeypatch.setattr(transformers_logging.get_logger(), "propagate", True)  # to caplog
    Loader(source=str(tmp_path / "m")).check()
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "m", way)
    (record,) = caplog.records
    assert record.name == "svnup.model.loading"
    assert "mtp.layers.0.proj.weight, v_head.bias does not belong to the language model" in record.message
    assert "\n" not in record.message
    assert transformers_logging.get_verbosity() == logging.WARNING


def test_pickled_checkpoints_are_read_whole_alone(tmp_path):
    pickled("llama", tmp_path / "m")
    Loader(source=str(tmp_path / "m")).check()  # knows nothing before it reads
    assert torch.equal(logits(load(tmp_path / "m").model), logits(plain(tmp_path / "m")))
    with pytest.raises(ValueError, match=r"no safetensors checkpoint.*offload=none"):
        load(tmp_path / "m", "disk")
    state = torch.load(tmp_path / "m" / "pytorch_model.bin")
    state.pop("model.norm.weight")
    torch.save(state, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        load(tmp_path / "m")


# -- damaged files


def cut(path: Path, share: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


POINTS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


def break_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")


DAMAGE = {
    "cut": (single, lambda f: cut(f / "model.safetensors"), r"model\.safetensors.*copy the checkpoint again"),
    "cut to the header": (single, lambda f: cut(f / "model.safetensors", 0.001), r"model\.safetensors.*copy the checkpoint"),
    "empty": (single, lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors.*copy the checkpoint"),
    "no file at all": (single, lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
    "a pointer": (single, lambda f: (f / "model.safetensors").write_bytes(POINTS), r"model\.safetensors .*git lfs pull"),
    "a pointer for config": (single, lambda f: (f / "config.json").write_bytes(POINTS), r"config\.json .*git lfs pull"),
    "a shard cut": (shards, lambda f: cut(next(f.glob("*-00002-*"))), r"model-00002.*copy the checkpoint"),
    "a shard lost": (shards, lambda f: next(f.glob("*-00002-*")).unlink(), r"model-00002-of"),
    "an index cut": (shards, lambda f: cut(f / "model.safetensors.index.json"), r"cannot be loaded|index\.json"),
    "an index of nothing": (shards, lambda f: break_index(f, lambda _: {}), r"weight_map"),
    "an index that is a list": (shards, lambda f: break_index(f, lambda _: []), r"cannot be loaded|index\.json"),
    "config that is a list": (single, lambda f: (f / "config.json").write_text("[1]"), r"config"),
    "config cut": (single, lambda f: cut(f / "config.json"), r"config"),
    "config in bytes": (single, lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), r"config"),
    "layers in words": (single, lambda f: edit_json(f, num_hidden_layers="twelve"), r"num_hidden_layers|config"),
    "width in words": (single, lambda f: edit_json(f, hidden_size="wide"), r"hidden_size|config"),
    "no model type": (single, lambda f: edit_json(f, model_type=None, architectures=None), r"model_type"),
    "unknown model type": (single, lambda f: edit_json(f, model_type="lama"), r"lama"),
    "unknown dtype": (single, lambda f: edit_json(f, dtype="float33"), r"float33"),
    "unknown activation": (single, lambda f: edit_json(f, hidden_act="gelou"), r"gelou"),
    "heads that do not divide": (single, lambda f: edit_json(f, num_attention_heads=5, head_dim=None), r"."),
    "no decoder": (single, lambda f: edit_json(f, model_type="clip_vision_model"), r"model_type=clip_vision_model.*decoder"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line_that_names_what_is_wrong(case, tmp_path):
    form, damage, says = DAMAGE[case]
    folder = tmp_path / "m"
    form("llama", folder)
    damage(folder)
    for way in WAYS:
        with pytest.raises(ValueError, match=says) as error:
            load(folder, way)
        assert len(str(error.value).splitlines()) == 1
        assert len(str(error.value)) < 700
        assert str(error.value).startswith(("pretrained_model_name_or_path=", "model_type="))
        assert str(error.value).count("pretrained_model_name_or_path=") <= 1


CONFIGURED = {
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "not a JSON object"),
    "a pointer": (lambda f: (f / "config.json").write_bytes(POINTS), "git lfs pull"),
    "layers in words": (lambda f: edit_json(f, num_hidden_layers="twelve"), "'num_hidden_layers'"),
    "no layers": (lambda f: edit_json(f, num_hidden_layers=0), "num_hidden_layers=0"),
    "positions in words": (lambda f: edit_json(f, max_position_embeddings="many"), "'max_position_embeddings'"),
    "a part that is none": (lambda f: edit_json(f, text_config="text"), "num_hidden_layers=None in config.json"),
    "another width": (lambda f: edit_json(f, intermediate_size=160), "and so differ"),
    "a layer less": (lambda f: edit_json(f, num_hidden_layers=2), "has model.layers.2"),
    "weights cut": (lambda f: cut(f / "model.safetensors"), "copy the checkpoint again"),
    "a tokenizer cut": (lambda f: cut(f / "tokenizer.json"), "tokenizer"),
}


@pytest.mark.parametrize("case", CONFIGURED)
def test_the_command_refuses_before_it_starts(case, random_model, svnup_on, tmp_path):
    damage, says = CONFIGURED[case]
    random_model(n_blocks=3).save(tmp_path / "m")
    damage(tmp_path / "m")
    code, said = svnup_on(tmp_path / "m")
    assert code == 2, said
    assert "Traceback" not in said
    line = said.rstrip("\n").splitlines()[-1]
    assert line.startswith("svnup: ")
    assert says in line
    assert not Path("results").exists()


# -- vision-language models

PART = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SEEN = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
SEEN |= {"num_hidden_layers": 3}  # as deep as the language model
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN = {"depth": 3, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
QWEN |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
VISION = {
    "llava": {
        "text_config": PART | {"model_type": "llama"},
        "vision_config": SEEN | {"model_type": "clip_vision_model"},
        "image_token_index": 5,
    },
    "mistral3": {
        "text_config": PART | {"model_type": "mistral"},
        "vision_config": SEEN | {"model_type": "pixtral"},
        "image_token_index": 5,
    },
    "qwen3_vl": {
        "text_config": PART | {"model_type": "qwen3_vl_text", "rope_parameters": MROPE},
        "vision_config": QWEN,
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 7,
        "vision_end_token_id": 8,
    },
    "smolvlm": {"text_config": PART | {"model_type": "llama"}, "vision_config": SEEN, "image_token_id": 5, "pad_token_id": 0},
    "gemma3": {
        "text_config": PART | {"model_type": "gemma3_text", "sliding_window": 8, "query_pre_attn_scalar": 8},
        "vision_config": SEEN | {"model_type": "siglip_vision_model"},
        "image_token_index": 5,
        "mm_tokens_per_image": 1,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", VISION)
def test_the_language_model_of_a_vision_language_model_is_pruned_and_the_rest_is_kept(kind, tmp_path):
    config = AutoConfig.for_model(kind, **VISION[kind])
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for name, p in model.named_parameters():
        if p.ndim == 2 and "embed" not in name:
            p.data *= 5  # loud enough for every block to matter
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").write_text('{"size": 28}')
    expected = -logits(model).double().log_softmax(-1)[:, :-1].gather(-1, torch.as_tensor(TEXT)[:, 1:, None])[..., 0].mean(1)
    before = AutoModelForImageTextToText.from_pretrained(tmp_path / "m").state_dict()
    lms = [load(tmp_path / "m", way) for way in WAYS]
    for lm in lms:
        np.testing.assert_allclose(lm.nll(TEXT), expected.numpy(), atol=1e-5)
        assert np.array_equal(lm.nll(TEXT), lms[0].nll(TEXT))
    coalitions = np.array([[True, False, True], [False, True, True]])
    values = [LayerGame(lm, TEXT)(coalitions) for lm in lms]
    assert np.array_equal(*values)
    assert values[0][0] != values[0][1]
    for way, lm in zip(WAYS, lms, strict=True):
        prune_model(lm, SparsityProfile([0.5] * 3, lm.block_params, 0.5), Wanda(), TEXT)
        lm.save(tmp_path / way)
        again, info = AutoModelForImageTextToText.from_pretrained(tmp_path / way, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert (tmp_path / way / "preprocessor_config.json").read_text() == '{"size": 28}'
        after = again.state_dict()
        assert {n for n in after if not torch.equal(after[n], before[n])} == set(lm.pruned_names())
        lm.save(tmp_path / f"{way}-bits", "bitmask")
        assert load(tmp_path / f"{way}-bits", way).fingerprint() == lms[0].fingerprint()
    save_masks(lms[0], tmp_path / "masks")
    fresh = load(tmp_path / "m")
    apply_masks(fresh.model, tmp_path / "masks")
    assert torch.equal(logits(fresh.model), logits(lms[0].model))


def test_every_family_of_the_tests_keeps_its_class():
    """A config that has a causal language model of its own is not read as another kind of model."""
    for family in FAMILIES:
        assert type(random_family(family).model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

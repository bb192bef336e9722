"""Walking block by block is the model's own forward, in every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILIES, GROUPED, OPT
from models import family_model as load
from torch import nn
from transformers.pytorch_utils import Conv1D

from svnup.allocation import Budget
from svnup.game import LayerGame
from svnup.model.blocks import replaced
from svnup.model.language_model import LanguageModel, make_config, pick_device
from svnup.model.loading import Loader
from svnup.model.source import Random
from svnup.pruning import prune_model
from svnup.pruning.sparsegpt import SparseGPT
from svnup.shapley import all_coalitions


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(3).integers(3, 97, size=(3, 16))


def own_nll(lm, tokens):
    """Loss of every next token by one forward of the model itself, float64 (n_seq, seq_len - 1)."""
    rows = torch.as_tensor(tokens)
    with torch.no_grad():
        logits = lm.model(input_ids=rows).logits.double()
    return -logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].numpy()


def walked_nll(lm, tokens, batch_tokens=None):
    out = []
    with torch.inference_mode():
        for batch in lm.micro_batches(tokens, batch_tokens):
            for index in range(lm.n_blocks):
                batch = lm.run_block(index, batch)
            out.append(lm.token_nll(batch))
    return torch.cat(out).double().numpy()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_walking_is_the_models_own_forward(family, text):
    lm = load(family)
    expected = own_nll(lm, text)
    assert expected.std() > 0.02  # a model that says something
    np.testing.assert_allclose(walked_nll(lm, text), expected, atol=2e-5)
    np.testing.assert_allclose(walked_nll(lm, text, batch_tokens=16), expected, atol=2e-5)
    np.testing.assert_allclose(lm.nll(text), expected.mean(axis=1), atol=2e-5)
    seen = []
    for visit in lm.walk(text):
        seen.append(visit.index)
        if visit.index == lm.n_blocks - 1:
            visit.run(advance=True)
            losses = [lm.token_nll(batch) for batch in visit.batches]
    assert seen == [0, 1, 2, 3]
    np.testing.assert_allclose(torch.cat(losses).double().numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_linears_are_found(family):
    lm = load(family)
    assert lm.n_blocks == 4
    assert len(lm.blocks) == 4
    for index in range(4):
        linears = lm.linears(index)
        assert linears
        assert all(isinstance(m, Conv1D if family == "gpt2" else nn.Linear) for m in linears.values())
        inside = {id(p) for p in lm.blocks[index].parameters()}
        assert all(id(m.weight) in inside for m in linears.values())
    matrices = sum(p.numel() for n, p in lm.blocks[0].named_parameters() if p.ndim == 2)
    assert lm.block_params.tolist() == [matrices] * 4


@pytest.mark.parametrize(
    ("family", "wide"),
    [
        ("mistral_window", {"sliding_window": None}),
        ("qwen2_mixed", {"layer_types": ["full_attention"] * 4}),
        ("gemma2_mixed", {"layer_types": ["full_attention"] * 4}),
        ("gemma3_text_mixed", {"layer_types": ["full_attention"] * 4}),
    ],
)
def test_windows_shorter_than_the_text_matter_here(family, wide, text):
    narrow, full = walked_nll(load(family), text), walked_nll(load(family, **wide), text)
    np.testing.assert_allclose(
        narrow[:, :3], full[:, :3], atol=2e-5 if "gemma3" not in family else 10
    )  # gemma3: other rotary base
    assert np.abs(narrow[:, 8:] - full[:, 8:]).max() > 0.01


def test_blocks_get_masks_of_their_own_where_layer_types_are_mixed(text):
    lm = load("gemma2_mixed")
    (batch,) = lm.micro_batches(text)
    masks = [kwargs["attention_mask"] for _, kwargs in batch.calls]
    assert masks[0] is not None
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2_mixed", "gpt_neox"])
def test_a_block_that_is_changed_during_a_walk_passes_on_what_it_now_is(family, text):
    lm = load(family)
    for visit in lm.walk(text):
        for linear in visit.linears.values():
            linear.weight.mul_(0.5)
        last = visit
    last.run(advance=True)
    with torch.inference_mode():
        losses = torch.cat([lm.token_nll(batch) for batch in last.batches])
    np.testing.assert_allclose(losses.double().numpy(), own_nll(lm, text), atol=2e-5)
    assert np.abs(own_nll(lm, text) - own_nll(load(family), text)).max() > 0.01


def test_every_block_runs_once_per_walk_and_the_last_not_at_all(text):
    lm = load("llama")
    runs = [0] * 4
    lm.nll(text)  # the first use asks the blocks what they return
    for index, block in enumerate(lm.blocks):
        block.mlp.register_forward_hook(lambda m, args, out, index=index: runs.__setitem__(index, runs[index] + 1))
    for _ in lm.walk(text):
        pass
    assert runs == [1, 1, 1, 0]
    for visit in lm.walk(text):
        visit.run(advance=True)
    assert runs == [2, 2, 2, 1]


def test_many_tokens_go_through_the_head_in_parts(monkeypatch, text):
    monkeypatch.setattr("svnup.model.language_model.HEAD_TOKENS", 7)
    lm = load("llama")
    np.testing.assert_allclose(walked_nll(lm, text), own_nll(lm, text), atol=2e-5)


def test_micro_batches_hold_at_least_a_sequence():
    lm = load("llama")
    tokens = np.arange(3, 63).reshape(5, 12)
    assert [len(b.tokens) for b in lm.micro_batches(tokens, batch_tokens=24)] == [2, 2, 1]
    assert [len(b.tokens) for b in lm.micro_batches(tokens, batch_tokens=1)] == [1] * 5
    assert [len(b.tokens) for b in lm.micro_batches(tokens)] == [5]
    assert torch.equal(torch.cat([b.tokens for b in lm.micro_batches(tokens, 24)]), torch.as_tensor(tokens))


def test_replaced_forwards_come_back():
    lm = load("llama")
    own = lm.blocks[1]
    x = torch.zeros(1)

    def earlier(*args, **kwargs):  # as accelerate leaves it
        return "earlier"

    own.forward = earlier
    with replaced({lm.blocks[0]: lambda *a: "new", own: lambda *a: "new"}):
        assert (lm.blocks[0](x), own(x)) == ("new", "new")
    assert "forward" not in vars(lm.blocks[0])
    assert own.forward is earlier
    with pytest.raises(KeyError), replaced({lm.blocks[0]: lambda *a: "new", own: lambda *a: "new"}):
        raise KeyError
    assert "forward" not in vars(lm.blocks[0])
    assert own.forward is earlier


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text_mixed"])
def test_a_model_that_accelerate_spreads_is_the_model(family, text):
    """With the hooks of a map over several GPUs, here all of them the CPU."""
    from accelerate import dispatch_model

    plain, spread = load(family), load(family)
    places = {name: "cpu" for name, m in spread.model.named_modules() if not list(m.children())}
    places |= {f"{spread.blocks_path}.{index}": "cpu" for index in range(spread.n_blocks)}
    places = {n: p for n, p in places.items() if not any(n.startswith(f"{other}.") for other in places)}
    lm = LanguageModel(dispatch_model(spread.model, places, main_device="cpu", force_hooks=True))
    assert "forward" in vars(lm.blocks[0]), "accelerate has it"
    np.testing.assert_array_equal(lm.nll(text), plain.nll(text))
    games = [LayerGame(one, text) for one in (plain, lm)]
    np.testing.assert_array_equal(*[game(all_coalitions(4)[::3]) for game in games])
    for one in (plain, lm):
        prune_model(one, Budget(one.block_params, 0.5, "unstructured").uniform(), SparseGPT(), text)
    np.testing.assert_array_equal(lm.nll(text), plain.nll(text))
    assert "forward" in vars(lm.blocks[0])


def test_a_model_that_does_not_fit_the_gpus_is_refused(tmp_path, monkeypatch):
    """Accelerate would keep the rest on the CPU or on disk, and bring it for each use."""
    load("llama").model.save_pretrained(tmp_path)
    read = Loader.load

    def partly(loader):
        model = read(loader)
        model.model.layers[3].to("meta")
        return model

    monkeypatch.setattr(Loader, "load", partly)
    with pytest.raises(ValueError, match=r"model\.device_map=auto: the model does not fit the GPUs at hand; use more"):
        LanguageModel.load(str(tmp_path), tokenizer=object(), device_map="auto")


def test_the_model_is_as_it_was_after_an_error_inside(text):
    lm = load("llama")
    expected = own_nll(lm, text)
    with pytest.raises(IndexError):
        list(lm.micro_batches(np.full((1, 8), 10_000)))  # no such token
    (batch,) = lm.micro_batches(text)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        lm.token_nll(replace(batch, hidden=torch.zeros(1, 2, 5)))  # no such width
    assert not any("forward" in vars(m) for m in lm.model.modules())
    np.testing.assert_array_equal(own_nll(lm, text), expected)


def test_blocks_path_is_the_way_out():
    config = make_config("llama", **GROUPED)
    model = LanguageModel.random(config, None, seed=0, device="cpu").model
    assert LanguageModel(model, blocks_path="model.layers").blocks is model.model.layers
    for path in ("model.nothing", "model.norm"):
        with pytest.raises(ValueError, match=rf"model\.blocks_path={path}: no such ModuleList.*model\.layers"):
            LanguageModel(model, blocks_path=path)
    model.model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    with pytest.raises(ValueError, match=r"2 ModuleLists of length num_hidden_layers=4.*model\.blocks_path"):
        LanguageModel(model)
    assert LanguageModel(model, blocks_path="model.layers").n_blocks == 4
    config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"0 ModuleLists of length num_hidden_layers=5.*model\.blocks_path"):
        LanguageModel(model)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_saved_models_come_back_to_the_same_logits(random_model, tmp_path, tokens, model_type):
    lm = random_model(2, model_type=model_type)
    with torch.no_grad():
        lm.linears(1)["self_attn.q_proj"].weight[:4] = 0
    lm.save(tmp_path / "model")
    again = LanguageModel.load(str(tmp_path / "model"), device="cpu")
    rows = torch.as_tensor(tokens)
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=rows).logits, lm.model(input_ids=rows).logits)
    assert again.tokenizer("some text")["input_ids"] == lm.tokenizer("some text")["input_ids"]
    assert again.dtype == "float32"
    assert LanguageModel.load(str(tmp_path / "model"), device="cpu", dtype="bfloat16").dtype == "bfloat16"
    assert {p.suffix for p in (tmp_path / "model").iterdir()} <= {".json", ".safetensors"}


@pytest.mark.parametrize("tokenizer", [None, object()])
@pytest.mark.parametrize("name", ["{here}/nothing", "./nothing", "~/no/such/model"])
def test_models_that_are_not_there(name, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"(nothing|no/such/model): there is no such folder; give a checkpoint folder"):
        LanguageModel.load(name.format(here=tmp_path), tokenizer=tokenizer)
    assert not Path("~").exists()


def test_the_home_folder_is_written_as_elsewhere(random_model, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    lm = random_model(2)
    lm.save("~/model")
    assert LanguageModel.load("~/model", device="cpu").fingerprint() == lm.fingerprint()


def test_random_weights_come_from_the_seed_and_leave_the_generator_alone():
    config = make_config("llama", **GROUPED)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prints = [LanguageModel.random(config, None, seed=seed, device="cpu").fingerprint() for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    assert prints[0] == prints[1] != prints[2]


def test_fingerprints_see_every_weight_and_its_dtype():
    lm = load("opt")
    before = lm.fingerprint()
    seen = {before}
    for name, p in lm.model.named_parameters():
        with torch.no_grad():
            p.view(-1)[-1] += 1
            seen.add(lm.fingerprint())
            p.view(-1)[-1] -= 1
        assert name
    assert len(seen) == 1 + len(list(lm.model.parameters()))
    lm.model.to(torch.bfloat16)
    assert lm.fingerprint() not in seen


def test_fingerprints_survive_saving_and_reloading(random_model, tmp_path):
    lm = random_model(2)
    before = lm.fingerprint()
    lm.save(tmp_path / "model")
    assert lm.fingerprint() == before
    assert LanguageModel.load(str(tmp_path / "model"), device="cpu").fingerprint() == before


def test_skeletons_have_shapes_and_no_weights():
    lm = LanguageModel.skeleton(make_config("llama", **GROUPED))
    assert {p.device.type for p in lm.model.parameters()} == {"meta"}
    assert lm.block_params.tolist() == load("llama").block_params.tolist()


def test_models_take_no_gradients_and_do_not_drop_out():
    lm = LanguageModel.random(make_config("opt", **OPT, dropout=0.5), None, seed=0, device="cpu")
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device=cuda:99.*choose auto or cpu"):
        pick_device("cuda:99")


def test_the_built_in_model_is_trained(tiny):
    assert tiny.n_blocks == 12
    ids = tiny.tokenizer("Return the sum of the array elements over the given axis.")["input_ids"]
    assert tiny.nll(np.array([ids])).mean() < 5 < np.log(tiny.vocab_size)


def test_random_models_say_what_is_wrong_with_their_shape():
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    for change, message in (
        ({"num_attention_heads": 5}, "hidden_size=32.*multiple of num_attention_heads=5"),
        ({"vocab_size": 100}, "vocab_size=100.*2048"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"device": "tpu"}, "device=tpu"),
    ):
        with pytest.raises(ValueError, match=message):
            Random(**(shape | change))


def test_positions_that_the_configuration_does_not_name_are_those_of_the_table():
    model_type, shape = FAMILIES["gpt2"]
    lm = LanguageModel.skeleton(make_config(model_type, **shape))
    assert lm.max_positions == 64
    lm.model.config.max_position_embeddings = None
    assert lm.max_positions == 64
    lm.decoder.wpe = None
    assert lm.max_positions is None

"""Running a block is a function of what it is given, whatever the model's code does; or the model is refused in a line."""

from __future__ import annotations

from collections import UserDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from svnup.game import LayerGame
from svnup.model.blocks import Form, containers, differing, hidden_of, nearly_equal, refill, with_hidden
from svnup.model.language_model import LanguageModel, make_config
from svnup.pruning.reconstruct import Reconstruct
from svnup.pruning.walk import prune_model, pruned_weights
from svnup.pruning.wanda import Wanda
from svnup.shapley.gates import Gates
from svnup.types import SparsityProfile

TEXT = np.random.default_rng(5).integers(3, 90, size=(5, 12))
SMALL = {"vocab_size": 91, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "max_position_embeddings": 48}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KEYS = SMALL | IDS | {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5}
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
NARROW = {"vocab_size_per_layer_input": 91, "hidden_size_per_layer_input": 4, "laurel_rank": 3, "altup_num_inputs": 3}
FAMILIES = {
    "keys of two layer types are shared": (
        "gemma3n_text",
        KEYS | NARROW | {"num_hidden_layers": 6, "layer_types": TYPES, "num_kv_shared_layers": 2},
    ),
    "keys are shared under a head that hands them on": (
        "gemma4_text",
        KEYS
        | {"num_hidden_layers": 6, "layer_types": TYPES, "num_kv_shared_layers": 2, "global_head_dim": 8}
        | {"hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 91},
    ),
    "a list": ("openai-gpt", {"vocab_size": 91, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 48}),
    "a parent that takes no tokens": ("roberta", SMALL | IDS | {"num_hidden_layers": 3, "is_decoder": True}),
    "a head that reads other fields": ("doge", KEYS | {"num_hidden_layers": 3}),
}


def make(kind, shape, louder=5.0):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(make_config(kind, **shape), dtype=torch.float32)
    lm = LanguageModel(model)
    with torch.no_grad():  # loud enough for every block to matter
        for index in range(lm.n_blocks):
            for linear in lm.linears(index).values():
                linear.weight.mul_(louder)
    return lm


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A model, never changed."""
    return make(*FAMILIES[request.param])


@pytest.fixture
def llama():
    return make("llama", KEYS | {"num_hidden_layers": 4})


@torch.no_grad()
def own_losses(lm):
    rows = torch.as_tensor(TEXT)
    logits = lm.model(input_ids=rows).logits.double()
    return -logits.log_softmax(-1)[:, :-1].gather(-1, rows[:, 1:, None])[..., 0].mean(1).numpy()


def test_the_loss_by_blocks_is_the_models_own(family, monkeypatch):
    expected = own_losses(family)
    assert expected.std() > 0.01
    np.testing.assert_allclose(family.nll(TEXT), expected, atol=2e-5)
    monkeypatch.setattr("svnup.model.language_model.BATCH_TOKENS", {"cpu": 24})  # three micro-batches, block by block
    *_, last = family.walk(TEXT)
    last.run(advance=True)
    assert len(last.batches) == 3
    with torch.inference_mode():
        found = torch.cat([family.token_nll(batch).double().mean(1) for batch in last.batches])
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_values_do_not_depend_on_what_was_evaluated_before(family):
    n = family.n_blocks
    rows = np.unique(np.random.default_rng(2).random((9, n)) < 0.7, axis=0)
    rows = np.concatenate([rows, ~np.eye(n, dtype=bool)])
    together = LayerGame(family, TEXT)(rows)
    game = LayerGame(family, TEXT, state_bytes=0)  # computes prefixes again
    alone = [float(game(row[None])[0]) for row in rows[::-1]][::-1]
    assert together.tolist() == alone
    assert len(set(alone)) > len(alone) // 2


@torch.no_grad()
def test_an_absent_block_still_leaves_its_keys():
    """By hand: the model's own forward with a block that adds nothing to hidden states, but runs."""
    lm = make(*FAMILIES["keys are shared under a head that hands them on"])
    assert lm.writers == {2, 3}  # the last of each type with keys of its own
    game = LayerGame(lm, TEXT)
    for absent in (2, 3):
        block = lm.blocks[absent]
        hook = block.register_forward_hook(lambda module, args, out: args[0])
        expected = -own_losses(lm).mean()
        hook.remove()
        row = np.arange(6) != absent
        assert game(row[None])[0] == pytest.approx(expected, abs=2e-5)
    assert game.n_block_forwards == 2 * (5 + 1)  # five present, and one for what it leaves


def test_pruning_reads_the_keys_of_its_own_text(monkeypatch):
    """The reports of a walk over all sequences together are those of a walk over one at a time."""
    kind, shape = FAMILIES["keys are shared under a head that hands them on"]
    reports = []
    for size in (1000, 12):
        monkeypatch.setattr("svnup.model.language_model.BATCH_TOKENS", {"cpu": size})
        lm = make(kind, shape)
        profile = SparsityProfile(np.full(6, 0.5), lm.block_params, 0.5)
        reports.append((prune_model(lm, profile, Wanda(), TEXT), lm.nll(TEXT)))
    assert [row.n_zeros for row in reports[0][0].per_linear] == [row.n_zeros for row in reports[1][0].per_linear]
    np.testing.assert_allclose(reports[0][1], reports[1][1], atol=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_refitted_whatever_they_read_and_return(name):
    lm = make(*FAMILIES[name])
    profile = SparsityProfile(np.full(lm.n_blocks, 0.5), lm.block_params, 0.5)
    report = prune_model(lm, profile, Wanda(), TEXT, Reconstruct(lr=2e-3, epochs=5, batch_tokens=24))
    assert [block.n_steps for block in report.recovered] == [15] * lm.n_blocks
    assert all(block.error_after < block.error_before for block in report.recovered if block.taken)
    assert sum(block.taken for block in report.recovered) > lm.n_blocks // 2
    assert np.isfinite(lm.nll(TEXT)).all()


def test_stand_ins_leave_keys_of_their_own():
    lm = make(*FAMILIES["keys are shared under a head that hands them on"])
    profile = SparsityProfile(np.full(6, 0.5), lm.block_params, 0.5)
    weights = pruned_weights(lm, profile, Wanda(), TEXT)
    game = LayerGame(lm, TEXT, pruned=weights)
    row = np.arange(6) != 2
    value = game(row[None])[0]
    for name, linear in lm.linears(2).items():
        linear.weight.data.copy_(weights[2][f"{name}.weight"])
    assert value == pytest.approx(-own_losses(lm).mean(), abs=2e-5)


def test_games_that_need_more_than_hidden_states_are_refused(llama, monkeypatch):
    lm = make(*FAMILIES["keys are shared under a head that hands them on"])
    with pytest.raises(ValueError, match=r"Gemma4ForCausalLM: gates need one residual stream.*choose another estimator"):
        Gates(2).estimate(LayerGame(lm, TEXT))
    several = make(
        "gemma3n_text", KEYS | NARROW | {"num_hidden_layers": 3, "layer_types": TYPES[:3], "num_kv_shared_layers": 0}
    )
    with pytest.raises(ValueError, match="gates need one residual stream"):
        Gates(2).estimate(LayerGame(several, TEXT))
    with pytest.raises(ValueError, match=r"players=sublayer: block 0 is not an attention and an MLP.*altup.*use players=block"):
        LayerGame(several, TEXT, players="sublayer")
    monkeypatch.setattr(LanguageModel, "writers", frozenset({2}))
    with pytest.raises(ValueError, match=r"players=sublayer: block 2 passes more than hidden states.*use players=block"):
        LayerGame(llama, TEXT, players="sublayer")


# -- what cannot be run apart


def refused(lm, message):
    with pytest.raises(ValueError, match=message) as caught:
        lm.nll(TEXT)
    assert "\n" not in str(caught.value)
    assert "another model" in str(caught.value)
    assert not any("forward" in vars(m) for m in lm.model.modules())


def test_a_block_that_reads_what_another_left_in_a_module(llama):
    left = []
    llama.blocks[0].register_forward_hook(lambda m, args, out: left.append(out.mean()))
    llama.blocks[2].register_forward_hook(lambda m, args, out: out + left[-1])
    refused(llama, r"LlamaForCausalLM: what block 2 computes depends on more than it is given")


def test_a_decoder_that_sees_what_follows():
    kind, shape = FAMILIES["a parent that takes no tokens"]
    told = "RobertaForCausalLM: its predictions depend on the tokens that follow; set is_decoder to true in config.json"
    refused(make(kind, shape | {"is_decoder": False}), told)


def test_a_decoder_that_runs_a_block_twice(llama):
    def again(module, args, kwargs):
        return (llama.blocks[1](*args, **kwargs), *args[1:]), kwargs

    llama.blocks[2].register_forward_pre_hook(again, with_kwargs=True)
    refused(llama, r"LlamaForCausalLM: model.layers are not run once each, one after the other, but in the order \[0, 1, ")


def test_a_model_that_cannot_read_tokens_alone(llama):
    def fails(*args, **kwargs):
        raise KeyError("pixel_values")

    handle = llama.model.model.norm.register_forward_pre_hook(fails)
    refused(llama, r"LlamaForCausalLM: cannot read tokens as a causal decoder does \(KeyError: 'pixel_values'\)")
    handle.remove()


def test_a_head_that_mixes_tokens(llama):
    llama.model.lm_head.register_forward_pre_hook(lambda m, args: (args[0].cumsum(1),))
    refused(llama, r"LlamaForCausalLM: its head gives some tokens other logits than all")


# -- the parts


def test_containers_of_hidden_states():
    x, y, other = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(1)
    for out in (x, (x,), [x, None, other], (x, (other, other)), {"states": x}, BaseModelOutputWithPast(last_hidden_state=x)):
        assert hidden_of(out) is x
        form = Form.of(out).around(y)
        assert type(form) is type(out)
        assert hidden_of(form) is y
        swapped = with_hidden(out, y)
        assert type(swapped) is type(out)
        assert hidden_of(swapped) is y
        assert hidden_of(out) is x
    kept = with_hidden([x, None, other], y)
    assert kept[1] is None
    assert kept[2] is other
    assert Form.of((None, x, other)).around(y) == (None, y, None)
    with pytest.raises(ValueError, match="no hidden states among what a module returns"):
        hidden_of((None, 3))


def test_containers_among_arguments():
    shared, names = UserDict(), ["a"]
    calls = [((1, shared), {"names": names}), ((2, shared), {"mask": None})]
    assert [id(c) for c in containers(calls)] == [id(shared), id(names)]
    refill(shared, {"k": 1})
    refill(names, ["b", "c"])
    assert dict(shared) == {"k": 1}
    assert names == ["b", "c"]
    refill(shared, {})
    assert not shared


def test_calls_that_differ():
    mask = torch.ones(2, 2)
    call = ((mask,), {"scale": 2, "shared": {}})
    assert differing(call, ((mask.clone(),), {"scale": 2, "shared": {}}), []) is None
    assert differing(call, ((mask + 1,), {"scale": 2, "shared": {}}), []) == "0"
    assert differing(call, ((mask,), {"scale": 3, "shared": {}}), []) == "scale"
    assert differing(call, ((mask,), {"scale": 2}), []) == "shared"
    filled = {"k": mask}
    assert differing(call, ((mask,), {"scale": 2, "shared": filled}), []) == "shared"
    assert differing(call, ((mask,), {"scale": 2, "shared": filled}), [filled]) is None


def test_closeness_is_a_few_roundings():
    x = torch.linspace(-3, 3, 50)
    assert nearly_equal(x, x + 1e-7)
    assert not nearly_equal(x, x + 1e-4)
    assert nearly_equal(x.bfloat16(), (x * 1.004).bfloat16())
    assert not nearly_equal(x, x.double())
    assert not nearly_equal(x, x[:-1])
    broken = torch.where(x > 2, torch.nan, x)
    assert nearly_equal(broken, broken.clone())
    assert not nearly_equal(broken, x)


def test_batches_are_left_as_they_were(family):
    with torch.inference_mode():
        (batch,) = family.micro_batches(TEXT[:1])
        before = replace(batch, hidden=batch.hidden.clone())
        first = family.run_block(0, batch)
        again = family.run_block(0, batch)
    assert torch.equal(batch.hidden, before.hidden)
    assert torch.equal(first.hidden, again.hidden)
    assert batch.state == before.state

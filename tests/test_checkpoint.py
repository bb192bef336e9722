"""Checkpoints read by name, the bitmask format bit for bit, and what is said of damaged ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svnup.cli.expand import main
from svnup.files import SEAL
from svnup.model.checkpoint import (
    BITMASK,
    INDEX,
    Checkpoint,
    expand,
    in_place,
    is_bitmask,
    pack,
    read_metadata,
    read_tensors,
    save_tensors,
    unpack,
    write_bitmask,
)
from svnup.model.language_model import LanguageModel, make_config
from svnup.pruning import prune_model
from svnup.pruning.magnitude import Magnitude
from svnup.types import SparsityProfile

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class NoTokenizer:
    def save_pretrained(self, folder):
        return None


def bits_of(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def pruned(random_model, sparsity=0.7, **options):
    lm = random_model(2, **options)
    profile = SparsityProfile(np.full(2, sparsity), lm.block_params, sparsity)
    prune_model(lm, profile, Magnitude(), np.zeros((0, 8), dtype=np.int64))
    return lm


# -- bits


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(0, 5))
def test_any_mask_comes_back_from_its_bits(shape, seed):
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    packed = pack(bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (-(-bits.numel() // 8),)
    again = unpack(packed, shape)
    assert again.dtype == torch.bool
    assert torch.equal(again, bits)


def test_the_first_bit_is_the_highest():
    assert pack(torch.tensor([[True, False, False], [False, False, False], [False, True, True]])).tolist() == [0b10000001, 0x80]


# -- the format


def matrices(dtype):
    """Matrices of every kind: half empty with -0.0, denormals and infinities kept, all zero, zero-free, one weight, no rows."""
    g = torch.Generator().manual_seed(1)
    mixed = torch.randn(5, 13, generator=g).to(dtype)
    mixed[torch.rand(5, 13, generator=g) < 0.6] = 0
    mixed[0, :4] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4, torch.inf, torch.nan], dtype=dtype)
    full = torch.randn(3, 8, generator=g).to(dtype).abs() + 1
    empty = torch.zeros(4, 7, dtype=dtype)
    return {"mixed": mixed, "empty": empty, "full": full, "minus": -empty, "one": full[:1, :1], "none": empty[:0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matrices_come_back_bit_for_bit(tmp_path, dtype):
    given_ = matrices(dtype)
    plain = {"norm": torch.ones(7, dtype=dtype), "ids": torch.arange(3)}
    assert bits_of(given_["minus"]).ne(0).all(), "minus zeros are not zeros here"
    write_bitmask(tmp_path, iter([given_, plain]), set(given_))
    assert {p.name for p in tmp_path.iterdir()} == {"bitmask-00001.safetensors", "bitmask-00002.safetensors", BITMASK}
    checkpoint = Checkpoint(tmp_path)
    assert sorted(checkpoint.names()) == sorted(given_ | plain)
    assert sorted(sorted(group) for group in checkpoint.by_file()) == [sorted(given_), sorted(plain)]
    found = checkpoint.read([*plain, *given_])
    for name, tensor in given_.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(bits_of(found[name]), bits_of(tensor)), name
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    stored = load_file(tmp_path / "bitmask-00001.safetensors")
    assert len(stored["empty.values"]) == 0
    assert len(stored["mixed.values"]) == int(bits_of(given_["mixed"]).ne(0).sum()) < given_["mixed"].numel()


def test_tensors_of_shards_are_read_by_name(tmp_path, random_model):
    lm = random_model(2)
    lm.model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).is_file()
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint, state = Checkpoint(tmp_path), lm.model.state_dict()
    found = checkpoint.read(reversed(checkpoint.names()))
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    assert set(state) - set(found) <= set(lm.model.all_tied_weights_keys)
    assert sum(map(len, checkpoint.by_file())) == len(found)
    with pytest.raises(ValueError, match=r"has no tensor model\.norm\.wieght"):
        checkpoint.read(["model.norm.weight", "model.norm.wieght"])


# -- a model


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_an_expanded_checkpoint_has_the_logits_of_the_pruned_model(random_model, tmp_path, tokens, model_type):
    lm = pruned(random_model, model_type=model_type)
    lm.save(tmp_path / "small", "bitmask")
    (tmp_path / "small" / "profile.json").write_text("{}")
    assert is_bitmask(tmp_path / "small")
    assert main([str(tmp_path / "small"), str(tmp_path / "dense")]) == 0
    assert not is_bitmask(tmp_path / "dense")
    files = {p.name for p in (tmp_path / "dense").iterdir()}
    assert {"config.json", "tokenizer.json", "profile.json", INDEX} <= files
    assert not any("bitmask" in name for name in files)
    rows = torch.as_tensor(tokens)
    with torch.no_grad():
        expected = lm.model(input_ids=rows).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()(input_ids=rows).logits, expected)
    again = LanguageModel.load(str(tmp_path / "small"), device="cpu")
    assert again.fingerprint() == lm.fingerprint()
    assert again.tokenizer("some text")["input_ids"] == lm.tokenizer("some text")["input_ids"]
    assert LanguageModel.load(str(tmp_path / "small"), device="cpu", dtype="bfloat16").dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"model\.device_map=auto: .*device_map=null"):
        LanguageModel.load(str(tmp_path / "small"), device_map="auto")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_bitmask_checkpoint_at_70_percent_takes_well_below_half(tmp_path, dtype):
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    lm = LanguageModel.random(make_config("llama", **shape), NoTokenizer(), seed=0, dtype=dtype, device="cpu")
    profile = SparsityProfile([0.6, 0.8], lm.block_params, 0.7)
    prune_model(lm, profile, Magnitude(), np.zeros((0, 8), dtype=np.int64))
    lm.save(tmp_path / "dense")
    lm.save(tmp_path / "small", "bitmask")

    def size(name):
        return sum(p.stat().st_size for p in (tmp_path / name).iterdir() if p.suffix == ".safetensors" or p.name == BITMASK)

    assert 0.3 + 1 / 16 < size("small") / size("dense") < 0.45


def test_what_is_generated_with_is_kept(tmp_path):
    """generation_config.json belongs to the checkpoint, not to the configuration of the model."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    lm = LanguageModel.random(make_config("llama", **shape), NoTokenizer(), seed=0, device="cpu")
    lm.model.generation_config.max_new_tokens = 7
    lm.save(tmp_path / "a")
    disk = LanguageModel.load(str(tmp_path / "a"), tokenizer=NoTokenizer(), device="cpu", offload="disk")
    disk.save(tmp_path / "b", "bitmask")
    LanguageModel.load(str(tmp_path / "b"), tokenizer=NoTokenizer(), device="cpu").save(tmp_path / "c")
    for name in "abc":
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["max_new_tokens"] == 7, name


def test_the_dtype_of_a_checkpoint_whose_config_has_none_is_that_of_its_weights(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    lm = LanguageModel.random(make_config("llama", **shape), NoTokenizer(), seed=0, dtype="float16", device="cpu")
    lm.save(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config.pop("dtype", None) or config.pop("torch_dtype", None)
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    for offload in ("none", "disk"):
        again = LanguageModel.load(str(tmp_path / "a"), tokenizer=NoTokenizer(), device="cpu", offload=offload)
        assert again.dtype == "float16", offload


# -- what is wrong is said in a line


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Bytes of the files of a bitmask checkpoint of two parts, whose first matrix is half zero."""
    folder = tmp_path_factory.mktemp("small")
    write_bitmask(folder, [{"a": torch.eye(16), "n": torch.ones(3)}, {"b": torch.ones(4, 4)}], {"a", "b"})
    (folder / "config.json").write_text("{}")
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def cut(data, share=0.6):
    return data[: int(len(data) * share)]


def changed(data, **values):
    """Without the checksum, as whoever changes it on purpose leaves it out."""
    data = {key: value for key, value in json.loads(data).items() if key != SEAL}
    return json.dumps(data | values).encode()


FIRST = "bitmask-00001.safetensors"
DAMAGE = {
    "truncated": (FIRST, cut, "cannot be read"),
    "empty": (FIRST, lambda data: b"", "cannot be read"),
    "missing": (FIRST, lambda data: None, "cannot be read"),
    "of another kind": (FIRST, lambda data: b"\x80\x04pickle" * 9, "cannot be read"),
    "later version": (BITMASK, lambda data: changed(data, version=2), "bitmask version 2; this svnup reads 1"),
    "no version": (BITMASK, lambda data: b"{}", "lacks one of version, files, shapes"),
    "not JSON": (BITMASK, cut, "not JSON"),
    "a list": (BITMASK, lambda data: b"[1]", "lacks one of"),
    "no files": (BITMASK, lambda data: b'{"version": 1}', "lacks one of"),
    "another shape": (BITMASK, lambda data: changed(data, shapes={"a": [3, 5], "b": [4, 4]}), "a is damaged"),
    "a name too many": (BITMASK, lambda data: data.replace(b'"n"', b'"m"'), "is damaged: .*checksum"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_refused_in_one_line_and_leave_nothing(small, tmp_path, capsys, case):
    name, change, message = DAMAGE[case]
    source = tmp_path / "source"
    source.mkdir()
    for file, data in small.items():
        if (data := change(data) if file == name else data) is not None:
            (source / file).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        expand(source, tmp_path / "target")
    assert main([str(source), str(tmp_path / "target")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("svnup-expand: ")
    assert str(source) in err
    assert len(err.splitlines()) == 1
    assert not out
    assert not (tmp_path / "target").exists()


def test_bits_that_do_not_fit_their_values_are_seen(small, tmp_path):
    for file, data in small.items():
        (tmp_path / file).write_bytes(data)
    stored = load_file(tmp_path / FIRST)
    for wrong in (stored["a.bits"] & 0x7F, stored["a.bits"][:-8], stored["a.bits"] | 1):
        save_file(stored | {"a.bits": wrong}, tmp_path / FIRST)
        with pytest.raises(ValueError, match="a is damaged"):
            Checkpoint(tmp_path).read(["a"])


def test_folders_that_are_no_bitmask_checkpoint_and_targets_that_exist(small, tmp_path, capsys, random_model):
    for file, data in small.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / "there").mkdir()
    assert main([str(tmp_path), str(tmp_path / "there")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert list((tmp_path / "there").iterdir()) == []
    for source in (tmp_path / "there", tmp_path / "nowhere"):
        assert main([str(source), str(tmp_path / "new")]) == 2
        assert "no svnup_bitmask.json there" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"no safetensors checkpoint.*safe_serialization"):
        Checkpoint(tmp_path / "there")
    (tmp_path / "there" / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"no safetensors checkpoint.*safe_serialization"):
        Checkpoint(tmp_path / "there")


# -- nothing half


def test_a_folder_appears_when_it_is_complete(tmp_path):
    seen = []

    def breaks(folder):
        (folder / "half").write_text("half")
        seen.append((tmp_path / "target").exists())
        raise KeyboardInterrupt

    def works(folder):
        assert list(folder.iterdir()) == [], "what an earlier attempt left is gone"
        (folder / "whole").write_text("whole")
        seen.append((tmp_path / "target").exists())

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            in_place(tmp_path / "target", breaks)
        assert not (tmp_path / "target").exists()
    in_place(tmp_path / "target", works)
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["whole"]
    with pytest.raises(KeyboardInterrupt):
        in_place(tmp_path / "target", breaks)
    assert [p.name for p in (tmp_path / "target").iterdir()] == ["whole"], "what was there stays until the new one is complete"
    assert seen == [False, False, False, True]
    in_place(tmp_path / "target", works)
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


@pytest.mark.parametrize("form", ["dense", "bitmask"])
def test_a_save_that_is_killed_leaves_no_half_model(random_model, tmp_path, monkeypatch, form):
    lm = random_model(2)
    by_block = lm.state_dict_by_block

    def killed():
        yield next(by_block())
        raise KeyboardInterrupt

    if form == "dense":
        monkeypatch.setattr(lm.tokenizer, "save_pretrained", lambda folder: next(iter(())))
    monkeypatch.setattr(lm, "state_dict_by_block", killed)
    with pytest.raises((KeyboardInterrupt, StopIteration)):
        lm.save(tmp_path / "model", form)
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    lm.save(tmp_path / "model", form)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_same_tensors_make_the_same_bytes(tmp_path):
    tensors = {"b.weight": torch.arange(6.0).reshape(2, 3), "ä": torch.ones(2, dtype=torch.bfloat16), "n": torch.tensor(7)}
    told = {"key": "k", "note": "über", "a": '"1"'}
    for n in range(12):
        save_tensors(tensors, tmp_path / f"{n}", metadata=told)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    found = read_tensors(tmp_path / "0")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert read_metadata(tmp_path / "0").items() >= told.items()

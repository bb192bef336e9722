"""Offloaded models are the very models, bit for bit, with one block at a time in memory; interrupted prunings go on."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from cli import forked
from models import FAMILIES, family_model
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from svnup.game import LayerGame, layer_game
from svnup.game.walk_plan import WalkPlan
from svnup.memory import STATUS, resident
from svnup.model import language_model, offload
from svnup.model.checkpoint import Checkpoint
from svnup.model.digest import tensor_sha256, through
from svnup.model.language_model import LanguageModel, OffloadedBatch, make_config
from svnup.model.offload import DiskBlockStore, HostBlockStore, Incoming
from svnup.model.source import Random
from svnup.pruning import apply_masks
from svnup.pruning.magnitude import Magnitude
from svnup.pruning.nothing import NoRecovery
from svnup.pruning.reconstruct import Reconstruct
from svnup.pruning.sparsegpt import SparseGPT
from svnup.pruning.walk import prune_model, temporarily_pruned
from svnup.pruning.wanda import Wanda
from svnup.shapley import all_coalitions
from svnup.types import SparsityProfile

TEXT = np.random.default_rng(3).integers(3, 97, size=(3, 16))
SPARSITIES = [0.6, 0.4, 0.5, 0.5]


class NoTokenizer:
    def save_pretrained(self, folder):
        return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Gives the folder of a family's checkpoint, dense or bitmask; made once."""

    @cache
    def save(family, form="dense"):
        lm = family_model(family)
        lm.tokenizer = NoTokenizer()
        folder = tmp_path_factory.mktemp(f"{family}-{form}") / "model"
        lm.save(folder, form)
        return folder

    return save


def load(folder, offload="none", **options):
    return LanguageModel.load(str(folder), tokenizer=NoTokenizer(), device="cpu", offload=offload, **options)


def profile(lm, sparsities=SPARSITIES):
    return SparsityProfile(sparsities, lm.block_params, float(np.average(sparsities, weights=lm.block_params)))


def logits(lm):
    with torch.no_grad():
        return lm.model(input_ids=torch.as_tensor(TEXT)).logits


def full_blocks(lm):
    """Blocks of which any parameter is in memory."""
    return {i for i, block in enumerate(lm.blocks) if not all(p.is_meta for p in block.parameters())}


# -- the same numbers


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_the_same_from_disk_and_from_bits(family, saved):
    plain = load(saved(family))
    others = [
        load(saved(family), "disk"),
        load(saved(family, "bitmask")),
        load(saved(family, "bitmask"), "disk"),
    ]
    assert [lm.offloaded for lm in others] == [True, False, True]
    expected = logits(plain), plain.nll(TEXT), plain.fingerprint()
    assert expected[0].std() > 0.02
    for lm in others:
        assert torch.equal(logits(lm), expected[0])
        assert np.array_equal(lm.nll(TEXT), expected[1])
        assert lm.fingerprint() == expected[2]
        assert lm.block_params.tolist() == plain.block_params.tolist()
        assert not any(b.is_meta for b in lm.model.buffers())


def test_several_tensors_of_a_block_are_hashed_at_once_and_one_block_is_in_memory(saved, monkeypatch):
    lm, together = load(saved("llama"), "disk"), threading.Barrier(2, timeout=20)
    meeting = [name for name in lm.model.state_dict() if name.startswith(f"{lm.blocks_path}.2.")][:2]

    def spied(name, tensor):
        if name in meeting:
            together.wait()  # until another thread hashes the other one
        assert len(full_blocks(lm)) <= 1
        return tensor_sha256(name, tensor)

    expected = load(saved("llama")).fingerprint()
    monkeypatch.setattr(language_model, "tensor_sha256", spied)
    assert lm.fingerprint() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
@pytest.mark.parametrize("part", [8, 24, 4096])
def test_the_hash_of_a_tensor_is_that_of_its_bytes_in_parts_too(dtype, part):
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    whole = bytes(tensor.view(torch.uint8).flatten().tolist())
    in_parts = b"".join(bytes(p.tolist()) for p in through(torch.empty(part, dtype=torch.uint8), tensor))
    assert in_parts == whole
    for given in (tensor, tensor.T.contiguous().T):
        assert tensor_sha256("w", given) == hashlib.sha256(f"w {dtype} (7, 5)".encode() + whole).digest()
    assert tensor_sha256("w", tensor[:0]) == hashlib.sha256(f"w {dtype} (0, 5)".encode()).digest()
    assert tensor_sha256("w", tensor[0, 0]) == hashlib.sha256(f"w {dtype} ()".encode() + whole[: tensor.itemsize]).digest()


QUICK = ["llama", "gpt2", "gemma3_text_mixed", "opt_post_norm_projected"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name not in QUICK]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", QUICK + SLOW)
def test_a_model_pruned_from_disk_has_the_weights_of_one_pruned_in_memory(family, saved, tmp_path):
    for pruner in (SparseGPT(), Wanda()):
        plain, disk = load(saved(family)), load(saved(family), "disk")
        before = plain.fingerprint()
        reports = [prune_model(lm, profile(lm), pruner, TEXT) for lm in (plain, disk)]
        bare = [[(r.block, r.name, r.n_zeros, r.size, r.error) for r in report.per_linear] for report in reports]
        assert bare[0] == bare[1]
        expected = plain.fingerprint()
        assert before != expected == disk.fingerprint()
        assert np.array_equal(disk.nll(TEXT), plain.nll(TEXT))
    for form in ("dense", "bitmask"):
        disk.save(tmp_path / form, form)
        for where in ("none", "disk"):
            assert load(tmp_path / form, where).fingerprint() == expected
    assert load(saved(family)).fingerprint() == before, "the checkpoint itself is never written"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"payoff": "kl", "players": "sublayer"}], ids=["plain", "kl of sublayers"])
def test_layer_games_have_the_same_values(family, options, saved):
    plain, disk = load(saved(family)), load(saved(family), "disk")
    games = [LayerGame(lm, TEXT, **options) for lm in (plain, disk)]
    coalitions = all_coalitions(games[0].n_players)[:: 1 if not options else 17]
    values = [game(coalitions) for game in games]
    assert np.array_equal(*values)
    assert len(set(values[0])) > len(coalitions) // 2
    assert games[0].key == games[1].key, "what one has measured the other knows"


@pytest.mark.parametrize("together", [1, 3, 32])
def test_a_game_reads_a_block_once_for_many_coalitions(saved, monkeypatch, together):
    monkeypatch.setattr(layer_game, "TOGETHER", together)
    lm = load(saved("llama"), "disk")
    game, coalitions = LayerGame(lm, TEXT), all_coalitions(4)
    lm.nll(TEXT)
    reads, read = [], lm._store._read
    monkeypatch.setattr(lm._store, "_read", lambda index: reads.append(index) or read(index))
    assert np.array_equal(game(coalitions), LayerGame(load(saved("llama")), TEXT)(coalitions))
    plan = WalkPlan.of(coalitions, together=together)
    assert len(reads) <= plan.n_loads, "a block that is still there is not read again"
    assert game.n_block_forwards == plan.n_block_forwards
    assert together < 16 or reads == [0, 1, 2, 3]


def test_gates_have_the_same_gradients(saved):
    from svnup.shapley.gates import Gates

    plain, disk = load(saved("llama")), load(saved("llama"), "disk")
    values = [Gates().estimate(LayerGame(lm, TEXT, payoff="neg_nll")).values for lm in (plain, disk)]
    assert np.array_equal(*values)


# -- one block at a time


@pytest.mark.parametrize("pruner", [SparseGPT(), Magnitude()], ids=["with inputs", "without"])
def test_at_most_one_block_is_in_memory(saved, tmp_path, monkeypatch, pruner):
    lm = load(saved("llama"), "disk")
    seen, parked = [], []
    for index, block in enumerate(lm.blocks):
        for m in (block.self_attn.q_proj, block.mlp.down_proj):
            m.register_forward_hook(lambda m, args, out, index=index: seen.append((index, full_blocks(lm))))
    load_block = lm.load_block

    def noting(index):
        load_block(index)
        seen.append((index, full_blocks(lm)))

    monkeypatch.setattr(lm, "load_block", noting)

    def count():
        assert len(seen) >= lm.n_blocks
        assert all(inside == {index} for index, inside in seen)
        seen.clear()

    for visit in lm.walk(TEXT):
        parked += [b for b in visit.batches if type(b) is OffloadedBatch]
    assert parked
    count()
    lm.nll(TEXT)
    count()
    lm.fingerprint()
    count()
    logits(lm)
    count()
    LayerGame(lm, TEXT)(all_coalitions(4))
    count()
    prune_model(lm, profile(lm), pruner, TEXT)
    count()
    for form in ("dense", "bitmask"):
        for _ in lm.state_dict_by_block():
            assert len(full_blocks(lm)) <= 1
        lm.save(tmp_path / form, form)
        count()


def test_a_block_is_gone_before_the_next_is_read(saved, tmp_path, monkeypatch):
    """Not even what is being written is held beside the next block, so that memory for one is enough."""
    alive, reads = [], []
    fill = offload.fill

    def noting(module, weights, device):
        fill(module, weights, device)
        alive.extend(weakref.ref(p) for p in module.parameters())

    lm = load(saved("llama"), "disk")
    read = lm._store._read

    def reading(index):
        reads.append(sum(ref() is not None for ref in alive))
        alive.clear()
        return read(index)

    monkeypatch.setattr(offload, "fill", noting)
    monkeypatch.setattr(lm._store, "_read", reading)
    lm.nll(TEXT)
    LayerGame(lm, TEXT)(all_coalitions(4))
    lm.fingerprint()
    lm.save(tmp_path / "dense")
    lm.save(tmp_path / "bitmask", "bitmask")
    n_read = len(reads)
    prune_model(lm, profile(lm), SparseGPT(), TEXT)
    assert len(reads) == n_read + 4
    assert max(reads) <= 2, "of 9 parameters, what a loop over them still names"


def test_hidden_states_wait_in_files_that_go_with_them(saved, tmp_path):
    lm = load(saved("llama"), "disk", scratch=tmp_path / "scratch")
    for visit in lm.walk(np.tile(TEXT, (60, 9))[:, :128]):
        assert len(visit.batches) > 1
        for batch in visit.batches:
            assert isinstance(batch._file, np.memmap)
            assert batch._on_host is None
        mapped = Path("/proc/self/maps")
        if mapped.is_file():
            assert mapped.read_text().count(str(tmp_path / "scratch" / "states")) >= len(visit.batches)
        visit.run(advance=True)
    assert list((tmp_path / "scratch" / "states").iterdir()) == []
    assert {p.name for p in (tmp_path / "scratch").iterdir()} == {"states", "lock"}
    (tmp_path / "scratch" / "states" / "of a killed process").write_bytes(b"x")
    again = load(saved("llama"), "disk", scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch" / "states").iterdir()) == []
    temporary = Path(load(saved("llama"), "disk")._store._scratch)
    del again
    gc.collect()
    assert not temporary.exists(), "files without a folder of their own go with the model"


# -- in the CPU's memory


def on_host(folder, dtype="float64"):
    """Blocks at home in float32 and "on the device" in float64: a second device that every machine has."""
    lm = load(folder, dtype=dtype)
    for p in lm.blocks.parameters():
        p.data = p.data.float()
    lm._offload_to(HostBlockStore(lm.blocks, getattr(torch, dtype)))
    return lm


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2_mixed"])
def test_blocks_come_from_the_host_and_go_home(family, saved, tmp_path):
    plain, host = load(saved(family), dtype="float64"), on_host(saved(family))
    here = []
    for index in range(4):
        next(iter(host.linears(index).values())).register_forward_hook(
            lambda *_, index=index: here.append(
                (index, {i for i, b in enumerate(host.blocks) if any(p.dtype == torch.float64 for p in b.parameters())})
            )
        )
    assert torch.equal(logits(host), logits(plain))
    assert np.array_equal(host.nll(TEXT), plain.nll(TEXT))
    coalitions = all_coalitions(4)
    assert np.array_equal(LayerGame(host, TEXT)(coalitions), LayerGame(plain, TEXT)(coalitions))
    batches = next(iter(host.walk(TEXT))).batches
    assert all(isinstance(b, OffloadedBatch) and b._file is None for b in batches)
    for lm in (plain, host):
        prune_model(lm, profile(lm), Wanda(), TEXT)
    host.load_block(0)
    host.load_block(1)
    assert {p.dtype for p in host.blocks[0].parameters()} == {torch.float32}, "at home"
    for index in range(4):
        for name, linear in host.linears(index).items():
            assert torch.equal(linear.weight.double(), plain.linears(index)[name].weight)
            assert int((linear.weight == 0).sum()) == int(SPARSITIES[index] * linear.weight.numel() + 1e-6)
    assert np.array_equal(host.nll(TEXT), plain.nll(TEXT))
    assert here
    assert all(inside == {index} for index, inside in here)
    with pytest.raises(ValueError, match=r"offload: .*offload=none"), temporarily_pruned(host, profile(host), Wanda(), TEXT):
        pass


@pytest.mark.parametrize(("n_pinned", "error"), [(4, 0), (2, 2)])
def test_blocks_are_pinned_for_a_gpu_as_far_as_the_system_locks_memory(saved, caplog, monkeypatch, n_pinned, error):
    class Runtime:
        """Counts what a CUDA runtime would register."""

        registered: list[int] = []  # noqa: RUF012

        def cudaHostRegister(self, address, n_bytes, flags):
            if error and len(self.registered) == n_pinned:
                return error
            self.registered.append(address)
            return 0

        def cudaHostUnregister(self, address):
            self.registered.remove(address)

    runtime, lm, plain = Runtime(), load(saved("llama")), load(saved("llama"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    owner = type("Owner", (), {})()
    offload._pin(lm.blocks, torch.device("cpu"), owner)
    assert len(runtime.registered) == n_pinned
    for index, block in enumerate(lm.blocks):
        ours = {p.untyped_storage().data_ptr() for p in block.parameters()}
        assert (ours == {runtime.registered[index]}) if index < n_pinned else ours.isdisjoint(runtime.registered)
    assert lm.fingerprint() == plain.fingerprint()
    assert np.array_equal(lm.nll(TEXT), plain.nll(TEXT))
    assert [r.getMessage().partition(" are")[0] for r in caplog.records] == ["offload=cpu: blocks from 2 on"] * (error > 0)
    del owner
    gc.collect()
    assert not runtime.registered, "registered no longer than the store lives"


@pytest.mark.parametrize("recovery", [NoRecovery(), Reconstruct(lr=3e-3, epochs=2, batch_tokens=16)], ids=["", "refitted"])
def test_a_host_shelf_on_the_same_device_changes_nothing(saved, tmp_path, recovery):
    plain, host = load(saved("llama")), load(saved("llama"))
    host._offload_to(HostBlockStore(host.blocks, torch.device("cpu")))
    assert torch.equal(logits(host), logits(plain))
    for lm in (plain, host):
        prune_model(lm, profile(lm), SparseGPT(), TEXT, recovery)
    assert host.fingerprint() == plain.fingerprint()
    host.save(tmp_path / "model", "bitmask")
    assert load(tmp_path / "model").fingerprint() == plain.fingerprint()
    assert not load(saved("llama"), "cpu").offloaded, "the CPU's memory is where it is anyway"


# -- interrupted


@dataclass(frozen=True)
class Fragile:
    """Wanda until the power fails."""

    fails_at: int = 10**9
    pattern: str = "unstructured"
    calls: list = field(default_factory=list, repr=False)
    needs_inputs: ClassVar[bool] = True
    prunes: ClassVar[bool] = True

    def __repr__(self):
        return "Fragile"

    def new_stats(self, weight):
        return Wanda().new_stats(weight)

    def observe(self, stats, x):
        Wanda().observe(stats, x)

    def prune(self, weight, stats, sparsity):
        if len(self.calls) == self.fails_at:
            raise KeyboardInterrupt
        self.calls.append(sparsity)
        return Wanda().prune(weight, stats, sparsity)


N = 7  # linears of a block of Llama


@pytest.mark.thinned(3)
@pytest.mark.parametrize("block", [0, 1, 3])
def test_an_interrupted_pruning_goes_on_where_it_was(saved, tmp_path, block):
    plain = load(saved("llama"))
    dense, whole = plain.nll(TEXT), prune_model(plain, profile(plain), Fragile(), TEXT)
    lm = load(saved("llama"), "disk", scratch=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prune_model(lm, profile(lm), Fragile(block * N + 3), TEXT)
    lm = load(saved("llama"), "disk", scratch=tmp_path)
    assert np.array_equal(lm.nll(TEXT), dense), "the dense model is still what is in the checkpoint"
    assert lm.fingerprint() == load(saved("llama")).fingerprint()
    again = Fragile()
    report = prune_model(lm, profile(lm), again, TEXT)
    assert len(again.calls) == (4 - block) * N
    assert lm.fingerprint() == plain.fingerprint()
    assert np.array_equal(lm.nll(TEXT), plain.nll(TEXT))
    assert [(r.block, r.name, r.n_zeros, r.size, r.error) for r in report.per_linear] == [
        (r.block, r.name, r.n_zeros, r.size, r.error) for r in whole.per_linear
    ]
    lm.save(tmp_path / "model")
    assert load(tmp_path / "model").fingerprint() == plain.fingerprint()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("what", ["profile", "pruner", "tokens", "linears"])
def test_another_pruning_with_the_same_files_starts_anew(saved, tmp_path, what):
    lm = load(saved("llama"), "disk", scratch=tmp_path)
    prune_model(lm, profile(lm), Fragile(), TEXT)
    spy, tokens, other = Fragile(), TEXT, profile(lm)
    if what == "profile":
        other = profile(lm, [0.6, 0.4, 0.4, 0.6])
    elif what == "linears":
        sizes = [{n: m.weight.numel() for n, m in lm.linears(i).items()} for i in range(4)]
        shares = [{n: {"sparsity": s, "size": size} for n, size in sizes[i].items()} for i, s in enumerate(SPARSITIES)]
        other = SparsityProfile.from_dict(other.to_dict() | {"linears": shares})
    elif what == "tokens":
        tokens = TEXT.copy()
        tokens[-1, -1] += 1
    else:
        spy = Wanda()
    plain, lm = load(saved("llama")), load(saved("llama"), "disk", scratch=tmp_path)
    for model in (plain, lm):
        prune_model(model, other, spy, tokens)
    if isinstance(spy, Fragile):
        assert len(spy.calls) == 2 * 4 * N
    assert lm.fingerprint() == plain.fingerprint()


def test_a_damaged_file_of_a_block_is_set_aside_and_its_block_pruned_again(saved, tmp_path, caplog):
    lm = load(saved("llama"), "disk", scratch=tmp_path)
    prune_model(lm, profile(lm), Fragile(), TEXT)
    path = sorted(tmp_path.glob("block-*"))[1]
    whole = path.read_bytes()
    expected = lm.fingerprint()
    for damaged in (whole[:100], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        path.write_bytes(damaged)
        caplog.clear()
        lm = load(saved("llama"), "disk", scratch=tmp_path)
        prune_model(lm, profile(lm), Fragile(), TEXT)
        assert f"{path.name}.damaged" in caplog.text
        assert path.with_name(f"{path.name}.damaged").read_bytes() == damaged
        assert lm.fingerprint() == expected


def test_pruning_without_inputs_goes_on_too(saved, tmp_path, monkeypatch):
    lm = load(saved("llama"), "disk", scratch=tmp_path)
    prune, calls = Magnitude.prune, []

    def fails(self, weight, stats, sparsity):
        calls.append(sparsity)
        if len(calls) == 2 * N + 1:
            raise KeyboardInterrupt
        return prune(self, weight, stats, sparsity)

    monkeypatch.setattr(Magnitude, "prune", fails)
    with pytest.raises(KeyboardInterrupt):
        prune_model(lm, profile(lm), Magnitude(), TEXT)
    plain, lm = load(saved("llama")), load(saved("llama"), "disk", scratch=tmp_path)
    prune_model(lm, profile(lm), Magnitude(), TEXT)
    assert len(calls) == 4 * N + 1
    prune_model(plain, profile(plain), Magnitude(), TEXT)
    assert lm.fingerprint() == plain.fingerprint()


def test_what_needs_both_versions_in_memory_is_refused(saved, tmp_path):
    lm = load(saved("llama"), "disk")
    with pytest.raises(ValueError, match=r"offload: .*offload=none"), temporarily_pruned(lm, profile(lm), Wanda(), TEXT):
        pass
    with pytest.raises(ValueError, match=r"offloaded.*offload=none"):
        apply_masks(lm, tmp_path / "masks")


@pytest.mark.slow
def test_a_killed_job_prunes_only_what_was_left(tmp_path):
    """SIGKILL of the command in the middle of pruning from disk; the second run takes over, the files are gone afterwards."""
    from svnup.model.source import Random

    shape = {"hidden_size": 64, "intermediate_size": 1024, "num_attention_heads": 2, "num_hidden_layers": 16}
    Random(device="cpu", **shape).load().save(tmp_path / "source")
    job = [
        "model=pretrained", "model.pretrained_model_name_or_path=source", "model.seq_len=64", "dataset=docs", "dataset.n_seq=8",
        "dataset@shapley.game.data=docs", "evaluation.datasets=[docs]", "evaluation.n_seq=2", "allocator=uniform",
        "pruner=sparsegpt", "save_model=true",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def start(*args):
        command = [sys.executable, "-m", "svnup", *job, *args]
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    running = start("offload=disk", "results_dir=disk")
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("disk/runs/*/unfinished/offload/block-*"))) < 4 and time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    (run,) = (tmp_path / "disk" / "runs").iterdir()
    blocks = {p.name: p.stat().st_mtime_ns for p in (run / "unfinished" / "offload").glob("block-*")}
    assert 4 <= len(blocks) < 16
    assert json.loads((run / "result.json").read_text())["status"] == "running"
    again = start("offload=disk", "results_dir=disk")
    kept = {}
    while again.poll() is None:
        there = [p for p in (run / "unfinished" / "offload").glob("block-*") if p.name in blocks]
        kept |= {p.name: p.stat().st_mtime_ns for p in there if p.exists()}
        time.sleep(0.01)
    assert again.returncode == 0, again.communicate()[0]
    assert kept == blocks, "what was pruned is not pruned again"
    assert not (run / "unfinished").exists()
    alone = start("results_dir=plain")
    assert alone.wait(timeout=120) == 0
    results = [
        json.loads(next((tmp_path / n / "runs").iterdir()).joinpath("result.json").read_text()) for n in ("disk", "plain")
    ]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["dense"] == results[1]["dense"]
    assert results[0]["config_key"] == results[1]["config_key"]
    (plain,) = (tmp_path / "plain" / "runs").iterdir()
    assert load(run / "model").fingerprint() == load(plain / "model").fingerprint()


# -- names in checkpoints


def rewritten(source, target, change):
    """A copy of a checkpoint of one file with other tensors in it."""
    target.mkdir()
    for p in source.iterdir():
        if p.suffix == ".json":
            (target / p.name).write_bytes(p.read_bytes())
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("family", "prefix"), [("gpt2", "transformer."), ("opt", "model."), ("bloom", "transformer."), ("llama", "model.")]
)
def test_checkpoints_of_the_model_without_its_head_are_read(family, prefix, saved, tmp_path):
    """As the hub has them for GPT-2 and BLOOM: without the prefix of the base model."""
    other = rewritten(saved(family), tmp_path / "m", lambda ts: {n.removeprefix(prefix): t for n, t in ts.items()})
    assert any(n.startswith(prefix) for n in Checkpoint(saved(family)).names())
    assert not any(n.startswith(prefix) for n in Checkpoint(other).names())
    assert load(other, "disk").fingerprint() == load(other).fingerprint() == load(saved(family)).fingerprint()


def test_names_that_transformers_has_changed_are_read(saved, tmp_path):
    """GPT-NeoX's head was embed_out, and its attention kept buffers that no model has now."""
    renames = {"lm_head.weight": "embed_out.weight"}

    def legacy(tensors):
        extra = {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}
        return {renames.get(n, n): t for n, t in tensors.items()} | extra

    base = load(saved("gpt_neox"))
    source = saved("gpt_neox")
    names = set(Checkpoint(source).names())
    assert names & {"lm_head.weight", "embed_out.weight"}
    other = rewritten(source, tmp_path / "m", legacy)
    assert "embed_out.weight" in Checkpoint(other).names()
    assert load(other, "disk").fingerprint() == load(other).fingerprint() == base.fingerprint()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tied_embeddings_stay_tied(family, tmp_path):
    kind, shape = FAMILIES[family]
    lm = LanguageModel.random(make_config(kind, **shape, tie_word_embeddings=True), NoTokenizer(), seed=0, device="cpu")
    lm.save(tmp_path / "m")
    assert "lm_head.weight" not in Checkpoint(tmp_path / "m").names()
    disk = load(tmp_path / "m", "disk")
    assert disk.model.get_output_embeddings().weight is disk.model.get_input_embeddings().weight
    assert torch.equal(logits(disk), logits(lm))
    for form in ("dense", "bitmask"):
        disk.save(tmp_path / form, form)
        assert "lm_head.weight" not in Checkpoint(tmp_path / form).names()
        assert load(tmp_path / form).fingerprint() == lm.fingerprint()


def test_shards_are_read_a_block_at_a_time(saved, tmp_path):
    lm = load(saved("llama"))
    lm.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    disk = load(tmp_path, "disk")
    assert disk.fingerprint() == lm.fingerprint()
    assert np.array_equal(disk.nll(TEXT), lm.nll(TEXT))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_that_is_missing_is_named(name, saved, tmp_path):
    other = rewritten(saved("llama"), tmp_path / "m", lambda ts: {n: t for n, t in ts.items() if n != name})
    with pytest.raises(ValueError, match=rf"the checkpoint lacks {name}, .*copy it again"):
        load(other, "disk")


def test_a_tensor_of_another_shape_is_named(saved, tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    other = rewritten(saved("llama"), tmp_path / "m", lambda ts: ts | {name: ts[name][:-1].clone()})
    with pytest.raises(ValueError, match=r"mlp\.up_proj\.weight.*\[47, 32\].*\[48, 32\]"):
        load(other, "disk")


def test_pickled_checkpoints_are_not_read(saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no safetensors checkpoint.*safe_serialization"):
        load(tmp_path, "disk")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_blocks_come_in_the_dtype_that_was_asked_for(dtype, saved):
    disk, plain = (load(saved("llama"), offload, dtype=dtype) for offload in ("disk", "none"))
    assert disk.dtype == dtype
    assert torch.equal(logits(disk), logits(plain))
    for lm in (disk, plain):
        prune_model(lm, profile(lm), SparseGPT(), TEXT)
    assert disk.fingerprint() == plain.fingerprint()


def test_a_shelf_keeps_a_block_that_is_there(saved, monkeypatch):
    lm = load(saved("llama"), "disk")
    reads = []
    read = lm._store._read
    assert isinstance(lm._store, DiskBlockStore)
    monkeypatch.setattr(lm._store, "_read", lambda index: reads.append(index) or read(index))
    lm.nll(TEXT)
    reads.clear()
    lm.nll(TEXT)
    assert reads == [0, 1, 2, 3]
    lm.load_block(3)
    assert reads == [0, 1, 2, 3]


@pytest.mark.skipif(not STATUS.is_file(), reason="the system does not say what is resident")
def test_the_pages_of_a_block_go_back_to_the_system(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 4, "num_hidden_layers": 10}
    Random(device="cpu", **shape).load().save(tmp_path / "model")

    def visit_all():
        lm = load(tmp_path / "model", "disk")
        lm.load_block(0)
        before = resident()
        for index in range(lm.n_blocks):
            lm.load_block(index)
        block = sum(p.numel() * p.element_size() for p in lm.blocks[0].parameters())
        (tmp_path / "grown").write_text(str((resident() - before) / block))

    assert forked(visit_all) == 0
    assert float((tmp_path / "grown").read_text()) < 3, "blocks more in memory after ten than after one"


def test_buffers_that_a_checkpoint_has_are_read(saved, tmp_path, monkeypatch):
    own = LlamaDecoderLayer.__init__

    def with_buffer(self, *args, **kwargs):
        own(self, *args, **kwargs)
        self.register_buffer("gain", torch.ones(3))

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", with_buffer)
    with pytest.raises(ValueError, match=r"the checkpoint lacks model\.layers\.0\.gain"):
        load(saved("llama"))
    lm = family_model("llama")
    lm.tokenizer = NoTokenizer()
    for index, block in enumerate(lm.blocks):
        block.gain.fill_(0.25 + index)
    lm.save(tmp_path / "dense")
    lm.save(tmp_path / "bits", "bitmask")
    for folder, where in ((tmp_path / "dense", "disk"), (tmp_path / "bits", "none"), (tmp_path / "bits", "disk")):
        again = load(folder, where)
        assert [block.gain[0].item() for block in again.blocks] == [0.25, 1.25, 2.25, 3.25][: again.n_blocks]
        assert again.fingerprint() == lm.fingerprint()


def test_two_processes_do_not_share_a_folder(saved, tmp_path):
    code = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); "
        "print('locked', flush=True); time.sleep(60)"
    )
    (tmp_path / "scratch").mkdir()
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path / "scratch" / "lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ValueError, match="another process works in"):
            load(saved("llama"), "disk", scratch=tmp_path / "scratch")
    finally:
        other.kill()
        other.wait()
    load(saved("llama"), "disk", scratch=tmp_path / "scratch")


def test_stand_ins_of_an_offloaded_model_are_refused(saved):
    lm = load(saved("llama"), "disk")
    with pytest.raises(ValueError, match=r"offload: .*use offload=none"):
        LayerGame(lm, TEXT, pruned=[{} for _ in range(lm.n_blocks)])


class Sent(Incoming):
    """Weights that come at once, and what was asked for."""

    def __init__(self, n_blocks):
        super().__init__(lambda index: {}, torch.device("cpu"), n_blocks)
        self._stream, self.began = object(), []

    def _begin(self, index):
        self.began.append(index)
        done = Future()
        done.set_result(({}, None))
        return done


@pytest.fixture
def streams(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_event=lambda event: None))


@pytest.mark.parametrize(
    ("taken", "began"),
    [
        ([0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1, 2]),
        ([0, 1, 2, 3, 2, 1, 0, 1], [0, 1, 2, 3, 0, 2, 1, 0, 3, 1, 2]),
    ],
    ids=["down the blocks, again and again", "and up, as gradients go"],
)
def test_the_next_block_comes_ahead_in_the_direction_of_the_walk(streams, taken, began):
    blocks = Sent(4)
    for index in taken:
        blocks.take(index)
    assert blocks.began == began


def test_only_a_block_that_has_changed_comes_again(streams):
    blocks = Sent(4)
    blocks.take(0)
    blocks.drop(0)
    blocks.take(1)
    assert blocks.began == [0, 1, 2]
    blocks.drop(2)
    blocks.take(2)
    assert blocks.began == [0, 1, 2, 2, 3]

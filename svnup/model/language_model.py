"""A causal language model as a stack of blocks, and the block-by-block walk that scoring, pruning and evaluation share."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from svnup import distributed
from svnup.files import at_home
from svnup.machines import HASHERS
from svnup.model.blocks import (
    Call,
    Observed,
    StopForward,
    containers,
    differing,
    hidden_of,
    nearly_equal,
    observe,
    refill,
    replaced,
    split_call,
    with_hidden,
)
from svnup.model.checkpoint import Tensors, in_place, is_bitmask, write_bitmask, write_dense
from svnup.model.digest import tensor_sha256
from svnup.model.linears import LINEAR_MODULES, Linear, NoRoutesError, expert_of, linears_of, parameter_of, rerouted
from svnup.model.loading import Loader, auto_class, outline, quiet_unless_terminal
from svnup.model.offload import BlockStore, DiskBlockStore, HostBlockStore
from svnup.progress import stage
from svnup.types import Floats, Granularity, Ints, Offload, SaveFormat

# Fixed and not derived from free memory: the sizes of matrix products decide the last bits of a number.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
HEAD_TOKENS = 1024
Unit = Literal["block", "attention", "mlp"]


@dataclass
class MicroBatch:
    """A few sequences between two blocks.

    Args:
        tokens: int64 (b, s).
        hidden: hidden states that enter the next block, (b, s, d).
        calls: the other arguments of each block exactly as the model passes them, since masks and rotary embeddings differ
            between blocks where layer types are mixed.
        state: what earlier blocks wrote into containers among these arguments for later ones to read (Gemma 3n: keys and
            values); empty in most families.
    """

    tokens: Tensor
    hidden: Tensor
    calls: list[Call]
    state: tuple[Any, ...] = ()


class OffloadedBatch(MicroBatch):
    """A micro-batch whose hidden states are kept off the device.

    Args:
        batch: the micro-batch to offload.
        place: the folder of a temporary file that holds the hidden states; None keeps them in the CPU's memory.
    """

    def __init__(self, batch: MicroBatch, place: Path | None) -> None:
        self.tokens, self.calls, self.state = batch.tokens, batch.calls, batch.state
        self._device, self._file = batch.hidden.device, None
        if place is not None:  # bytes, since numpy has no bfloat16
            with tempfile.NamedTemporaryFile(dir=place) as file:  # deleted with the process, however that ends
                n_bytes = batch.hidden.numel() * batch.hidden.element_size()
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here instead of a crash later
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                self._file = np.memmap(file, np.uint8, "w+", shape=(n_bytes,))
        self._dtype, self._shape = batch.hidden.dtype, batch.hidden.shape
        self._on_host: Tensor | None = None
        self.hidden = batch.hidden

    @property
    def hidden(self) -> Tensor:
        """The hidden states on the device, (b, s, d): read anew each time."""
        if self._on_host is not None:
            return self._on_host.to(self._device, non_blocking=True)
        return torch.from_numpy(np.array(self._file)).view(self._dtype).reshape(self._shape).to(self._device)

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        if self._file is not None:
            self._file[:] = hidden.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        elif self._device.type == "cuda":
            # Pinned, and the same each time: what a GPU copies to new memory that is not came at 1 GB/s, a fortieth of its bus.
            if self._on_host is None or (self._on_host.shape, self._on_host.dtype) != (hidden.shape, hidden.dtype):
                try:
                    self._on_host = torch.empty(hidden.shape, dtype=hidden.dtype, pin_memory=True)
                except RuntimeError:  # the system locks no more memory
                    self._on_host = torch.empty(hidden.shape, dtype=hidden.dtype)
            self._on_host.copy_(hidden)
        else:
            self._on_host = hidden.cpu()


class Visit:
    """One block during a walk, with its inputs: to read it, run it or change its weights.

    Attributes:
        block: the module, whose weights are on the device.
        linears: its prunable linear layers by name.
        batches: the micro-batches that enter the block.
        advanced: whether the batches already hold the outputs of the block.
        shared: whether the batches are the share of this process in a text that several processes walk on together.
    """

    def __init__(self, lm: LanguageModel, index: int, batches: list[MicroBatch], shared: bool = False) -> None:
        lm.load_block(index)
        self.lm, self.index, self.batches, self.shared = lm, index, batches, shared
        self.block = lm.blocks[index]
        self.linears = lm.linears(index)
        self.advanced = False

    def run(self, advance: bool = False) -> None:
        """Run the block on all its inputs, so that hooks see them.

        Args:
            advance: keep the outputs as inputs of the next block.
        """
        for batch in self.batches:
            try:
                out = self.lm.run_block(self.index, batch)
            except StopForward:
                assert not advance, "nothing came out of the block"
                continue
            if advance:
                batch.hidden, batch.state = out.hidden, out.state
        self.advanced = self.advanced or advance
        self.lm.n_block_runs += bool(self.batches)


class LanguageModel:
    """A Hugging Face causal decoder with its blocks, their prunable linear layers and its head.

    The model is put in eval mode and takes no gradients. An offloaded block is loaded to the device when it is run or visited.

    Args:
        model: a model of transformers.
        tokenizer: its tokenizer, needed only to save the model or to read text.
        blocks_path: dotted name of the ModuleList of blocks; None finds it by its length, `num_hidden_layers`.

    Raises:
        ValueError: the blocks are not found.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, blocks_path: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.blocks_path = _find_blocks(model, blocks_path)
        self.blocks = model.get_submodule(self.blocks_path)
        self.decoder = model.get_submodule(self.blocks_path.rpartition(".")[0])
        self.n_block_runs = 0  # of visited blocks on all inputs
        self._store: BlockStore | None = None
        self._companions: dict[str, bytes] = {}  # files that are saved beside the model
        self._shared = _shared_by_blocks(self.blocks)

    @classmethod
    def load(
        cls,
        pretrained_model_name_or_path: str,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        blocks_path: str | None = None,
        gguf_file: str | None = None,
        offload: Offload = "none",
        scratch: Path | None = None,
    ) -> Self:
        """Load a checkpoint folder (dense or bitmask) or a Hub model; names as in `from_pretrained`.

        A quantized checkpoint is dequantized.

        Args:
            tokenizer: None takes the checkpoint's own.
            device: auto (CUDA if there is one), cpu, cuda, cuda:1, ...
            gguf_file: a GGUF file of the folder or Hub model to read in place of its checkpoint.
            offload: where blocks and hidden states of calibration are kept while they are not needed: `none` on the device,
                `cpu` in the CPU's memory, `disk` in the checkpoint and in files under `scratch`, so that the whole model is
                never in memory.
            scratch: the folder of these files; None makes a temporary one.

        Raises:
            ValueError: the checkpoint cannot be loaded, or lacks tensors of the model.
        """
        name = pretrained_model_name_or_path
        loader = Loader(
            source=str(at_home("pretrained_model_name_or_path", name)) if name.startswith("~") else name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=device_map,
            gguf_file=gguf_file,
        )
        tokenizer = tokenizer or loader.tokenizer()
        return cls.from_loader(loader, tokenizer, device=device, blocks_path=blocks_path, offload=offload, scratch=scratch)

    @classmethod
    def from_loader(
        cls,
        loader: Loader,
        tokenizer: Any,
        *,
        device: str = "auto",
        blocks_path: str | None = None,
        offload: Offload = "none",
        scratch: Path | None = None,
    ) -> Self:
        """Load the model of a loader; the arguments are those of `load`."""
        if loader.device_map is not None and (offload == "disk" or is_bitmask(loader.source)):
            raise ValueError(
                f"model.device_map={loader.device_map}: {loader.source} is loaded to one device; use device_map=null"
            )
        if offload == "disk":
            return cls._from_disk(loader, tokenizer, pick_device(device), blocks_path, scratch)
        model = loader.load()
        if loader.device_map is not None and any(p.is_meta for p in model.parameters()):
            raise ValueError(
                f"model.device_map={loader.device_map}: the model does not fit the GPUs at hand; use more, or a smaller one"
            )
        lm = cls(model, tokenizer, blocks_path)
        lm._companions = loader.companions()
        if loader.device_map is None:
            lm._move(pick_device(device), offload)
        return lm

    @classmethod
    def _from_disk(
        cls, loader: Loader, tokenizer: Any, device: torch.device, blocks_path: str | None, scratch: Path | None
    ) -> Self:
        """A model whose blocks stay in the checkpoint until they are loaded."""
        path = cls(loader.outline(), None, blocks_path).blocks_path
        model, read, identity = loader.without_blocks(path)
        lm = cls(model, tokenizer, path)
        lm._companions = loader.companions()
        lm._move_all_but_blocks(device)
        lm._offload_to(DiskBlockStore(lm.blocks, read, device, scratch, f"{identity} {model.config.dtype}"))
        return lm

    def _move(self, device: torch.device, offload: Offload) -> None:
        """Put the model on a device; the parameters of blocks stay in the CPU's memory if they are offloaded."""
        if offload == "none" or device.type == "cpu":
            self.model.to(device)
            return
        self._move_all_but_blocks(device)
        self._offload_to(HostBlockStore(self.blocks, device))

    def _move_all_but_blocks(self, device: torch.device) -> None:
        """Put everything on a device except the parameters of blocks; their buffers are moved."""
        blocks = {id(p) for p in self.blocks.parameters()}
        for p in self.model.parameters():
            if id(p) not in blocks:
                p.data = p.data.to(device)
        for module in self.model.modules():
            module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None})

    def _offload_to(self, store: BlockStore) -> None:
        """Keep the blocks in a store and load each on demand."""
        self._store = store
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(self._loads_before_forward(index))

    def _loads_before_forward(self, index: int) -> Callable[..., None]:
        """Pre-forward hook that loads a block on demand; one whose forward is replaced for a while needs no weights."""

        def hook(block: nn.Module, args: Any) -> None:
            if "forward" not in vars(block):
                self.load_block(index)

        return hook

    @classmethod
    def random(
        cls,
        config: Any,
        tokenizer: Any,
        *,
        seed: int,
        dtype: str = "float32",
        device: str = "auto",
        offload: Offload = "none",
    ) -> Self:
        """A model of a transformers config with random weights, drawn from `seed`."""
        with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
            torch.default_generator.manual_seed(seed)
            lm = cls(auto_class(config).from_config(config, dtype=getattr(torch, dtype)), tokenizer)
        lm._move(pick_device(device), offload)
        return lm

    @classmethod
    def skeleton(cls, config: Any, blocks_path: str | None = None, trust_remote_code: bool = False) -> Self:
        """A model of a transformers config without memory for weights, to check a job before anything is loaded."""
        return cls(outline(config, trust_remote_code), None, blocks_path)

    # -- modules, shapes and weights

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """The device of the input embeddings, on which blocks are run."""
        out: torch.device = self.model.get_input_embeddings().weight.device
        return out

    @property
    def dtype(self) -> str:
        """The dtype of the weights, such as bfloat16."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        """Number of logits of the head."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def n_embeddings(self) -> int:
        """Number of input embeddings; every token id is below it."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the model supports, by its configuration or its position embeddings; None if unknown."""
        named = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if named is not None and named > 0:
            return int(named)
        tables = {n: m for n, m in self.decoder.named_modules() if isinstance(m, nn.Embedding)}
        return min((m.num_embeddings for n, m in tables.items() if "pos" in n or n.endswith("wpe")), default=None)

    def why_too_long(self, seq_len: int) -> str | None:
        """Why a skeleton fails on sequences of this length although it runs on short ones; None if it does not fail.

        A skeleton has no numbers: a limit that depends on weights or on token ids is not found.
        """
        for length in (2, seq_len):
            try:
                self.decoder(input_ids=torch.zeros(1, length, dtype=torch.int64, device="meta"), use_cache=False)
            except Exception as error:  # of any family's code
                return str(error).partition("\n")[0] if length == seq_len > 2 else None
        return None

    def linears(self, index: int) -> dict[str, Linear]:
        """The prunable linear layers of a block by name: nn.Linear, GPT-2's Conv1D, and each matrix of each expert.

        Routers and gates of experts are none, and what several blocks share belongs to none of them.
        """
        return _own_linears(self.blocks, index, self._shared)

    def linear_parameters(self, index: int) -> dict[str, nn.Parameter]:
        """The parameters of a block that hold the weights of its prunable linear layers, by name in the block."""
        names = {parameter_of(name, m): None for name, m in self.linears(index).items()}
        return {name: self.blocks[index].get_parameter(name) for name in names}

    def left_alone(self) -> dict[str, int]:
        """Numbers of weights of what is no prunable linear layer in blocks, by name in a block: routers, convolutions, ...

        Vectors, such as biases and the weights of norms, are left out.
        """
        out: dict[str, int] = {}
        for index in range(self.n_blocks):
            for name, p in self._others(index).items():
                out[name] = out.get(name, 0) + p.numel()
        return out

    def has_others(self, index: int) -> bool:
        """Whether a block has weights that `left_alone` counts."""
        return bool(self._others(index))

    def _others(self, index: int) -> dict[str, nn.Parameter]:
        pruned = self.linear_parameters(index)
        return {name: p for name, p in self.blocks[index].named_parameters() if p.dim() > 1 and name not in pruned}

    @property
    def offloaded(self) -> bool:
        """Whether blocks are loaded to the device one at a time."""
        return self._store is not None

    def load_block(self, index: int) -> None:
        """Put the weights of an offloaded block on the device, in place of the block that is there."""
        if self._store is not None:
            self._store.load_block(index)

    def store_block(self, index: int, key: str, note: str) -> None:
        """Write the current weights of an offloaded block to its store, with what `restore_block` looks for.

        Args:
            key: identifies the pruning that made the weights.
            note: text to keep beside them.
        """
        if self._store is not None:
            self._store.store_block(index, key, note)

    def restore_block(self, index: int, key: str) -> str | None:
        """Take over the weights of a block that an interrupted process stored under the same key.

        Returns:
            The note that was stored with them; None if there are none, and the block is unchanged.
        """
        return self._store.restore_block(index, key) if self._store is not None else None

    @property
    def block_params(self) -> Ints:
        """Number of prunable weights of each block, int64 (n_blocks,)."""
        return np.array([sum(m.weight.numel() for m in self.linears(i).values()) for i in range(self.n_blocks)])

    def budget_params(self, granularity: Granularity) -> Ints:
        """Number of prunable weights of each unit with a budget of its own, int64 (n_units,), ordered as `budget_units`."""
        return np.array([sum(m.weight.numel() for m in unit.values()) for _, unit in self.budget_units(granularity)])

    def budget_units(self, granularity: Granularity) -> list[tuple[int, dict[str, Linear]]]:
        """The units with a budget of their own: blocks, sublayers (attention before MLP), experts, or linear layers.

        With experts, what is of no expert is a unit of its block, too.

        Returns:
            For each unit the index of its block and its prunable linear layers by name.

        Raises:
            ValueError: as `sublayers`, or no block has experts.
        """
        if granularity == "block":
            return [(index, self.linears(index)) for index in range(self.n_blocks)]
        if granularity == "sublayer":
            return [(index, unit) for index in range(self.n_blocks) for unit in self.sublayer_linears(index)]
        if granularity == "expert":
            units = [(index, unit) for index in range(self.n_blocks) for unit in self._expert_linears(index)]
            if len(units) == self.n_blocks:
                name = type(self.model).__name__
                raise ValueError(f"granularity=expert: {name} has no experts; use granularity=sublayer, or another allocator")
            return units
        return [(index, {name: m}) for index in range(self.n_blocks) for name, m in self.linears(index).items()]

    def granularity_of(self, params: Ints) -> Granularity:
        """The granularity of a profile whose units have this many weights, int64 (n_units,)."""
        if len(params) == self.n_blocks:
            return "block"
        finer: tuple[Granularity, ...] = ("sublayer", "expert")
        for granularity in finer:
            with contextlib.suppress(ValueError):  # this model has no such units
                if np.array_equal(params, self.budget_params(granularity)):
                    return granularity
        return "linear"

    def _expert_linears(self, index: int) -> list[dict[str, Linear]]:
        """The prunable linear layers of a block that are of no expert, and those of each expert."""
        units: dict[str | None, dict[str, Linear]] = {}
        for name, linear in self.linears(index).items():
            units.setdefault(expert_of(name, linear), {})[name] = linear
        others = units.pop(None, None)
        return [*([others] if others else []), *units.values()]

    def experts(self, index: int) -> list[str]:
        """The names of the experts of a block, such as mlp.experts.3, in the order of `budget_units`."""
        names = {expert_of(name, linear): None for name, linear in self.linears(index).items()}
        return [name for name in names if name is not None]

    def check_routes(self) -> None:
        """Check that experts are called with the routes of tokens and their weights, as games of experts need.

        A skeleton can be asked, too. It has no numbers: where the model's code needs some, nothing is found.

        Raises:
            NoRoutesError: they are not.
        """

        def passes(module: nn.Module) -> Callable[..., Any]:
            @functools.wraps(module.forward)
            def forward(*args: Any, **kwargs: Any) -> Any:
                return torch.zeros_like(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))

            return forward

        try:
            with contextlib.ExitStack() as contexts, torch.no_grad():
                for index, block in enumerate(self.blocks):
                    experts = self.experts(index)
                    holders = {block.get_submodule(expert.rpartition(".")[0]) for expert in experts}
                    contexts.enter_context(replaced({module: passes(module) for module in holders}))
                    contexts.enter_context(rerouted(block, experts, lambda numbers, index, weights: weights))
                self.decoder(input_ids=self._probe, use_cache=False)
        except NoRoutesError:
            raise
        except Exception:  # of any family's code
            return

    def sublayer_linears(self, index: int) -> list[dict[str, Linear]]:
        """The prunable linear layers of a block's attention, and those of its MLP; raises ValueError as `sublayers`."""
        linears = self.linears(index).items()
        return [{n: m for n, m in linears if n.partition(".")[0] in modules} for modules in self.sublayers(index).values()]

    def fingerprint(self) -> str:
        """SHA-256 of the architecture and of every current weight with its dtype."""
        config = self.model.config.to_dict()
        for key in ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"):
            config.pop(key, None)
        config["attn_implementation"] = getattr(self.model.config, "_attn_implementation", None)

        total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        with ThreadPoolExecutor(HASHERS) as pool:
            for tensors in self._in_memory():
                for digested in pool.map(tensor_sha256, tensors, tensors.values()):
                    total.update(digested)
        return total.hexdigest()

    def _in_memory(self) -> Iterator[Tensors]:
        """The state dict in its order: all of it where that is in memory, else in groups, of which one has one block."""
        if not any(p.is_meta for p in self.blocks.parameters()):
            yield self.model.state_dict()
            return
        for index, names in groupby(self.model.state_dict(), key=self._block_of):
            if index is not None:
                self.load_block(index)
            group = {name: attrgetter(name)(self.model) for name in names}
            yield group
            group.clear()  # there is memory for one block, even if the caller still holds this one

    def _block_of(self, name: str) -> int | None:
        inside = name.startswith(self.blocks_path + ".")
        return int(name[len(self.blocks_path) + 1 :].partition(".")[0]) if inside else None

    def state_dict_by_block(self) -> Iterator[Tensors]:
        """The state dict in groups of tensors: one for each block, valid until the next is asked for, then the rest.

        Tied tensors are given once.
        """
        tied = set(self.model.all_tied_weights_keys or {})
        rest: Tensors = {}
        for index, names in groupby(self.model.state_dict(), key=self._block_of):
            if index is None:
                rest |= {name: attrgetter(name)(self.model) for name in names if name not in tied}
                continue
            self.load_block(index)
            of_block = {name: attrgetter(name)(self.model) for name in names}
            yield of_block
            of_block.clear()  # there is memory for one block, even if the caller still holds this one
        yield rest

    def _as_released(self) -> Iterator[Tensors]:
        """The groups of `state_dict_by_block`, named and divided as in released checkpoints, as `save_pretrained` does."""
        for group in self.state_dict_by_block():
            released = revert_weight_conversion(self.model, group)
            yield released
            released.clear()  # as these groups are

    def pruned_names(self) -> list[str]:
        """Names, in the state dict, of the parameters that hold the prunable weights."""
        return [f"{self.blocks_path}.{i}.{name}" for i in range(self.n_blocks) for name in self.linear_parameters(i)]

    def save(self, folder: str | Path, form: SaveFormat = "dense") -> None:
        """Write a checkpoint; its folder appears when it is complete.

        Args:
            folder: where to write it.
            form: `dense` is safetensors that `from_pretrained` reloads to the same logits; `bitmask` stores pruned matrices as
                their kept values and one bit per weight, which `LanguageModel.load` and `svnup-expand` restore exactly.
        """

        def fill_folder(partial: Path) -> None:
            if form == "dense" and self._store is None:
                self.model.save_pretrained(partial)
            else:
                self.model.config.architectures = [type(self.model).__name__]
                self.model.config.save_pretrained(partial)
                if self.model.generation_config is not None:
                    self.model.generation_config.save_pretrained(partial)
                if form == "dense":
                    write_dense(partial, self._as_released())
                else:
                    write_bitmask(partial, self.state_dict_by_block(), set(self.pruned_names()))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)
            for name, data in self._companions.items():
                (partial / name).write_bytes(data)

        with quiet_unless_terminal():
            in_place(at_home("folder", folder), fill_folder)

    # -- running blocks and the head

    def micro_batches(self, tokens: np.ndarray | Tensor, batch_tokens: int | None = None) -> Iterator[MicroBatch]:
        """Cut tokens into micro-batches that are ready to enter the first block.

        Args:
            tokens: int64 (n_seq, seq_len).
            batch_tokens: the most tokens of a micro-batch, which has at least one sequence; None takes `BATCH_TOKENS`.

        Raises:
            ValueError: the blocks of this model cannot be run one by one.
        """
        rows = torch.as_tensor(tokens)
        last = None
        assert self._checked
        for chunk in rows.split(self._rows(rows.shape[1], batch_tokens)):
            batch = self._enter(chunk.to(self.device))
            if last is not None and _same(last.calls, batch.calls):
                batch.calls = last.calls  # masks and rotary embeddings of one length, held once
            yield batch
            last = batch

    def _rows(self, seq_len: int, batch_tokens: int | None = None) -> int:
        """Sequences of a micro-batch."""
        return max(1, (batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])) // seq_len)

    def entering(self, tokens: np.ndarray | Tensor, batch_tokens: int | None = None) -> list[MicroBatch]:
        """The micro-batches of all tokens at once, as a walk holds them. Args and Raises: as `micro_batches`."""
        return [self.offload_states(batch) for batch in self.micro_batches(tokens, batch_tokens)]

    def offload_states(self, batch: MicroBatch) -> MicroBatch:
        """A micro-batch with its hidden states where those of an offloaded model wait; the batch itself if it is not."""
        return batch if self._store is None else OffloadedBatch(batch, self._store.states)

    def run_block(
        self, index: int, batch: MicroBatch, *, unit: Unit = "block", weights: dict[str, Tensor] | None = None
    ) -> MicroBatch:
        """One block-forward: run a block on a micro-batch.

        The result depends on the arguments alone: while the block runs, mutable containers among its arguments have the
        content that the batch has for them.

        Args:
            index: of the block.
            batch: the inputs of the block; left as it is.
            unit: run the attention or the MLP alone, with the other one adding nothing to the residual stream.
            weights: used in place of the block's own parameters of these names, without a copy.

        Returns:
            A new micro-batch with the outputs of the block.
        """
        if weights:
            self.load_block(index)  # before its parameters are replaced
        args, kwargs = batch.calls[index]
        block, hidden = self.blocks[index], batch.hidden
        shared = self._state_containers(batch.calls)
        for container, content in zip(shared, batch.state, strict=True):
            refill(container, content)
        silent = (
            {} if unit == "block" else self._silence(index, "mlp" if unit == "attention" else "attention", hidden.shape[-1])
        )
        with replaced(silent):
            out = functional_call(block, weights, (hidden, *args), kwargs) if weights else block(hidden, *args, **kwargs)
        return MicroBatch(batch.tokens, hidden_of(out), batch.calls, tuple(map(copy.copy, shared)))

    def run_blocks(self, batch: MicroBatch) -> MicroBatch:
        """The outputs of the last block for a micro-batch of inputs of the first; the model is not offloaded."""
        for index in range(self.n_blocks):
            batch = self.run_block(index, batch)
        return batch

    def sublayers(self, index: int) -> dict[str, dict[str, nn.Module]]:
        """The modules of a block's `attention` and of its `mlp`, by name; together they have all matrices of the block.

        The MLP is one module, or the linear layers that are children of the block itself (OPT).

        Raises:
            ValueError: the block has other modules with matrices, or lacks one of the two.
        """
        heavy = {n: m for n, m in self.blocks[index].named_children() if any(p.dim() > 1 for p in m.parameters())}
        attention = {n: m for n, m in heavy.items() if "attn" in n or "attention" in n}
        mlp = {n: m for n, m in heavy.items() if n not in attention}
        own = [n for n, p in self.blocks[index].named_parameters(recurse=False) if p.dim() > 1]
        one = len(mlp) == 1 or (mlp and all(isinstance(m, LINEAR_MODULES) for m in mlp.values()))
        if len(attention) != 1 or not one or own:
            raise ValueError(
                f"players=sublayer: block {index} is not an attention and an MLP ({[*heavy, *own]}); use players=block"
            )
        return {"attention": attention, "mlp": mlp}

    def _silence(self, index: int, sublayer: str, width: int) -> dict[nn.Module, Callable[..., Any]]:
        """Forwards for the modules of a sublayer that compute nothing and add nothing to the residual stream."""
        *inner, last = self.sublayers(index)[sublayer].values()

        def nothing(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            return self._observed.forms[last].around(x.new_zeros(*x.shape[:-1], width))

        return {m: lambda x, *args, **kwargs: x for m in inner} | {last: nothing}

    def token_nll(self, batch: MicroBatch) -> Tensor:
        """Negative log-likelihood of each next token in nats, float32 (b, s - 1).

        The head runs on a few tokens at a time, so that the float32 logits of all of them never exist at once.

        Args:
            batch: outputs of the last block.
        """
        targets = batch.tokens[:, 1:].reshape(-1)
        losses = [
            nn.functional.cross_entropy(logits, targets[start : start + len(logits)].to(logits.device), reduction="none")
            for start, logits in self._logits_in_chunks(batch)
        ]
        return torch.cat(losses).view(len(batch.tokens), -1)

    def token_kl(self, batch: MicroBatch, reference: MicroBatch) -> Tensor:
        """KL(reference || batch) of the predictions of each next token in nats, float32 (b, s - 1).

        Args:
            batch: outputs of the last block.
            reference: outputs of the last block on the same tokens, such as those of the dense model.
        """
        pairs = zip(self._logits_in_chunks(reference), self._logits_in_chunks(batch), strict=True)
        chunks = [
            nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            for (_, a), (_, b) in pairs
        ]
        return torch.cat(chunks).view(len(batch.tokens), -1)

    @torch.inference_mode()
    def nll(self, tokens: np.ndarray | Tensor) -> Floats:
        """Mean negative log-likelihood of each sequence in nats per token, float64 (n_seq,).

        Of several processes each computes whole micro-batches, so that the losses are those of one process, bit for bit.

        Args:
            tokens: int64 (n_seq, seq_len).
        """
        rows = self._rows(tokens.shape[1])
        own = distributed.share(-(-len(tokens) // rows))
        part = tokens[own.start * rows : own.stop * rows]
        return np.concatenate(distributed.gathered(self._nll(part) if len(part) else np.zeros(0)))

    def _nll(self, tokens: np.ndarray | Tensor) -> Floats:
        losses: list[Tensor] = []
        if self._store is not None:  # so that every block is loaded once
            *_, last = self.walk(tokens)
            last.run(advance=True)
            return torch.cat([self.token_nll(b).double().mean(1).cpu() for b in last.batches]).numpy()
        with stage("evaluation", len(tokens), "sequences") as advance:
            for batch in self.micro_batches(tokens):
                batch = self.run_blocks(batch)
                losses.append(self.token_nll(batch).double().mean(1).cpu())
                advance(len(batch.tokens))
        return torch.cat(losses).numpy()

    @torch.no_grad()  # and no inference mode, whose tensors are no good for gradients of what is visited
    def walk(self, tokens: np.ndarray | Tensor | list[MicroBatch], start: int = 0, *, shared: bool = False) -> Iterator[Visit]:
        """The block-by-block loop: visit each block with the outputs of the blocks before it, as the caller left them.

        After a visit the block is run with the weights that it then has, unless the caller has advanced the visit itself.

        Args:
            tokens: int64 (n_seq, seq_len), or micro-batches that are inputs of block `start`; the caller may clear this list
                when the blocks that are left need no inputs.
            start: index of the first block to visit.
            shared: as in `Visit`.
        """
        batches = tokens if isinstance(tokens, list) else self.entering(tokens)
        for index in range(start, self.n_blocks):
            visit = Visit(self, index, batches, shared)
            yield visit
            if not visit.advanced and index + 1 < self.n_blocks:
                visit.run(advance=True)

    # -- the model's own forward with a block or the decoder replaced for one call: nothing of it is written anew

    @property
    def writers(self) -> frozenset[int]:
        """The blocks that pass more to later ones than hidden states, such as keys and values that these share."""
        return frozenset(self._observed.writes)

    def _state_containers(self, calls: list[Call]) -> list[Any]:
        """The mutable containers among the arguments of blocks through which blocks pass state to later ones."""
        written = self._observed.written
        return [containers(calls)[number] for number in written] if written else []

    def _forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens, use_cache=False)

    def _enter(self, tokens: Tensor) -> MicroBatch:
        """Record the arguments that the model prepares for its blocks: each passes its input on, the last stops the forward."""
        forms = self._observed.forms  # which runs the real blocks, so before they are replaced
        entered: list[Tensor] = []
        calls: list[Call] = []

        def record(block: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden, call = split_call(block, args, kwargs)
                entered.append(hidden)
                calls.append(call)
                if len(calls) == self.n_blocks:
                    raise StopForward
                return forms[block].around(hidden)

            return forward

        with replaced({block: record(block) for block in self.blocks}), contextlib.suppress(StopForward):
            self._forward(tokens)
        return MicroBatch(tokens, entered[0], calls, tuple(map(copy.copy, self._state_containers(calls))))

    def _decoded(self, batch: MicroBatch) -> Any:
        """The output of the decoder (the module that has the blocks) where the last block returns the batch's hidden states."""
        decoded: list[Any] = []

        def passes(block: nn.Module) -> Callable[..., Any]:
            last, form = block is self.blocks[-1], self._observed.forms[block]
            return lambda *args, **kwargs: form.around(batch.hidden if last else split_call(block, args, kwargs)[0])

        def enough(module: nn.Module, args: Any, out: Any) -> None:
            decoded.append(out)
            raise StopForward

        hook = self.decoder.register_forward_hook(enough)
        try:
            with replaced({block: passes(block) for block in self.blocks}), contextlib.suppress(StopForward):
                self._forward(batch.tokens)
        finally:
            hook.remove()
        return decoded[0]

    def _logits_in_chunks(self, batch: MicroBatch) -> Iterator[tuple[int, Tensor]]:
        """Pairs (start, float32 logits (c, vocab)) over the flattened positions that have a next token."""
        decoded = self._decoded(batch)
        normed = hidden_of(decoded)
        states = normed[:, :-1].reshape(-1, normed.shape[-1])
        stub = batch.tokens[:1, :1]
        for start in range(0, len(states), HEAD_TOKENS):
            out = with_hidden(decoded, states[None, start : start + HEAD_TOKENS])
            with replaced({self.decoder: lambda *args, out=out, **kwargs: out}):
                logits = self._forward(stub).logits[0].float()
            yield start, logits

    # -- checks that blocks can be run one by one, against the model's own forward on a few tokens

    @property
    def _probe(self) -> Tensor:
        """Two sequences that differ in their last token, (2, 8)."""
        rows = torch.arange(3, 11, device=self.device).repeat(2, 1)
        rows[1, -1] += 1
        return rows.remainder(self.vocab_size)

    def _unfit(self, why: str, error: Exception | None = None, fix: str = "choose another model") -> ValueError:
        said = f" ({type(error).__name__}: {' '.join(str(error).split())[:120]})" if error is not None else ""
        return ValueError(f"{type(self.model).__name__}: {why}{said}; {fix}")

    @cached_property
    def _observed(self) -> Observed:
        """A short forward of the model; raises ValueError if it fails, is not causal, or does not run block after block."""
        try:
            seen = observe(self.blocks, lambda: self._forward(self._probe).logits)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the model's own code raises
            if self.offloaded and isinstance(error, ValueError):  # from reading a block, with a message of its own
                raise
            raise self._unfit("cannot read tokens as a causal decoder does", error) from error
        if seen.order != list(range(self.n_blocks)):
            raise self._unfit(f"{self.blocks_path} are not run once each, one after the other, but in the order {seen.order}")
        for index in range(1, self.n_blocks):
            if not nearly_equal(seen.entered[index], seen.left[index - 1]):
                raise self._unfit(f"block {index} does not get what block {index - 1} returns, so that none can be run apart")
        if not nearly_equal(seen.logits[0, :-1], seen.logits[1, :-1], ulps=2**6):
            reads_on = getattr(self.model.config, "is_decoder", True) is False
            fix = "set is_decoder to true in config.json, or choose another model" if reads_on else "choose another model"
            raise self._unfit("its predictions depend on the tokens that follow", fix=fix)
        return seen

    @cached_property
    def _checked(self) -> bool:
        """Check that blocks get the same arguments and the head gives the same logits as in the model's own forward.

        A few tokens are enough: what depends on other blocks does so at any length.

        Raises:
            ValueError: they do not.
        """
        seen = self._observed
        try:
            with torch.no_grad():
                batch = self._enter(self._probe)
        except Exception as error:  # of the model's own code, on what replaced blocks return
            raise self._unfit("needs more of its blocks than hidden states", error) from error
        for index, (own, call) in enumerate(zip(seen.calls, batch.calls, strict=True)):
            if (argument := differing(own, call, self._state_containers(batch.calls))) is not None:
                raise self._unfit(f"argument {argument} of block {index} depends on what other blocks compute")
        last = replace(batch, hidden=seen.left[-1].to(batch.hidden.device))
        try:
            with torch.no_grad():
                logits = torch.cat([chunk for _, chunk in self._logits_in_chunks(last)]).cpu()
        except Exception as error:
            raise self._unfit("its head needs more than hidden states", error) from error
        if not nearly_equal(
            logits, seen.logits[:, :-1].flatten(0, 1).float(), ulps=2**18
        ):  # products of other sizes, maybe of bfloat16
            raise self._unfit("its head gives some tokens other logits than all")
        self._check_apart()
        return True

    @torch.no_grad()
    def _check_apart(self) -> None:
        """Check that the output of a block does not depend on what ran before it; raises ValueError if it does."""
        batch, other = self._enter(self._probe), self._enter((self._probe + 5).remainder(self.vocab_size))
        for index, own in enumerate(self._observed.left):
            batch, other = self.run_block(index, batch), self.run_block(index, other)  # alternating, as in a walk
            if not nearly_equal(batch.hidden, own):
                raise self._unfit(f"what block {index} computes depends on more than it is given")


def _same(a: Any, b: Any) -> bool:
    """Whether two nested structures of arguments have equal values."""
    (left, shape), (right, other) = tree_flatten(a), tree_flatten(b)
    if shape != other:
        return False
    equal: dict[tuple[int, int], bool] = {}  # blocks mostly share their arguments
    for x, y in zip(left, right, strict=True):
        pair = (id(x), id(y))
        if pair not in equal:
            both = isinstance(x, Tensor) and isinstance(y, Tensor)
            equal[pair] = x is y or (torch.equal(x, y) if both else not isinstance(x, Tensor) and bool(x == y))
        if not equal[pair]:
            return False
    return True


def _shared_by_blocks(blocks: nn.ModuleList) -> frozenset[str]:
    """Names, in the list of blocks, of the parameters that are those of several blocks."""
    owners: dict[int, set[int]] = {}
    names: dict[str, int] = {}
    for index, block in enumerate(blocks):
        for name, p in block.named_parameters(remove_duplicate=False):
            owners.setdefault(id(p), set()).add(index)
            names[f"{index}.{name}"] = id(p)
    return frozenset(name for name, p in names.items() if len(owners[p]) > 1)


def _own_linears(blocks: nn.ModuleList, index: int, shared: frozenset[str]) -> dict[str, Linear]:
    found = linears_of(blocks[index])
    return {name: m for name, m in found.items() if f"{index}.{parameter_of(name, m)}" not in shared}


def prunable_parameters(model: PreTrainedModel, blocks_path: str | None = None) -> dict[str, nn.Parameter]:
    """The parameters that hold the prunable weights of a model of transformers, by name; the model stays as it is.

    Args and Raises as `LanguageModel`.
    """
    path = _find_blocks(model, blocks_path)
    blocks = model.get_submodule(path)
    shared = _shared_by_blocks(blocks)
    names = {
        f"{path}.{index}.{parameter_of(name, m)}": None
        for index in range(len(blocks))
        for name, m in _own_linears(blocks, index, shared).items()
    }
    return {name: model.get_parameter(name) for name in names}


def _find_blocks(model: PreTrainedModel, path: str | None) -> str:
    n = model.config.get_text_config().num_hidden_layers
    found = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if path is not None:
        if path not in dict(model.named_modules()) or not isinstance(model.get_submodule(path), nn.ModuleList):
            raise ValueError(f"model.blocks_path={path}: no such ModuleList in {type(model).__name__}; found {found}")
        return path
    if len(found) > 1:  # a vision encoder may have as many blocks
        decoder = {id(m) for m in model.get_decoder().modules()}
        found = [name for name in found if id(model.get_submodule(name)) in decoder] or found
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} ModuleLists of length num_hidden_layers={n} ({found}): "
            "name the one that holds the blocks with model.blocks_path"
        )
    out: str = found[0]
    return out


def pick_device(device: str) -> torch.device:
    """The torch device of `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:1`; raises ValueError if it is missing.

    Of several processes of a job each has the GPU of its number on the machine.
    """
    picked = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if picked.type == "cuda" and (number := distributed.local_rank()) is not None:
        picked = torch.device("cuda", number)
    if picked.type == "cuda" and (picked.index or 0) >= (n := torch.cuda.device_count()):
        way = "choose auto or cpu" if distributed.local_rank() is None else f"start at most {n} processes on it, or choose cpu"
        raise ValueError(f"device={device}: this machine has {n} CUDA devices; {way}")
    return picked


def make_config(model_type: str, **shape: Any) -> Any:
    """A transformers config of a model family with the given values."""
    return AutoConfig.for_model(model_type, **shape)

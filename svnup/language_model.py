"""A causal language model seen as a stack of blocks, and the one block-by-block loop that everything here uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from svnup.checkpoint import Checkpoint, Tensors, in_place, is_bitmask, write_bitmask, write_dense
from svnup.offload import DiskShelf, HostShelf, Shelf, fill
from svnup.progress import stage
from svnup.types import Floats, Granularity, Ints, Offload, SaveFormat

# Fixed, not derived from free memory: the sizes of matrix products decide the last bits of a number.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
HEAD_TOKENS = 1024
Part = Literal["block", "attention", "mlp"]
if TYPE_CHECKING:  # mypy does not read transformers
    Linear = nn.Linear
else:
    Linear = nn.Linear | Conv1D


@dataclass
class MicroBatch:
    """Some sequences on their way through the blocks.

    `tokens` (b, s); `hidden` (b, s, d), what enters the next block; `calls`, the other arguments of each block exactly as
    the model passes them (masks and rotary embeddings differ between blocks where layer types are mixed).
    """

    tokens: Tensor
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]


class ParkedBatch(MicroBatch):
    """A micro-batch whose hidden states wait in the CPU's memory, or in a file of the folder `place`, and not on the device."""

    def __init__(self, batch: MicroBatch, place: Path | None) -> None:
        self.tokens, self.calls = batch.tokens, batch.calls
        self._device, self._file = batch.hidden.device, None
        if place is not None:  # bytes, since numpy has no bfloat16
            with tempfile.NamedTemporaryFile(dir=place) as file:  # gone with the process, however that ends
                n_bytes = batch.hidden.numel() * batch.hidden.element_size()
                if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and no crash later
                    os.posix_fallocate(file.fileno(), 0, n_bytes)
                self._file = np.memmap(file, np.uint8, "w+", shape=(n_bytes,))
        self._dtype, self._shape = batch.hidden.dtype, batch.hidden.shape
        self.hidden = batch.hidden

    @property
    def hidden(self) -> Tensor:
        if self._file is None:
            return self._parked.to(self._device)
        return torch.from_numpy(np.array(self._file)).view(self._dtype).reshape(self._shape).to(self._device)

    @hidden.setter
    def hidden(self, hidden: Tensor) -> None:
        if self._file is None:
            self._parked = hidden.cpu()
        else:
            self._file[:] = hidden.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class EnoughError(Exception):
    """Raised by a hook that needs no more of the run of a block on one batch."""


class Visit:
    """One block during a walk: look at it, run it, change its weights."""

    def __init__(self, lm: LanguageModel, index: int, batches: list[MicroBatch]) -> None:
        lm.bring(index)
        self.lm, self.index, self.batches = lm, index, batches
        self.block = lm.blocks[index]
        self.linears = lm.linears(index)
        self.advanced = False

    def run(self, advance: bool = False) -> None:
        """Run the block on all inputs, for its hooks; `advance` keeps the outputs as the next block's inputs."""
        for batch in self.batches:
            try:
                hidden = self.lm.run_block(self.index, batch.hidden, batch)
            except EnoughError:
                assert not advance, "nothing came out of the block"
                continue
            if advance:
                batch.hidden = hidden
        self.advanced = self.advanced or advance
        self.lm.n_block_runs += bool(self.batches)


class LanguageModel:
    """A Hugging Face causal decoder with its blocks, their prunable linears, and a head that turns hidden states into losses.

    `blocks_path` names the ModuleList of blocks where it cannot be found by its length (`num_hidden_layers`).
    Raises ValueError where the blocks are not found or are mixtures of experts. The model is put in eval mode and takes no
    gradients. Where the blocks lie elsewhere (`offload`), each is brought to the device when it is run or visited.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, blocks_path: str | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.blocks_path = _find_blocks(model, blocks_path)
        self.blocks = model.get_submodule(self.blocks_path)
        self.decoder = model.get_submodule(self.blocks_path.rpartition(".")[0])
        self.n_block_runs = 0  # of visited blocks on all inputs
        self._shelf: Shelf | None = None
        _refuse_experts(model, self.blocks)

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
        offload: Offload = "none",
        scratch: Path | None = None,
    ) -> Self:
        """Load a checkpoint folder (dense or bitmask) or a hub model; names as in `from_pretrained`, `device` = auto, cpu,
        cuda, cuda:1, ...

        `tokenizer` None takes the checkpoint's own. `offload`: where blocks and calibration states wait while they are not
        computed with: `none` on the device, `cpu` in its memory, `disk` in the checkpoint itself and in files under `scratch`
        (None: temporary ones), so that the whole model is never in memory.

        Raises ValueError where the checkpoint cannot be loaded.
        """
        source = pretrained_model_name_or_path
        remote: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        if offload == "disk" or is_bitmask(source):
            if device_map is not None:
                raise ValueError(f"model.device_map={device_map}: {source} is read for one device; use device_map=null")
            config, checkpoint = read_config(source, **remote), Checkpoint(_local_folder(source, revision))
            config.dtype = config.dtype or checkpoint.dtype()
            config = config_with(config, dtype, attn_implementation)
            lm = cls._assembled(checkpoint, config, pick_device(device), trust_remote_code, blocks_path, offload, scratch)
            if (checkpoint.folder / "generation_config.json").is_file():
                lm.model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
            lm.tokenizer = tokenizer or read_tokenizer(source, **remote)
            return lm
        options: dict[str, Any] = {"device_map": device_map, "attn_implementation": attn_implementation}
        with _quiet_unless_terminal():
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    source,
                    dtype=dtype,
                    **remote,
                    **{k: v for k, v in options.items() if v is not None},
                )
            except (OSError, ImportError) as error:
                raise ValueError(f"{source} cannot be loaded: {error}") from error
        if device_map is not None and any(p.is_meta for p in model.parameters()):
            raise ValueError(
                f"model.device_map={device_map}: the model does not fit the GPUs at hand; use more, or a smaller one"
            )
        lm = cls(model, tokenizer or read_tokenizer(source, **remote), blocks_path)
        if device_map is None:
            lm._move(pick_device(device), offload)
        return lm

    @classmethod
    def _assembled(
        cls,
        checkpoint: Checkpoint,
        config: Any,
        device: torch.device,
        trust_remote_code: bool,
        blocks_path: str | None,
        offload: Offload,
        scratch: Path | None,
    ) -> Self:
        """A model whose tensors are read one after the other: all but the blocks, and these too unless they stay on disk."""
        with _parameters_without_memory():
            model = AutoModelForCausalLM.from_config(config, dtype=config.dtype, trust_remote_code=trust_remote_code)
        for module in model.modules():  # as loading does: what is computed and not stored comes out the same in any dtype
            if module._non_persistent_buffers_set:
                model._init_weights(module)
        lm = cls(model, None, blocks_path)
        stored = _stored_names(model, checkpoint.names())

        def read(names: list[str], prefix: str = "") -> Tensors:
            where = {n: stored.get(prefix + n, prefix + n) for n in names}
            tensors = checkpoint.read(where.values())
            return {n: tensors[found] for n, found in where.items()}

        def read_block(index: int) -> Tensors:
            return read([n for n, _ in lm.blocks[index].named_parameters()], f"{lm.blocks_path}.{index}.")

        rest = [n for n, _ in model.named_parameters() if not n.startswith(lm.blocks_path + ".")]
        tied = set(model.all_tied_weights_keys or {})
        fill(model, read([n for n in rest if n not in tied]), device)
        model.tie_weights()
        kept = set(model.state_dict())  # buffers that a checkpoint has, some of them in blocks, stay on the device
        for name, value in read([n for n, _ in model.named_buffers() if n in kept and n in stored]).items():
            model.get_buffer(name).copy_(value)
        _buffers_to(model, device)
        if offload == "disk":
            lm._put_on(DiskShelf(lm.blocks, read_block, device, scratch, f"{checkpoint.identity()} {config.dtype}"))
            return lm
        for index, block in enumerate(lm.blocks):
            fill(block, read_block(index), torch.device("cpu") if offload == "cpu" else device)
        if offload == "cpu":
            lm._move(device, offload)
        return lm

    def _move(self, device: torch.device, offload: Offload) -> None:
        """Put the model on a device; of an offloaded one all but the parameters of the blocks."""
        if offload == "none" or device.type == "cpu":
            self.model.to(device)
            return
        blocks = {id(p) for p in self.blocks.parameters()}
        for p in self.model.parameters():
            if id(p) not in blocks:
                p.data = p.data.to(device)
        _buffers_to(self.model, device)
        self._put_on(HostShelf(self.blocks, device))

    def _put_on(self, shelf: Shelf) -> None:
        """Let every forward of a block bring it first, whoever runs it; one that is replaced for a while needs no weights."""
        self._shelf = shelf
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda m, args, index=index: None if "forward" in vars(m) else self.bring(index))

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
        """A model of the given transformers config with weights drawn from `seed`."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            lm = cls(AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)), tokenizer)
        lm._move(pick_device(device), offload)
        return lm

    @classmethod
    def skeleton(cls, config: Any, blocks_path: str | None = None, trust_remote_code: bool = False) -> Self:
        """The same modules and shapes without memory for weights, to check a job before anything is loaded."""
        with torch.device("meta"):
            return cls(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code), None, blocks_path)

    # -- what it is made of

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        return self.model.get_output_embeddings().weight.shape[0]

    def linears(self, index: int) -> dict[str, Linear]:
        """The prunable linears of a block by name (nn.Linear, or GPT-2's Conv1D); never embeddings, norms and the LM head."""
        return {name: m for name, m in self.blocks[index].named_modules() if isinstance(m, Linear)}

    @property
    def offloaded(self) -> bool:
        """Whether blocks come to the device one at a time."""
        return self._shelf is not None

    def bring(self, index: int) -> None:
        """Have the weights of a block on the device; a block that was there may leave."""
        if self._shelf is not None:
            self._shelf.bring(index)

    def settle(self, index: int, key: str, note: str) -> None:
        """Keep the weights that a block now has, wherever it lives; `key` and `note` are for `settled`."""
        if self._shelf is not None:
            self._shelf.settle(index, key, note)

    def settled(self, index: int, key: str) -> str | None:
        """The note of a block that an interrupted process settled by the same key, whose weights it then has; else None."""
        return self._shelf.settled(index, key) if self._shelf is not None else None

    @property
    def block_params(self) -> Ints:
        """Prunable weights per block, shape (n_blocks,)."""
        return np.array([sum(m.weight.numel() for m in self.linears(i).values()) for i in range(self.n_blocks)])

    @property
    def sublayer_params(self) -> Ints:
        """Prunable weights of each block's attention and of its MLP, shape (2 n_blocks,), in the order of their players."""
        return self.budget_params("sublayer")

    def budget_params(self, granularity: Granularity) -> Ints:
        """Prunable weights of whatever has a budget of its own, in the order of `budget_parts`."""
        return np.array([sum(m.weight.numel() for m in part.values()) for _, part in self.budget_parts(granularity)])

    def budget_parts(self, granularity: Granularity) -> list[tuple[int, dict[str, Linear]]]:
        """What has a budget of its own, each with the index of its block and its prunable linear layers by name: the blocks,
        their attention and their MLP by turns, or each linear layer. Raises ValueError as `sublayers` does."""
        if granularity == "block":
            return [(index, self.linears(index)) for index in range(self.n_blocks)]
        if granularity == "sublayer":
            return [(index, part) for index in range(self.n_blocks) for part in self.sublayer_linears(index)]
        return [(index, {name: m}) for index in range(self.n_blocks) for name, m in self.linears(index).items()]

    def granularity_of(self, params: Ints) -> Granularity:
        """What has budgets of its own in a profile of so many weights each."""
        if len(params) == self.n_blocks:
            return "block"
        sublayers = len(params) == 2 * self.n_blocks and np.array_equal(params, self.budget_params("sublayer"))
        return "sublayer" if sublayers else "linear"

    def sublayer_linears(self, index: int) -> list[dict[str, Linear]]:
        """The prunable linears of a block's attention, and those of its MLP. Raises ValueError as `sublayers` does."""
        linears = self.linears(index).items()
        return [{n: m for n, m in linears if n.partition(".")[0] in part} for part in self.sublayers(index).values()]

    def fingerprint(self) -> str:
        """SHA-256 over the architecture and every weight as they are now, dtype included."""
        config = self.model.config.to_dict()
        for key in ("_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype"):
            config.pop(key, None)
        config["attn_implementation"] = getattr(self.model.config, "_attn_implementation", None)

        def digest(item: tuple[str, Tensor]) -> bytes:
            name, tensor = item
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(data.data)
            return digest.digest()

        total = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        if self._shelf is not None:  # one block at a time
            for item in self._state():
                total.update(digest(item))
            return total.hexdigest()
        with ThreadPoolExecutor(8) as pool:  # hashlib lets go of the interpreter lock
            for part in pool.map(digest, self.model.state_dict().items()):
                total.update(part)
        return total.hexdigest()

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        """The state dict, with each block brought when it is its turn."""
        for name in self.model.state_dict():
            if (index := self._block_of(name)) is not None:
                self.bring(index)
            yield name, attrgetter(name)(self.model)

    def _block_of(self, name: str) -> int | None:
        inside = name.startswith(self.blocks_path + ".")
        return int(name[len(self.blocks_path) + 1 :].partition(".")[0]) if inside else None

    def parts(self) -> Iterator[Tensors]:
        """Every stored tensor by its name in the state dict: block by block, each valid until the next, then the rest.

        Tied tensors come once.
        """
        tied = set(self.model.all_tied_weights_keys or {})
        rest: Tensors = {}
        for index, names in groupby(self.model.state_dict(), key=self._block_of):
            if index is None:
                rest |= {name: attrgetter(name)(self.model) for name in names if name not in tied}
                continue
            self.bring(index)
            part = {name: attrgetter(name)(self.model) for name in names}
            yield part
            part.clear()  # whoever still holds it: there is room for one block
        yield rest

    def pruned_names(self) -> list[str]:
        """Names in the state dict of the weights that pruners may change."""
        return [f"{self.blocks_path}.{i}.{name}.weight" for i in range(self.n_blocks) for name in self.linears(i)]

    def save(self, folder: Path, form: SaveFormat = "dense") -> None:
        """Write a checkpoint that appears when it is complete: `dense` safetensors that `from_pretrained` reloads to the same
        logits, or `bitmask`, where pruned matrices are their kept values and a bit per weight (`LanguageModel.load` and
        `svnup-expand` restore them exactly)."""

        def fill_folder(partial: Path) -> None:
            if form == "dense" and self._shelf is None:
                self.model.save_pretrained(partial)
            else:
                self.model.config.architectures = [type(self.model).__name__]
                self.model.config.save_pretrained(partial)
                if self.model.generation_config is not None:
                    self.model.generation_config.save_pretrained(partial)
                if form == "dense":
                    write_dense(partial, self.parts())
                else:
                    write_bitmask(partial, self.parts(), set(self.pruned_names()))
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(partial)

        with _quiet_unless_terminal():
            in_place(folder, fill_folder)

    # -- running it

    def micro_batches(self, tokens: np.ndarray | Tensor, batch_tokens: int | None = None) -> Iterator[MicroBatch]:
        """Cut tokens (n_seq, seq_len) into micro-batches of at most `batch_tokens` (at least a sequence) at block 0's door."""
        rows = torch.as_tensor(tokens)
        size = batch_tokens or BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        last = None
        for chunk in rows.split(max(1, size // rows.shape[1])):
            batch = self._enter(chunk.to(self.device))
            if last is not None and _same(last.calls, batch.calls):
                batch.calls = last.calls  # masks and rotary embeddings of one length, held once
            yield batch
            last = batch

    def run_block(
        self, index: int, hidden: Tensor, batch: MicroBatch, *, part: Part = "block", weights: dict[str, Tensor] | None = None
    ) -> Tensor:
        """One block-forward: hidden states (b, s, d) to hidden states (b, s, d).

        `part` runs the attention or the MLP alone, the other contributing nothing; `weights` are used in place of the
        block's own parameters of these names, without a copy.
        """
        assert weights is None or self._shelf is None, "weights of an offloaded block come and go"
        args, kwargs = batch.calls[index]
        block = self.blocks[index]
        silent = (
            {} if part == "block" else self._silence(index, "mlp" if part == "attention" else "attention", hidden.shape[-1])
        )
        with self._replaced(silent):
            out = functional_call(block, weights, (hidden, *args), kwargs) if weights else block(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def sublayers(self, index: int) -> dict[str, dict[str, nn.Module]]:
        """The modules of a block that make up its `attention` and its `mlp`, by name.

        Raises ValueError where they cannot be told apart.
        """
        heavy = {n: m for n, m in self.blocks[index].named_children() if any(p.dim() > 1 for p in m.parameters())}
        attention = {n: m for n, m in heavy.items() if "attn" in n or "attention" in n}
        mlp = {n: m for n, m in heavy.items() if n not in attention}
        if len(attention) != 1 or not mlp:
            raise ValueError(
                f"players=sublayer: block {index} has no attention and MLP apart ({list(heavy)}); use players=block"
            )
        return {"attention": attention, "mlp": mlp}

    def _silence(self, index: int, part: str, width: int) -> dict[nn.Module, Callable[..., Any]]:
        """Forwards for the modules of a sublayer that cost nothing and add nothing to the residual stream."""
        *inner, last = self.sublayers(index)[part].values()

        def nothing(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            zeros = x.new_zeros(*x.shape[:-1], width)
            length = self._tuple_lengths[last]
            return (zeros, *[None] * (length - 1)) if length else zeros

        return {m: lambda x, *args, **kwargs: x for m in inner} | {last: nothing}

    def token_nll(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        """Negative log-likelihood in nats of each next token, (b, s) hidden after the last block to float32 (b, s - 1).

        The head runs on a few tokens at a time: the float32 logits of all of them never exist at once.
        """
        targets = batch.tokens[:, 1:].reshape(-1)
        losses = [
            nn.functional.cross_entropy(logits, targets[start : start + len(logits)].to(logits.device), reduction="none")
            for start, logits in self._logits_in_chunks(hidden, batch)
        ]
        return torch.cat(losses).view(len(batch.tokens), -1)

    def token_kl(self, hidden: Tensor, reference: Tensor, batch: MicroBatch) -> Tensor:
        """KL divergence in nats from the predictions at `reference` to those at `hidden`, (b, s) to float32 (b, s - 1)."""
        pairs = zip(self._logits_in_chunks(reference, batch), self._logits_in_chunks(hidden, batch), strict=True)
        chunks = [
            nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1)
            for (_, a), (_, b) in pairs
        ]
        return torch.cat(chunks).view(len(batch.tokens), -1)

    @torch.inference_mode()
    def nll(self, tokens: np.ndarray | Tensor) -> Floats:
        """Mean negative log-likelihood in nats of each sequence, tokens (n_seq, seq_len) to float64 (n_seq,)."""
        losses: list[Tensor] = []
        if self._shelf is not None:  # every block comes once
            *_, last = self.walk(tokens)
            last.run(advance=True)
            return torch.cat([self.token_nll(b.hidden, b).double().mean(1).cpu() for b in last.batches]).numpy()
        with stage("evaluation", len(tokens), "sequences") as advance:
            for batch in self.micro_batches(tokens):
                hidden = batch.hidden
                for index in range(self.n_blocks):
                    hidden = self.run_block(index, hidden, batch)
                losses.append(self.token_nll(hidden, batch).double().mean(1).cpu())
                advance(len(batch.tokens))
        return torch.cat(losses).numpy()

    @torch.inference_mode()
    def walk(self, tokens: np.ndarray | Tensor | list[MicroBatch], start: int = 0) -> Iterator[Visit]:
        """THE block-by-block loop: visit each block with the outputs of the blocks before it, as they were left.

        Between two visits the block is run again with the weights it then has, unless its visitor already advanced. In place
        of tokens it takes micro-batches that stand at the door of block `start`; a visitor who needs no more of them clears
        the list.
        """
        shelf = self._shelf
        if isinstance(tokens, list):
            batches = tokens
        else:
            batches = [batch if shelf is None else ParkedBatch(batch, shelf.states) for batch in self.micro_batches(tokens)]
        for index in range(start, self.n_blocks):
            visit = Visit(self, index, batches)
            yield visit
            if not visit.advanced and index + 1 < self.n_blocks:
                visit.run(advance=True)

    # -- how the model's own code is made to do it: a block or the decoder is replaced for one call, nothing is rebuilt by hand

    def _enter(self, tokens: Tensor) -> MicroBatch:
        """Let the model prepare its blocks' arguments: every block records them and passes its input on."""
        _ = self._tuple_lengths  # asks the real blocks, so before they are replaced
        entered: list[Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def record(index: int) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                kwargs = dict(kwargs)
                hidden = args[0] if args else kwargs.pop("hidden_states")
                entered.append(hidden)
                calls.append((args[1:], kwargs))
                return self._as_block_output(index, hidden)

            return forward

        with self._replaced({block: record(i) for i, block in enumerate(self.blocks)}):
            self.decoder(input_ids=tokens, use_cache=False)
        return MicroBatch(tokens, entered[0], calls)

    def _logits_in_chunks(self, hidden: Tensor, batch: MicroBatch) -> Iterator[tuple[int, Tensor]]:
        """(start, float32 logits (c, vocab)) over the flattened positions that have a next token."""

        def passes(index: int) -> Callable[..., Any]:
            last = index == self.n_blocks - 1
            return lambda *args, **kwargs: self._as_block_output(
                index, hidden if last else args[0] if args else kwargs["hidden_states"]
            )

        with self._replaced({block: passes(i) for i, block in enumerate(self.blocks)}):
            normed = self.decoder(input_ids=batch.tokens, use_cache=False)[0]
        states = normed[:, :-1].reshape(-1, normed.shape[-1])
        stub = batch.tokens[:1, :1]
        for start in range(0, len(states), HEAD_TOKENS):
            out = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states[None, start : start + HEAD_TOKENS])
            with self._replaced({self.decoder: lambda *args, out=out, **kwargs: out}):
                logits = self.model(input_ids=stub, use_cache=False).logits[0].float()
            yield start, logits

    def _as_block_output(self, index: int, hidden: Tensor) -> Any:
        """Hidden states in the form in which this model's blocks return them: a tensor, or a tuple that starts with it."""
        return (hidden,) if self._tuple_lengths[self.blocks[index]] else hidden

    @cached_property
    def _tuple_lengths(self) -> dict[nn.Module, int]:
        """Length of the tuple that each block and each of its modules returns, 0 for a plain tensor."""
        lengths: dict[nn.Module, int] = {}

        def note(module: nn.Module, args: Any, out: Any) -> None:
            lengths[module] = len(out) if isinstance(out, tuple) else 0

        modules = [m for block in self.blocks for m in (block, *block.children())]
        hooks = [module.register_forward_hook(note) for module in modules]
        try:
            self.decoder(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return lengths

    @staticmethod
    @contextlib.contextmanager
    def _replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
        """Give modules another forward for a while; what was there (accelerate puts its own) comes back in any case."""
        before: dict[nn.Module, Any] = {module: module.__dict__.get("forward") for module in forwards}
        try:
            for module, forward in forwards.items():
                module.forward = forward
            yield
        finally:
            for module, forward in before.items():
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward


def matrix(linear: Linear) -> Tensor:
    """The weight of a linear as (d_out, d_in), a view: GPT-2's Conv1D stores the transpose."""
    return linear.weight.T if isinstance(linear, Conv1D) else linear.weight


def _same(a: Any, b: Any) -> bool:
    """Whether two structures of arguments hold the same values."""
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


def _buffers_to(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        module._buffers.update({n: b.to(device) for n, b in module._buffers.items() if b is not None})


@contextlib.contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Modules made inside have parameters of shape and dtype only; buffers are real, since no checkpoint stores them all."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def config_with(config: Any, dtype: str, attn_implementation: str | None) -> Any:
    """A transformers config with the dtype (`auto`: as it says) and the attention that are asked for."""
    config.dtype = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    return config


def _local_folder(name: str, revision: str | None) -> Path:
    """The folder of a checkpoint, downloaded if it is a hub model."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be loaded: {error}") from error


def _stored_names(model: PreTrainedModel, stored: list[str]) -> dict[str, str]:
    """Where a checkpoint has each tensor, by its name in the model: some were saved without the head's model around the base
    model, some under names that transformers has changed since."""
    base, renamings = model.base_model_prefix, [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming)]
    names: dict[str, str] = {}
    for name in stored:
        renamed = name
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        names |= dict.fromkeys((f"{base}.{renamed}", renamed.removeprefix(f"{base}."), renamed), name)
    return names | {name: name for name in stored}


def _refuse_experts(model: PreTrainedModel, blocks: nn.Module) -> None:
    """Fused experts are parameters of three dimensions, which no pruner here sees; listed ones may never see a token."""
    for name, p in blocks.named_parameters():
        if p.dim() > 2 or "experts" in name:
            raise ValueError(
                f"{type(model).__name__}: block parameter {name} {tuple(p.shape)} belongs to a mixture of experts or a "
                "convolution, which svnup does not support yet; choose a dense model"
            )


def _find_blocks(model: PreTrainedModel, path: str | None) -> str:
    n = model.config.get_text_config().num_hidden_layers
    found = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n]
    if path is not None:
        if path not in dict(model.named_modules()) or not isinstance(model.get_submodule(path), nn.ModuleList):
            raise ValueError(f"model.blocks_path={path}: no such ModuleList in {type(model).__name__}; found {found}")
        return path
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} ModuleLists of length num_hidden_layers={n} ({found}): "
            "name the one that holds the blocks with model.blocks_path"
        )
    return found[0]


def pick_device(device: str) -> torch.device:
    """The torch device for `auto` (CUDA if there is one), `cpu`, `cuda`, `cuda:1`; ValueError where it is missing."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    picked = torch.device(device)
    if picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device}: this machine has {torch.cuda.device_count()} CUDA devices; choose auto or cpu")
    return picked


def read_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint folder or hub model; raises ValueError where it cannot be read."""
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} has no readable config: {error}") from error


def make_config(model_type: str, **shape: Any) -> Any:
    """A transformers config of a model family with the given names and values."""
    return AutoConfig.for_model(model_type, **shape)


def read_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint folder or hub model; raises ValueError where it cannot be read."""
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{name} has no readable tokenizer: {error}") from error


@contextlib.contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """Keep the library's progress bars out of logs."""
    if sys.stderr.isatty() or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()

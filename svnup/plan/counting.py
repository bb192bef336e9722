"""What the blocks of a model do with a micro-batch, counted on the meta device: the model's own code, without numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from svnup.machines import Work
from svnup.model.language_model import LanguageModel
from svnup.model.linears import expert_of, matrix
from svnup.pruning.walk import Pruner

ALIASES = ("_unsafe_view", "empty", "empty_like", "new_empty", "lift_fresh")  # which move no bytes, as views do not
GROUPED = ("_grouped_mm", "transformers::grouped_mm_fallback")  # products of experts, which torch does not count


class Counting(TorchDispatchMode):
    """Counts the work of operations on tensors of the meta device, and how many bytes these take at a time.

    Where code asks for a number, which no tensor has here, it is told 1: where it asks whether a mask can be left out, that is
    the answer for a text without padding.

    Attributes:
        work: so far.
        peak: the most bytes of new tensors at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work, self.peak, self._held = Work(), 0, 0
        self._known = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True, torch.int64: 1}.get(args[0].dtype, 1.0)
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in ALIASES:
            given, made = tree_leaves((args, kwargs)), tree_leaves(out)
            self.add(self._products(name, args, kwargs, out), [*given, *made])
            self._known.update(tensor.untyped_storage() for tensor in _tensors(given))
            for tensor in _tensors(made):
                self._hold(tensor)
        return out

    def add(self, products: Mapping[str, float], tensors: list[Any]) -> None:
        """Count one operation that reads and writes these tensors."""
        moved = sum(t.numel() * t.element_size() for t in _tensors(tensors))
        self.work += Work(products, moved=moved, calls=1)

    def _products(self, name: str, args: Any, kwargs: Any, out: Any) -> dict[str, float]:
        if name in GROUPED:  # (rows, d_in) by (n_experts, d_in, d_out): each row by the matrix of its expert
            rows, matrices = args[:2]
            return {_dtype([rows]): 2.0 * rows.numel() * matrices.shape[-1]}
        packet = getattr(torch.ops.aten, name.rstrip("_"), None)  # in place or not is the same work
        if packet not in flop_registry:
            return {}
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        return {_dtype(tree_leaves(args)): float(flop_registry[packet](*args, **kwargs, out_val=out))}

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        self._held += (size := storage.nbytes())
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self._held -= size


class _Attention(TorchFunctionMode):
    """Attention as the fused kernels compute it, which hold no matrix of all pairs of tokens: half of them if it is causal."""

    def __init__(self, counting: Counting) -> None:
        super().__init__()
        self._counting = counting

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value, *rest = args
        causal = (kwargs or {}).get("is_causal", rest[2] if len(rest) > 2 else False)
        pairs = query.shape[:-1].numel() * key.shape[-2] / (2 if causal else 1)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        self._counting.add({_dtype([query]): 2.0 * pairs * (query.shape[-1] + value.shape[-1])}, [query, key, value, out])
        return out


@dataclass(frozen=True)
class Pass:
    """One micro-batch of n_seq sequences of seq_len tokens through the blocks.

    Args:
        blocks: what each block does.
        reads: for each block by the name of a linear layer the first one that reads the same input.
        n_tokens: of the micro-batch.
        activations: bytes of hidden states and what is computed with them, at most.
    """

    blocks: tuple[Work, ...]
    reads: tuple[Mapping[str, str], ...]
    n_tokens: int
    activations: int

    @cached_property
    def _whole(self) -> Work:
        return sum(self.blocks, Work())

    def through(self, n_tokens: float) -> Work:
        """What all blocks do with so many tokens."""
        return self._whole * (n_tokens / self.n_tokens)


def count_pass(lm: LanguageModel, n_seq: int, seq_len: int) -> Pass:
    """Count a forward of a model without weights; where its code needs numbers, by two operations for each weight and token."""
    try:
        return _counted(lm, n_seq, seq_len)
    except Exception:  # of any family's code: routing by numbers, kernels without a meta device
        return _estimated(lm, n_seq * seq_len)


def _counted(lm: LanguageModel, n_seq: int, seq_len: int) -> Pass:
    counting = Counting()
    begun: list[Work] = []
    blocks: list[Work] = []
    reads: list[dict[str, str]] = [{} for _ in lm.blocks]
    seen: list[tuple[str, Tensor]] = []

    def enter(*_: Any) -> None:
        begun.append(counting.work)
        seen.clear()

    def leave(*_: Any) -> None:
        before = begun[-1]
        blocks.append(counting.work + before * -1)

    with ExitStack() as hooks:
        for index, block in enumerate(lm.blocks):
            hooks.callback(block.register_forward_pre_hook(enter).remove)
            hooks.callback(block.register_forward_hook(leave).remove)
            for name, linear in lm.linears(index).items():
                if isinstance(linear, nn.Module):

                    def see(_: Any, args: Any, name: str = name, index: int = index) -> None:
                        leader = next((other for other, x in seen if x is args[0]), name)
                        reads[index][name] = leader
                        seen.append((name, args[0]))

                    hooks.callback(linear.register_forward_pre_hook(see).remove)
        with torch.no_grad(), _Attention(counting), counting:
            tokens = torch.zeros(n_seq, seq_len, dtype=torch.int64, device="meta")
            lm.decoder(input_ids=tokens, use_cache=False)
    assert len(blocks) == lm.n_blocks
    return Pass(tuple(blocks), tuple(reads), n_seq * seq_len, counting.peak)


def _estimated(lm: LanguageModel, n_tokens: int) -> Pass:
    size, width = lm.model.dtype.itemsize, lm.model.config.get_text_config().hidden_size
    blocks = []
    for index, block in enumerate(lm.blocks):
        linears = lm.linears(index)
        of_experts = sum(m.weight.numel() for name, m in linears.items() if expert_of(name, m) is not None)
        weights = sum(p.numel() for p in block.parameters())
        moved = (4 * n_tokens * sum(sum(matrix(m).shape) for m in linears.values()) + weights) * size
        active = weights - of_experts * (1 - routed(lm))
        blocks.append(Work({lm.dtype: 2.0 * active * n_tokens}, moved=moved, calls=8 * len(linears)))
    inner = max((max(matrix(m).shape) for i in range(lm.n_blocks) for m in lm.linears(i).values()), default=width)
    reads = tuple({name: name for name in lm.linears(i)} for i in range(lm.n_blocks))
    return Pass(tuple(blocks), reads, n_tokens, n_tokens * (8 * width + 4 * inner) * size)


def routed(lm: LanguageModel) -> float:
    """The share of its experts that a token is routed to, as the config says."""
    config = lm.model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    n_experts = next((n for name in names if (n := getattr(config, name, None))), None)
    routed = getattr(config, "num_experts_per_tok", None) or getattr(config, "moe_k", None)
    return min(1.0, routed / n_experts) if n_experts and routed else 1.0


def count_statistics(pruner: Pruner, weight: Tensor, n_tokens: int) -> tuple[Work, int]:
    """What a pruner does to observe so many inputs of a matrix (d_out, d_in) at once, and the bytes of its statistics."""
    stats, counting = pruner.new_stats(weight), Counting()
    x = torch.empty(n_tokens, weight.shape[1], dtype=weight.dtype, device="meta")
    try:
        with torch.no_grad(), counting:
            pruner.observe(stats, x)
    except Exception:  # of code that needs numbers: its inputs are read, at least
        return Work(moved=2 * x.numel() * x.element_size(), calls=1), n_bytes(stats)
    return counting.work, n_bytes(stats)


def n_bytes(stats: Any) -> int:
    """Bytes of the tensors in statistics."""
    if isinstance(stats, Tensor):
        return stats.numel() * stats.element_size()
    held = vars(stats).values() if hasattr(stats, "__dict__") else ()
    return sum(map(n_bytes, held))


def _tensors(leaves: list[Any]) -> Iterator[Tensor]:
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))


def _dtype(leaves: list[Any]) -> str:
    return str(next(_tensors(leaves)).dtype).removeprefix("torch.")

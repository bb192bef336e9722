"""Training after pruning that keeps the zeros: in a loop of one's own, by transformers' Trainer, and of LoRA adapters.

The masks of a model hold its pruned weights at zero while the others are trained:

    masks = Masks.of(model)
    with masks.held(optimizer):
        ...  # any training loop

What is masked are weights of linear layers of blocks, those of experts among them. Norms, biases, embeddings and heads are
trained as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, TrainerCallback

from svnup.model.language_model import LanguageModel, prunable_parameters
from svnup.pruning.packed import read_masks

if TYPE_CHECKING:
    from peft import PeftModel


class Masks:
    """The pruned weights of a model, which are held at zero while it is trained.

    They are those of the model's own parameters, on one device or replicated (data parallel); a byte for each weight.

    Args:
        gone: parameters by name, each with its pruned weights, bool in its shape.
    """

    def __init__(self, gone: Mapping[str, tuple[nn.Parameter, Tensor]]) -> None:
        self._gone = {name: (p, mask) for name, (p, mask) in gone.items() if mask.any()}
        if not self._gone:
            raise ValueError("masks: no weight of a linear layer is zero; give a pruned model, or a file of its masks")

    @classmethod
    def of(cls, model: PreTrainedModel | LanguageModel, blocks_path: str | None = None) -> Self:
        """The masks of a pruned model by its zeros, before adapters are added to it.

        Args:
            blocks_path: dotted name of the ModuleList of blocks; None finds it.

        Raises:
            ValueError: no weight is zero, or the weights are not in memory; or there are adapters, or another wrapper.
        """
        if isinstance(model, LanguageModel):
            if model.offloaded:
                raise ValueError("masks: the weights of an offloaded model are not in memory; load it with offload=none")
            model, blocks_path = model.model, model.blocks_path
        if not isinstance(model, PreTrainedModel):
            raise ValueError(f"masks: {type(model).__name__} is no model of transformers; take the masks before it is wrapped")
        parameters = prunable_parameters(model, blocks_path)
        if name := next((name for name in parameters if "base_layer" in name.split(".")), None):
            raise ValueError(f"masks: {name} has adapters; take the masks of the pruned model before adapters are added")
        if name := next((name for name, p in parameters.items() if p.is_meta), None):
            raise ValueError(f"masks: the weights of {name} are not in memory; load the model without offloading")
        return cls({name: (p, p.detach() == 0) for name, p in parameters.items()})

    @classmethod
    def read(cls, model: PreTrainedModel | LanguageModel, file: str | Path) -> Self:
        """The masks of a file that `save_masks=true` wrote, for this model, whose pruned weights need not be zero yet.

        Raises:
            ValueError: as `svnup.pruning.apply_masks`.
        """
        return cls({name: (p, ~keep.to(p.device)) for name, (p, keep) in read_masks(model, file).items()})

    @property
    def n_zeros(self) -> int:
        """Number of weights that are held at zero."""
        return sum(int(gone.sum()) for _, gone in self._gone.values())

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the pruned weights in place."""
        for p, gone in self._gone.values():
            p.masked_fill_(gone.to(p.device), 0)

    @contextmanager
    def held(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Context in which pruned weights are zero, before the first step of the optimizer and after each.

        Their gradients are zero too as soon as they are there, so that neither clipping nor momentum sees them. Neither weight
        decay nor a momentum of before makes one of them anything else.

        Args:
            optimizer: of torch, or one that accelerate has wrapped.

        Raises:
            ValueError: the optimizer updates none of the masked parameters.
        """
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        updated = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        masked = [(p, gone) for p, gone in self._gone.values() if id(p) in updated]
        if not masked:
            raise ValueError(
                f"optimizer={type(optimizer).__name__}: it updates no masked weight; make it of the parameters of the model "
                "that the masks are of, on one device or replicated, after model.requires_grad_(True)"
            )
        hooks = [p.register_post_accumulate_grad_hook(_masking_gradients(gone)) for p, gone in masked]
        hooks.append(optimizer.register_step_post_hook(lambda *_: self.apply()))
        self.apply()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def adapters_masked(self, tuned: PeftModel) -> Iterator[None]:
        """Context in which LoRA adapters change the weights that are kept, and no others: what `merge` gives loses nothing.

        A layer with weights W, mask M and adapter BA computes with W + M * BA, where peft computes with W + BA, at the cost of
        the product BA and of its gradients for each layer.

        Args:
            tuned: a PeftModel with LoRA adapters on the model that the masks are of.

        Raises:
            ValueError: there are no LoRA adapters on masked linear layers; or some are of another kind than W + BA, have
                dropout or biases, or are on stacked experts, for which it does not work.
        """
        layers = self._adapted(tuned)
        for name, (layer, _) in layers.items():
            dropout = any(isinstance(m, nn.Dropout) for m in layer.lora_dropout.values())
            stacked = not hasattr(layer.get_base_layer(), "weight")
            if layer.lora_variant or dropout or stacked or any(layer.lora_bias.values()):
                raise ValueError(
                    f"adapters_masked: the adapter of {name} is not W + BA; choose LoRA of linear layers with lora_dropout=0, "
                    "lora_bias=False and use_dora=False, or train it as it is and merge"
                )
        try:
            for layer, gone in layers.values():
                layer.forward = _with_masked_adapter(layer, gone)
            yield
        finally:
            for layer, _ in layers.values():
                vars(layer).pop("forward", None)

    def merge(self, tuned: PeftModel) -> Any:
        """The pruned model with its LoRA adapters merged into the weights that are kept, W + M * BA; its zeros stay zeros.

        Args:
            tuned: a PeftModel with LoRA adapters on the model that the masks are of; used up, as by `merge_and_unload`.

        Returns:
            The model of transformers without adapters. If these were trained as peft does, with W + BA, what they do at pruned
            weights is lost; if within `adapters_masked`, nothing is.

        Raises:
            ValueError: there are no LoRA adapters on masked linear layers, or merged weights are not finite.
        """
        self._adapted(tuned)
        merged = tuned.merge_and_unload(safe_merge=True)
        parameters = dict(merged.named_parameters())
        assert all(parameters[name] is p for name, (p, _) in self._gone.items()), "merged into the masked parameters"
        self.apply()
        return merged

    def _adapted(self, tuned: PeftModel) -> dict[str, tuple[Any, Tensor]]:
        """The LoRA layers of a model on masked parameters by name, each with the pruned weights."""
        try:
            from peft.tuners.lora import LoraLayer
        except ImportError:
            raise ValueError("peft: the package of LoRA adapters is missing; pip install 'svnup[finetuning]'") from None
        known = {id(p): gone for p, gone in self._gone.values()}
        layers = {
            name: (layer, next(known[id(p)] for p in layer.get_base_layer().parameters() if id(p) in known))
            for name, layer in tuned.named_modules()
            if isinstance(layer, LoraLayer) and any(id(p) in known for p in layer.get_base_layer().parameters())
        }
        if not layers:
            raise ValueError(
                f"{type(tuned).__name__}: no LoRA adapters on masked weights; give a PeftModel on the model of the masks"
            )
        return layers


class KeepZeros(TrainerCallback):
    """Keeps the pruned weights of a model at zero while transformers' Trainer trains it, by `Masks.held`.

    Args:
        masks: None takes those of the model's zeros when training begins.
    """

    def __init__(self, masks: Masks | None = None) -> None:
        self._masks, self._held = masks, ExitStack()

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._held.close()  # of a training that ended in an error
        self._held.enter_context((self._masks or Masks.of(model)).held(optimizer))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._held.close()


def _masking_gradients(gone: Tensor) -> Callable[[Tensor], None]:
    def mask(p: Tensor) -> None:
        if p.grad is not None:
            p.grad.masked_fill_(gone.to(p.grad.device), 0)

    return mask


def _with_masked_adapter(layer: Any, gone: Tensor) -> Callable[..., Any]:
    """The forward of a LoRA layer with W + M * BA in place of W + BA."""
    peft_forward = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        adapters = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters or layer.merged or not adapters:
            return peft_forward(x, *args, **kwargs)
        base = layer.get_base_layer()
        delta = sum(layer.get_delta_weight(name) for name in adapters).masked_fill(gone.to(x.device), 0)
        return functional_call(base, {"weight": base.weight + delta.to(base.weight.dtype)}, (x, *args), kwargs)

    return forward

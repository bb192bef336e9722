"""Masks as files, one bit per weight, to keep a pruned model sparse during fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from svnup.model.checkpoint import pack, read_metadata, read_tensors, save_tensors, unpack
from svnup.model.language_model import LanguageModel


def save_masks(lm: LanguageModel, file: str | Path) -> None:
    """Write the masks of all prunable weights to a safetensors file: packed bits by name in the state dict."""
    names = set(lm.pruned_names())
    shapes, packed = {}, {}
    for tensors in lm.state_dict_by_block():
        for name in names & tensors.keys():
            shapes[name], packed[name] = list(tensors[name].shape), pack(tensors[name] != 0)
    save_tensors(packed, Path(file), {"svnup_masks": json.dumps(shapes)})


@torch.no_grad()
def apply_masks(model: nn.Module | LanguageModel, file: str | Path) -> None:
    """Zero every pruned weight in place, for example after fine-tuning.

    Args:
        model: a model of transformers, or a LanguageModel; changed.
        file: a file of `save_masks`.

    Raises:
        ValueError: the file has no masks, or those of another model, or the weights are not in memory; the model is unchanged.
    """
    for parameter, keep in read_masks(model, file).values():
        parameter.masked_fill_(~keep.to(parameter.device), 0)


def read_masks(model: nn.Module | LanguageModel, file: str | Path) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """The masks of a file, bool in the shapes of their parameters, beside these, by name.

    Args and Raises as `apply_masks`.
    """
    if isinstance(model, LanguageModel) and model.offloaded:
        raise ValueError("apply_masks: the weights of an offloaded model are not in memory; load it with offload=none")
    module = model.model if isinstance(model, LanguageModel) else model
    metadata = read_metadata(Path(file))
    if "svnup_masks" not in metadata:
        raise ValueError(f"{file}: no masks; give a file that save_masks=true wrote")
    packed, parameters = read_tensors(Path(file)), dict(module.named_parameters())
    out: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for name, shape in json.loads(metadata["svnup_masks"]).items():
        if name not in parameters or list(parameters[name].shape) != shape:
            found = f"of shape {list(parameters[name].shape)}" if name in parameters else "not in it"
            raise ValueError(f"{file}: masks of another model: {name} {shape} is {found}; give the masks of this model")
        if parameters[name].is_meta:
            raise ValueError(f"apply_masks: the weights of {name} are not in memory; load the model without offloading")
        out[name] = parameters[name], unpack(packed[name], shape)
    return out

"""Pruning a model block by block to a sparsity profile."""

from svnup.pruning.walk import Pruner, apply_masks, prune_model, save_masks

__all__ = ["Pruner", "apply_masks", "prune_model", "save_masks"]

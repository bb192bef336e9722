"""Prune a model by a recipe with the installed llm-compressor, and write which weights of its linear layers are zero.

    python prune.py MODEL RECIPE TOKENS OUTPUT

Runs in an environment with llm-compressor, without svnup. TOKENS is a .npy file, int64 (n_seq, seq_len); OUTPUT becomes an .npz
file with a bool matrix for each linear layer, by its name in the model.
"""

import sys
from typing import Any

import numpy as np
import torch
from llmcompressor import oneshot
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main(folder: str, recipe: str, tokens: str, output: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows: Any = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in torch.from_numpy(np.load(tokens))]
    oneshot(model=model, recipe=recipe, dataset=DataLoader(rows, batch_size=1), num_calibration_samples=len(rows))
    linears = {name: m.weight.detach() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    zeros: dict[str, Any] = {name: (weight == 0).numpy() for name, weight in linears.items()}
    np.savez(output, **zeros)


if __name__ == "__main__":
    main(*sys.argv[1:])

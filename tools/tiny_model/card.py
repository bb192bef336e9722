"""Measure the numbers of the model card: python card.py

The exit code is 1 if the model's perplexity is not at least 10 times below that of a unigram model.

Protocol: the text is tokenised once and cut into non-overlapping windows of 256 tokens, the remainder is dropped; a
window's loss is the mean NLL of its 255 targets, the perplexity is exp of the mean over windows.
"""

import argparse
import gzip
import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

ASSETS = Path(__file__).resolve().parents[2] / "svnup" / "assets"
WINDOW, RATIO = 256, 10


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the numbers of the model card.")
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny", help="model folder (default: the built-in one)")
    parser.add_argument("--texts", type=Path, default=ASSETS / "text", help="folder of the five texts")
    args = parser.parse_args()
    logging.set_verbosity_error()  # a whole text is longer than the model's positions: intended
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    config = model.config
    print(
        f"{config.model_type}: {config.num_hidden_layers} blocks, width {config.hidden_size}, "
        f"vocabulary {config.vocab_size:,}, {model.num_parameters():,} parameters"
    )

    tokens = {}
    for role in ("calibration", "payoff", "selection", "test"):
        text = gzip.decompress((args.texts / f"{role}.txt.gz").read_bytes()).decode()
        tokens[role] = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        print(f"{role}: {len(text):,} characters, {len(tokens[role]):,} tokens, {len(tokens[role]) // WINDOW} windows")

    windows = tokens["test"][: len(tokens["test"]) // WINDOW * WINDOW].view(-1, WINDOW)
    targets = windows[:, 1:]
    losses = []
    with torch.inference_mode():
        for batch in windows.split(16):
            logits = model(batch).logits[:, :-1].float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
            losses.append(nll.double().mean(1))
    perplexity = math.exp(torch.cat(losses).mean())

    counts = torch.bincount(tokens["calibration"], minlength=config.vocab_size).double() + 1
    unigram = math.exp(-(counts / counts.sum()).log()[targets].mean(1).mean())

    print(f"perplexity of the model on the test text: {perplexity:.2f}")
    print(f"perplexity of a unigram model (add-one counts of the calibration text) on the same tokens: {unigram:.1f}")
    print(f"ratio: {unigram / perplexity:.1f} (must be at least {RATIO})")
    return 0 if unigram >= RATIO * perplexity else 1


if __name__ == "__main__":
    sys.exit(main())

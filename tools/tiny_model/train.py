"""Train the built-in model on the text of corpus.py: python train.py TEXT_DIR OUT_DIR

OUT_DIR becomes a model folder in the hub's format. Run the same command again after an interruption: training goes on
from OUT_DIR/checkpoint.pt and ends, on the same machine and number of threads, in the same bits as without it.

Recipe: byte-level BPE vocabulary of 2,048, tied embeddings; AdamW (0.9, 0.95), weight decay 0.1, gradient clip 1;
learning rate 2e-3 with 100 warm-up steps and a cosine to 5 %; batches of 16 x 256 tokens; bfloat16 autocast (or float32).
"""

import argparse
import hashlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    logging,
)

VOCABULARY, POSITIONS, LENGTH, BATCH = 2048, 512, 256, 16
PEAK, WARMUP, FLOOR = 2e-3, 100, 0.05
VALIDATION_BATCHES = 40
EXPERTS, ROUTES, BALANCE = 8, 2, 0.01  # of a mixture: in a block, of a token, and the weight of the balancing loss
END = "<|endoftext|>"


def publish(save: Callable[[Path], object], out: Path) -> None:
    """Save into a temporary folder and rename file by file, so that a kill leaves no half-written file in OUT_DIR."""
    partial = out / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    save(partial)
    for file in partial.iterdir():
        os.replace(file, out / file.name)
    partial.rmdir()


def train_tokenizer(text: Path) -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train([str(text)], trainer)
    return bpe


def build_model(args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(args.seed)
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": args.width,
        "num_hidden_layers": args.blocks,
        "num_attention_heads": args.heads,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if args.model_type == "llama":
        mlp = args.width * 8 // 3
        return LlamaForCausalLM(LlamaConfig(intermediate_size=mlp, num_key_value_heads=args.heads, **common))
    if args.model_type == "qwen3_moe":  # an expert is as wide as the model
        mixture: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": ROUTES, "norm_topk_prob": True}
        mixture["router_aux_loss_coef"], mixture["moe_intermediate_size"] = BALANCE, args.width
        heads = {"num_key_value_heads": args.heads, "head_dim": args.width // args.heads}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**mixture, **heads, **common))
    # Without dropout as in the Llama recipe; no padding token, since OPT's default, 1, is a character here.
    opt = OPTConfig(ffn_dim=4 * args.width, word_embed_proj_dim=args.width, dropout=0.0, pad_token_id=None, **common)
    return OPTForCausalLM(opt)


def learning_rate(step: int, steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return PEAK * min(1, (step + 1) / WARMUP) * (FLOOR + (1 - FLOOR) * cosine)


def batch_of(tokens: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """The batch is a function of seed and step alone: a resumed training sees the batches that it would have seen."""
    starts = np.random.default_rng([seed, step]).integers(0, len(tokens) - LENGTH, BATCH)
    return torch.stack([tokens[i : i + LENGTH] for i in starts])


def loss_of(model: torch.nn.Module, x: torch.Tensor, precision: str) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        balanced = {"output_router_logits": True} if model.training and hasattr(model, "router_aux_loss_coef") else {}
        out: torch.Tensor = model(x, labels=x, **balanced).loss
        return out


@torch.no_grad()
def validate(model: torch.nn.Module, tokens: torch.Tensor, precision: str) -> float:
    model.eval()
    batches = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH).split(BATCH)[:VALIDATION_BATCHES]
    losses = [loss_of(model, x, precision).item() for x in batches]
    model.train()
    return sum(losses) / len(losses)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Report:
    """A bar on a terminal, a plain line per report elsewhere."""

    def __init__(self, done: int, steps: int) -> None:
        self.first, self.steps, self.start, self.validation = done, steps, time.monotonic(), "-"
        self.bar = Progress(BarColumn(), TextColumn("{task.description}"))
        self.plain = not self.bar.console.is_terminal
        self.bar.disable = self.plain
        self.task = self.bar.add_task("", total=steps, completed=done)

    def __call__(self, step: int, loss: float, line: bool) -> None:
        seconds = (time.monotonic() - self.start) / (step - self.first)
        minutes, rest = divmod(round(seconds * (self.steps - step)), 60)
        text = (
            f"step {step:,}/{self.steps:,}  {BATCH * LENGTH / seconds:,.0f} tokens/s  loss {loss:.3f}"
            f"  validation {self.validation}  left {minutes}:{rest:02}"
        )
        self.bar.update(self.task, completed=step, description=text)
        if self.plain and line:
            print(text, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the built-in model; run again to resume.")
    parser.add_argument("text", type=Path, metavar="TEXT_DIR", help="folder with train.txt and validation.txt")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="model folder; the checkpoint lies there too")
    parser.add_argument("--steps", type=int, default=3493)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model-type", choices=["llama", "opt", "qwen3_moe"], default="llama")
    parser.add_argument(  # bfloat16 is many times slower than float32 on a CPU without instructions for it
        "--precision", choices=["bfloat16", "float32"], default="bfloat16"
    )
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--validate-every", type=int, default=200, metavar="STEPS")
    parser.add_argument("--report-every", type=int, default=20, metavar="STEPS", help="plain lines, off a terminal")
    args = parser.parse_args()
    for name in ("steps", "blocks", "width", "heads", "checkpoint_every", "validate_every", "report_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.width % (2 * args.heads):
        parser.error("--width must be a multiple of twice --heads")
    for split in ("train", "validation"):
        if not (args.text / f"{split}.txt").is_file():
            parser.error(f"{args.text / split}.txt does not exist: build it with corpus.py")
    return args


def main() -> int:
    args = parse()
    logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    texts = {split: (args.text / f"{split}.txt").read_bytes() for split in ("train", "validation")}
    settings = {name: getattr(args, name) for name in ("steps", "seed", "model_type", "precision", "blocks", "width", "heads")}
    settings["text"] = hashlib.sha256(texts["train"]).hexdigest()

    checkpoint, state = args.out / "checkpoint.pt", None
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        changed = [name for name in settings if state["settings"][name] != settings[name]]
        if changed:
            print(f"train.py: {checkpoint} has other settings ({', '.join(changed)}): remove it", file=sys.stderr)
            return 2
        print(f"resuming after step {state['step']}", flush=True)

    bpe = train_tokenizer(args.text / "train.txt")  # seconds, and the same every time: not in the checkpoint
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END)
    publish(tokenizer.save_pretrained, args.out)
    train, validation = (torch.tensor(bpe.encode(text.decode()).ids) for text in texts.values())
    print(f"{len(train):,} training tokens, {len(validation):,} validation tokens", flush=True)
    if min(len(train), len(validation)) <= LENGTH:
        print(f"train.py: the texts must be longer than {LENGTH} tokens", file=sys.stderr)
        return 2

    model = build_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    done = 0
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        done = state["step"]

    report = Report(done, args.steps)
    model.train()
    with report.bar:
        for step in range(done + 1, args.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, args.steps)
            loss = loss_of(model, batch_of(train, args.seed, step), args.precision)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            last = step == args.steps
            if step % args.checkpoint_every == 0 or last:
                state = {"settings": settings, "step": step, "rng": torch.get_rng_state()}
                state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(checkpoint, state)
            if validated := step % args.validate_every == 0:
                report.validation = f"{validate(model, validation, args.precision):.3f}"
            report(step, loss.item(), line=validated or last or step % args.report_every == 0)

    print(f"validation loss {validate(model, validation, args.precision):.4f}; model in {args.out}")
    publish(model.half().save_pretrained, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

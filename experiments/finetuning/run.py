"""What training the kept weights recovers, and whether the choice of a budget still matters after it.

A model pruned with Wanda by the uniform budget and by a Shapley budget, and the dense model: perplexity on test text before
and after each was trained alike, on as many tokens of training text. Beside it, with the uniform budget, LoRA adapters, as
peft trains them and as they will be merged, before and after a merge that stays sparse. Of several learning rates the study
takes the one with the lowest perplexity on selection text, uniformly pruned. Writes results/tables/finetuning.md, of a real
model finetuning_real.md; what was measured is kept in the cache, so that a killed run goes on at the training where it was.

    python -m experiments.finetuning.run [--cache results/cache] [--quick]
    python -m experiments.finetuning.run --model PATH [--datasets FOLDER] [--profile profile.json]     # of a real model
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from experiments.study import Known, built_in, made_by, mean_and_spread, parse, parser, publish, table, text
from svnup.allocation import Budget
from svnup.allocation.maps import FromFile, ScoreBudget
from svnup.data import C4, WikiText2, tokens_sha256
from svnup.evaluation import perplexity
from svnup.game import LayerGame
from svnup.language_model import LanguageModel
from svnup.pruning import prune_model
from svnup.pruning.wanda import Wanda
from svnup.recovery import Masks
from svnup.shapley.sliding_window import SlidingWindow
from svnup.types import Ints, SparsityProfile

Way = Literal["weights", "lora", "masked lora"]


@dataclass(frozen=True)
class Sizes:
    """How much is measured, on how much text; the defaults made the committed table."""

    n_blocks: int | None = None
    sparsity: float = 0.7
    window: int = 3
    n_payoff: int = 8
    n_calibration: int = 16
    n_training: int = 64
    n_selection: int = 16
    n_test: int = 32
    seq_len: int = 256
    n_batch: int = 4  # sequences of a step
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    seeds: tuple[int, ...] = (0, 1)
    rank: int = 8


# Half an hour of one core; the rate is not searched for, and windows 1 to 32 of the test text were read for choices.
REAL = Sizes(
    sparsity=0.6,
    window=1,
    n_payoff=4,
    n_calibration=16,
    n_training=48,
    n_test=24,
    rates=(1e-4,),
    seeds=(0,),
    seq_len=512,
    n_batch=2,
)
READ_BEFORE = 32
QUICK = Sizes(
    n_blocks=3,
    window=2,
    n_payoff=2,
    n_calibration=2,
    n_training=4,
    n_selection=2,
    n_test=2,
    seq_len=32,
    n_batch=2,
    rates=(1e-3, 3e-3),
    seeds=(0, 1),
    rank=2,
)
DECAY = 0.01  # of all weights; adapters have none
LORA_RATE = 10  # times the rate of all weights, as is usual


class Texts(NamedTuple):
    """Tokens by role, int64 (n, seq_len) each; training text by seed."""

    calibration: Ints
    payoff: Ints
    selection: Ints
    test: Ints
    training: dict[int, Ints]


def built_in_texts(sizes: Sizes) -> Texts:
    length = sizes.seq_len
    training = {seed: text("training", sizes.n_training, length, seed) for seed in sizes.seeds}
    return Texts(
        text("calibration", sizes.n_calibration, length),
        text("payoff", sizes.n_payoff, length),
        text("selection", sizes.n_selection, length),
        text("test", sizes.n_test, length),
        training,
    )


def hub_texts(sizes: Sizes, tokenizer: object, datasets: str | None) -> Texts:
    """C4 and WikiText-2. Local copies of C4 have few files: calibration and training text are drawn from the first one
    together, no document twice; another seed trains in another order."""
    c4 = partial(C4, seq_len=sizes.seq_len, datasets_dir=datasets)
    drawn = c4(n_seq=sizes.n_calibration + sizes.n_training).tokens(tokenizer)
    left = drawn[sizes.n_calibration :]
    test = WikiText2(role="test", n_seq=sizes.n_test, skip=READ_BEFORE, seq_len=sizes.seq_len, datasets_dir=datasets)
    return Texts(
        drawn[: sizes.n_calibration],
        c4(role="payoff", n_seq=sizes.n_payoff).tokens(tokenizer),
        c4(role="selection", n_seq=sizes.n_selection).tokens(tokenizer),
        test.tokens(tokenizer),
        {seed: np.random.default_rng(seed).permutation(left) for seed in sizes.seeds},
    )


class Bench:
    """The model, its texts, and perplexities that are measured once ever."""

    def __init__(self, options: argparse.Namespace, sizes: Sizes) -> None:
        self.sizes, self.model, self.cache = sizes, options.model, options.cache
        self.known = Known(options.cache, "finetuning")
        lm = self.dense()
        texts = hub_texts(sizes, lm.tokenizer, options.datasets) if self.model else built_in_texts(sizes)
        self.texts, self.fingerprint, self.budget = texts, lm.fingerprint(), Budget(lm.block_params, sizes.sparsity)
        self.profiles: dict[str, SparsityProfile | None] = {"dense": None, "uniform": self.budget.uniform()}
        if options.profile:
            self.profiles[f"of {options.profile.parent.name}"] = FromFile(str(options.profile)).allocate(self.budget)
        else:
            game = LayerGame(lm, texts.payoff, payoff="recip_ppl", cache_dir=self.cache)
            values = SlidingWindow(sizes.window).estimate(game)
            self.profiles["shapley"] = ScoreBudget(scale="log", lam=0.15).allocate(self.budget, values)

    def dense(self) -> LanguageModel:
        if self.model is None:
            return built_in(self.sizes.n_blocks)
        return LanguageModel.load(self.model, dtype="float32", device="cpu")

    def pruned(self, profile: SparsityProfile | None) -> LanguageModel:
        lm = self.dense()
        if profile is not None:
            prune_model(lm, profile, Wanda(), self.texts.calibration)
        return lm

    def before(self, profile: SparsityProfile | None) -> float:
        """Perplexity on the test text without training."""
        what = ["before", *self._what(profile, self.texts.test)]
        return float(self.known.measured(what, lambda: perplexity(self.pruned(profile), self.texts.test)))

    def after(
        self, profile: SparsityProfile | None, way: Way, rate: float, seed: int, *, selecting: bool = False
    ) -> tuple[float, float]:
        """Perplexity after training, and that once adapters are merged, on the test or the selection text."""
        tokens = self.texts.selection if selecting else self.texts.test
        training = self.texts.training[seed]
        own = [way, rate, seed, self.sizes.n_batch, self.sizes.rank, tokens_sha256(training)]
        what = [*own, *self._what(profile, tokens)]
        trained, merged = self.known.measured(what, lambda: self._measure(profile, way, rate, seed, tokens))
        print(way, rate, seed, "selection" if selecting else "test", f"{trained:.3f} {merged:.3f}", sep=" | ", flush=True)
        return float(trained), float(merged)

    def _what(self, profile: SparsityProfile | None, tokens: Ints) -> list[object]:
        sparsity = None if profile is None else profile.to_dict() | {"sparsity": np.round(profile.sparsity, 9).tolist()}
        return [self.fingerprint, sparsity, tokens_sha256(self.texts.calibration), tokens_sha256(tokens)]

    def _measure(self, profile: SparsityProfile | None, way: Way, rate: float, seed: int, tokens: Ints) -> list[float]:
        lm = self.pruned(profile)
        model = lm.model.requires_grad_(True)
        masks = Masks.of(model) if profile is not None else None
        if way == "weights":
            optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=DECAY)
            with masks.held(optimizer) if masks is not None else nullcontext():
                self._train(model, optimizer, seed)
            return [perplexity(LanguageModel(model), tokens)] * 2
        from peft import LoraConfig, get_peft_model

        assert masks is not None, "only pruned models have adapters here"
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            tuned = get_peft_model(model, LoraConfig(r=self.sizes.rank, target_modules="all-linear"))
        adapters = [p for p in tuned.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(adapters, lr=LORA_RATE * rate, weight_decay=0.0)
        with masks.adapters_masked(tuned) if way == "masked lora" else nullcontext():
            self._train(tuned, optimizer, seed)
            unmerged = perplexity(LanguageModel(tuned.get_base_model()), tokens)
        return [unmerged, perplexity(LanguageModel(masks.merge(tuned)), tokens)]

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        """One pass over the training text; the rate rises over a tenth of the steps and falls to 0."""
        batches = torch.as_tensor(self.texts.training[seed]).split(self.sizes.n_batch)
        n_warmup = max(1, len(batches) // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / n_warmup, (len(batches) - step) / (len(batches) - n_warmup + 1))
        )
        model.train()
        for batch in batches:
            model(input_ids=batch, labels=batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def rate(self) -> float:
        """The learning rate with the lowest perplexity on selection text, pruned uniformly."""
        rates, seed = self.sizes.rates, self.sizes.seeds[0]
        if len(rates) == 1:
            return rates[0]
        uniform = self.profiles["uniform"]
        return min(rates, key=lambda rate: self.after(uniform, "weights", rate, seed, selecting=True)[0])


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument(
        "--model", metavar="PATH", help="a checkpoint folder or a name on the Hub, in place of the built-in model"
    )
    made.add_argument("--datasets", metavar="FOLDER", help="with local copies of C4 and WikiText-2, of a real model's texts")
    made.add_argument("--profile", type=Path, metavar="FILE", help="a profile.json, in place of a budget by Shapley values")
    options = parse(made, argv)
    sizes = QUICK if options.quick else REAL if options.model else Sizes()
    bench = Bench(options, sizes)
    rate, lines = bench.rate(), []
    for name, profile in bench.profiles.items():
        line = [name, "-" if profile is None else f"{100 * profile.target:g} %", f"{bench.before(profile):.2f}"]
        line.append(mean_and_spread([bench.after(profile, "weights", rate, seed)[0] for seed in sizes.seeds]))
        if name != "uniform":
            line += ["-"] * 4
        else:  # what a merge loses is no question of the budget
            ways: tuple[Way, ...] = ("lora", "masked lora")
            for way in ways:
                both = np.array([bench.after(profile, way, rate, seed) for seed in sizes.seeds])
                line += [mean_and_spread(both[:, 0]), mean_and_spread(both[:, 1])]
        lines.append(line)
        print(*line, sep=" | ", flush=True)
    head = ["budget", "zeros", "before", "trained", "LoRA", "LoRA, merged", "masked LoRA", "masked LoRA, merged"]
    publish(
        options,
        "finetuning_real" if options.model else "finetuning",
        ["# Perplexity before and after training", "", about(options, sizes, rate), "", *table(head, lines, "lr" + "r" * 6)],
    )


def about(options: argparse.Namespace, sizes: Sizes, rate: float) -> str:
    """The line below the title."""
    threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    where = (
        f"{Path(options.model).name}; C4, of whose first file the training text is documents that the pruner did not read; "
        f"perplexity on windows {READ_BEFORE + 1} to {READ_BEFORE + sizes.n_test} of the WikiText-2 test text"
        if options.model
        else f"Built-in model; perplexity on {sizes.n_test} sequences of the test text"
    )
    command = "make study NAME=finetuning" if not options.model else "python -m experiments.finetuning.run --model FOLDER"
    command += " --profile FILE" if options.profile else ""
    rates = ", ".join(f"{r:g}" for r in sizes.rates)
    chosen = f"the best of {rates} on selection text" if len(sizes.rates) > 1 else "not searched for"
    values = f"Shapley values by windows of {sizes.window} on {sizes.n_payoff} sequences, lam 0.15"
    return (
        f"{made_by(command, threads)}. {where}; Wanda with {sizes.n_calibration} calibration sequences; "
        f"{'a stored profile' if options.profile else values}; all sequences have {sizes.seq_len} tokens. Trained for one pass "
        f"over {sizes.n_training} sequences ({sizes.n_training * sizes.seq_len:,} tokens) of training text, {sizes.n_batch} a "
        f"step, by AdamW with weight decay {DECAY:g}, rate {rate:g} ({chosen}). LoRA of rank {sizes.rank} on all linear layers "
        f"of blocks, rate {LORA_RATE * rate:g}; merged: into the kept weights alone; masked: trained as it will be merged. "
        f"Seeds {', '.join(map(str, sizes.seeds))}, of text and adapters: mean ± standard deviation; calibration seed 0."
    )


if __name__ == "__main__":
    main()

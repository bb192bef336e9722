"""Two text files of the windows of WikiText-2 that count as selection text: 1 to 12 as payoff, 13 to 32 to choose by.

    python -m experiments.smollm2.windows --output texts [--datasets FOLDER] [--model FOLDER]

With them a budget can be measured on the text that perplexity is read on, in place of C4; windows 33 to 160 stay unread. The
sweep is in experiments/smollm2/README.md. Where the hub can be reached, `dataset@selection=wikitext2` and
`dataset@shapley.game.data=wikitext2` read the validation and training split for the same purpose, and need no file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.study import add_real_model
from svnup.data import WikiText2
from svnup.model import smollm2
from svnup.model.loading import read_tokenizer

PARTS = {"payoff.txt": slice(0, 12), "selection.txt": slice(12, 32)}  # of the windows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder of the two files")
    add_real_model(parser)
    options = parser.parse_args(argv)
    tokenizer = read_tokenizer(str(smollm2.checkpoint_folder() if options.model == smollm2.NAME else options.model))
    tokens = WikiText2(n_seq=32, seq_len=512, role="test", datasets_dir=options.datasets).tokens(tokenizer)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        (options.output / name).write_text(tokenizer.decode(tokens[part].reshape(-1)), encoding="utf-8")


if __name__ == "__main__":
    main()

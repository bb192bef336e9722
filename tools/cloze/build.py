"""Build the multiple-choice set of the built-in model: which continuation does a passage of held-out text have?

    python tools/cloze/build.py [--out DIR]

writes docs_cloze.jsonl, by default where svnup ships it (svnup/assets/tasks, beside the task's yaml). The same bytes every
time: what looks random goes by SHA-256, and no model is asked.

Passages are the paragraphs of the test text that are long enough. The context ends at the first single space after 14 words,
and the next 8 words, with the whitespace between them, are the true continuation. A passage whose continuation occurs anywhere
else in the text is left out. The three distractors are continuations of other passages, drawn from the 60 that are nearest in
length, so that length tells nothing; passages less than 10 paragraphs away give none, since they may be of the same docstring.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from svnup.data import TEXTS

N_CONTEXT, N_CONTINUATION = 14, 8
N_DISTRACTORS, N_NEAREST, APART = 3, 60, 10
PASSAGE = re.compile(
    rf"(?P<context>(?:\S+\s+){{{N_CONTEXT - 1},}}?\S+) (?P<continuation>(?:\S+\s+){{{N_CONTINUATION - 1}}}\S+)"
)


@dataclass(frozen=True)
class Passage:
    """A context and how it goes on; `place` counts the paragraphs before it."""

    place: int
    context: str
    continuation: str


def passages(text: str) -> list[Passage]:
    """Every passage that is long enough and whose continuation occurs once in the text."""
    found = []
    for place, paragraph in enumerate(re.split(r"\n\s*\n", text)):
        match = PASSAGE.match(paragraph.strip())
        if match and text.count(match["continuation"]) == 1:
            found.append(Passage(place, match["context"], match["continuation"]))
    return found


def items(found: list[Passage]) -> Iterable[dict[str, object]]:
    """One item per passage: context, four choices in a drawn order, and the index of the true one."""
    for passage in found:
        others = [p for p in found if abs(p.place - passage.place) >= APART]
        others.sort(key=lambda p: (abs(len(p.continuation) - len(passage.continuation)), p.place))
        distractors = drawn(others[:N_NEAREST], passage, "distractors")[:N_DISTRACTORS]
        choices = [p.continuation for p in drawn([passage, *distractors], passage, "order")]
        yield {"context": passage.context, "choices": choices, "label": choices.index(passage.continuation)}


def drawn(options: list[Passage], passage: Passage, what: str) -> list[Passage]:
    """The options in an order that only this passage and what is drawn decide."""
    return sorted(options, key=lambda p: hashlib.sha256(f"{what} {passage.place} {p.place}".encode()).digest())


def build() -> str:
    """The set as JSON lines."""
    with gzip.open(TEXTS / "test.txt.gz", "rt", encoding="utf-8") as file:
        found = passages(file.read())
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=TEXTS.parent / "tasks", metavar="DIR")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    text = build()
    (folder / "docs_cloze.jsonl").write_text(text, encoding="utf-8", newline="\n")
    print(f"{text.count(chr(10))} items, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()

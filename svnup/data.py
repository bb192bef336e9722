"""Token sources: the built-in text, a text file, WikiText-2 and C4; each gives int64 tokens (n_seq, seq_len).

Five roles of text are never mixed: calibration (statistics of pruners), payoff (the game), selection (validation: options and
profiles are chosen on it), test (reported numbers only) and training (of a pruned model, which no job reads). Each source has
different text for each role.
"""

from __future__ import annotations

import gzip
import hashlib
import random
import zlib
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from svnup.files import at_home
from svnup.types import LOCAL_COPY, Ints

Role = Literal["calibration", "payoff", "selection", "test", "training"]
Sampler = Literal["distinct", "literature"]
MAX_TEXT = 2**30  # bytes of a text file, decompressed: all of it is tokenized at once
CHUNK = 2**20
DRAWN = ("calibration", "payoff", "training")  # roles whose windows are sampled by the seed
TEXTS = Path(__file__).parent / "assets" / "text"


@dataclass(frozen=True, kw_only=True)
class TokenSource(ABC):
    """A text for one role, as token sequences of one length.

    Args:
        n_seq: number of sequences; None is all, in order.
        seq_len: tokens of a sequence.
        seed: of sampling, for roles whose windows are sampled.
        role: what the text is for.
        skip: windows to leave out at the beginning, of a text that is read in order.

    Raises:
        ValueError: an option is out of range.
    """

    n_seq: int | None
    seq_len: int
    seed: int = 0
    role: Role = "calibration"
    skip: int = 0
    name: ClassVar[str]
    complete: ClassVar[bool] = True  # False: needs an option from the user
    from_hub: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.n_seq is not None and self.n_seq < 1:
            raise ValueError(f"n_seq={self.n_seq}: ask for at least one sequence (null: all there are)")
        if self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len}: a sequence needs at least 2 tokens to have something to predict")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: choose 0 or more")
        if self.skip < 0:
            raise ValueError(f"skip={self.skip}: windows left out at the beginning; choose 0 or more")
        if self.skip and self.role in DRAWN:
            raise ValueError(f"skip={self.skip}: {self.role} text is drawn by its seed, not read in order; use skip=0")

    def tokens(self, tokenizer: Any) -> Ints:
        """Tokens, int64 (n_seq, seq_len), read once per tokenizer; raises ValueError if the text is missing or too short."""
        known = self.__dict__.setdefault("_tokens", {})  # a cache; the fields, which determine it, are frozen
        name = (type(tokenizer).__name__, tokenizer.name_or_path)
        if name not in known:
            known[name] = self.read(tokenizer)
        out: Ints = known[name]
        return out

    @abstractmethod
    def read(self, tokenizer: Any) -> Ints:
        """Read and tokenize the text, int64 (n_seq, seq_len)."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A text that identifies the content, found without tokenizing it."""


@dataclass(frozen=True, kw_only=True)
class Docs(TokenSource):
    """The text of the built-in model: docstrings of permissively licensed packages, five disjoint files for the five roles."""

    name = "docs"

    def fingerprint(self) -> str:
        return hashlib.sha256((TEXTS / f"{self.role}.txt.gz").read_bytes()).hexdigest()

    def read(self, tokenizer: Any) -> Ints:
        with gzip.open(TEXTS / f"{self.role}.txt.gz", "rt", encoding="utf-8") as file:
            return _windows(_encode(tokenizer, file.read()), self)


@dataclass(frozen=True, kw_only=True)
class TextFile(TokenSource):
    """A UTF-8 text file (.txt or .txt.gz), all of it for one role."""

    path: str
    name = "text_file"
    complete = False

    def __post_init__(self) -> None:
        super().__post_init__()
        file = at_home("path", self.path)
        if not self.path or not file.is_file():
            raise ValueError(f"path={self.path or chr(39) * 2}: there is no such file; name a text file: path=my_text.txt")
        if not file.stat().st_size:
            raise ValueError(f"path={self.path}: the file is empty; name a file with text")

    def fingerprint(self) -> str:
        total = hashlib.sha256()
        for chunk in self._chunks():
            total.update(chunk)
        return total.hexdigest()

    def read(self, tokenizer: Any) -> Ints:
        try:
            text = b"".join(self._chunks()).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"path={self.path}: not UTF-8 text ({error}); convert the file") from None
        if "\0" in text:
            raise ValueError(f"path={self.path}: not UTF-8 text (it has zero bytes, as UTF-16 has); convert the file")
        if not text.strip():
            raise ValueError(f"path={self.path}: the file has no text; name a file with text")
        return _windows(_encode(tokenizer, text), self)

    def _chunks(self) -> Iterator[bytes]:
        """The decompressed text without its byte-order mark, in chunks; raises ValueError if it is too large."""
        size = 0
        try:
            with (gzip.open if self.path.endswith(".gz") else open)(at_home("path", self.path), "rb") as file:
                chunk = file.read(CHUNK).removeprefix(BOM_UTF8)
                while chunk:
                    size += len(chunk)
                    if size > MAX_TEXT:
                        raise ValueError(f"path={self.path}: more than {MAX_TEXT >> 20} MiB of text; give less of it")
                    yield chunk
                    chunk = file.read(CHUNK)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"path={self.path}: cannot be read ({error}); check the file") from None


@dataclass(frozen=True, kw_only=True)
class WikiText2(TokenSource):
    """WikiText-2 raw, with lines joined by two newlines and tokenized once, as in the released scripts of SparseGPT and Wanda.

    Test and selection are the test and validation splits; calibration is the first 80 % of the lines of the training split,
    payoff the rest. None is left to train on: raises ValueError for that role.
    """

    path: str = "Salesforce/wikitext"
    revision: str | None = None
    datasets_dir: str | None = None
    name = "wikitext2"
    from_hub = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.role == "training":
            raise ValueError("role=training: calibration and payoff divide the training split of wikitext2; train on c4")

    def fingerprint(self) -> str:
        return _hub_fingerprint(self.path, self.revision, self.datasets_dir)

    def read(self, tokenizer: Any) -> Ints:
        split = {"test": "test", "selection": "validation"}.get(self.role, "train")
        lines = list(_load(self, "wikitext-2-raw-v1", split=split)["text"])
        cut = len(lines) * 8 // 10
        part = {"calibration": lines[:cut], "payoff": lines[cut:]}.get(self.role, lines)
        return _windows(_encode(tokenizer, "\n\n".join(part)), self)


@dataclass(frozen=True, kw_only=True)
class C4(TokenSource):
    """C4 (en).

    Calibration, payoff, selection and training are random crops of documents longer than seq_len, from the first to the fourth
    training file. Test is the usual protocol of SparseGPT and Wanda: the first 1,100 validation documents joined by a space,
    cut into 256 windows.

    Args:
        sampler: `distinct` takes no document twice; `literature` samples as `get_c4` of Wanda (lib/data.py), so that a seed has
            the same calibration text. SparseGPT (datautils.py) samples so too, but fails on a document of exactly seq_len
            tokens, which is skipped here.
    """

    path: str = "allenai/c4"
    revision: str | None = None
    sampler: Sampler = "distinct"
    datasets_dir: str | None = None
    name = "c4"
    from_hub = True

    def fingerprint(self) -> str:
        return _hub_fingerprint(self.path, self.revision, self.datasets_dir)

    def read(self, tokenizer: Any) -> Ints:
        if self.role == "test":
            documents = self._documents("en/c4-validation.00000-of-00008.json.gz")
            text = " ".join(documents[i]["text"] for i in range(min(1100, len(documents))))
            return _windows(_encode(tokenizer, text)[: 256 * self.seq_len], self)
        shard = ("calibration", "payoff", "selection", "training").index(self.role)
        documents = self._documents(f"en/c4-train.{shard:05d}-of-01024.json.gz")
        crops = _literature_crops if self.sampler == "literature" else _distinct_crops
        return crops(documents, tokenizer, self)

    def _documents(self, file: str) -> Any:
        return _load(self, data_files={"part": file}, split="part")


def tokens_sha256(tokens: Ints) -> str:
    """The SHA-256 of tokens, int64 (n_seq, seq_len), in hex."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()


NAMED: dict[str, type[TokenSource]] = {source.name: source for source in (Docs, TextFile, WikiText2, C4)}


def local_copy(path: str, datasets_dir: str | None) -> Path | None:
    """The folder with a copy of a data set of the Hub: its name below `datasets_dir` or the working directory; else None."""
    places = [at_home("datasets_dir", folder) / path for folder in (datasets_dir, ".") if folder is not None]
    return next((place for place in places if place.is_dir()), None)


def _hub_fingerprint(path: str, revision: str | None, datasets_dir: str | None) -> str:
    """The name of a data set of the Hub with its revision, or with the hash of a local copy that is read instead."""
    copy = local_copy(path, datasets_dir)
    return f"{path}{LOCAL_COPY}{folder_digest(copy)}" if copy is not None else f"{path}@{revision or 'main'}"


def folder_digest(folder: Path) -> str:
    """SHA-256 of names and contents of all files below a folder, except Python's caches."""
    total = hashlib.sha256()
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__"):
        with file.open("rb") as data:
            total.update(str(file.relative_to(folder)).encode() + hashlib.file_digest(data, "sha256").digest())
    return total.hexdigest()


def _distinct_crops(documents: Any, tokenizer: Any, source: TokenSource) -> Ints:
    """Crops of documents in a random order, no document twice."""
    wanted, rng = _n_sampled(source), np.random.default_rng(source.seed)
    rows: list[Ints] = []
    for index in rng.permutation(len(documents)):
        ids = _encode(tokenizer, documents[int(index)]["text"])
        if len(ids) > source.seq_len:
            start = rng.integers(len(ids) - source.seq_len + 1)
            rows.append(ids[start : start + source.seq_len])
            if len(rows) == wanted:
                return np.stack(rows)
    raise ValueError(f"n_seq={wanted}: {source.name} has only {len(rows)} documents longer than seq_len={source.seq_len}")


def _literature_crops(documents: Any, tokenizer: Any, source: TokenSource) -> Ints:
    """Crops of documents sampled with replacement by Python's generator, as in the released scripts."""
    wanted, rng = _n_sampled(source), random.Random(source.seed)
    rows: list[Ints] = []
    short: set[int] = set()
    while len(rows) < wanted:
        index = rng.randint(0, len(documents) - 1)
        if index in short:
            continue
        ids = _encode(tokenizer, documents[index]["text"])
        if len(ids) > source.seq_len:
            start = rng.randint(0, len(ids) - source.seq_len - 1)  # as in the scripts, which never sample the last crop
            rows.append(ids[start : start + source.seq_len])
            continue
        short.add(index)
        if len(short) == len(documents):
            raise ValueError(f"seq_len={source.seq_len}: no document of {source.name} is longer; ask for shorter sequences")
    return np.stack(rows)


def _n_sampled(source: TokenSource) -> int:
    if source.n_seq is None:
        raise ValueError(f"n_seq=null: {source.name} is sampled for {source.role}; give a number of sequences")
    if source.skip:
        raise ValueError(f"skip={source.skip}: {source.name} is sampled for {source.role}, not read in order; use skip=0")
    return source.n_seq


def _windows(ids: Ints, source: TokenSource) -> Ints:
    """Cut tokens into non-overlapping windows, without the remainder; what is drawn is sampled by the seed."""
    available = len(ids) // source.seq_len
    left = available - source.skip
    wanted = source.n_seq if source.n_seq is not None else left
    if wanted > left or left < 1:
        given = f"n_seq={source.n_seq}" + (f", skip={source.skip}" if source.skip else "")
        raise ValueError(
            f"{given}: the {source.role} text of {source.name} has {len(ids)} tokens, {available} windows of "
            f"seq_len={source.seq_len}; ask for fewer or shorter windows, or give a longer text"
        )
    rows = ids[source.skip * source.seq_len : available * source.seq_len].reshape(left, source.seq_len)
    if source.role in DRAWN and wanted < available:
        return rows[np.random.default_rng(source.seed).permutation(available)[:wanted]]
    return rows[:wanted]


def _encode(tokenizer: Any, text: str) -> Ints:
    try:
        return np.array(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)
    except Exception as error:  # tokenizers are third-party code and data
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        name = tokenizer.name_or_path
        raise ValueError(f"the tokenizer of {name} cannot encode the text ({reason}); check its files") from error


def _load(source: WikiText2 | C4, *args: Any, **kwargs: Any) -> Any:
    copy = local_copy(source.path, source.datasets_dir) if source.path else None
    if copy is None and source.path.count("/") != 1:  # a single word would name a builder of the library
        raise ValueError(
            f"path={source.path}: no such folder, and not a name on the Hub; give organisation/name, as {type(source).path}"
        )
    import datasets  # takes a second to import

    try:
        return datasets.load_dataset(str(copy or source.path), *args, revision=source.revision, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path={source.path}: the data set cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); it "
            "needs the hub, a filled datasets cache, or a local copy in a folder of that name below datasets_dir"
        ) from error

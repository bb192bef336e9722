"""Token sources: four roles that never mix, windows by the seed, and the data sets of the hub on small local copies."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from svnup.data import C4, TEXTS, Docs, Role, TextFile, WikiText2
from svnup.language_model import read_tokenizer
from svnup.model import BUILT_IN_FOLDER

ROLES = get_args(Role)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return read_tokenizer(str(BUILT_IN_FOLDER))


class Words:
    """A tokenizer of numbered words, so that every token names the place it comes from."""

    name_or_path = "words"

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(start: int, stop: int) -> str:
    return " ".join(map(str, range(start, stop)))


# -- the built-in text


def test_the_four_texts_are_disjoint():
    """They were split by file, and docstrings seen before were left out: no more is shared than a line of boilerplate."""
    paragraphs = {}
    for role in ROLES:
        with gzip.open(TEXTS / f"{role}.txt.gz", "rt", encoding="utf-8") as file:
            text = file.read()
        assert len(text) > 200_000, role
        paragraphs[role] = {p.strip() for p in text.split("\n\n") if len(p.strip()) > 200}
        assert len(paragraphs[role]) > 300, role
    for one, other in itertools.combinations(ROLES, 2):
        assert len(paragraphs[one] & paragraphs[other]) <= 1, (one, other)


def test_docs_read_the_text_of_their_role(tokenizer):
    windows = {role: Docs(n_seq=8, seq_len=32, role=role).tokens(tokenizer) for role in ROLES}
    prints = {role: Docs(n_seq=8, seq_len=32, role=role).fingerprint() for role in ROLES}
    assert len(set(prints.values())) == 4
    for role, rows in windows.items():
        assert rows.shape == (8, 32)
        assert rows.dtype == np.int64
        with gzip.open(TEXTS / f"{role}.txt.gz", "rt", encoding="utf-8") as file:
            text = file.read()
        for row in rows:
            decoded = tokenizer.decode(row[1:-1].tolist()).strip("�")  # a window may cut a character
            assert decoded in text
    again = Docs(n_seq=8, seq_len=32, role="payoff").tokens(tokenizer)
    assert np.array_equal(again, windows["payoff"])


# -- windows of one text


@pytest.fixture
def hundred(tmp_path) -> str:
    """1,003 tokens: 100 windows of 10, and a remainder of 3."""
    (tmp_path / "n.txt").write_text(numbers(0, 1003))
    return str(tmp_path / "n.txt")


def windows(path: str, role: str, n_seq: int | None = None, seed: int = 0, seq_len: int = 10) -> np.ndarray:
    return TextFile(path=path, n_seq=n_seq, seq_len=seq_len, seed=seed, role=role).tokens(Words())


@pytest.mark.parametrize("role", ["test", "selection"])
def test_reported_windows_come_in_order_and_drop_the_remainder(role, hundred):
    assert np.array_equal(windows(hundred, role), np.arange(1000).reshape(100, 10))
    assert np.array_equal(windows(hundred, role, n_seq=3, seed=5), np.arange(30).reshape(3, 10))
    assert windows(hundred, role, seq_len=7).shape == (143, 7)


@pytest.mark.parametrize("role", ["calibration", "payoff"])
def test_sampled_windows_are_drawn_by_the_seed(role, hundred):
    zero, one = (windows(hundred, role, n_seq=20, seed=s) for s in (0, 1))
    assert np.array_equal(windows(hundred, role, n_seq=20, seed=0), zero)
    assert not np.array_equal(zero, one)
    for rows in (zero, one):
        assert rows.shape == (20, 10)
        assert (rows[:, 0] % 10 == 0).all()  # whole windows of the grid
        assert (np.diff(rows) == 1).all()
        assert len(set(rows[:, 0])) == 20, "no window twice"
    assert not np.array_equal(np.sort(zero[:, 0]), np.arange(20) * 10), "not simply the first"
    everything = windows(hundred, role)
    assert np.array_equal(np.sort(everything[:, 0]), np.arange(100) * 10)


def test_tokens_are_read_once_per_tokenizer(hundred, monkeypatch):
    source = TextFile(path=hundred, n_seq=None, seq_len=10)
    reads = []
    read = TextFile.read
    monkeypatch.setattr(TextFile, "read", lambda self, tokenizer: reads.append(tokenizer) or read(self, tokenizer))
    other = Words()
    other.name_or_path = "other words"
    assert source.tokens(Words()) is source.tokens(Words())
    source.tokens(other)
    assert len(reads) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [({"n_seq": 0}, "n_seq=0"), ({"n_seq": -1}, "n_seq=-1"), ({"seq_len": 1}, "seq_len=1")],
)
def test_numbers_that_make_no_sense(options, said, hundred):
    with pytest.raises(ValueError, match=f"^{said}: "):
        TextFile(**({"path": hundred, "n_seq": 2, "seq_len": 10} | options))


# -- text files


def test_a_gz_file_is_the_same_text(tmp_path):
    (tmp_path / "a.txt").write_text(numbers(0, 100))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(numbers(0, 100).encode()))
    plain, zipped = (windows(str(tmp_path / name), "test") for name in ("a.txt", "a.txt.gz"))
    assert np.array_equal(plain, zipped)
    assert np.array_equal(plain, np.arange(100).reshape(10, 10))


def test_a_text_file_s_fingerprint_is_its_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("some text")
    one, two = (TextFile(path=str(tmp_path / f"{n}.txt"), n_seq=1, seq_len=2) for n in ("a", "b"))
    before = one.fingerprint()
    assert before == two.fingerprint()
    (tmp_path / "a.txt").write_text("other text")
    assert one.fingerprint() != before


def test_text_files_that_are_none(tmp_path):
    def read(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        TextFile(path=str(tmp_path / name), n_seq=2, seq_len=10).tokens(Words())

    with pytest.raises(ValueError, match=r"path=nope\.txt: there is no such file"):
        TextFile(path="nope.txt", n_seq=2, seq_len=10)
    with pytest.raises(ValueError, match="path='': there is no such file"):
        TextFile(path="", n_seq=2, seq_len=10)
    with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
        read("empty.txt", b"")
    with pytest.raises(ValueError, match=r"blank\.txt: the file has no text"):
        read("blank.txt", b" \n ")
    with pytest.raises(ValueError, match=r"blank\.gz: the file has no text"):
        read("blank.gz", gzip.compress(b"\n"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8"):
        read("latin.txt", "1 2 ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"fake\.gz: not UTF-8"):
        read("fake.gz", b"1 2 3")
    with pytest.raises(ValueError, match=r"n_seq=2: .*19 tokens, 1 windows of seq_len=10"):
        read("short.txt", numbers(0, 19).encode())
    (tmp_path / "short.txt").write_text(numbers(0, 9))
    with pytest.raises(ValueError, match="9 tokens, 0 windows"):  # all there are, but there are none
        TextFile(path=str(tmp_path / "short.txt"), n_seq=None, seq_len=10, role="test").tokens(Words())


def test_a_gz_file_damaged_inside(tmp_path):
    data = bytearray(gzip.compress(numbers(0, 5000).encode()))
    data[40:60] = b"\xff" * 20
    (tmp_path / "damaged.txt.gz").write_bytes(bytes(data))
    with pytest.raises(ValueError, match="damaged"):
        windows(str(tmp_path / "damaged.txt.gz"), "test")


# -- data sets of the hub, from local copies in folders of their names

N_TRAIN, N_VALIDATION, N_TEST = 100, 30, 20


@pytest.fixture
def copies(tmp_path, monkeypatch) -> Path:
    """Small copies of WikiText-2 and C4 relative to the working directory, in the hub's own layout; words are numbers."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    wiki = tmp_path / "Salesforce" / "wikitext"
    (wiki / "wikitext-2-raw-v1").mkdir(parents=True)
    readme = "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
    for split, start, n in (("train", 0, N_TRAIN), ("validation", 10_000, N_VALIDATION), ("test", 20_000, N_TEST)):
        lines = [f" {numbers(start + 10 * i, start + 10 * (i + 1))} \n" for i in range(n)]
        pq.write_table(pa.table({"text": lines}), wiki / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
        readme += f"  - split: {split}\n    path: wikitext-2-raw-v1/{split}-*\n"
    (wiki / "README.md").write_text(f"{readme}---\n")
    (tmp_path / "allenai" / "c4" / "en").mkdir(parents=True)
    for name, start in (("train.00000-of-01024", 0), ("train.00001-of-01024", 10**6), ("train.00002-of-01024", 2 * 10**6)):
        # documents of 5, 10, 15, ... tokens; a document begins at a multiple of 1,000
        write_c4(tmp_path, name, [numbers(start + 1000 * i, start + 1000 * i + 5 * (i + 1)) for i in range(40)])
    write_c4(tmp_path, "validation.00000-of-00008", [f"{i}" for i in range(1300)])
    return tmp_path


def write_c4(folder: Path, name: str, documents: list[str]) -> None:
    with gzip.open(folder / "allenai" / "c4" / "en" / f"c4-{name}.json.gz", "wt") as file:
        for text in documents:
            file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://example.org"}) + "\n")


def tokens_of(rows: np.ndarray) -> set[int]:
    return set(rows.ravel().tolist())


def test_wikitext2_by_role(copies):
    rows = {role: WikiText2(n_seq=None, seq_len=10, role=role).tokens(Words()) for role in ROLES}
    assert np.array_equal(rows["test"], 20_000 + np.arange(200).reshape(20, 10))
    assert np.array_equal(rows["selection"], 10_000 + np.arange(300).reshape(30, 10))
    assert tokens_of(rows["calibration"]) == set(range(800))  # the first 80 % of the lines of train
    assert tokens_of(rows["payoff"]) == set(range(800, 1000))
    zero, one = (WikiText2(n_seq=5, seq_len=10, seed=s).tokens(Words()) for s in (0, 1))
    assert zero.shape == (5, 10)
    assert not np.array_equal(zero, one)
    with pytest.raises(ValueError, match=r"n_seq=21: the test text of wikitext2 has 200 tokens, 20 windows"):
        WikiText2(n_seq=21, seq_len=10, role="test").tokens(Words())


def test_wikitext2_is_joined_by_two_newlines_and_tokenized_once(copies):
    class Recorder(Words):
        texts: list[str] = []  # noqa: RUF012

        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            self.texts.append(text)
            return super().__call__(text)

    WikiText2(n_seq=None, seq_len=10, role="test").tokens(Recorder())
    lines = [f" {numbers(20_000 + 10 * i, 20_000 + 10 * (i + 1))} \n" for i in range(N_TEST)]
    assert Recorder.texts == ["\n\n".join(lines)]


def test_c4_crops_are_random_windows_of_long_documents(copies):
    roles = ("calibration", "payoff", "selection")
    seq_len = 100
    rows = {role: C4(n_seq=15, seq_len=seq_len, role=role).tokens(Words()) for role in roles}
    for shard, role in enumerate(roles):
        assert rows[role].shape == (15, seq_len)
        assert (np.diff(rows[role]) == 1).all(), "a crop lies inside one document"
        document, start = np.divmod(rows[role][:, 0] - shard * 10**6, 1000)
        assert (document >= 0).all()
        assert (document < 40).all(), "each role reads its own file"
        assert (5 * (document + 1) > seq_len).all(), "only documents longer than seq_len"
        assert len(set(document)) == 15, "no document twice"
        assert len(set(start)) > 1, "crops begin anywhere"
    assert not tokens_of(rows["calibration"]) & tokens_of(rows["payoff"])
    again, other = (C4(n_seq=15, seq_len=seq_len, seed=s).tokens(Words()) for s in (0, 1))
    assert np.array_equal(again, rows["calibration"])
    assert not np.array_equal(other, again)
    # documents of 105, 110, ... 200 tokens: 20 of them, the one of exactly 100 is not among them
    assert C4(n_seq=20, seq_len=seq_len).tokens(Words()).shape == (20, seq_len)
    with pytest.raises(ValueError, match=r"n_seq=21: c4 has only 20 documents longer than seq_len=100"):
        C4(n_seq=21, seq_len=seq_len).tokens(Words())


def test_c4_test_protocol(copies):
    """The first 1,100 documents of the validation file, joined by a space, at most 256 windows."""
    rows = C4(n_seq=None, seq_len=10, role="test").tokens(Words())
    assert np.array_equal(rows, np.arange(1100).reshape(110, 10))
    rows = C4(n_seq=None, seq_len=4, role="test").tokens(Words())
    assert np.array_equal(rows, np.arange(256 * 4).reshape(256, 4))
    assert np.array_equal(C4(n_seq=3, seq_len=4, role="test").tokens(Words()), np.arange(12).reshape(3, 4))


def test_c4_joins_documents_by_one_space(copies):
    seen = []

    class Recorder(Words):
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            seen.append(text)
            return super().__call__(text)

    C4(n_seq=None, seq_len=10, role="test").tokens(Recorder())
    assert seen == [numbers(0, 1100)]


def test_sampling_needs_a_number(copies):
    with pytest.raises(ValueError, match=r"n_seq=null: c4 is sampled for calibration"):
        C4(n_seq=None, seq_len=10).tokens(Words())


@pytest.mark.parametrize("source", [WikiText2, C4])
@pytest.mark.parametrize("role", ROLES)
def test_not_available_offline(source, role, tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = {WikiText2: "Salesforce/wikitext", C4: "allenai/c4"}[source]
    with pytest.raises(ValueError, match=f"^path={path}: the data set cannot be loaded .* local copy"):
        source(n_seq=2, seq_len=10, role=role).tokens(Words())
    with pytest.raises(ValueError, match=r"^path=elsewhere/mine: "):
        source(path="elsewhere/mine", n_seq=2, seq_len=10, role=role).tokens(Words())


def test_local_copies_lie_below_any_folder(copies, tmp_path_factory, monkeypatch):
    """Also below the home; and what is not there is looked for where it always was."""
    here = {source: source(n_seq=3, seq_len=10, role="test") for source in (WikiText2, C4)}
    prints = {source: (one.fingerprint(), one.tokens(Words())) for source, one in here.items()}
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    monkeypatch.setenv("HOME", str(copies.parent))
    for folder in (str(copies), f"~/{copies.name}"):
        for source, (fingerprint, tokens) in prints.items():
            there = source(n_seq=3, seq_len=10, role="test", datasets_dir=folder)
            assert there.fingerprint() == fingerprint
            assert np.array_equal(there.tokens(Words()), tokens)
    write_c4(copies, "validation.00000-of-00008", [f"{i}" for i in range(7000, 8300)])
    assert C4(n_seq=3, seq_len=10, role="test", datasets_dir=str(copies)).fingerprint() != prints[C4][0]
    monkeypatch.chdir(copies)
    assert np.array_equal(WikiText2(n_seq=3, seq_len=10, role="test", datasets_dir="/").tokens(Words()), prints[WikiText2][1])


def test_a_changed_local_copy_has_another_fingerprint(copies):
    source = C4(n_seq=None, seq_len=10, role="test")
    before = source.fingerprint()
    write_c4(copies, "validation.00000-of-00008", [f"{i}" for i in range(5000, 6300)])
    assert source.fingerprint() != before

"""Token sources: five roles that never mix, windows by the seed, and the data sets of the hub on small local copies."""

import gzip
import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from svnup.data import C4, TEXTS, Docs, Role, TextFile, WikiText2
from svnup.model.loading import read_tokenizer
from svnup.model.source import BUILT_IN_FOLDER

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


def test_the_five_texts_are_disjoint():
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
    assert len(set(prints.values())) == 5
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


@pytest.mark.parametrize("role", ["test", "selection"])
def test_windows_at_the_beginning_are_left_out(role, hundred):
    def after(skip: int, n_seq: int | None = None) -> np.ndarray:
        return TextFile(path=hundred, n_seq=n_seq, seq_len=10, role=role, skip=skip).tokens(Words())

    assert np.array_equal(after(32, 5), np.arange(320, 370).reshape(5, 10))
    assert np.array_equal(after(97), np.arange(970, 1000).reshape(3, 10))
    assert np.array_equal(after(0), windows(hundred, role))
    with pytest.raises(ValueError, match=r"^n_seq=4, skip=97: .* 100 windows"):
        after(97, 4)
    with pytest.raises(ValueError, match=r"^n_seq=None, skip=100: "):
        after(100)


@pytest.mark.parametrize("role", ["calibration", "payoff", "training"])
def test_windows_that_are_drawn_have_no_beginning(role, hundred):
    with pytest.raises(ValueError, match=rf"^skip=3: {role} text is drawn"):
        TextFile(path=hundred, n_seq=2, seq_len=10, role=role, skip=3)


@pytest.mark.parametrize("role", ["calibration", "payoff", "training"])
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
    [({"n_seq": 0}, "n_seq=0"), ({"n_seq": -1}, "n_seq=-1"), ({"seq_len": 1}, "seq_len=1"), ({"skip": -1}, "skip=-1")],
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
    with pytest.raises(ValueError, match=r"fake\.gz: cannot be read \(Not a gzipped"):
        read("fake.gz", b"1 2 3")
    with pytest.raises(ValueError, match=r"n_seq=2: .*19 tokens, 1 windows of seq_len=10"):
        read("short.txt", numbers(0, 19).encode())
    (tmp_path / "short.txt").write_text(numbers(0, 9))
    with pytest.raises(ValueError, match="9 tokens, 0 windows"):  # all there are, but there are none
        TextFile(path=str(tmp_path / "short.txt"), n_seq=None, seq_len=10, role="test").tokens(Words())


def test_a_byte_order_mark_and_a_gz_are_no_other_text(tmp_path):
    text = numbers(0, 100).encode()
    files = {"plain.txt": text, "mark.txt": b"\xef\xbb\xbf" + text, "mark.txt.gz": gzip.compress(b"\xef\xbb\xbf" + text)}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    sources = [TextFile(path=str(tmp_path / name), n_seq=None, seq_len=10, role="test") for name in files]
    assert len({source.fingerprint() for source in sources}) == 1
    assert all(np.array_equal(source.tokens(Words()), np.arange(100).reshape(10, 10)) for source in sources)


@pytest.mark.parametrize("name", ["long.txt", "long.txt.gz"])
def test_more_text_than_can_be_tokenized_is_refused_at_a_bound(name, tmp_path, monkeypatch):
    """Neither unpacked as a whole nor kept: what is read before the refusal is little more than the bound."""
    text = b" 12345678 123456" * (2 << 20)  # 32 MiB
    (tmp_path / name).write_bytes(gzip.compress(text, 1) if name.endswith("gz") else text)
    monkeypatch.setattr("svnup.data.MAX_TEXT", 3 << 20)
    source = TextFile(path=str(tmp_path / name), n_seq=2, seq_len=10)
    said = r"^path=\S+long\.txt(\.gz)?: more than 3 MiB of text; give less of it$"
    tracemalloc.start()
    with pytest.raises(ValueError, match=said):
        source.fingerprint()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20
    with pytest.raises(ValueError, match=said):
        source.tokens(Words())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_text_in_another_encoding_is_told_in_one_line(encoding, tmp_path):
    (tmp_path / "other.txt").write_bytes("naïve words, again and again ".encode(encoding) * 20)
    with pytest.raises(ValueError, match=r"^path=\S+other\.txt: not UTF-8 text \(.*\); convert the file$"):
        windows(str(tmp_path / "other.txt"), "test")


def test_zeros_are_no_text(tmp_path):
    (tmp_path / "ascii16.txt").write_bytes(numbers(0, 100).encode("utf-16-le"))  # which is UTF-8, too
    with pytest.raises(ValueError, match=r"^path=\S+ascii16\.txt: not UTF-8 text \(it has zero bytes, as UTF-16 has\)"):
        windows(str(tmp_path / "ascii16.txt"), "test")


def test_a_tokenizer_that_fails_is_named(hundred):
    class Broken(Words):
        def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [None, None]}  # as tokenizers do that have no token for what they do not know

    source = TextFile(path=hundred, n_seq=None, seq_len=10)
    with pytest.raises(ValueError, match=r"^the tokenizer of words cannot encode the text \(TypeError: .*\); check its files$"):
        source.tokens(Broken())


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
    for shard in range(4):
        name, start = f"train.{shard:05d}-of-01024", shard * 10**6
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
    rows = {role: WikiText2(n_seq=None, seq_len=10, role=role).tokens(Words()) for role in ROLES if role != "training"}
    assert np.array_equal(rows["test"], 20_000 + np.arange(200).reshape(20, 10))
    assert np.array_equal(rows["selection"], 10_000 + np.arange(300).reshape(30, 10))
    assert tokens_of(rows["calibration"]) == set(range(800))  # the first 80 % of the lines of train
    assert tokens_of(rows["payoff"]) == set(range(800, 1000))
    zero, one = (WikiText2(n_seq=5, seq_len=10, seed=s).tokens(Words()) for s in (0, 1))
    assert zero.shape == (5, 10)
    assert not np.array_equal(zero, one)
    with pytest.raises(ValueError, match=r"^role=training: calibration and payoff divide .* wikitext2; train on c4$"):
        WikiText2(n_seq=None, seq_len=10, role="training")
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
    roles = ("calibration", "payoff", "selection", "training")
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
    assert sum(len(tokens_of(of_role)) for of_role in rows.values()) == len(set().union(*map(tokens_of, rows.values())))
    again, other = (C4(n_seq=15, seq_len=seq_len, seed=s).tokens(Words()) for s in (0, 1))
    assert np.array_equal(again, rows["calibration"])
    assert not np.array_equal(other, again)
    # documents of 105, 110, ... 200 tokens: 20 of them, the one of exactly 100 is not among them
    assert C4(n_seq=20, seq_len=seq_len).tokens(Words()).shape == (20, seq_len)
    with pytest.raises(ValueError, match=r"n_seq=21: c4 has only 20 documents longer than seq_len=100"):
        C4(n_seq=21, seq_len=seq_len).tokens(Words())


def test_the_literature_s_sample_of_c4(copies):
    """Seed 0 is what the published scripts read from the same file, document by document and crop by crop."""
    with gzip.open(copies / "allenai" / "c4" / "en" / "c4-train.00000-of-01024.json.gz", "rt") as file:
        documents = [[int(word) for word in json.loads(line)["text"].split()] for line in file]

    def published(n: int, seed: int, length: int) -> list[list[int]]:
        random.seed(seed)
        sample: list[list[int]] = []
        for _ in range(n):
            ids: list[int] = []
            while len(ids) <= length:
                ids = documents[random.randint(0, len(documents) - 1)]
            first = random.randint(0, len(ids) - length - 1)
            sample.append(ids[first : first + length])
        return sample

    for seed, n, length in ((0, 16, 100), (1, 30, 150), (0, 5, 199)):
        rows = C4(n_seq=n, seq_len=length, seed=seed, sampler="literature").tokens(Words())
        assert rows.tolist() == published(n, seed, length)
    assert not np.array_equal(C4(n_seq=16, seq_len=100).tokens(Words()), published(16, 0, 100))
    state = random.getstate()
    C4(n_seq=16, seq_len=100, sampler="literature", role="payoff").tokens(Words())
    assert random.getstate() == state, "nobody else's generator is used up"
    with pytest.raises(ValueError, match=r"^seq_len=200: no document of c4 is longer; ask for shorter sequences$"):
        C4(n_seq=1, seq_len=200, sampler="literature").tokens(Words())
    with pytest.raises(ValueError, match=r"n_seq=null: c4 is sampled for calibration"):
        C4(n_seq=None, seq_len=10, sampler="literature").tokens(Words())


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


def test_c4_test_windows_after_others_and_no_crops_after_others(copies):
    first = C4(n_seq=5, seq_len=10, role="test").tokens(Words())
    assert np.array_equal(C4(n_seq=3, seq_len=10, role="test", skip=2).tokens(Words()), first[2:])
    with pytest.raises(ValueError, match=r"^skip=2: c4 is sampled for selection"):
        C4(n_seq=3, seq_len=10, role="selection", skip=2).tokens(Words())


def test_sampling_needs_a_number(copies):
    with pytest.raises(ValueError, match=r"n_seq=null: c4 is sampled for calibration"):
        C4(n_seq=None, seq_len=10).tokens(Words())


@pytest.mark.parametrize(
    ("source", "role"), [(s, r) for s in (WikiText2, C4) for r in ROLES if (s, r) != (WikiText2, "training")]
)
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
    assert before.startswith("allenai/c4@sha256:")
    write_c4(copies, "validation.00000-of-00008", [f"{i}" for i in range(5000, 6300)])
    assert source.fingerprint() != before

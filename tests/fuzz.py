"""Configurations and files that nobody would write: each must end in a number, a plan or one line, and soon.

    python tests/fuzz.py --configurations 10000 --files 2000 --seed 0

One process, no model but small random ones. A configuration is composed by Hydra, changed at a place or several, and built as a
job is; a part of them goes through the whole command with `dry_run=true`. A file is a result of a run that was changed, read by
every command that reads results. What counts is a traceback, more than SECONDS of time, or a file outside the folders given.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from svnup.config import choices

SECONDS = 20
SENSIBLE = 0.4  # of the configurations: most of these are jobs
SMALL = [
    *("model=random", "model.num_hidden_layers=5", "model.hidden_size=16", "model.intermediate_size=16"),
    *("model.num_attention_heads=2", "model.seq_len=16", "dataset.n_seq=2", "evaluation.n_seq=2", "shapley.game.data.n_seq=4"),
    *("selection.n_seq=2", "dry_run=true"),
]
ALL = ("allocator", "pruner", "shapley", "recovery", "split", "evaluation")  # groups of which each option is drawn
CHOICES = {
    **{group: options for group, options in choices().items() if group in ALL},
    "dataset": ["docs", "text_file", "wikitext2", "c4"],
    "model": ["random", "tiny", "tiny_moe", "pretrained"],
    "tracker": ["none", "wandb"],
}
NUMBERS = [0, 1, -1, 2, 5, 2**31 - 1, 2**31, -(2**63), 10**30, 0.5, -0.5, 1.5, 1e308, 1e-320, float("nan"), float("inf")]
SHARDS = ["0", "0/4", "4/4", "1/0", "-1/3", "a/b", "2:4", "mixed:8", "0:0", "124"]
PATHS = ["~nobody/x", "/dev/null", "/dev/full", "../../x", "/", "."]
WORDS = ["x", "auto", "[]", "{}", "None", "null", "???", *SHARDS, *PATHS]
ODD = ["", "n" * 300, "ü\u202e", "\x00", "\x1b[31m", "${seed}", "${nothing}", "a: b"]
NODES = [[], {}, [0, 4], ["docs"], [["docs"]], [{"docs": 5}], [None], {"_target_": 5}, {"a": {"b": []}}, {5: 6}]
OTHERS = ["svnup.data.Docs", "svnup.shapley.exact.Exact", "svnup.pruning.wanda.Wanda", "svnup.model.source.Random", "os.system"]
VALUES: list[Any] = [None, True, False, *NUMBERS, *WORDS, *ODD, *NODES, *({"_target_": target} for target in OTHERS)]


GIVEN = {"budget": 8, "pretrained_model_name_or_path": "svnup/tiny", "path": "text.txt"}  # what has no default


class TooLongError(BaseException):
    """It took more than SECONDS."""


@contextlib.contextmanager
def soon() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLongError

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor, which others may use, too
    signal.alarm(10 * SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before:
            signal.signal(number, handler)


class Found(Counter[str]):
    """What should not have happened: by its place in the code how often; an example of each is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.examples: dict[str, str] = {}

    def note(self, what: Any, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/svnup/" in f.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {type(error).__name__}: {str(error)[:80]!r}"
        if place not in self:
            self.examples[place] = str(what)[:300]
            print(f"found: {place} by {self.examples[place]}", file=sys.__stderr__, flush=True)
        self[place] += 1

    def report(self) -> str:
        return "".join(f"{n:6} {place}\n       {self.examples[place]}\n" for place, n in self.most_common())


# -- configurations


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, name)
        yield from places(value, (*path, name))


def at(node: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        node = node[name]
    return node


def put(node: Any, path: tuple[Any, ...], value: Any) -> None:
    """Change one place of nested values; `...` takes it away."""
    for name in path[:-1]:
        node = node[name]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = copy.deepcopy(value)


class Configurations:
    """A seeded sequence of configurations, from few that are composed once."""

    def __init__(self, seed: int) -> None:
        from svnup import config

        config.register()
        self.draw = random.Random(seed)
        self._bases: dict[tuple[str, ...], Any] = {}

    def base(self) -> Any:
        from svnup.config import CONF

        groups = sorted(self.draw.sample(sorted(CHOICES), self.draw.choice((0, 1, 1, 2))))
        chosen = tuple(f"{group}={self.draw.choice(CHOICES[group])}" for group in groups)
        if chosen not in self._bases:
            small = [o for o in SMALL if "model=pretrained" not in chosen or not o.startswith("model.")]
            with initialize_config_dir(str(CONF), version_base="1.3"):
                try:
                    composed = compose("config", overrides=[*small, *chosen])
                    self._bases[chosen] = OmegaConf.to_container(composed, resolve=False)
                except (HydraException, OmegaConfBaseException):  # an option that has not the keys of SMALL
                    kept = [o for o in small if o.startswith("model") or "." not in o]
                    composed = compose("config", overrides=[*kept, *(c for c in chosen if not c.startswith("model"))])
                    self._bases[chosen] = OmegaConf.to_container(composed, resolve=False)
        node = copy.deepcopy(self._bases[chosen])
        for where in [where for where in places(node) if where[-1] in GIVEN]:
            if at(node, where) == "???":
                put(node, where, GIVEN[where[-1]])
        return node

    def one(self) -> tuple[Any, list[tuple[tuple[Any, ...], Any]]]:
        if self.draw.random() < SENSIBLE:
            return self.sensible()
        node, changes = self.base(), []
        for _ in range(self.draw.choice((1, 1, 1, 2, 3))):
            where = self.draw.choice(list(places(node)))
            value = self.draw.choice(VALUES) if self.draw.random() < 0.9 else ...
            if self.draw.random() < 0.05:
                where = (*where[:-1], self.draw.choice(("new", "_target_", "seed", 7, "")))
                value = self.draw.choice(VALUES)
            with contextlib.suppress(KeyError, TypeError, IndexError):
                put(node, where, value)
                changes.append((where, value))
        return node, changes

    def sensible(self) -> tuple[Any, list[tuple[tuple[Any, ...], Any]]]:
        """A configuration as a person may write it, changed at one to three places to another value of its kind."""
        node, changes = self.base(), []
        for _ in range(self.draw.choice((1, 2, 3))):
            where = self.draw.choice([where for where in places(node) if isinstance(at(node, where), (bool, int, float))])
            value = at(node, where)
            if isinstance(value, bool):
                value = not value if where != ("dry_run",) else value
            elif isinstance(value, int):
                value = max(1, value + self.draw.choice((-1, 1, 2)))
            else:
                value *= self.draw.choice((0.5, 0.9, 1.1))
            put(node, where, value)
            changes.append((where, value))
        return node, changes


def build(node: Any, texts: Any = None) -> str:
    """What becomes of a configuration: `plan`, or the line of its mistake. `texts` keeps what was tokenized."""
    from svnup import config

    try:
        job = config.build(OmegaConf.create(node), texts)
        job.check_shapes()
        if not any(source.from_hub for source in job.sources().values()):
            job.check_texts()
    except (ValueError, OmegaConfBaseException, HydraException) as error:
        return config.explain(error, [])
    except OSError as error:
        from svnup.files import fault

        if (told := fault(error)) is None:
            raise
        return told
    return "plan"


def fuzz_configurations(n: int, seed: int, found: Found) -> Counter[str]:
    """Build n of them; what is wrong goes to `found`, and how they ended is counted."""
    drawn, ends, texts = Configurations(seed), Counter[str](), {}  # type: ignore[var-annotated]
    for _ in range(n):
        node, changes = drawn.one()
        try:
            with soon(), contextlib.redirect_stderr(io.StringIO()):
                told = build(node, texts)
            if not told.strip():
                raise AssertionError("an error that says nothing")
            ends["plans" if told == "plan" else "lines"] += 1
        except (Exception, TooLongError) as error:
            found.note(changes, error)
    return ends


def fuzz_commands(n: int, seed: int, found: Found) -> Counter[str]:
    """Give the same kinds of values on the command line."""
    from svnup.cli.run import main

    draw, ends = random.Random(seed), Counter[str]()
    keys = [".".join(map(str, path)) for path in places(Configurations(seed).base())]
    for _ in range(n):
        given = []
        for _ in range(draw.choice((1, 1, 2))):
            value = draw.choice(VALUES)
            text = json.dumps(value) if isinstance(value, (list, dict)) and draw.random() < 0.5 else str(value)
            sign = draw.choice(("", "", "", "+", "++", "~"))
            given.append(f"{sign}{draw.choice(keys)}" + ("" if sign == "~" else f"={text}"))
        argv = ["svnup", *SMALL, *given, *draw.choice(([], [], ["-m"]))]
        told = io.StringIO()
        try:
            with soon(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                before, sys.argv = sys.argv, argv
                try:
                    code = main()
                finally:
                    sys.argv = before
            if "Traceback" in told.getvalue() or code not in (0, 1, 2):
                raise AssertionError(f"exit code {code}: {told.getvalue()[-300:]}")
            ends[f"exit code {code}"] += 1
        except (Exception, SystemExit, TooLongError) as error:
            found.note(given, error)
    return ends


# -- files


def changed_bytes(data: bytes, draw: random.Random) -> bytes:
    kind, where = draw.randrange(6), draw.randrange(len(data))
    if kind == 0:
        return data[:where]
    if kind == 1:
        return data[:where] + bytes([draw.randrange(256)]) + data[where + 1 :]
    if kind == 2:
        return data[:where] + data[where + draw.randrange(40) :]
    if kind == 3:
        return b"[" * 100_000
    if kind == 4:
        return data[:where] + draw.randbytes(8) + data[where:]
    return data + data


def changed_result(data: Any, draw: random.Random) -> bytes:
    """A result with something else at one to three places, or other bytes."""
    if draw.random() < 0.15:
        return changed_bytes(json.dumps(data).encode(), draw)
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 2, 3))):
        value = draw.choice([v for v in VALUES if not (isinstance(v, dict) and 5 in v)]) if draw.random() < 0.85 else ...
        with contextlib.suppress(KeyError, TypeError, IndexError):
            put(data, draw.choice(list(places(data))), value)
    return json.dumps(data).encode("utf-8", "surrogatepass")


def commands(key: str) -> list[list[str]]:
    pivot = ["--rows", "pruner,allocator", "--columns", "model,sparsity"]
    return [
        *(["table", "r", "--format", form] for form in ("terminal", "markdown", "csv", "latex", "html")),
        *(["table", "r", *pivot, "--format", form] for form in ("terminal", "markdown", "csv")),
        *(
            ["list", "r"],
            ["status", "r"],
            ["export", "r"],
            ["export", "r", "--format", "jsonl"],
            ["report", "r"],
            ["show", "r", key],
        ),
        *(["compare", "r", "ok"], ["published", "r", "--model", "tiny"]),
    ]


def fuzz_files(n: int, seed: int, good: list[Any], found: Found) -> Counter[str]:
    """Read n changed results, each by some of the commands that read them; `good` are whole ones, as parsed JSON."""
    from svnup.cli.results import main

    draw, ends = random.Random(seed), Counter[str]()
    for folder in ("ok", "r"):
        for row in good[: 1 if folder == "r" else None]:
            place = Path(folder, "runs", row["config_key"])
            place.mkdir(parents=True, exist_ok=True)
            (place / "result.json").write_text(json.dumps(row))
    bad = Path("r", "runs", "strange", "result.json")
    bad.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(n):
        row = draw.choice(good)
        bad.write_bytes(changed_result(row, draw))
        for command in draw.sample(commands(row["config_key"]), 4):
            told = io.StringIO()
            try:
                with soon(), contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                    code = main(command)
                if "\x1b" in told.getvalue() or "Traceback" in told.getvalue() or code not in (0, 1, 2):
                    raise AssertionError(f"exit code {code}: {told.getvalue()[-200:]!r}")
                ends[f"exit code {code}"] += 1
            except (Exception, SystemExit, TooLongError) as error:
                bad.with_name(f"{len(found)}.json").write_bytes(bad.read_bytes())
                found.note(command, error)
    return ends


def whole_results() -> list[Any]:
    import rows

    made = [rows.run(8.25, allocator="shapley", fallback=None), rows.run(9.5), rows.run(7.0, pruner="sparsegpt", seed=1)]
    made += [rows.run(allocator="owl", status="failed"), rows.run(8.0, allocator="shapley", fallback="dense")]
    return [json.loads(row.to_json()) for row in made]


@contextlib.contextmanager
def nothing_written_outside() -> Iterator[Path]:
    """A folder to work in; raises AssertionError where a file has appeared beside it, or in the home folder."""
    with tempfile.TemporaryDirectory() as top:
        home, work = Path(top, "home"), Path(top, "work")
        home.mkdir()
        work.mkdir()
        was, environment = Path.cwd(), dict(os.environ)
        os.environ |= {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(work / "cache"),
            "MPLCONFIGDIR": str(work / "matplotlib"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
        }
        os.chdir(work)
        try:
            yield work
            outside = [p for p in Path(top).rglob("*") if p not in (home, work) and not p.is_relative_to(work)]
            assert not outside, f"written outside of the folders given: {outside}"
        finally:
            os.chdir(was)
            os.environ.clear()
            os.environ.update(environment)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--configurations", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = Found()
    with nothing_written_outside():
        print("configurations", dict(fuzz_configurations(options.configurations, options.seed, found)), flush=True)
        print("commands", dict(fuzz_commands(options.configurations // 20, options.seed, found)), flush=True)
        print("files", dict(fuzz_files(options.files, options.seed, whole_results(), found)), flush=True)
    print(found.report() or "nothing found", end="")
    return int(bool(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())

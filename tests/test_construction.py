"""A `_target_` is of the kind that its place asks for, no other place has one, and a stranger's result names no code."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import rows
from cli import SMALL, forked, last_row
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from svnup import config, naming
from svnup.cli import repeat
from svnup.cli.results import main as results
from svnup.config.construction import KINDS, construct, refuse_outside
from svnup.naming import identity, named
from svnup.pruning.refit import Refit
from svnup.pruning.wanda import Wanda
from svnup.rerun import rerun
from svnup.results.row import Provenance, ResultRow
from svnup.results.store import RunFolder, load

WANDA = "svnup.pruning.wanda.Wanda"
TRAP = {"_target_": "trap.spring", "word": "sprung"}  # importing its module, or calling it, leaves a file


@pytest.fixture(scope="module")
def plain():
    """A resolved configuration with something at every place."""
    config.register()
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        options = ("shapley.window=2", "evaluation=full", "evaluation.tasks=cloze", "+dataset@evaluation.datasets.docs=docs")
        return OmegaConf.to_container(compose("config", overrides=[*SMALL, *options]), resolve=True)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that tells when it is imported and when it is called."""
    (tmp_path / "trap.py").write_text(
        "from pathlib import Path\n"
        f"HERE = Path({str(tmp_path)!r})\n"
        "(HERE / 'imported').touch()\n"
        "def spring(**_):\n    (HERE / 'called').touch()\n"
        "class Spring:\n    def __init__(self, **_):\n        spring()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("trap", None)


def with_value(node, key, value):
    node = copy.deepcopy(node)
    *parents, last = key.split(".")
    inner = node
    for parent in parents:
        inner = inner[int(parent) if isinstance(inner, list) else parent]
    if isinstance(inner, list):
        inner.append(value)
    else:
        inner[last] = value
    return node


PLAIN_PLACES = [
    *("model.test_text", "model.dense_ppl", "model.dense_ppl.0", "model.hidden_size", "pruner.pattern", "allocator.lam"),
    *("allocator.lower", "evaluation.n_seq", "evaluation.tasks", "evaluation.datasets.docs.seed", "dataset.n_seq"),
    *("shapley.window", "split.lam", "selection.seed", "seed", "cache_dir"),
    *("allocator.scorer.window", "allocator.scorer.shard", "allocator.scorer.game.payoff", "allocator.scorer.game.cap"),
]


@pytest.mark.parametrize("key", PLAIN_PLACES)
@pytest.mark.parametrize("deep", [False, True], ids=["itself", "deep inside"])
def test_no_place_of_a_plain_value_has_a_node(plain, trap, key, deep):
    given = with_value(plain, key, {"inner": [{"more": TRAP}]} if deep else TRAP)
    with pytest.raises(ValueError, match=rf"^{key.split('.')[0]}|^shapley"):
        config.build(OmegaConf.create(given))
    assert not (trap / "imported").exists()


def test_a_node_inside_a_value_is_told_by_its_key(plain, trap):
    given = with_value(plain, "evaluation.tasks", {"cloze": {"deep": [TRAP]}})
    with pytest.raises(ValueError, match=r"^evaluation\.tasks\.cloze\.deep\.0\._target_=trap\.spring: nothing is built here"):
        config.build(OmegaConf.create(given))


NO_PRUNER = {
    "a function": "subprocess.getoutput",
    "a class of another kind": "subprocess.Popen",
    "a builtin": "builtins.dict",
    "a function of svnup": "svnup.model.checkpoint.in_place",
    "a class reached through svnup": "svnup.rerun.subprocess.Popen",
    "a name that a module of svnup imports": "svnup.rerun.Path",
    "a module of svnup": "svnup.rerun",
    "another kind of svnup": "svnup.allocation.maps.Uniform",
    "the protocol itself": "svnup.pruning.walk.Pruner",
    "a space before": f" {WANDA}",
    "a line end after": f"{WANDA}\n",
    "letters that look alike": WANDA.replace("a", "\u0430"),
    "wide letters": "\uff53vnup.pruning.wanda.Wanda",
    "an ideographic stop": "svnup.pruning.wanda\u3002Wanda",
    "two dots": "svnup..pruning.wanda.Wanda",
    "a colon": "svnup.pruning.wanda:Wanda",
    "a word": "Wanda",
    "a number": 7,
    "a list": [WANDA],
    "nothing": None,
    "another node": TRAP,
    "one that is not there": "svnup.pruning.wanda.Wnada",
    "a package that is not there": "svnup_pruning.wanda.Wanda",
}


@pytest.mark.parametrize("what", NO_PRUNER)
def test_a_pruner_is_a_class_with_what_pruners_have(trap, what):
    with pytest.raises(ValueError, match=r"^pruner(\._target_|: has no _target_)") as told:
        construct({"_target_": NO_PRUNER[what]}, "pruner", "pruner")
    assert "; " in str(told.value), "the way out"
    assert not (trap / "imported").exists()


@pytest.mark.parametrize("option", ["_partial_", "_args_", "_convert_", "_recursive_", "_target_ ", "__class__"])
def test_options_of_hydra_s_own_constructor_are_none(option):
    with pytest.raises(ValueError, match=rf"^pruner\.{option}=.*has no such option"):
        construct({"_target_": WANDA, option: True}, "pruner", "pruner")


def test_no_component_passes_for_another_kind(plain):
    nodes = {
        **{name: plain[name] for name in ("model", "split", "pruner", "recovery", "evaluation", "tracker")},
        "text": plain["dataset"],
        "allocator": {k: v for k, v in plain["allocator"].items() if k != "scorer"},
        "estimator": {k: v for k, v in plain["shapley"].items() if k not in ("game", "shard")},
        "game": plain["shapley"]["game"],
        "scorer": {"_target_": "svnup.scoring.published.Owl"},
    }
    assert set(nodes) == set(KINDS)
    for kind in KINDS:
        assert construct(nodes[kind], kind, kind)
        for other in set(KINDS) - {kind}:
            with pytest.raises(ValueError, match=rf"^here\._target_=.*: is no {other}\b.*; choose a class that follows"):
                construct(nodes[kind], "here", other)


# -- code of one's own


OWN = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar
from helper_of_mine import share
if TYPE_CHECKING:
    from svnup.pruning import Pruner

@dataclass(frozen=True)
class Mine:
    base: Pruner
    others: list[Pruner] = field(default_factory=list)
    by_name: dict[str, Pruner] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    needs_inputs: ClassVar[bool] = False
    prunes: ClassVar[bool] = True
    pattern: ClassVar[str] = "unstructured"
    def new_stats(self, weight): return None
    def observe(self, stats, x): ...
    def prune(self, weight, stats, sparsity):
        out = weight.clone().flatten()
        out[: int(sparsity * share * len(out))] = 0
        return out.reshape(weight.shape)
"""
OF_MINE = {"pruner._target_": "mine_alone.Mine", "+pruner.base": f"{{_target_: {WANDA}}}"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A pruner of one's own beside a helper, outside svnup."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "mine_alone.py").write_text(OWN)
    (folder / "helper_of_mine.py").write_text("share = 1.0\n")
    monkeypatch.syspath_prepend(folder)
    _forget()
    yield folder
    _forget()


def _forget():
    """As a new process would."""
    from svnup import outside

    naming.code_of.cache_clear()
    outside.code_hash.cache_clear()
    for name in ("mine_alone", "helper_of_mine"):
        sys.modules.pop(name, None)


def test_own_components_take_components_where_their_annotations_say_so(own):
    node = {"_target_": "mine_alone.Mine", "base": {"_target_": WANDA}, "by_name": {"w": {"_target_": WANDA}}}
    built = construct(node | {"others": [{"_target_": WANDA}], "words": ["a"]}, "pruner", "pruner")
    assert built.base == built.by_name["w"] == built.others[0] == Wanda()
    for place, wrong in (("base", "wanda"), ("others", ["wanda"]), ("by_name", {"w": 3})):
        with pytest.raises(ValueError, match=rf"^pruner\.{place}(\.\w+)?=(wanda|3): must be a node"):
            construct(node | {place: wrong}, "pruner", "pruner")
    for place, wrong in (("words", [{"_target_": WANDA}]), ("others", [{"_target_": "svnup.allocation.maps.Uniform"}])):
        with pytest.raises(ValueError, match=rf"^pruner\.{place}\.0\._target_="):
            construct(node | {place: wrong}, "pruner", "pruner")


@pytest.mark.slow
def test_own_code_is_part_of_the_run_and_an_edited_helper_runs_it_again(svnup, own):
    given = [f"{key}={value}" for key, value in OF_MINE.items()] + ["~pruner.pattern", "allocator=uniform", "sparsity=0.5"]
    assert svnup(*given)[0] == 0
    first = last_row()
    assert first["fingerprints"]["pruner code"].startswith("mine_alone.Mine ")
    assert "already finished" in svnup(*given)[1]
    (own / "helper_of_mine.py").write_text("share = 1.0  # another comment\n")
    _forget()
    code, out, _ = svnup(*given)
    assert code == 0
    (line,) = [line for line in out.splitlines() if "has changed since" in line]
    assert first["config_key"] in line
    second = last_row()
    assert second["config_key"] != first["config_key"]
    assert second["metrics"] == first["metrics"]
    assert "has changed since" not in svnup(*given, "seed=1")[1], "which is another job"


def test_a_result_that_names_code_from_outside_is_repeated_with_trust_alone(svnup, own, tmp_path):
    given = [f"{key}={value}" for key, value in OF_MINE.items()] + ["~pruner.pattern", "allocator=uniform", "sparsity=0.5"]
    assert svnup(*given)[0] == 0
    (row,) = load("results")
    with pytest.raises(ValueError, match=r"^[\w.]+\._target_=mine_alone\.Mine: .*--trust$"):
        rerun(row, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    file = RunFolder.of("results", row.config_key).path / "result.json"
    assert forked(lambda: sys.exit(repeat.repeat(file, str(tmp_path / "again"), str(tmp_path / "cache"), trust=False))) == 2
    assert forked(lambda: sys.exit(repeat.repeat(file, str(tmp_path / "again"), str(tmp_path / "cache"), trust=True))) == 0
    (again,) = load(tmp_path / "again")
    assert again.metrics == row.metrics


# -- what somebody else's result may say


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "key", [*PLAIN_PLACES, "pruner", "model", "evaluation.datasets.docs", "allocator.scorer.game.data", "tracker", "hydra"]
)
def test_nothing_of_a_stranger_s_result_is_imported(plain, trap, key, capsys, monkeypatch):
    row = ResultRow("finished", "abc", with_value(plain, key, TRAP), Provenance(), {})
    with pytest.raises(ValueError, match=r"^[\w.]+\._target_=trap\.spring: would run code from outside.*--trust$"):
        config.stored(row.config)
    RunFolder.of(trap, "abc").write(row)
    assert results(["rerun", "abc", "--results-dir", str(trap)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("svnup-results: ")
    readable = RunFolder.of(trap, "abc").read() is not None  # a number's place takes numbers, so such a result is none
    assert (err.count("\n"), "--trust" in err) == (1, readable)
    assert not (trap / "imported").exists()
    with pytest.raises(ValueError):  # noqa: PT011 - trusted or not, it is of no kind that a place asks for
        config.build(config.stored(row.config, trust=True))
    assert not (trap / "called").exists()


@pytest.mark.parametrize("target", [7, ["svnup.x.Y"], "svnup", "svnupx.Y", "\uff53vnup.pruning.wanda.Wanda", f" {WANDA}", ""])
def test_only_a_plain_path_inside_svnup_is_ours(target):
    with pytest.raises(ValueError, match=r"^pruner\._target_="):
        refuse_outside({"pruner": {"_target_": target}})
    refuse_outside({"pruner": {"_target_": WANDA}, "tags": ["_target_"]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.trust_remote_code", True),
        ("model.attn_implementation", "somebody/kernel"),
        ("evaluation.include_path", "/tmp/tasks"),
    ],
)
def test_code_of_checkpoints_and_tasks_is_code_too(plain, key, value):
    with pytest.raises(ValueError, match=rf"^{key}={value}: would run code"):
        config.stored(with_value(plain, key, value))


@pytest.mark.parametrize("key", ["model.test_text", "results_dir", "dataset.role", "tracker.tags", "pruner.pattern"])
@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a ${oc.env:SECRET_TOKEN} b", "${seed}", "${oc.create:{a: 1}}", "\\${x}"])
def test_nothing_of_a_result_is_interpolated(plain, key, text):
    for trust in (False, True):
        with pytest.raises(ValueError, match=rf"^{key}(\.\d+)?=.*no interpolations"):
            config.stored(with_value(plain, key, [text] if key == "tracker.tags" else text), trust)


@pytest.mark.parametrize("group", config.GROUPS)
def test_words_in_the_place_of_a_group_are_one_line(plain, group):
    with pytest.raises(ValueError, match=rf"^({group}|allocator\.scorer)\b.*must be a node"):
        config.build(config.stored(with_value(plain, group, "word")))


@pytest.mark.parametrize("key", ["../../x", "/tmp/x", "..", ".", "", "a/b", "a\\b", "a\0b", "a\n", "x" * 101, "ä", 7, None])
def test_a_key_stays_in_the_folder(tmp_path, key, capsys):
    with pytest.raises(ValueError, match=r"^config_key="):
        ResultRow("finished", key, {}, Provenance(), {})
    good = rows.run(7.5)
    folder = tmp_path / "results" / "runs" / "x"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(json.loads(good.to_json()) | {"config_key": key}))
    before = set(tmp_path.rglob("*"))
    place = str(tmp_path / "results")
    for command in (["rerun", "", "--results-dir", place], ["export", place], ["report", place], ["wandb", place]):
        assert results(command) == 2
        assert "no result.json below this folder that can be read" in capsys.readouterr().err
    assert set(tmp_path.rglob("*")) == before


# -- names that last


def test_a_moved_or_renamed_component_keeps_its_name_and_old_results_find_it(monkeypatch, plain):
    old = {"_target_": "svnup.methods.old.WandaPruner", "pattern": "2:4"}
    assert named(old) == {"_target_": "wandapruner", "pattern": "2:4"}
    monkeypatch.setitem(naming.MOVED, "svnup.methods.old.WandaPruner", "svnup.methods.wanda.Wanda")
    monkeypatch.setitem(naming.MOVED, "svnup.methods", "svnup.pruning")
    assert construct(old, "pruner", "pruner") == Wanda("2:4")
    for target in (old["_target_"], "svnup.methods.wanda.Wanda", WANDA):
        assert named({"_target_": target}) == {"_target_": "wandapruner"}
        assert naming.method_name({"_target_": target}) == "wandapruner"
    assert json.loads(identity(Wanda("2:4"))) == {"_target_": "wandapruner", "pattern": "2:4"}


def test_a_key_tells_no_module(plain):
    job = config.build(OmegaConf.create(plain))
    text = json.dumps(named(job.config))
    assert "svnup." not in text
    assert named(job.config["pruner"]) == {"_target_": "wanda", "pattern": "unstructured"}


def test_the_identity_of_an_object_has_all_that_it_was_made_of(own):
    first = json.loads(identity(Refit(Wanda("2:4"), "2:4")))
    assert first["base"] == {"_target_": "wanda", "pattern": "2:4"}
    assert identity(Refit(Wanda("2:4"), "2:4", damp=0.5)) != identity(Refit(Wanda("2:4"), "2:4"))
    mine = construct({"_target_": "mine_alone.Mine", "base": {"_target_": WANDA}}, "pruner", "pruner")
    before = identity(mine)
    assert json.loads(before)["_target_"].keys() == {"module", "class", "version", "sha256"}
    (own / "helper_of_mine.py").write_text("share = 0.5\n")
    _forget()
    assert identity(mine) != before


def test_a_result_of_today_s_earlier_form_is_read_and_built(plain, tmp_path):
    (tmp_path / "my.txt").write_text("Words of my own. " * 400)
    path = str(tmp_path / "my.txt")
    older = with_value(plain, "evaluation.datasets", ["docs", {"text_file": {"path": path, "n_seq": 2}}])
    older = {k: v for k, v in older.items() if k != "datasets_dir"}
    assert naming.moving_numbers(older)
    sources = config.build(config.stored(older)).evaluation.datasets
    assert {name: (s.name, s.n_seq, s.seq_len, s.role) for name, s in sources.items()} == {
        "docs": ("docs", 4, 32, "test"),
        "text_file": ("text_file", 2, 32, "test"),
    }
    row = replace(ResultRow("finished", "abc", older, Provenance(), {}), metrics={})
    assert json.loads(row.to_json())["config"] == older
    assert Path(path).is_file()

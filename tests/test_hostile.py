"""Files from elsewhere name nothing outside their folder, and are read, left out or refused in a line, whatever they say."""

import contextlib
import copy
import io
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import rows
import torch
from models import random_model as make_random_model

from svnup import config
from svnup.cli.expand import main
from svnup.cli.results import main as results
from svnup.data import C4, WikiText2
from svnup.files import SEAL
from svnup.model.checkpoint import BITMASK, INDEX, Checkpoint, write_dense
from svnup.model.loading import Loader
from svnup.reports.wandb import upload
from svnup.results.row import ResultRow
from svnup.results.store import RunFolder

# -- checkpoints

ELSEWHERE = [
    "../stolen.safetensors",
    "sub/../../stolen.safetensors",
    "..\\stolen.safetensors",
    "/etc/passwd",
    "",
    None,
    7,
    ["x"],
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model in shards and as a bitmask, and beside them a file of the same tensors that belongs to neither."""
    place = tmp_path_factory.mktemp("saved")
    lm = make_random_model(2)
    for form in ("dense", "bitmask"):
        lm.save(place / form, form)
    tensors = {name: t.clone() for name, t in lm.model.state_dict().items()}
    (place / "dense" / "model.safetensors").unlink()
    write_dense(place / "dense", [tensors])
    shutil.copy(place / "dense" / "model-00001.safetensors", place / "stolen.safetensors")
    return place


def changed(saved, tmp_path, form, change):
    """A copy of a checkpoint whose index has been changed; beside it what it must not read."""
    shutil.copytree(saved, tmp_path / "all")
    file = tmp_path / "all" / form / (INDEX if form == "dense" else BITMASK)
    data = json.loads(file.read_text())
    change(data)
    data.pop(SEAL, None)  # a stranger can make a checksum, too, and leaving it out is less work
    file.write_text(json.dumps(data))
    return file.parent


@pytest.mark.parametrize("form", ["dense", "bitmask"])
@pytest.mark.parametrize("name", ELSEWHERE, ids=repr)
def test_a_checkpoint_names_no_file_outside_its_folder(saved, tmp_path, form, name):
    def change(data):
        files = data["weight_map" if form == "dense" else "files"]
        files[min(files)] = name

    folder = changed(saved, tmp_path, form, change)
    with pytest.raises(ValueError, match="no file of its folder"):
        Checkpoint(folder)
    with pytest.raises(ValueError, match="no file of its folder"):
        Loader(source=str(folder)).check()


@pytest.mark.parametrize("shape", [[10**7, 10**7], [-1, 8], [32.0, 32], "32x32", None, [], [32, 33]], ids=repr)
def test_bits_that_are_not_those_of_the_shape_leave_no_folder(saved, tmp_path, shape, capsys):
    folder = changed(saved, tmp_path, "bitmask", lambda data: data["shapes"].update({min(data["shapes"]): shape}))
    before = set(tmp_path.rglob("*"))
    assert main([str(folder), str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert (err.count("\n"), "is damaged" in err) == (1, True)
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", ["files", "shapes"])
def test_an_index_of_another_kind_is_damaged(saved, tmp_path, key):
    folder = changed(saved, tmp_path, "bitmask", lambda data: data.update({key: list(data[key])}))
    with pytest.raises(ValueError, match="copy the checkpoint again"):
        Checkpoint(folder)


# -- results

WRONG = (None, 7, "word", [], {}, [1], ["a"], [[1]], {"a": 1}, True, -0.5, 10**400, "\x1b]0;mine\x07\x1b[31m")
COMMANDS = (["table"], ["table", "--rows", "pruner", "--columns", "model"], ["list"], ["export"], ["report"])


def places(node, path=()):
    """Every place of a JSON value, of lists the first entry."""
    found = list(node.items()) if isinstance(node, dict) else list(enumerate(node))[:1] if isinstance(node, list) else []
    for name, value in found:
        yield (*path, name)
        yield from places(value, (*path, name))


def with_change(data, path, value):
    data = copy.deepcopy(data)
    node = data
    for name in path[:-1]:
        node = node[name]
    if value is Ellipsis:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return data


@pytest.mark.slow
def test_no_result_makes_a_traceback_or_drives_a_terminal(tmp_path, monkeypatch):
    """A hundred changes of anything to anything, each through every command that reads results."""
    monkeypatch.chdir(tmp_path)
    plain, rng, answers = config.defaults(), random.Random(3), {0: 0, 1: 0, 2: 0}
    monkeypatch.setattr(config, "defaults", lambda: plain)
    row = rows.run(8.25, allocator="shapley", fallback="dense")
    good, file = json.loads(row.to_json()), RunFolder.of("r", row.config_key).path / "result.json"
    rows.write(Path("ok"), row)
    rows.write(Path("r"), row)
    everywhere = list(places(good))
    for _ in range(100):
        path, value = rng.choice(everywhere), rng.choice((*WRONG, ...))
        file.write_text(json.dumps(with_change(good, path, value)))
        for command, *options in (*COMMANDS, ["show", row.config_key], ["compare", "ok"]):
            told = io.StringIO()
            with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
                answers[results([command, "r", *options])] += 1
            assert "\x1b" not in told.getvalue(), (path, command)
    assert answers[0] > 100 < answers[2], answers


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("metrics", {"docs/ppl": 3}),
        ("profile", {"sparsity": "0.7"}),
        ("seconds", 10**400),
        ("config", {"model": {}}),
        ("provenance", {"hardware": {"threads": "2"}}),
        ("provenance", {"environment": {"OMP_NUM_THREADS": 1}}),
        ("fingerprints", ["w"]),
    ],
)
def test_a_result_with_something_else_at_a_key_is_refused_by_its_key(key, value):
    data = json.loads(rows.run(8.25).to_json()) | {key: value}
    with pytest.raises(ValueError, match=f"^{key}"):
        ResultRow.from_json(json.dumps(data))


def test_options_of_a_tracker_in_a_result_are_checked(tmp_path):
    row = rows.run(8.25, tracker={"_target_": "svnup.reports.wandb.WandbTracker", "tags": [{"_target_": "subprocess.Popen"}]})
    with pytest.raises(ValueError, match=r"^tracker\.tags"):
        upload(tmp_path, row, lambda row, folder: {}, False)
    assert not list(tmp_path.iterdir())


def test_a_repetition_imports_nothing_from_where_the_result_says_that_it_ran(tmp_path, monkeypatch):
    """A relative PYTHONPATH is the user's, from where the user stands."""
    import subprocess

    from svnup.rerun import rerun

    seen = {}

    def run(command, env, check):
        seen.update(env)
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", "lib", ""]))
    monkeypatch.setattr("svnup.rerun.subprocess.run", run)
    with pytest.raises(ValueError, match="cannot be repeated"):
        rerun(rows.run(8.25, cwd=str(tmp_path / "theirs")), tmp_path / "again")
    assert seen["PYTHONPATH"].split(os.pathsep)[1:] == [str(tmp_path), str(tmp_path / "lib")]


# -- data sets


@pytest.mark.parametrize("source", [WikiText2, C4])
@pytest.mark.parametrize("path", ["pandas", "sql", "a/b/c", ""])
def test_a_data_set_is_a_folder_or_a_name_of_the_hub_and_no_reader_of_the_library(source, path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: pytest.fail("was asked"))
    with pytest.raises(ValueError, match=f"^path={path}: "):
        source(path=path, n_seq=1, seq_len=8).read(None)


def test_the_models_that_these_tests_change_are_whole(saved):
    """So what is refused above is refused for its change."""
    for form in ("dense", "bitmask"):
        loaded = Loader(source=str(saved / form)).load()
        assert all(torch.isfinite(t).all() for t in loaded.state_dict().values())

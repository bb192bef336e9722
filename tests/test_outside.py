"""The code behind a target: which files it is, and a hash that changes with any of them and with nothing else."""

import importlib
import subprocess
import sys

import pytest

from svnup import outside
from svnup.outside import code_files, code_hash, git_state, outside_code, targets


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder on the path, where `write` makes files; hashes are made anew after each."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(**files):
        """By name without .py, a dash for each slash."""
        for name, text in files.items():
            path = folder / f"{name.replace('-', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        importlib.invalidate_caches()
        code_hash.cache_clear()
        return folder

    yield write
    code_hash.cache_clear()


def test_targets_are_found_wherever_they_stand():
    node = {"a": {"_target_": "x.A", "b": [{"_target_": "y.B"}, [{"c": {"_target_": "z.C"}}]]}, "d": 1, "e": "_target_"}
    assert list(targets(node)) == ["x.A", "y.B", "z.C"]


@pytest.mark.parametrize("edited", ["smaller", "helper", "further-deep", "pack-part"])
def test_a_module_brings_what_it_imports_beside_it(place, edited):
    place(
        smaller="import json\nfrom helper import f\n",
        helper="import os, further.deep as d\n\n\ndef g():\n    from pack import part\n",
    )
    place(**{"further-deep": "", "pack-__init__": "", "pack-part": "", "stranger": ""})
    assert set(code_files("smaller")) == {"smaller.py", "helper.py", "further/deep.py", "pack/__init__.py", "pack/part.py"}
    before = code_hash("smaller.Pruner")
    place(stranger="x = 1")
    assert code_hash("smaller") == before, "nobody imports it"
    place(**{edited: "# another word\n"})
    assert code_hash("smaller.Pruner") != before


def test_a_package_is_all_of_its_files_and_the_hash_tells_no_place(place, tmp_path, monkeypatch):
    folder = place(**{"pack-__init__": "", "pack-sub-deep": "a = 1\n"})
    (folder / "pack" / "notes.txt").write_text("no code")
    assert set(code_files("pack")) == {"pack/__init__.py", "pack/sub/deep.py"}
    before = code_hash("pack.sub.deep.Thing")
    folder.rename(tmp_path / "moved")
    monkeypatch.syspath_prepend(str(tmp_path / "moved"))
    code_hash.cache_clear()
    assert code_hash("pack") == before


def test_the_hash_is_that_of_the_code_that_was_imported(place):
    """A sweep of hours in one process whose code is edited goes on with what it imported."""
    folder = place(steady="a = 1\n")
    before = code_hash("steady.A")
    (folder / "steady.py").write_text("a = 2\n")
    assert code_hash("steady.A") == before


def test_installed_code_is_its_package_alone_and_has_its_version():
    assert all(name.startswith("omegaconf/") for name in code_files("omegaconf"))
    (told,) = outside_code({"pruner": {"_target_": "omegaconf.DictConfig"}, "a": {"_target_": "svnup.x.Y"}}).values()
    assert told["version"].startswith("2.")
    assert (told["targets"], told["sha256"]) == (["omegaconf.DictConfig"], code_hash("omegaconf"))


def test_what_is_not_there_or_lies_in_no_file_is_said():
    for target in ("no_such_package_of_mine.X", "builtins.dict"):
        with pytest.raises(ValueError, match=f"_target_={target.partition('.')[0]}: its code is not in a file"):
            outside_code({"pruner": {"_target_": target}})


def test_git_tells_what_of_the_code_is_not_committed(place):
    folder = place(**{"alone": "a = 1\n", "pack-__init__": ""})
    assert set(git_state(folder, [folder / "alone.py"]).values()) == {None}

    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=folder, check=True, capture_output=True)

    git("init", "-q")
    git("add", "alone.py")
    git("commit", "-q", "-m", "one")
    clean = git_state(folder, [folder / "alone.py"])
    assert (clean["dirty"], clean["diff_sha256"], clean["untracked"], len(clean["git"])) == (False, None, [], 40)
    place(alone="a = 2\n")
    changed = git_state(folder, [folder / "alone.py"])
    assert changed["dirty"]
    assert changed["diff_sha256"]
    assert git_state(folder, [folder / "pack"]) | {"git": None} == {
        "git": None,
        "dirty": True,
        "diff_sha256": None,
        "untracked": ["pack/__init__.py"],
    }
    told = outside_code({"pruner": {"_target_": "alone.Pruner"}})["alone"]
    assert (told["git"], told["dirty"], told["folder"]) == (clean["git"], True, str(folder))


def test_a_notebook_is_no_module(monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(ValueError, match="__main__: its code is not in a file"):
        outside.code_files("__main__")

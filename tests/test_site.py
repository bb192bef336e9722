"""The pages are true: their code runs, their words are the glossary's, what is made of tables and comments is up to date."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from pages import blocks, files, found_in, words_not_to_use
from test_numbers import results_in

import svnup
from tools import config_reference, insert_numbers, readme_figure

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING, CHANGELOG = ((ROOT / f"{name}.md").read_text("utf-8") for name in ("README", "CONTRIBUTING", "CHANGELOG"))
PAGES = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
GLOSSARY, UNWANTED = PAGES["glossary.md"], "## Words not to use"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OLD_WORDS = {"choosing.md", "leaderboard.md"}  # written before the glossary


# -- the README


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 100


def test_the_python_of_the_readme(monkeypatch, capsys):
    (code,) = blocks(README, "python")
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})
    values = [float(value) for value in re.findall(r"-?\d+\.\d*", capsys.readouterr().out)]
    assert len(values) == 12
    assert max(values) == values[0], "the first block of the built-in model is worth many times the others"


def test_the_picture_is_of_the_committed_table():
    bars = readme_figure.bars()
    assert [name for name, _, _ in bars][:2] == ["dense", "uniform"]
    assert readme_figure.FIGURE.read_text("utf-8") == readme_figure.drawn(bars), "make numbers"
    assert str(readme_figure.FIGURE.relative_to(ROOT)) in README


@pytest.mark.parametrize("group", ["allocator", "pruner"])
def test_the_tables_of_methods_name_every_option(group):
    options = {path.stem for path in (ROOT / "conf" / group).glob("[!_]*.yaml")} - {"none"}
    page = {"allocator": "budgets.md", "pruner": "pruning.md"}[group]
    for text in (README, PAGES[page]):
        table = text.partition(f"| `{group}=` |")[2].partition("\n\n")[0]
        assert options - set(re.findall(r"`(\w+)`", table)) == set()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_paths_of_code_exist(page):
    text = (ROOT / page).read_text("utf-8")
    examples = {Path(name) for name in files(text)}
    named = {Path(name) for name in re.findall(r"`((?:svnup|conf|experiments|tests|tools)/[\w/.]+)`", text)}
    assert {str(path) for path in named - examples if not (ROOT / path).exists() and "NAME" not in str(path)} == set()


# -- numbers, keys, words


def test_every_page_with_inserted_numbers_is_kept_up_to_date():
    values = insert_numbers.numbers()
    pages = {"README.md": README} | {f"docs/{name}": text for name, text in PAGES.items()}
    marked = {name for name, text in pages.items() if insert_numbers.MARK.search(text)}
    assert marked == set(insert_numbers.PAGES)
    for name in marked:
        assert pages[name] == insert_numbers.filled(pages[name], values), "make numbers"
        assert results_in(pages[name]) == []


def test_the_reference_of_keys_is_that_of_the_comments():
    assert PAGES["reference_config.md"] == config_reference.page(), "python tools/config_reference.py"


def test_a_key_without_a_comment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(config_reference, "ROOT", tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text("# Mine.\n_target_: a.B\nrate: 0.5  # share of rows\nnested:\n  deep: ${seed}\nbare: 3\n")
    option = config_reference.read(file, "pruner.")
    assert (option.about, option.target) == ("Mine.", "a.B")
    with pytest.raises(ValueError, match=r"mine\.yaml: pruner\.bare$"):
        config_reference.described([option])
    file.write_text("# Mine.\nrate: 0.5\n")
    other = tmp_path / "other.yaml"
    other.write_text("# Other.\nrate: 1.0  # share of rows\n")
    options = config_reference.described([config_reference.read(path, "pruner.") for path in (file, other)])
    assert [key.comment for option in options for key in option.keys] == ["share of rows"] * 2, "it is said once in a group"
    file.write_text("rate: 0.5  # share of rows\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: does not say what it is"):
        config_reference.read(file, "pruner.")


def test_the_table_of_words_can_be_read():
    names, text = (words_not_to_use(GLOSSARY, where) for where in ("names", "text"))
    assert {"settle", "shelf", "again"} <= set(names)
    assert {"settle", "no folder that can be written"} <= set(text)
    assert "again" not in text
    table = GLOSSARY.partition(UNWANTED)[2]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")][2:]
    for _, where, instead in rows:
        assert {place.strip() for place in where.split(",")} <= {"names", "text"}
        assert instead.strip()


def test_words_are_found_in_prose_alone():
    page = "A shelf of [books](shelf.md) and `shelf`.\n\n    shelf\n\nBookshelf, part-time, to be\nhad."
    assert found_in(page, ["shelf", "book", "part", "to be had"]) == ["shelf", "to be had"]
    assert found_in("[books](shelf.md), `shelf`", ["shelf"]) == []


@pytest.mark.parametrize("name", sorted({"README.md", "CONTRIBUTING.md", *PAGES} - OLD_WORDS))
def test_pages_keep_to_the_glossary(name):
    text = PAGES[name] if name in PAGES else (ROOT / name).read_text("utf-8")
    assert found_in(text.partition(UNWANTED)[0], words_not_to_use(GLOSSARY, "text")) == []


def test_the_glossary_has_each_term_once():
    terms = re.findall(r"^- \*\*(.+?)\*\*: ", GLOSSARY, re.MULTILINE)
    assert len(terms) > 50
    assert len(set(terms)) == len(terms)


# -- what a visitor of the repository reads


def test_the_changelog_has_its_sections():
    (unreleased,) = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    sections = re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)
    assert (unreleased, sections[-1]) == ("[Unreleased]", "Numbers")
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Fixed", "Removed", "Security", "Numbers"}
    versions = re.findall(r"^Version (\d+)", CHANGELOG.partition("### Numbers")[2], re.MULTILINE)
    assert [int(version) for version in versions] == list(range(1, svnup.NUMBERS_VERSION + 1))


def test_the_metadata_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert project["version"] == citation["version"] == svnup.__version__
    assert project["license"] == citation["license"]
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert f"svnup[{'docs'}]" in project["optional-dependencies"]["dev"], "so that the site is built where tests run"
    pinned = {re.split("[=<>[]", line)[0].lower() for line in (ROOT / "constraints.txt").read_text("utf-8").split("\n")}
    assert {re.split("[=<>[]", name)[0] for name in project["optional-dependencies"]["docs"]} <= pinned


def test_hooks_are_the_linters_of_make_lint():
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"]
    lint = (ROOT / "Makefile").read_text("utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    commands = [command.replace("$(BIN)/", "").removesuffix(" .") for command in re.findall(r"\$\(BIN\)/.+", lint)]
    assert [hook["entry"].removeprefix(".venv/bin/").removesuffix(" --force-exclude") for hook in repo["hooks"]] == commands


@pytest.mark.parametrize("name", ["bug", "method"])
def test_issue_forms(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text("utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in ("input", "textarea", "dropdown")
        assert field["attributes"]["label"]


# -- what takes longer


def test_the_python_reference_names_what_is_there():
    named = re.findall(r"^\.\. auto(?:class|function):: ([\w.]+)$", PAGES["reference_python.md"], re.MULTILINE)
    assert len(named) > 25
    for path in named:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, path


@pytest.mark.slow
def test_the_examples_of_contributing(tmp_path):
    """In a copy of the tree, where they are at home."""
    for folder in ("svnup", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    examples = files(CONTRIBUTING)
    assert len(examples) == 6
    for name, content in examples.items():
        assert not (tmp_path / name).exists(), "an example is no method of svnup"
        (tmp_path / name).write_text(content, encoding="utf-8")
    (commands,) = blocks(CONTRIBUTING, "sh")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "x")}
    shell = ["bash", "-e", "-c", commands]
    done = subprocess.run(shell, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(file.read_text("utf-8")) for file in tmp_path.glob("results/runs/*/result.json")]
    used = {row["config"][group]["_target_"].rpartition(".")[2]: row for row in rows for group in ("pruner", "allocator")}
    assert {"MeanInput", "Halves", "Magnitude", "ScoreBudget"} == used.keys()
    assert used["MeanInput"]["scores"]["method"] == "WeightNorm(power=2)"
    assert {round(sparsity, 6) for sparsity in used["Halves"]["profile"]["sparsity"]} == {0.55, 0.65}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.stem: path.read_text("utf-8") for path in tmp_path.glob("*.html")}
    assert {Path(name).stem for name in PAGES} <= pages.keys()
    assert "Numbers" in pages["changelog"], "pages that lie elsewhere are shown whole"
    assert "allocator.trial_n_seq" in pages["reference_config"]
    assert "block-by-block loop" in pages["reference_python"]
    assert not [name for name, page in pages.items() if re.search(r'href="\.\./', page)], "no link leaves the site"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
    assert cells[0]["source"][0].startswith("# ")
    assert path.name in (ROOT / "notebooks" / "README.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    nbclient, nbformat = (pytest.importorskip(name, reason="pip install '.[docs]'") for name in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel", reason="pip install '.[docs]'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, 4)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    nbclient.execute(notebook, cwd=tmp_path, timeout=600, kernel_name="python3")  # raises with the cell that fails
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 90
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)

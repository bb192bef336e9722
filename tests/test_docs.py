"""What the pages point to exists, and the commands that they show are ones that can be typed."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from svnup import config
from svnup.cli import results as results_cli

ROOT = Path(__file__).parent.parent
PAGES = sorted(p for p in ROOT.rglob("*.md") if not {".venv", "results"} & set(p.relative_to(ROOT).parts[:1]))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    targets = re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE)
    assert [t for t in targets if not re.search(rf"^{t}\b", shown, re.MULTILINE)] == []


# -- commands


def commands_of(page: Path) -> Iterator[str]:
    """The commands of a page: lines of indented and fenced blocks, and code in a sentence that has arguments."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    yield from re.findall(r"^(?: {4})?((?:svnup|svnup-results|make) [^`\n]*)$", text, re.MULTILINE)
    yield from re.findall(r"`((?:svnup|svnup-results|make) [^`\n]+)`", text)


# The glossary has words, not commands; files that a page tells to write are run by test_extending.py and test_site.py.
COMMANDS = sorted({command for page in PAGES if page.name != "glossary.md" for command in commands_of(page)})
WRITTEN = {name for page in PAGES for name in re.findall(r"(\w+)\.yaml`", page.read_text(encoding="utf-8"))}


def typed(program: str, commands: Iterable[str] = COMMANDS) -> list[list[str]]:
    """The words of every command of a program, each once, without comments and without the marks of what may be left out."""
    lines = [re.sub(r"[\[\]](?=\s|$)|(?<=\s)\[", "", c) if program == "make" else c for c in commands]
    split = [shlex.split(line, comments=True) for line in lines]
    found = [[word for word in words[1:] if word != "..."] for words in split if words[0] == program]
    return [list(words) for words in dict.fromkeys(map(tuple, found)) if "NAME=NAME" not in words]


def needs_a_written_file(words: list[str]) -> bool:
    """Whether a command names an option of a group that its page tells how to write."""
    options = [word.partition("=") for word in words if re.fullmatch(r"(allocator|pruner)=\w+", word)]
    return any(name in WRITTEN and not (config.CONF / group / f"{name}.yaml").is_file() for group, _, name in options)


def jobs_of(overrides: list[str]) -> list[list[str]]:
    """Jobs of a sweep in which each value of each axis occurs."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    axes = [
        [f"{o.input_line.partition('=')[0]}={v}" for v in o.sweep_string_iterator()] for o in parsed if o.is_sweep_override()
    ]
    fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
    return [[*fixed, *(axis[i % len(axis)] for axis in axes)] for i in range(max(map(len, axes), default=1))]


def test_pages_show_commands_of_every_program() -> None:
    assert {command.split()[0] for command in COMMANDS} == {"svnup", "svnup-results", "make"}
    assert len(COMMANDS) > 60


FIRST = typed("svnup", commands_of(ROOT / "README.md"))  # what a reader tries first; the others are of the slow part


# Those with --config-dir belong to files of the user's own: test_extending.py runs them.
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, marks=[] if words in FIRST else pytest.mark.slow, id=" ".join(words))
        for words in typed("svnup")
        if "--config-dir" not in words and not needs_a_written_file(words)
    ],
)
def test_a_command_of_a_page_makes_jobs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It composes as it stands; and what it says beside the model, which may be on the hub, makes jobs of the built-in one."""
    monkeypatch.chdir(tmp_path)
    config.register()
    overrides = [word.removeprefix("hydra.sweeper.params.") for word in words if "=" in word]
    for group, _, name in (word.partition("=") for word in overrides if word.startswith("hydra/")):
        assert (config.CONF / group / f"{name}.yaml").is_file()
    overrides = [word for word in overrides if not re.match(r"hydra/|\+?hydra\.launcher\.", word)]  # plugins may be missing
    for path in (word.partition("=")[2] for word in overrides if re.match(r"\+?[\w.]+\.path=", word)):
        (tmp_path / path).write_text(f"words of {path}")
    with initialize_config_dir(str(config.CONF), version_base="1.3"):
        for job in jobs_of(overrides):
            composed = compose("config", job)
            here = [word for word in job if not re.match(r"(model|model\.\w+|datasets_dir|experiment)=", word)]
            config.build(composed if here == job else compose("config", here))


@pytest.mark.parametrize("words", typed("svnup-results"), ids=" ".join)
def test_a_command_about_results_is_understood(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where there are no results it says so, in a line of its own; argparse would leave with its usage."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    command, *more = words
    if all(word.startswith("--") for word in more):  # the name of a command, or of its options
        with pytest.raises(SystemExit):
            results_cli.main([command, "--help"])
        shown = capsys.readouterr().out
        assert [word for word in more if word not in shown] == []
        assert f"usage: svnup-results {command} " in shown
    else:
        assert results_cli.main(words) in (0, 2)


@pytest.mark.parametrize("words", typed("make"), ids=" ".join)
def test_make_has_the_target_and_reads_its_variables(words: list[str]) -> None:
    target, *given = words
    done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    variables = dict(word.split("=") for word in given)
    assert [name for name in variables if not re.search(rf"\$\(.*\b{name}\b|^{name} \?=", MAKEFILE, re.MULTILINE)] == []
    if target == "study" and variables:
        (study,) = re.findall(r"-m (experiments\.[\w.]+)", done.stdout)
        assert (ROOT / f"{study.replace('.', '/')}.py").is_file()
    elif target == "table" and variables:
        assert "choose" not in done.stdout

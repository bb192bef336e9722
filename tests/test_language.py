"""Names, docstrings, help and pages use the words of the glossary (docs/glossary.md), not those of its last table."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from svnup.cli import expand, results
from svnup.model import smollm2

ROOT = Path(__file__).parent.parent
GLOSSARY, TABLE = ROOT / "docs" / "glossary.md", "## Words not to use"
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "svnup").rglob("*.py"))
PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path != GLOSSARY)
needs_glossary = pytest.mark.skipif(not GLOSSARY.is_file(), reason="docs/glossary.md is not written yet")


def unwanted(where: str, table: str | None = None) -> list[str]:
    """The words and phrases that the glossary's last table keeps out of `where`, names or text."""
    table = (GLOSSARY.read_text("utf-8") if table is None else table).partition(TABLE)[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")]
    return [word for words, places, _ in rows if where in places.split(", ") for word in re.findall(r"`([^`]+)`", words)]


def in_text(text: str, words: list[str]) -> list[str]:
    """The unwanted words of a text, outside of code."""
    prose = re.sub(r"^```.*?^```|`[^`]*`|(?<=\])\([^)]*\)|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    prose = " ".join(prose.split())
    return [word for word in words if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", prose, re.IGNORECASE)]


def in_name(name: str, words: list[str]) -> list[str]:
    """The unwanted words of a name, between underscores or capitals."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_")
    return [word for word in words if f"_{word.replace('-', '_')}_" in f"_{parts}_"]


def public_names(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Functions, classes, methods, fields and constants of a module or class, and arguments of functions, all without `_`."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            if child.name.startswith("_") and child.name != "__init__":
                continue
            yield child.name
            if isinstance(child, ast.ClassDef):
                yield from public_names(child)
            else:
                every = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
                yield from (argument.arg for argument in every)
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            yield from (t.id for t in targets if isinstance(t, ast.Name) and not t.id.startswith("_"))


def docstrings(tree: ast.Module) -> Iterator[str]:
    """All docstrings, without the names of arguments that they list."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield re.sub(r"^ +\w+: ", "", text, flags=re.MULTILINE)


@needs_glossary
@pytest.mark.parametrize("path", SOURCES)
def test_names_and_docstrings(path):
    tree, words = ast.parse((ROOT / path).read_text("utf-8")), unwanted("names")
    names = {name: found for name in (Path(path).stem, *public_names(tree)) if (found := in_name(name, words))}
    texts = {text[:60]: found for text in docstrings(tree) if (found := in_text(text, unwanted("text")))}
    assert names == {}
    assert texts == {}


@needs_glossary
@pytest.mark.parametrize("name", PAGES)
def test_pages(name):
    assert in_text((ROOT / "docs" / name).read_text("utf-8"), unwanted("text")) == []


@needs_glossary
@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (results.main, []),
        *((results.main, [command]) for command in ("table", "list", "show", "report", "compare", "rerun", "published")),
        (expand.main, []),
        (smollm2.main, []),
    ],
)
def test_help(main, arguments, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "--help"])
    assert in_text(capsys.readouterr().out, unwanted("text")) == []


@needs_glossary
def test_help_of_svnup():
    shown = yaml.safe_load((ROOT / "conf" / "config.yaml").read_text("utf-8"))["hydra"]["help"]
    assert in_text(f"{shown['header']} {shown['template']}", unwanted("text")) == []


def test_unwanted_words_are_found():
    rows = "| not | in | but |\n| --- | --- | --- |\n| `frob`, `to frob` | names, text | use |\n| `wide eyes` | text | - |"
    table = f"{TABLE}\n\n{rows}"
    names, texts = unwanted("names", table), unwanted("text", table)
    assert (names, texts) == (["frob", "to frob"], ["frob", "to frob", "wide eyes"])
    assert [in_name(name, names) for name in ("frob_it", "TheFrob", "frobs", "_frob")] == [["frob"], ["frob"], [], ["frob"]]
    assert in_text("`frob`, frobbed and un-frob,\n    but Wide\n    eyes", texts) == ["wide eyes"]


def test_what_of_a_module_is_checked():
    tree = ast.parse('''
class A:
    frob: int
    def _b(self, frob): ...
    def c(self, d):
        """Frob it.

        Args:
            d: frob.
        """
E = 1
''')
    assert list(public_names(tree)) == ["A", "frob", "c", "self", "d", "E"]
    assert list(docstrings(tree)) == ["Frob it.\n\nArgs:\nfrob."]

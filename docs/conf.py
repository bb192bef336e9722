"""The documentation site: `make docs` builds it from the pages in this folder, which GitHub shows as they are."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from svnup import __version__  # noqa: E402

project = "svnup"
author = "The svnup contributors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
html_theme = "furo"
html_title = f"svnup {release}"
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"

# Pages of the site that lie elsewhere in the repository, beside the file that they are.
ELSEWHERE = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md", "notebooks": "notebooks/README.md"}
PAGES = {(ROOT / file).resolve(): f"{name}.md" for name, file in ({"index": "README.md"} | ELSEWHERE).items()}
LINK = re.compile(r"(!?\[((?:[^\[\]]|\[[^\]]*\])*)\])\(([^)\s]+)\)")


def on_the_site(text: str, folder: Path) -> str:
    """A page of a folder with links that work on the site: to its pages, or, to other files of the repository, their paths."""

    def rewritten(link: re.Match[str]) -> str:
        label, words, target = link[1], link[2], link[3]
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return link[0]
        file = (folder / path).resolve()
        page = PAGES.get(file) or (os.path.relpath(file, DOCS) if file.is_relative_to(DOCS) else None)
        if page is not None:
            return f"{label}({page}{'#' * bool(anchor)}{anchor})"
        place = file.relative_to(ROOT).as_posix()
        return f"`{place}`" if place.startswith(words.strip("`")) or words == file.name else f"{words} (`{place}`)"

    return LINK.sub(rewritten, text)


def read_source(app: Any, name: str, source: list[str]) -> None:
    file = ROOT / ELSEWHERE[name] if name in ELSEWHERE else DOCS / f"{name}.md"
    source[0] = on_the_site(file.read_text(encoding="utf-8"), file.parent)


def as_rst(line: str) -> str:
    """A line of a docstring, which is plain text with code in backticks, as reStructuredText."""
    parts = line.split("`")
    plain = [re.sub(r"([*|\\_])", r"\\\1", part) if i % 2 == 0 else f"``{part}``" for i, part in enumerate(parts)]
    return "".join(plain) if len(parts) % 2 else re.sub(r"([*|\\_`])", r"\\\1", line)


def read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [as_rst(line) for line in "\n".join(lines).split("\n")]


def setup(app: Any) -> None:
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", read_docstring, priority=400)  # before napoleon, which writes roles

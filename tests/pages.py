"""What a page of the documentation has a reader do: files to write, commands to type, Python to run."""

from __future__ import annotations

import re


def files(page: str) -> dict[str, str]:
    """The files that a page shows, by path: a block behind a line that ends with the path in backticks and a colon."""
    return dict(re.findall(r"^`([\w./]+)`[^`\n]*:\n\n```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL))


def blocks(page: str, language: str) -> list[str]:
    """The blocks in a language (sh, python) that are no files."""
    found = re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return [code for code in found if code not in files(page).values()]


def words_not_to_use(glossary: str, where: str) -> list[str]:
    """The words and phrases that the glossary's last table keeps out of `where`: names or text."""
    table = glossary.partition("## Words not to use")[2]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| `")]
    return [word for words, places, _ in lines if where in places.split(", ") for word in re.findall(r"`([^`]+)`", words)]


def found_in(text: str, words: list[str]) -> list[str]:
    """Which of some words and phrases are in a page, outside of code, inserted numbers and links' targets."""
    prose = re.sub(r"^```.*?^```|`[^`]*`|(?<=\])\([^)]*\)|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = " ".join(line for line in prose.splitlines() if not line.startswith("    "))
    return [word for word in words if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", lines, re.IGNORECASE)]

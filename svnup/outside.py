"""Code from outside svnup that a configuration names: its files, their hash, version and git state."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

OURS = "svnup"
IMPORTED = re.compile(r"^[ \t]*(?:from[ \t]+(\w[\w.]*)|import[ \t]+(\w[\w., \t]*))", re.MULTILINE)


def targets(node: Any) -> Iterator[str]:
    """Every `_target_` of a configuration, at any depth."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def is_ours(target: str) -> bool:
    """Whether a target is a component of svnup."""
    return target.partition(".")[0] == OURS


def outside_code(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The code from outside svnup that a configuration names: targets, version, hash, folder and git state by package.

    Raises:
        ValueError: the package of a target is not found.
    """
    found = sorted({target for target in targets(config) if not is_ours(target)})
    told = {}
    for package in dict.fromkeys(target.partition(".")[0] for target in found):
        places = _places_with_imports(package)
        told[package] = {
            "targets": [target for target in found if target.partition(".")[0] == package],
            "version": _version(package),
            "sha256": code_hash(package),
            "folder": str(places[0].parent),
            **git_state(places[0].parent, places),
        }
    return told


@cache
def code_hash(target: str) -> str:
    """SHA-256 of a target's package, over names and contents of all its files, in hex.

    It is computed once per process, since imported code stays as it was then.

    Raises:
        ValueError: the package is not found.
    """
    package, _, rest = target.partition(".")
    if rest:
        return code_hash(package)
    digest = hashlib.sha256()
    for name, file in sorted(code_files(package).items()):
        digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def code_files(package: str) -> dict[str, Path]:
    """The .py files of a top-level package or module by relative path.

    For code that is not installed, the modules that it imports from its own folder are included, such as helpers of a script.

    Raises:
        ValueError: the package is not found.
    """
    return {name: file for place in reversed(_places_with_imports(package)) for name, file in _files(place).items()}


def git_state(folder: Path, places: list[Path]) -> dict[str, Any]:
    """The git state of files and folders: commit, whether they are dirty, and what is not committed.

    Returns:
        `git`, the commit; `dirty`; `diff_sha256`, of the difference to the commit; `untracked`, names of files in no commit.
        All are None if git tracks none of them.
    """
    names = [str(place) for place in places]
    known = git(folder, "ls-files", "--cached", "--others", "--exclude-standard", "--", *names)
    if not known:
        return dict.fromkeys(("git", "dirty", "diff_sha256", "untracked"))
    commit = git(folder, "rev-parse", "HEAD")
    diff = git(folder, "diff", "HEAD", "--no-ext-diff", "--no-textconv", "--no-color", "--", *names)
    untracked = (git(folder, "ls-files", "--others", "--exclude-standard", "--", *names) or "").splitlines()
    return {
        "git": commit.strip() if commit else None,
        "dirty": bool(diff or untracked),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
        "untracked": untracked[:100],
    }


def git(folder: Path, *args: str) -> str | None:
    """The output of a git command in a folder; None if it fails or git is not installed."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=folder, capture_output=True, text=True, errors="replace", timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _places(package: str) -> list[Path]:
    """The folders of a top-level package (several for a namespace) or the file of a module, found without importing it."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # `__main__` has none
        spec = None
    if spec is not None and spec.submodule_search_locations:
        return [Path(place).absolute() for place in spec.submodule_search_locations]
    origin = spec.origin if spec is not None and spec.has_location else getattr(sys.modules.get(package), "__file__", None)
    if origin is None:
        raise ValueError(f"_target_={package}: its code is not in a file; put it in a module on PYTHONPATH")
    return [Path(origin).absolute()]


def _places_with_imports(package: str) -> list[Path]:
    """As `_places`, with the packages and modules that it imports from its own folder if it is not installed."""
    places = _places(package)
    root = places[0].parent
    if package in {OURS, *sys.stdlib_module_names} or {"site-packages", "dist-packages"} & set(root.parts):
        return places
    left = list(places)
    while left:
        for name in _imports(_files(left.pop()).values()):
            beside = [place for place in _beside(name) if place.parent == root and place not in places]
            places += beside
            left += beside
    return places


def _beside(package: str) -> list[Path]:
    with contextlib.suppress(ValueError):
        return _places(package)
    return []


def _files(place: Path) -> dict[str, Path]:
    """All .py files of a folder, or the file itself, by their path relative to its parent."""
    files = [place] if place.is_file() else [f for f in sorted(place.rglob("*.py")) if not _is_hidden(f.relative_to(place))]
    return {file.relative_to(place.parent).as_posix(): file for file in files}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _imports(files: Iterable[Path]) -> set[str]:
    """Top-level names that files import, without relative imports."""
    found: set[str] = set()
    for file in files:
        for one, several in IMPORTED.findall(file.read_text(encoding="utf-8", errors="replace")):
            found |= {name.split()[0].partition(".")[0] for name in (one or several).split(",") if name.split()}
    return found - {OURS}


def _version(package: str) -> str | None:
    """The version of a package's distribution, or its `__version__`; None if it has neither."""
    names = importlib.metadata.packages_distributions().get(package)
    return importlib.metadata.version(names[0]) if names else getattr(sys.modules.get(package), "__version__", None)

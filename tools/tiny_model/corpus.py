"""Build the text of the built-in model: docstrings of installed, permissively licensed packages.

    python corpus.py OUT_DIR [--roles DIR]

writes OUT_DIR/{train,validation,test}.txt and, with --roles, the five texts that svnup ships as DIR/*.txt.gz.

Deterministic for given package versions: packages, folders and files in sorted order; a docstring is kept if it has at
least 120 characters and at least 60 % of its longer lines were not seen before; the split is by the SHA-256 of the
file's relative path (test 2 %, validation 2 %, the rest train), so that no file is in two splits.
"""

import argparse
import ast
import collections
import gzip
import hashlib
import os
import random
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

MODULES = ["datasets", "huggingface_hub", "matplotlib", "networkx", "numpy", "pandas"]
MODULES += ["scipy", "shapiq", "sklearn", "sympy", "torch", "transformers"]
PINS = Path(__file__).with_name("requirements.txt")


def wrong_versions() -> tuple[list[str], list[str]]:
    """The packages that are missing, and those whose version is not the pinned one."""
    lines = PINS.read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    missing, different = [], []
    for module in MODULES:
        package = "scikit-learn" if module == "sklearn" else module
        try:
            installed = version(package).split("+")[0]  # 2.13.0+cpu holds the same docstrings as 2.13.0
        except PackageNotFoundError:
            missing.append(package)
            continue
        if installed != pins[package]:
            different.append(f"{package} {installed} (pinned: {pins[package]})")
    return missing, different


def docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node)
            if doc and len(doc) >= 120:
                yield doc


def build() -> dict[str, list[str]]:
    """The docstrings of each split."""
    seen: set[str] = set()
    splits: dict[str, list[str]] = collections.defaultdict(list)
    for module in MODULES:
        found = find_spec(module)  # found, not imported: nothing of the package runs
        assert found is not None, f"{module} is not installed"
        assert found.origin is not None, f"{module} is no package with files"
        root = Path(found.origin).parent
        files = [Path(folder, f) for folder, _, names in os.walk(root) for f in names if f.endswith(".py")]
        for path in sorted(files, key=lambda p: (p.parent.as_posix(), p.name)):
            relative = path.relative_to(root.parent).as_posix()
            if "/tests" in os.path.dirname(relative):
                continue
            bucket = int(hashlib.sha256(relative.encode()).hexdigest(), 16) % 100
            split = "test" if bucket < 2 else "validation" if bucket < 4 else "train"
            for doc in docstrings(path):
                lines = [s for s in map(str.strip, doc.split("\n")) if len(s) > 20]
                if not lines or sum(s not in seen for s in lines) < 0.6 * len(lines):
                    continue
                seen.update(lines)
                splits[split].append(doc.strip())
    for docs in splits.values():
        random.Random(0).shuffle(docs)
    return splits


def roles(texts: dict[str, str]) -> dict[str, str]:
    """The five shipped texts. Each is cut at the first blank line after its size, so that no paragraph is broken."""

    def end(text: str, position: int) -> int:
        found = text.find("\n\n", position)
        return len(text) if found < 0 else found

    train, validation = texts["train"], texts["validation"]
    first = end(train, 1_500_000)
    second = end(train, first + len("\n\n") + 500_000)
    third = end(train, second + len("\n\n") + 500_000)
    others = {
        "calibration": train[:first],
        "payoff": train[first + len("\n\n") : second],
        "selection": validation[: end(validation, 600_000)],
        "test": texts["test"],
    }
    return others | {"training": unshared(train[second + len("\n\n") : third], others.values())}


def unshared(text: str, others: Iterable[str]) -> str:
    """A text without its paragraphs of more than 200 characters that another has, too: docstrings share some boilerplate."""
    known = {paragraph.strip() for other in others for paragraph in other.split("\n\n")}
    return "\n\n".join(p for p in text.split("\n\n") if len(p.strip()) <= 200 or p.strip() not in known)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build the text of the built-in model from docstrings.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for train.txt, validation.txt, test.txt")
    parser.add_argument("--roles", type=Path, metavar="DIR", help="also write the five shipped texts as .txt.gz here")
    parser.add_argument("--any-version", action="store_true", help="accept other versions: the text will differ")
    args = parser.parse_args()

    missing, different = wrong_versions()
    wrong = [f"{package} is not installed" for package in missing] + different * (not args.any_version)
    if wrong:
        hint = "" if missing else " or pass --any-version"
        print(f"corpus.py: {'; '.join(wrong)}: install {PINS.name}{hint}", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore", SyntaxWarning)  # odd escapes in other people's sources

    args.out.mkdir(parents=True, exist_ok=True)
    texts = {}
    for split, docs in build().items():
        texts[split] = "\n\n".join(docs)
        (args.out / f"{split}.txt").write_text(texts[split], encoding="utf-8", newline="\n")
        print(f"{split}: {len(docs):,} docstrings, {len(texts[split]):,} characters")
    if args.roles:
        args.roles.mkdir(parents=True, exist_ok=True)
        for role, text in roles(texts).items():
            with gzip.GzipFile(args.roles / f"{role}.txt.gz", "wb", mtime=0) as file:  # mtime=0: same bytes every time
                file.write(text.encode())
            print(f"{role}: {len(text):,} characters")
    return 0


if __name__ == "__main__":
    sys.exit(main())

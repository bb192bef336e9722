"""What may never be written down: secrets in text, taken out.

A secret is known by the name of its variable, by its place in a URL, or by its form. The forms are those of detect-secrets
(assets/secret_rules.json, with its version and licence), and those few that it lacks.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

SECRET_NAME = re.compile(
    r"(^|_)(API_?KEY|KEY|PASS|PAT|AUTH)S?$|(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|BEARER)S?$", re.IGNORECASE
)
KEY_OF_SECRET = re.compile(r"(^|_)(api_?key|token|secret|password|passwd)$", re.IGNORECASE)
IN_URL = re.compile(r"(\w+://[^\s/:@'\"]*:)([^\s/@'\"]+)(?=@)")  # scheme://user:password@host
FORMS = re.compile(
    r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?-----|\Z)"
    r"|\b(?:hf|gh[a-z]|github_pat|wandb_v\d|sk|xox[a-z])[_-][\w-]{16,}",
    re.DOTALL,
)
ASSIGNED = re.compile(  # api_key = "...", in any language; --token ...
    r"((?:key|token|secret|password|passwd)[\"']?\s*[:=]\s*[\"']?)[\w+/.-]{16,}"
    r"|((?<!\S)--?[\w-]*(?:key|token|secret|password|passwd)(?:=|\s+)[\"']?)[^\s\"']{8,}"
    r"|(\bauthorization:\s*\w+\s+)[^\s\"']{8,}",
    re.IGNORECASE,
)
RULES = Path(__file__).parent / "assets" / "secret_rules.json"
HIDDEN = "[redacted]"
SHORTEST = 8  # characters; shorter ones could be any word


def redact(text: str) -> str:
    """The text without secrets of the environment, passwords in URLs, and what has the form of a key.

    Those of the environment are the values of variables that are keys, tokens or passwords by their name, as they are and as
    JSON writes them, and passwords in URLs. What could be any word or number stays (fewer than 8 characters, or 12 letters or
    digits, or a word of svnup's own configuration), and a path, which says where a key lies.
    """
    for name, value in _of_environment():
        for form in {value, json.dumps(value)[1:-1]}:
            if form in text:
                text = text.replace(form, f"[{name}]")
    if len(text) < SHORTEST:
        return text
    text = IN_URL.sub(lambda m: f"{m[1]}{m[2] if m[2].startswith('[') else HIDDEN}", text)
    return _forms().sub(HIDDEN, FORMS.sub(HIDDEN, text))


def redact_code(text: str) -> str:
    """Also without what is given to something that is called a key: code that is not committed yet may hold it."""
    return ASSIGNED.sub(lambda m: f"{next(g for g in m.groups() if g is not None)}{HIDDEN}", redact(text))


def redacted(node: Any) -> Any:
    """Nested JSON values with secrets taken out of their texts; numbers, keys and words of the configuration stay.

    A text under a key such as `api_key` or `token` is one whatever its form.
    """
    if isinstance(node, dict):
        return {name: HIDDEN if _is_hidden(name, value) else redacted(value) for name, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [redacted(value) for value in node]
    return redact(node) if isinstance(node, str) and len(node) >= SHORTEST and node not in _words() else node


def _is_hidden(name: Any, value: Any) -> bool:
    return isinstance(value, str) and bool(KEY_OF_SECRET.search(str(name))) and not _is_plain(value)


def _of_environment() -> list[tuple[str, str]]:
    """Secrets by the name of their variable, the longest first: one may be part of another."""
    found = []
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and not _is_plain(value) and not _is_path(value):
            found.append((name, value))
        elif "://" in value:
            found += [(name, m[2]) for m in IN_URL.finditer(value) if len(m[2]) >= SHORTEST]
    return sorted(found, key=lambda pair: -len(pair[1]))


def _is_plain(value: str) -> bool:
    """Whether a value could be any word."""
    return len(value) < SHORTEST or (len(value) < 12 and (value.isalpha() or value.isdigit())) or value in _words()


def _is_path(value: str) -> bool:
    try:
        return len(value) < 4096 and Path(value).exists()
    except (OSError, ValueError):  # too long for a path, or no text of one
        return False


@cache
def _words() -> frozenset[str]:
    """The words of svnup's own configuration, which say nothing of a secret that happens to be one of them."""
    folder = next((p / "conf" for p in Path(__file__).parents[:2] if (p / "conf").is_dir()), None)
    texts = [file.read_text(encoding="utf-8") for file in folder.rglob("*.yaml")] if folder is not None else []
    return frozenset(word for text in texts for word in re.findall(r"[\w.:/-]{8,}", text))


@cache
def _forms() -> re.Pattern[str]:
    """The rules of detect-secrets as one pattern, which takes what hangs on a key as part of it."""
    rules = json.loads(RULES.read_text(encoding="utf-8"))["rules"]
    known = "|".join(f"(?{'i' if rule['ignore_case'] else ''}:{rule['pattern']})" for rule in rules)
    return re.compile(rf"(?:{known})[\w+/=.-]*")

"""What may never be written down: secrets in text, taken out."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

SECRET_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PAT)S?$", re.IGNORECASE)
ASSIGNED = re.compile(
    r"((?:key|token|secret|password|passwd)[\"']?\s*[:=]\s*[\"']?)[\w+/.-]{16,}"  # api_key = "...", in any language
    r"|(\w+://[^\s/:@]+:)[^\s/@]+(?=@)"  # https://user:password@host
    r"|\b((?:hf|gh[a-z]|wandb_v\d|sk|xox[a-z])[_-])\w{16,}",  # what services give out
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text without the values of environment variables that are keys, tokens or passwords by their name.

    They go as they are and as JSON writes them. What could be any word stays (fewer than 8 characters, or 12 letters), and a
    path, which says where a key lies.
    """
    for name, value in os.environ.items():
        plain = len(value) < 8 or (len(value) < 12 and value.isalpha())
        if SECRET_NAME.search(name) and not plain and not Path(value).exists():
            for form in (value, json.dumps(value)[1:-1]):
                text = text.replace(form, f"[{name}]")
    return text


def redact_code(text: str) -> str:
    """Also without what looks like one: code that is not committed yet may hold it."""
    return ASSIGNED.sub(lambda m: f"{next(g for g in m.groups() if g is not None)}[redacted]", redact(text))

"""What is secret is written down nowhere, and what is not stays as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli import last_row

from svnup import secrets
from svnup.secrets import redact, redact_code, redacted

PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk\nAAAA\n-----END OPENSSH PRIVATE KEY-----"
TYPED = {
    "github_pat_": "github_pat_" + "1A2b3C4d" * 8,
    "ghp_": "ghp_" + "a1B2c3D4e5F6" * 3,
    "sk-": "sk-proj-" + "Zz9-yY8_" * 5,
    "glpat-": "glpat-" + "x1Y2z3W4v5" * 2,
    "hf_": "hf_" + "abcdEFGH" * 4,
    "AKIA": "AKIA" + "Q7R8S9T0U1V2W3X4",
    "slack": "xoxb-123456789-987654321-abcdefabcdef",
    "PEM": PEM,
    "url": "postgresql://someone:pass-word-9@db.example/x",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
}


@pytest.mark.parametrize("name", TYPED)
def test_a_key_is_known_by_its_form(name):
    found = redact(f"before {TYPED[name]} after")
    assert re.fullmatch(r"before (postgresql://someone:)?\[redacted\](@db.example/x)? after", found), found


@pytest.mark.parametrize(
    "line",
    [
        "run --token abcdefgh12",
        "curl -H 'Authorization: Bearer abcdefgh12'",
        "--api-key=abcdefgh12",
        "x --password 'abcdefgh12'",
    ],
)
def test_what_is_given_as_a_key_in_code_is_one(line):
    assert "abcdefgh12" not in redact_code(line)


@pytest.mark.parametrize(
    "name",
    ["PGPASSWORD", "GOOGLE_CREDENTIALS", "BEARER", "HF_TOKEN", "OPENAI_API_KEY", "MYSQL_PASSWD", "SIGNING_KEY", "AWS_SECRET"],
)
@pytest.mark.parametrize(
    "value", ["s3cr3t-w0rd!", "eyJ" + "h" * 600, PEM, 'a"b\\c9-xyz'], ids=["short", "long", "PEM", "quotes"]
)
def test_variables_of_secrets_by_their_names(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    assert redact(f"<{value}>") == f"<[{name}]>"
    assert json.loads(redact(json.dumps([value]))) == [f"[{name}]"]


def test_the_password_in_the_url_of_a_variable(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://me:hunter2hunter2@db/x")
    assert redact("connect with hunter2hunter2") == "connect with [DATABASE_URL]"


def test_words_and_numbers_of_the_configuration_stay(monkeypatch):
    for name, value in {"MY_TOKEN": "unstructured", "BUILD_KEY": "99999999", "A_SECRET": "sliding_window"}.items():
        monkeypatch.setenv(name, value)
    node = {"pattern": "unstructured", "n": 99999999, "shapley": "sliding_window", "values": [0.1, None, True]}
    assert redacted(node) == node
    assert redact("pattern unstructured, 99999999") == "pattern unstructured, 99999999"


def test_a_key_that_is_no_text_stays(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "longer-than-a-word-1")
    node = {"longer-than-a-word-1": 3, "x": ["longer-than-a-word-1", 4], "token": "abcdefgh-9876", "token_count": 12345678}
    assert redacted(node) == {
        "longer-than-a-word-1": 3,
        "x": ["[SOME_TOKEN]", 4],
        "token": "[redacted]",
        "token_count": 12345678,
    }


def test_plain_text_stays():
    text = "docs/ppl 12.47 sha256 " + "0f" * 32 + " /home/me/a/key.pem https://example.org:8080/a results/runs/3f2a8b1c9d0e"
    assert redact(text) == text


def test_the_rules_say_where_they_are_from():
    data = json.loads(secrets.RULES.read_text(encoding="utf-8"))
    assert (data["source"], data["version"], "Apache-2.0" in data["licence"]) == ("detect-secrets", "1.5.0", True)
    assert len(data["rules"]) >= 30
    assert all(re.compile(rule["pattern"]) for rule in data["rules"])


def test_no_run_writes_or_prints_a_secret(svnup, monkeypatch):
    """Typed into an override, interpolated from the environment, or long enough to break a path."""
    long, interpolated, typed = "eyJ" + "k" * 500, "inter-polated-99x", TYPED["hf_"]
    monkeypatch.setenv("LONG_TOKEN", long)
    monkeypatch.setenv("OTHER_SECRET", interpolated)
    monkeypatch.setenv("PATTERN_TOKEN", "unstructured")
    job = ["allocator=uniform", "pruner=magnitude", f"+dataset.path={typed}", "++selection.path=${oc.env:OTHER_SECRET}"]
    told = ""
    for sweep in ([], ["-m"]):
        code, out, err = svnup(*job, *sweep)
        assert code in (1, 2), "there is no such option"
        told += out + err
    code, out, err = svnup(
        "allocator=uniform", "pruner=magnitude", "tracker=none", f"hydra.job.config.override_dirname.kv_sep={typed}"
    )
    assert code == 0, err
    written = "".join(p.read_text(errors="replace") for p in Path().rglob("*") if p.is_file() and p.suffix != ".png")
    for secret in (long, interpolated, typed):
        assert secret not in told + out + err + written
    assert last_row()["config"]["pattern"] == "unstructured"
    assert last_row()["status"] == "finished"

"""The `svnup-expand` command: a bitmask checkpoint as a dense one."""

from __future__ import annotations

import argparse
from pathlib import Path

from svnup import __version__
from svnup.cli.outcome import outcome, tell
from svnup.files import at_home
from svnup.model.checkpoint import expand


def main(argv: list[str] | None = None) -> int:
    """The `svnup-expand` command."""
    parser = argparse.ArgumentParser(prog="svnup-expand", description="Make a dense checkpoint of a bitmask one.")
    parser.add_argument("--version", action="version", version=f"svnup {__version__}")
    parser.add_argument("source", type=Path, help="folder that save_format=bitmask wrote")
    parser.add_argument("target", type=Path, help="folder to make")
    args = parser.parse_args(argv)
    try:
        expand(at_home("source", args.source), at_home("target", args.target))
    except (Exception, KeyboardInterrupt) as error:
        if (told := outcome(error)) is None:
            raise
        message, code = told
        tell("svnup-expand", message)
        return code
    return 0

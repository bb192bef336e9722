"""The `svnup-expand` command: a bitmask checkpoint as a dense one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from svnup import __version__
from svnup.files import at_home, fault
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
    except ValueError as error:
        message, code = str(error), 2
    except OSError as error:
        if (told := fault(error)) is None:
            raise
        message, code = told, 1
    except KeyboardInterrupt:
        message, code = "interrupted (Ctrl-C)", 130
    else:
        return 0
    sys.stderr.write(f"svnup-expand: {' '.join(message.split())}\n")
    return code

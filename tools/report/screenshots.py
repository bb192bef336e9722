"""Pictures of a report as a desktop and a phone show it, light and dark, by a headless Chromium (Debian: apt install chromium).

python tools/report/screenshots.py results/tables_tiny/report.html [--into results/screenshots]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SIZES = {"desktop": (1280, 1600), "phone": (390, 1600)}
# Chromium takes no window narrower than 500: a frame of the phone's width stands in for one.
STYLE = "<style>body{margin:0}iframe{border:0;display:block}</style>"
FRAME = f'<!doctype html><meta name="color-scheme" content="light dark">{STYLE}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--into", type=Path, default=Path("results/screenshots"))
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None or not options.report.is_file():
        sys.stderr.write(f"{options.report}: no such report\n" if browser else "no chromium here: apt install chromium\n")
        return 2
    options.into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        for name, (width, height) in SIZES.items():
            frame = Path(profile) / f"{name}.html"
            source = options.report.resolve().as_uri()
            frame.write_text(f'{FRAME}<iframe src="{source}" width="{width}" height="{height}"></iframe>')
            for theme in ("light", "dark"):
                picture = options.into / f"{name}-{theme}.png"
                command = [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={profile}/{name}"]
                command += [f"--window-size={max(width, 500)},{height}", f"--screenshot={picture.resolve()}"]
                command += ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
                subprocess.run([*command, frame.as_uri()], check=True, capture_output=True, timeout=120)
                sys.stdout.write(f"{picture}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

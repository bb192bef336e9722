"""One self-contained HTML page about the runs of a results folder.

The page loads nothing: charts are inline SVG, style and script are embedded, and its content security policy forbids all else.
The same results make the same bytes.
"""

from __future__ import annotations

import base64
import hashlib

from markupsafe import Markup

from svnup.reports.measured import Collection
from svnup.reports.templates import asset, render
from svnup.reports.view import view
from svnup.results.row import ResultRow


def report(rows: list[ResultRow]) -> str:
    """The HTML page about some results; raises ValueError if there are none."""
    if not rows:
        raise ValueError("no runs to report on")
    style, script = asset("report.css"), asset("report.js")
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; base-uri 'none'"
    shown = view(Collection(rows))
    return render("report.html.jinja", report=shown, policy=policy, style=Markup(style), script=Markup(script))

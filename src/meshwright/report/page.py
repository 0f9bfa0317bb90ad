"""A self-contained page that opens offline: its frame, style and script, around sections and figures."""

import json
from importlib.resources import files
from typing import Any

from meshwright.report.parts import text

# Even if a later change let a reference to a network slip in, a browser would refuse to follow it.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; font-src data:"


def page_html(title: str, body: str, figures: dict[str, dict[str, Any]]) -> str:
    """The page. Text in `body` is escaped already; figures travel as JSON in which no tag can open."""
    from plotly.offline import get_plotlyjs  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")
    script = f"<script>{get_plotlyjs()}</script>\n<script>{asset('page.js')}</script>" if figures else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{text(title)} · Meshwright</title>
<style>
{asset("page.css")}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="figures">{data}</script>
{script}
</body>
</html>
"""


def asset(name: str) -> str:
    """A file that lies beside this one."""
    return files("meshwright.report").joinpath(name).read_text(encoding="utf-8")

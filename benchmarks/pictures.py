"""Pictures of a report's sections, as the documentation shows them: a page of `meshwright explain`, drawn by Chromium.

    python benchmarks/pictures.py runs/slow/report.html docs/pictures/slow.png "What to change" "Rank by rank"

The page's head is in every picture. Needs Chromium; nothing is loaded from a network.
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH = 860
# Enough for the charts to be drawn, in the browser's own time.
DRAWING_MS = 5000
# Into the page's title, which is where the dumped document tells how tall it is.
MEASURE = "<script>addEventListener('load', () => { document.title = document.body.scrollHeight; });</script>"
# The margin at a page's end is for reading, not for a picture.
TIGHT = "<style>main { padding: 20px 16px 4px !important; } footer { display: none; }</style>"
# In page.js, where each figure's turn begins.
LOOP = "for (const [id, figure] of Object.entries(figures)) {"
# A browser that draws pages of its own machine needs no protection from them, and cannot have it as root.
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--virtual-time-budget={DRAWING_MS}")


def with_sections(page: str, titles: list[str]) -> str:
    """The page with those of its sections that have such a title, in the page's order."""
    sections = re.findall(r"<section>.*?</section>", page, re.DOTALL)
    known = {
        html.unescape(match[1]): section for section in sections if (match := re.search(r"<h2>(.*?)</h2>", section))
    }
    for title in titles:
        if title not in known:
            sys.exit(f"the page has no section {title!r}; it has {', '.join(known)}")
    for section in sections:
        if section not in {known[title] for title in titles}:
            page = page.replace(section, "")
    # Of a section that is left out there is no place to draw in.
    page = page.replace(LOOP, f"{LOOP} if (document.getElementById(id) === null) {{ continue; }}")
    return page.replace("</head>", f"{TIGHT}{MEASURE}</head>")


def draw(browser: str, page: str, picture: Path, width: int) -> None:
    """The whole page as a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(page)
        command = [browser, *OPTIONS, f"--user-data-dir={folder}/profile"]
        told = subprocess.run(
            [*command, f"--window-size={width},200", "--dump-dom", path.as_uri()],
            capture_output=True,
            text=True,
            check=True,
        )
        height = re.search(r"<title>(\d+)</title>", told.stdout)
        assert height is not None, "the browser has not laid the page out"
        picture.parent.mkdir(parents=True, exist_ok=True)
        size = f"--window-size={width},{height[1]}"
        subprocess.run(
            [*command, size, f"--screenshot={picture.resolve()}", path.as_uri()], capture_output=True, check=True
        )


def main() -> None:
    """Draw one picture."""
    parser = argparse.ArgumentParser(description="A picture of some sections of a report.")
    parser.add_argument("report", type=Path, help="report.html of a run, or what --report wrote")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("sections", nargs="+", help="their titles")
    parser.add_argument("--width", type=int, default=WIDTH, help="pixels")
    options = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed")
    draw(browser, with_sections(options.report.read_text(), options.sections), options.picture, options.width)
    print(f"{options.picture}: {options.picture.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

"""The site, which `make docs` builds from the Markdown files as they stand in the repository.

The repository is the source folder, so a link means the same here and there. Sphinx makes files
that are no pages downloads; a folder has no place on the site, and of a link to one the words stay.
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READING_PATH = [
    "docs/README",
    "docs/theory",
    "docs/equations",
    "docs/kernel_versions",
    "docs/report",
    "docs/reproducing",
    "docs/scaling",
    "docs/beyond_one_machine",
    "docs/your_data",
    "docs/robustness",
]
ABOUT = ["CONTRIBUTING", "CHANGELOG"]

project = "nalayer"
author = copyright = "The nalayer developers"
root_doc = "README"
include_patterns = [f"{page}.md" for page in [root_doc, *READING_PATH, *ABOUT]]
exclude_patterns = [".*", "*-output", "benchmarks", "build", "kernels", "nalayer", "tests"]

extensions = ["myst_parser"]
myst_heading_anchors = 3
highlight_language = "none"  # of blocks that name none: formulas, commands
pygments_style = "friendly"

html_theme = "furo"
html_title = "nalayer"
html_copy_source = False
html_css_files = html_static_path = ["site.css"]


def links_to_folders_off(text: str, folder: Path) -> str:
    """Return a page's text with the words alone where it links to a folder."""

    def words(link: re.Match[str]) -> str:
        return link[1] if (folder / link[2]).is_dir() else link[0]

    return re.sub(r"\[([^\]\n]+)\]\(([^):#\s]+)\)", words, text)


def contents() -> str:
    """Return the list of pages, which a reader of the repository has in docs/README.md."""
    parts = {"Reading path": READING_PATH, "The project": ABOUT}
    return "".join(
        "\n".join(["", "", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])
        for caption, pages in parts.items()
    )


def read_source(app, page: str, source: list[str]) -> None:
    """Make a page of the repository one of the site."""
    source[0] = links_to_folders_off(source[0], (ROOT / page).parent)
    if page == root_doc:
        source[0] += contents()


def write_index(app, failure: Exception | None) -> None:
    """Let the first page be found under the name that browsers and servers look for."""
    if not failure:
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app) -> None:
    """Connect to Sphinx."""
    app.connect("source-read", read_source)
    app.connect("build-finished", write_index)

"""Settings of the documentation site: `sphinx-build -W -b html docs OUT`.

In: the Markdown pages of this folder, results and other Markdown files of the repository, and the
docstrings of the public names. Out: a site whose internal links and anchors have been checked: a
broken one is a warning, and `-W` stops at it.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

import trl_selfplay

project = "trl-selfplay"
author = "trl-selfplay contributors"
project_copyright = author
release = version = trl_selfplay.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"trl-selfplay {release}"
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 4  # as on GitHub, so that a link to a section works in both places

autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
default_role = "code"  # docstrings write names of fields in single backticks

_DOCS = Path(__file__).parent
_ROOT = _DOCS.parent
# Markdown files outside this folder that are pages of the site too, and the pages' names.
_COPIED = {
    **{p: f"repository/results/{p.stem}" for p in (_ROOT / "benchmarks/results").glob("*.md")},
    **{p: f"repository/{p.stem.lower()}" for p in _ROOT.glob("*.md")},
}
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def _site_links(text: str, folder: Path) -> str:
    """Return a page's text with its links to the repository's files as links of the site."""

    def site_link(link: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / link[1]))
        if path in _COPIED:
            return f"](/{_COPIED[path]}.md{link[2] or ''})"
        if path.is_relative_to(_DOCS):
            return f"](/{path.relative_to(_DOCS)}{link[2] or ''})"
        return f"](path:/{os.path.relpath(path, _DOCS)})"  # a download

    return _LINK.sub(site_link, text)


def _copy_pages(app: Sphinx) -> None:
    for path, page in _COPIED.items():
        copy, text = _DOCS / f"{page}.md", path.read_text()
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text() != text:  # else Sphinx would build it again
            copy.write_text(text)


def _rewrite_links(app: Sphinx, page: str, source: list[str]) -> None:
    origin = {name: path for path, name in _COPIED.items()}.get(page, _DOCS / f"{page}.md")
    source[0] = _site_links(source[0], origin.parent)


def setup(app: Sphinx) -> None:
    """Bring the repository's other Markdown files into the site."""
    app.connect("builder-inited", _copy_pages)
    app.connect("source-read", _rewrite_links)

"""The site builds without a warning, and its links lead somewhere."""

import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import trl_selfplay
import trl_selfplay.rewards

ROOT = Path(__file__).parent.parent
MISSING = [m for m in ("sphinx", "furo", "myst_parser") if not importlib.util.find_spec(m)]


class Page(HTMLParser):
    """The anchors of a page, and where it links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        self.links |= {value for name in ("href", "src") if (value := found.get(name))}


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason="the extra docs isn't installed")
def test_the_site_builds_and_its_links_lead_somewhere(tmp_path) -> None:
    """External links can't be fetched: only their form is checked."""
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", tmp_path],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {path: Page(path.read_text()) for path in tmp_path.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https"):
                is_right = "." in parts.netloc and " " not in link
            elif parts.scheme:
                is_right = parts.scheme in ("data", "mailto")
            else:
                target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
                is_right = target.is_file()
                if is_right and parts.fragment and target in pages:
                    is_right = unquote(parts.fragment) in pages[target].anchors
            if not is_right:
                broken.append(f"{path.relative_to(tmp_path)}: {link}")
    assert not broken
    assert {"index.html", "api.html", "trainers/star.html", "repository/results/learning.html"} <= {
        str(path.relative_to(tmp_path)) for path in pages
    }


@pytest.mark.parametrize("module", [trl_selfplay, trl_selfplay.rewards])
def test_the_reference_describes_every_public_name(module) -> None:
    text = (ROOT / "docs/api.md").read_text()
    for name in set(module.__all__) - {"__version__", "WrongOpponentError"}:
        assert f":: {name}\n" in text or f":: {name}(" in text, name

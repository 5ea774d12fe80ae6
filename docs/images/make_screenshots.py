# /// script
# dependencies = ["trl-selfplay", "playwright>=1.50", "pillow>=11"]
# ///
"""Take the screenshots of docs/report.md from the reports of two runs, in an installed Chromium.

In: the output_dir of a run that learnt, such as the demo's, and of one that collapsed. Out: PNG files beside
this script, of at most 150 kB.

    trl-selfplay demo --output_dir demo
    python docs/images/make_screenshots.py demo collapsed
"""

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from trl_selfplay.inspection.html_report import write_report

FOLDER = Path(__file__).parent
MOST_BYTES = 150_000
# Shows, of the first samples, the one whose prompt is in most rounds.
_SHOW_PROMPT = """
  const buttons = [...document.querySelectorAll("#list button")];
  const count = (button) => Number(button.textContent.match(/\\d+/)?.[0] ?? 1);
  buttons.reduce((best, button) => (count(button) > count(best) ? button : best)).click();
  document.activeElement.blur();
"""


def main() -> None:
    """Write all screenshots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("learnt", help="output_dir of a run that learnt")
    parser.add_argument("collapsed", help="output_dir of a run that collapsed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        learnt, collapsed = (
            write_report(run, Path(folder) / f"{number}.html")
            for number, run in enumerate((given.learnt, given.collapsed))
        )
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        take(browser, learnt, "report", 1100, 1000)
        take(browser, learnt, "report_samples", 1100, 760, start="#samples", script=_SHOW_PROMPT)
        take(browser, collapsed, "report_collapse", 1100, 1150, start="#held-out")
        browser.close()


def take(
    browser: Browser,
    page_path: Path,
    name: str,
    width: int,
    height: int,
    start: str | None = None,
    script: str | None = None,
) -> None:
    """Write one screenshot of a part of a page.

    Args:
        browser: Where to open it.
        page_path: The report.
        name: File name without suffix.
        width: Of the window, in pixels.
        height: Of the part.
        start: Selector of the element at the top of the part; None is the top of the page.
        script: JavaScript that is run first.
    """
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
    page = context.new_page()
    page.goto(page_path.as_uri())
    if script:
        page.evaluate(script)
    # The navigation sticks to the top of the window, and would cover the part.
    page.evaluate("document.querySelector('nav').style.position = 'static'")
    top = 0.0
    if start:
        top = page.evaluate(
            f"document.querySelector({start!r}).getBoundingClientRect().top + scrollY"
        )
    picture = page.screenshot(
        full_page=True, clip={"x": 0, "y": top, "width": width, "height": height}
    )
    context.close()
    path = FOLDER / f"{name}.png"
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    image.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise RuntimeError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}.")
    print(f"{path.name}: {size:,} bytes")


if __name__ == "__main__":
    main()

"""The README's picture: `picture.py PAGE.html OUT.png`, a part of a page as Chromium shows it.
Needs Playwright and Chromium."""

import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def main(page_file: Path, out: Path) -> None:
    chromium = (
        os.environ.get("PHATGOOSE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    )
    if chromium is None:
        sys.exit("there is no chromium: install Debian's, or set PHATGOOSE_CHROMIUM")
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1000}, device_scale_factor=1.5)
        page.goto(page_file.resolve().as_uri())
        article = page.locator("article").first
        article.scroll_into_view_if_needed()
        page.locator("article .token").nth(2).hover()
        top = page.locator("#controls").bounding_box()
        page.evaluate("y => window.scrollBy(0, y)", top["y"] - 8)
        end = article.bounding_box()
        height = min(1000, end["y"] + end["height"] + 8)
        page.screenshot(path=out, clip={"x": 0, "y": 0, "width": 1100, "height": height})
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

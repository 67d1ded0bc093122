"""A real Chromium for the tests of pages: Debian's, driven by Playwright; without either, tests are skipped and
say why.

Fixtures of one browser for a file of tests: `pytest_plugins = ["browser_fixtures"]`.
"""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = (
    os.environ.get("PHATGOOSE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)


@pytest.fixture(scope="module")
def chromium():
    # Not for the whole session: Playwright keeps an event loop running in this thread while it is open,
    # and nobody else can run one.
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: make dev")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: install Debian's, or set PHATGOOSE_CHROMIUM")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(path or address, width=1280, dark=False) → a page; its errors and any request to a network
    fail the test."""
    pages, wrong = [], []

    def visit(target, width: int = 1280, dark: bool = False, script: bool = True):
        context = chromium.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if dark else "light",
            java_script_enabled=script,
        )
        page = context.new_page()
        page.set_default_timeout(8000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        url = target if isinstance(target, str) else target.as_uri()
        here = (
            ("file:", "blob:", "data:")
            if url.startswith("file:")
            else (url.split("/", 3)[0] + "//" + url.split("/")[2], "blob:")
        )
        page.on("request", lambda r: None if r.url.startswith(here) else wrong.append(f"request to {r.url}"))
        page.goto(url)
        pages.append(context)
        return page

    yield visit
    for context in pages:
        context.close()
    assert wrong == []

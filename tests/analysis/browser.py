"""A real Chromium for the tests of pages: Debian's, driven by Playwright; without either, tests are skipped and say why."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

CHROMIUM = (
    os.environ.get("PHATGOOSE_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
)
AXE = Path(os.environ.get("PHATGOOSE_AXE", Path(__file__).parents[2] / "build" / "axe" / "axe.min.js"))


@pytest.fixture(scope="session")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: make setup")
    if CHROMIUM is None:
        pytest.skip("there is no chromium: install Debian's, or set PHATGOOSE_CHROMIUM")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """visit(path or address, width=1280, dark=False) → a page; its errors and any request to a network fail the test."""
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
        here = ("file:", "blob:", "data:") if url.startswith("file:") else (url.split("/", 3)[0] + "//" + url.split("/")[2], "blob:")  # fmt: skip
        page.on("request", lambda r: None if r.url.startswith(here) else wrong.append(f"request to {r.url}"))
        page.goto(url)
        pages.append(context)
        return page

    yield visit
    for context in pages:
        context.close()
    assert wrong == []


def until(page, condition: str, seconds: float = 8) -> None:
    """Waits for a condition in JavaScript. (Playwright's own waiting evaluates strings in the page, which its policy forbids.)"""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        page.wait_for_timeout(20)


def violations(page) -> list[str]:
    """What axe-core finds serious or critical, as "rule: first place"."""
    if not AXE.exists():
        pytest.skip(f"there is no axe-core at {AXE}: make axe")
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{v['id']}: {json.dumps(v['nodes'][0]['target'])} {v['nodes'][0].get('failureSummary', '')[:300]}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]

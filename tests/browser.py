"""What tests ask of a page in a browser; the browser itself is in browser_fixtures.py."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

AXE = Path(os.environ.get("PHATGOOSE_AXE", Path(__file__).parents[1] / "build" / "axe" / "axe.min.js"))


def until(page, condition: str, seconds: float = 8) -> None:
    """Waits for a condition in JavaScript. (Playwright's own waiting evaluates strings in the page,
    which its policy forbids.)"""
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

"""The report: one self-contained HTML file with the comparison, and for a few prompts which experts acted where.

The page asks nothing of the network: its script and style are inline, its data is embedded as JSON. Names and prompts are
strangers' text, so the template escapes everything, the script only sets textContent, and a content policy lets no other
script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from phatgoose.analysis.checks import checked
from phatgoose.analysis.prompts import RoutedPrompt, encoded, routed_prompt
from phatgoose.analysis.view import legend, view
from phatgoose.files import write_bytes

__all__ = ["FORMAT", "RoutedPrompt", "report", "routed_prompt"]

FORMAT = "phatgoose-report/2"
"""Of the embedded data, which the page offers for download: {"format", "results", "experts" (legend), "prompts"}."""


def report(
    results: Mapping[str, Any] | None, prompts: Sequence[RoutedPrompt] = (), *, out: Path | str
) -> Path:
    """Writes the page to `out`, whole or not at all, and returns its path.

    Args:
        results: what the quickstart writes as results.json; `phatgoose.analysis.checks.SHAPE` says what it must hold.
            Parts that are left out are left out of the page. Tasks and systems may be empty if there are prompts or experts.
        prompts: shown in this order, tokens coloured by expert.

    Raises:
        EvaluationError: `results` or a prompt is malformed; the message says where.
        StorageError: the file can't be written; an existing one is left as it was.
    """
    results = {"tasks": [], "systems": []} if results is None else results
    data = checked(results, empty=bool(prompts or results.get("experts")))
    shown = [encoded(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    names = [e["name"] for e in data.get("experts", [])]
    names += [name for row in data.get("shares", {}).values() for name in row]
    names += [name for profile in data.get("layers", {}).values() for name in profile["experts"]]
    names += [name for prompt in shown for name in prompt["experts"]]
    marks = legend(names)
    environment = _environment()
    script = environment.get_template("page.js.j2").render()
    html = environment.get_template("page.html.j2").render(
        data=data,
        prompts=shown,
        marks=marks,
        title=data.get("title") or "PHATGOOSE: which expert for which token",
        measured=bool(data["systems"]),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup(environment.get_template("page.css.j2").render()),
        embedded=htmlsafe_json_dumps(
            {"format": FORMAT, "results": data, "experts": marks, "prompts": shown},
            dumps=json.dumps,
            allow_nan=False,
            separators=(",", ":"),
        ),
        **view(data, marks),
    )
    # A lone surrogate in someone's text can't be written as UTF-8; the embedded JSON keeps it, escaped.
    write_bytes(Path(out), html.encode("utf-8", "replace"))
    return Path(out)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("phatgoose.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "points": points, "breakable": breakable, "seconds": seconds}
    return environment


def percent(share: float | None, digits: int = 0) -> str:
    """0.583 → "58" (no sign, the page says once that numbers are percentages); None → an en dash."""
    if share is None:
        return "–"
    text = f"{100 * share:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.replace("-", "")


def points(difference: float) -> str:
    """A difference of two shares in percentage points, always with its sign."""
    text = percent(difference, 1)
    return f"+{text}" if difference > 0 and float(text) else text


def seconds(value: float | None) -> str:
    """75 → "1 min 15 s"."""
    if value is None:
        return "–"
    if round(value) < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def breakable(text: str) -> Markup:
    """`text`, escaped, that may break after _ . : / - so that a long name doesn't widen its column."""
    parts: list[Markup] = []
    for character in str(text):
        parts.append(escape(character))
        if character in "_.:/-":
            parts.append(Markup("<wbr>"))
    return Markup("").join(parts)

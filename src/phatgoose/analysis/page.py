"""The report, one HTML file with the comparison and who acted where, and the live page.

The page needs no network: its script and style are inline, its data is embedded as JSON. Names and prompts are
strangers' text, so the template escapes everything, the script only sets textContent, and a content policy
lets no other script run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from phatgoose.analysis.cards import cards
from phatgoose.analysis.checks import checked
from phatgoose.analysis.prompts import RoutedPrompt, encoded, routed_prompt
from phatgoose.analysis.view import legend, view
from phatgoose.experts.pool import Pool
from phatgoose.files import write_bytes
from phatgoose.models.base.module_names import ModuleLocation, layer_labels
from phatgoose.templates import templates

__all__ = ["FORMAT", "RoutedPrompt", "report", "routed_prompt"]

FORMAT = "phatgoose-report/2"
"""Format of the embedded data, which the page offers for download: {"format", "results", "experts" (legend),
"prompts"}."""


def report(
    results: Mapping[str, Any] | None, prompts: Sequence[RoutedPrompt] = (), *, out: Path | str
) -> Path:
    """`phatgoose.report`, of results that have the form of `checks.SHAPE` already."""
    results = {"tasks": [], "systems": []} if results is None else results
    data = checked(results, empty=bool(prompts or results.get("experts")))
    shown = [encoded(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    lists = [[e["name"] for e in data.get("experts", [])], *data.get("shares", {}).values()]
    lists += [part["experts"] for part in (*data.get("layers", {}).values(), *shown)]
    marks = legend(name for names in lists for name in names)
    html, _ = rendered(
        "page",
        {"format": FORMAT, "results": data, "experts": marks, "prompts": shown},
        data=data,
        prompts=shown,
        marks=marks,
        title=data.get("title") or "PHATGOOSE: which expert for which token",
        measured=bool(data["systems"]),
        # A share is told by a style attribute.
        style_sources="'unsafe-inline'",
        **view(data, marks),
    )
    write_bytes(Path(out), html)
    return Path(out)


def live_page(
    *,
    base: str,
    pool: Pool,
    places: Mapping[str, ModuleLocation],
    routers: Sequence[Mapping[str, Any]],
    chat: bool,
    form: str | None = None,
    most_new_tokens: int,
) -> tuple[bytes, str]:
    """The page and its content policy.

    Args:
        base: the base's name.
        places: of the routed modules, in the order in which the server tells their choices.
        routers: {"name", "top_k"} of each that can be chosen; top_k is None if it has none.
        chat: whether the base has a chat template.
        form: the form of prompts that all experts were trained on, "raw" or "chat"; None if unknown or mixed.
    """
    data = checked({"tasks": [], "systems": [], "experts": cards(pool)}, empty=True)
    marks = legend(pool.names)
    labels = layer_labels(places)
    live = {
        "sites": [[place.layer, place.kind] for place in places.values()],
        "labels": [labels[path] for path in places],
        "layers": list(dict.fromkeys(labels.values())),
        "routers": list(routers),
    }
    return rendered(
        "live",
        {"results": data, "experts": marks, "live": live},
        data=data,
        marks=marks,
        live=True,
        title="Which expert for which token, live",
        base=base,
        routers=routers,
        chat=chat,
        form=form,
        most_new_tokens=most_new_tokens,
        **view(data, marks),
    )


def rendered(
    name: str, embedded: Mapping[str, Any], *, style_sources: str | None = None, **context: Any
) -> tuple[bytes, str]:
    """The page made from the templates `name`.html.j2, `name`.js.j2, page.css.j2 and `name`.css.j2, in UTF-8,
    and its content policy.

    Args:
        embedded: data for the page's script, as JSON.
        style_sources: allowed sources of style; None: only the page's own style sheet.
        context: variables of the template.
    """
    environment = templates(
        "phatgoose.analysis",
        escaped=True,
        percent=percent,
        points=points,
        breakable=breakable,
        seconds=seconds,
    )
    script = environment.get_template(f"{name}.js.j2").render()
    styles = [environment.get_template(f"{part}.css.j2").render() for part in dict.fromkeys(("page", name))]
    style = "\n".join(styles)
    policy = (
        f"default-src 'none'; style-src {style_sources or _hash(style)}; script-src {_hash(script)}; "
        f"img-src data:; base-uri 'none'; form-action 'none'"
    )
    if context.get("live"):
        policy += "; connect-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'"
    html = environment.get_template(f"{name}.html.j2").render(
        script=Markup(script),
        style=Markup(style),
        policy=policy,
        embedded=htmlsafe_json_dumps(embedded, dumps=json.dumps, allow_nan=False, separators=(",", ":")),
        **context,
    )
    # A lone surrogate in someone's text can't be written as UTF-8; the embedded JSON keeps it, escaped.
    return html.encode("utf-8", "replace"), policy


def _hash(text: str) -> str:
    """The source in a content policy that allows `text`."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
    """`text`, escaped, with possible line breaks after _ . : / - so that a long name doesn't widen its column."""
    parts: list[Markup] = []
    for character in str(text):
        parts.append(escape(character))
        if character in "_.:/-":
            parts.append(Markup("<wbr>"))
    return Markup("").join(parts)

"""The tables of adapters' settings in docs/experts-and-pools.md, written from experts/adapters/rules.toml by
`cli.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from phatgoose.experts.adapters.peft_rules import ADAPTERHUB_RULES, DROPPABLE, RULES, Rule

MARKS = "<!-- {} rules: begin -->", "<!-- {} rules: end -->"


def peft_table() -> str:
    """One row for the settings of one rule."""
    rows = ["| PEFT type | setting | what happens | why |", "|---|---|---|---|"]
    for kind, rules in RULES.items():
        rows += [f"| {kind} {row}" for row in _rows(rules.values())]
    return "\n".join(rows)


def adapterhub_table() -> str:
    return "\n".join(["| setting | what happens | why |", "|---|---|---|", *_rows(ADAPTERHUB_RULES.values())])


def _rows(rules: Iterable[Rule]) -> list[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for rule in rules:
        default = {None: "null", False: "false"}.get(rule.default, str(rule.default))
        how = f"refused unless `{default}`" if rule.how == "refused" else rule.how
        if rule.setting in DROPPABLE:
            how += ", or dropped on request"
        groups.setdefault((how, rule.why), []).append(f"`{rule.setting}`")
    rows = [f"| {', '.join(names)} | {how} | {why} |" for (how, why), names in groups.items()]
    return [
        *rows,
        "| any other | refused unless `null`, `false` or empty | it may change what the adapter computes |",
    ]


def page(path: Path) -> str:
    """The page at `path` with both tables between their marks."""
    text = path.read_text(encoding="utf-8")
    for name, table in (("peft", peft_table()), ("adapterhub", adapterhub_table())):
        begin, end = (mark.format(name) for mark in MARKS)
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text

"""The tables of adapters' settings in docs/experts-and-pools.md, written from experts/adapters/rules.toml by
`cli.py`."""

from __future__ import annotations

from pathlib import Path

from phatgoose.experts.adapters.peft_rules import ADAPTERHUB_RULES, DROPPABLE, RULES, Rule

OTHER = "| any other | refused unless `null`, `false` or empty | it may change what the adapter computes |"
MARKS = "<!-- {} rules: begin -->", "<!-- {} rules: end -->"


def peft_table() -> str:
    """One row for the settings of one rule, whichever kinds it is for."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for kind, rules in RULES.items():
        for rule in rules.values():
            kinds.setdefault((f"`{rule.setting}`", *_fate(rule)), []).append(kind)
    groups: dict[tuple[str, str, str], list[str]] = {}
    for (setting, how, why), of in kinds.items():
        whose = "all" if len(of) == len(RULES) else ", ".join(of)
        groups.setdefault((whose, how, why), []).append(setting)
    rows = [f"| {of} | {', '.join(names)} | {how} | {why} |" for (of, how, why), names in groups.items()]
    head = ["| PEFT type | setting | what happens | why |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, f"| all {OTHER}"])


def adapterhub_table() -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for rule in ADAPTERHUB_RULES.values():
        groups.setdefault(_fate(rule), []).append(f"`{rule.setting}`")
    rows = [f"| {', '.join(names)} | {how} | {why} |" for (how, why), names in groups.items()]
    return "\n".join(["| setting | what happens | why |", "|---|---|---|", *rows, OTHER])


def _fate(rule: Rule) -> tuple[str, str]:
    """(what happens with a setting, why)."""
    default = {None: "null", False: "false"}.get(rule.default, str(rule.default))
    how = f"refused unless `{default}`" if rule.how == "refused" else rule.how
    return (f"{how}, or dropped on request" if rule.setting in DROPPABLE else how), rule.why


def page(path: Path) -> str:
    """The page at `path` with both tables between their marks."""
    text = path.read_text(encoding="utf-8")
    for name, table in (("peft", peft_table()), ("adapterhub", adapterhub_table())):
        begin, end = (mark.format(name) for mark in MARKS)
        head, rest = text.split(begin)
        text = f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    return text

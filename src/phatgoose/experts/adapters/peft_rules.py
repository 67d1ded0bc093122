"""Which settings of an adapter are exact, have no effect, or are refused, by rules.toml.

What is refused raises an ExpertError that names the setting and its value.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_lora import check_targets
from phatgoose.experts.adapters.peft_updates import KINDS

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base's weights unchanged. All others change the base itself."""


@dataclass(frozen=True)
class Rule:
    """What happens with one setting. A refused setting passes at its default, and if it is null or empty."""

    setting: str
    how: Literal["exact", "no effect", "refused"]
    why: str
    default: Any = None


_FILE = tomllib.loads(files("phatgoose.experts.adapters").joinpath("rules.toml").read_text("utf-8"))
DROPPABLE: dict[str, str] = _FILE["droppable"]
"""What a caller may ask to leave out of an adapter → what that is."""
OTHER_WEIGHTS: dict[str, str] = _FILE["other_weights"]
"""Files that hold weights in a way that isn't read → what to say of a folder with one."""
RULES: dict[str, dict[str, Rule]] = {}
"""PEFT type → setting → rule."""
for _entry in _FILE["rules"]:
    for _kind in _entry["kinds"]:
        for _setting in _entry["settings"]:
            _rule = Rule(_setting, _entry["how"], _entry["why"], _entry.get("default"))
            RULES.setdefault(_kind, {})[_setting] = _rule
ADAPTERHUB_RULES = RULES.pop("AdapterHub")
"""AdapterHub's setting → rule."""


def check_rules(
    settings: Mapping[str, Any],
    rules: Mapping[str, Rule],
    where: str,
    drop: Collection[str] = (),
    empty: tuple[Any, ...] = ([], {}),
) -> None:
    """Refuses settings that are unknown or have a rule to refuse them.

    `drop` names settings to let pass. A refused setting without a default also passes if its value is in `empty`.
    """
    for key, value in settings.items():
        rule = rules.get(key)
        if rule is None:
            if value is None or value is False or value in ({}, []):
                continue
            raise ExpertError(
                f"{where}: unknown setting {brief(key)} = {brief(value)}. It may change what the adapter "
                "computes, so it isn't ignored. If it has no effect at inference, remove it from the config."
            )
        says_nothing = value is None or value == rule.default or (rule.default is None and value in empty)
        if rule.how == "refused" and not says_nothing and key not in drop:
            advice = f"; or leave them out with drop={key!r} (--drop)" if key in DROPPABLE else ""
            raise ExpertError(
                f"{where}: {key} = {brief(value)} (expected {rule.default!r}): {rule.why}{advice}."
            )


def check_type(config: Mapping[str, Any], where: str) -> str:
    """The adapter's peft_type, which is one of RULES."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in RULES:
        raise ExpertError(
            f"{where}: peft_type is {brief(kind)}; {', '.join(map(repr, RULES))} can be routed exactly. "
            "Train it as one of these, or merge it into a base of its own."
        )
    return kind


def check_config(config: Mapping[str, Any], where: str, drop: Collection[str] = ()) -> None:
    """Refuses by name every PEFT setting that isn't handled exactly; `drop` names DROPPABLE ones to let pass."""
    kind = check_type(config, where)
    check_rules(config, RULES[kind], where, drop)
    check_targets(config, where)
    saved = config.get("modules_to_save") or []
    names = isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)
    if not names or len(saved) > 100:
        raise ExpertError(f"{where}: modules_to_save = {brief(saved)}, expected a list of at most 100 names.")
    bias_only = KINDS[kind].bias_only
    if config.get("bias") not in (None, "none", "all", bias_only):
        raise ExpertError(
            f"{where}: bias = {brief(config['bias'])}, expected 'none', 'all' or {bias_only!r}."
        )
    init = config.get("init_lora_weights", True)
    if kind == "LORA" and init not in PLAIN_INITS:
        raise ExpertError(
            f"{where}: init_lora_weights = {brief(init)} changes the base's weights, so the adapter is not "
            "an update of the plain base. Make a plain LoRA of it once: `phatgoose convert ADAPTER --base "
            "BASE --out FOLDER`."
        )


def check_drop(drop: Collection[str]) -> tuple[str, ...]:
    """`drop` in order, each a key of DROPPABLE."""
    if isinstance(drop, str) or not isinstance(drop, Collection):
        raise ExpertError(f"what to leave out of an adapter is {brief(drop)}, expected a list of names.")
    for name in drop:
        if not isinstance(name, str) or name not in DROPPABLE:
            raise ExpertError(
                f"{brief(name)} can't be left out of an adapter; what can: {', '.join(DROPPABLE)}."
            )
    return tuple(sorted(set(drop)))

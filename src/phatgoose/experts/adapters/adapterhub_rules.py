"""The settings of an AdapterHub adapter, checked by rules.toml, with the library's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_rules import ADAPTERHUB_RULES, check_rules

_DEFAULTS: dict[str, Any] = {
    "cross_adapter": False, "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True,
    "is_parallel": False, "ln_before": False, "scaling": 1.0,
}  # fmt: skip
"""The library's, where a config lacks a setting."""
_BOOLEANS = (
    "mh_adapter", "output_adapter", "cross_adapter", "original_ln_before", "original_ln_after", "is_parallel",
    "ln_before",
)  # fmt: skip


def check_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings in an adapter's config, defaults filled in; every one that isn't handled exactly is refused by name.

    Raises:
        ExpertError: naming the setting and its value.
    """
    given = config.get("config")
    if not isinstance(given, Mapping):
        raise ExpertError(f"{where}: config is {brief(given)}; expected an adapter's settings.")
    check_rules(given, ADAPTERHUB_RULES, where, empty=())
    settings = {**_DEFAULTS, **given}
    for key in _BOOLEANS:
        if not isinstance(settings.get(key), bool):
            raise ExpertError(f"{where}: {key} is {brief(settings.get(key))}, expected true or false.")
    scaling = settings["scaling"]
    number = isinstance(scaling, int | float) and not isinstance(scaling, bool) and abs(scaling) < 1e30
    if not number and scaling not in ("learned", "channel"):
        raise ExpertError(f"{where}: scaling is {brief(scaling)}, expected a number, 'learned' or 'channel'.")
    _check_sum(settings, where)
    return settings


def _check_sum(settings: Mapping[str, Any], where: str) -> None:
    """The block must give y + h + adapter(…), with y and h once each. Some settings drop h or add it twice."""
    before, after, own = (
        settings[k] for k in ("original_ln_before", "original_ln_after", "residual_before_ln")
    )
    if settings["is_parallel"]:
        before, own = False, True
    if not isinstance(own, bool):
        raise ExpertError(
            f"{where}: residual_before_ln = {brief(own)}: the library doesn't define it for models whose "
            "layer norms stand before their blocks."
        )
    inside = before and not own  # whether the adapter's own residual connection brings h along
    if inside == after:
        raise ExpertError(
            f"{where}: original_ln_before = {before}, residual_before_ln = {own} and original_ln_after = "
            f"{after} together {'add the residual stream twice' if after else 'drop the residual stream'}, "
            "so the adapter is no addition to the base."
        )

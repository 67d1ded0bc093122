"""Which settings of an AdapterHub adapter are handled exactly, which have no effect, and which are refused: one rule a setting.

The table in docs/experts-and-pools.md is written from these rules (`python -m phatgoose.experts.adapters.adapterhub_rules`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_rules import Rule, rows_of, write_table

_WHERE = "which layers have adapters, and of which size, is read off the tensors"
_READS = "what the adapter reads: the block's output y, y and the residual stream h, or h"
_SUM = (
    "with the settings above it, y, h and the adapter must add up with each counted once; refused otherwise"
)
RULES = {
    rule.setting: rule
    for rule in [
        *(Rule(name, "exact", "in which places of a layer there are adapters") for name in ("mh_adapter", "output_adapter", "cross_adapter")),
        *(Rule(name, "no effect", _WHERE) for name in ("reduction_factor", "leave_out")),
        Rule("non_linearity", "exact", "by the library's names, but for `gelu_10`, `laplace`, `sqrtsoftplus`, `prelu` and `xielu`"),
        *(Rule(name, "exact", _READS) for name in ("original_ln_before", "is_parallel")),
        *(Rule(name, "exact", _SUM) for name in ("residual_before_ln", "original_ln_after")),
        Rule("scaling", "exact", "a number, `learned` or `channel`"),
        Rule("ln_before", "exact", "the adapter's own layer norm"),
        Rule("adapter_residual_before_ln", "no effect", "acts with `ln_after` only"),
        *(Rule(name, "no effect", "acts in training or initialisation only") for name in
          ("init_weights", "init_weights_seed", "dropout", "stochastic_depth")),
        *(Rule(name, "no effect", "acts with `phm_layer` or `inv_adapter` only") for name in
          ("phm_dim", "factorized_phm_W", "shared_W_phm", "shared_phm_rule", "factorized_phm_rule", "phm_c_init", "phm_init_range",
           "learn_phm", "hypercomplex_nonlinearity", "phm_rank", "phm_bias", "inv_adapter_reduction_factor")),
        Rule("architecture", "refused", "only bottleneck adapters are read in this format: convert LoRA and (IA)³ to PEFT's"),
        Rule("ln_after", "refused", "the new layer norm changes the residual stream, which is no addition to it", False),
        Rule("use_gating", "refused", "its gate is a mean over the whole sequence, so it is no function of one token", False),
        Rule("inv_adapter", "refused", "invertible adapters change the embeddings for every other expert"),
        Rule("phm_layer", "refused", "hypercomplex layers (Compacter) aren't computed here", False),
    ]
}  # fmt: skip
"""Setting → rule."""

_DEFAULTS: dict[str, Any] = {
    "cross_adapter": False, "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True,
    "is_parallel": False, "ln_before": False, "scaling": 1.0,
}  # fmt: skip
"""The library's, where a config lacks a setting."""


def check_settings(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings in an adapter's config, defaults filled in; every one that isn't handled exactly is refused by name.

    Raises:
        ExpertError: naming the setting and its value.
    """
    given = config.get("config")
    if not isinstance(given, Mapping):
        raise ExpertError(f"{where}: config is {brief(given)}; expected an adapter's settings.")
    for key, value in given.items():
        rule = RULES.get(key)
        if rule is None:
            if value in (None, False, {}, []):
                continue
            raise ExpertError(
                f"{where}: unknown setting {brief(key)} = {brief(value)}; it may change what the adapter computes, so it is not ignored. "
                "If it has no effect at inference, remove it from the config."
            )
        if rule.how == "refused" and value not in (rule.default, None):
            raise ExpertError(f"{where}: {key} = {brief(value)} (expected {rule.default!r}): {rule.why}.")
    settings = {**_DEFAULTS, **given}
    for key in ("mh_adapter", "output_adapter", "cross_adapter", "original_ln_before", "original_ln_after", "is_parallel", "ln_before"):  # fmt: skip
        if not isinstance(settings.get(key), bool):
            raise ExpertError(f"{where}: {key} is {brief(settings.get(key))}, expected true or false.")
    scaling = settings["scaling"]
    number = isinstance(scaling, int | float) and not isinstance(scaling, bool) and abs(scaling) < 1e30
    if not number and scaling not in ("learned", "channel"):
        raise ExpertError(f"{where}: scaling is {brief(scaling)}, expected a number, 'learned' or 'channel'.")
    _check_sum(settings, where)
    return settings


def _check_sum(settings: Mapping[str, Any], where: str) -> None:
    """The block must give y + h + adapter(…), with y and h once each; the library can be told to drop h or to add it twice."""
    before, after, own = (
        settings[k] for k in ("original_ln_before", "original_ln_after", "residual_before_ln")
    )
    if settings["is_parallel"]:
        before, own = False, True
    if not isinstance(own, bool):
        raise ExpertError(
            f"{where}: residual_before_ln = {brief(own)}: the library doesn't define it for models whose layer norms stand before their blocks."
        )
    inside = before and not own  # whether the adapter's own residual connection brings h along
    if inside == after:
        raise ExpertError(
            f"{where}: original_ln_before = {before}, residual_before_ln = {own} and original_ln_after = {after} together "
            f"{'add the residual stream twice' if after else 'drop the residual stream'}, so the adapter is no addition to the base."
        )


def table() -> str:
    """The rules as a Markdown table, settings of one rule in one row."""
    return "\n".join(["| setting | what happens | why |", "|---|---|---|", *rows_of(RULES.values())])


BEGIN, END = "<!-- adapterhub rules: begin -->", "<!-- adapterhub rules: end -->"


def main(arguments: list[str]) -> int:
    """Writes the table into a page between its two marks, or with --check says whether it stands there."""
    return write_table(arguments, BEGIN, END, table())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

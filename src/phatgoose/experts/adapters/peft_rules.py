"""Which settings of a PEFT adapter are handled exactly, which have no effect, and which are refused: one rule a setting.

The table in docs/experts-and-pools.md is written from these rules (`python -m phatgoose.experts.adapters.peft_rules`).
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_target_parameters import check_targets

DROPPABLE = {
    "modules_to_save": "the modules it saved whole (a classification head, embeddings and heads that aren't the base's own)",
    "trainable_token_indices": "the token embeddings it retrained",
    "prediction_head": "the prediction head that AdapterHub saved along",
}
"""What a caller may ask to leave out of an adapter, knowing that it then computes something else."""

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Values of init_lora_weights that leave the base's weights as they were; the others change the base itself."""


@dataclass(frozen=True)
class Rule:
    """What happens with one setting. A refused one passes at its default, and where it is null or empty."""

    setting: str
    how: Literal["exact", "no effect", "refused"]
    why: str
    default: Any = None


_COMMON = [
    *(
        Rule(name, "no effect", "says where it comes from")
        for name in (
            "task_type",
            "auto_mapping",
            "peft_version",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
        )
    ),
    *(
        Rule(name, "no effect", "which modules are adapted is read off the tensors")
        for name in ("target_modules", "exclude_modules")
    ),
    Rule("peft_type", "exact", "`LORA`, `IA3`, `ADALORA` or `VERA`; any other kind is refused"),
    Rule("fan_in_fan_out", "exact", "the layer's own weight says how it lies (GPT-2's Conv1D)"),
    Rule(
        "modules_to_save",
        "exact",
        "embeddings and heads must be the base's own (`route` compares them); other modules are refused",
    ),
]
_BIAS = Rule(
    "bias",
    "exact",
    "without effect where the base has no biases; an adapter that brings retrained ones is refused",
    "none",
)
_LAYERS = [
    Rule(name, "no effect", "which modules are adapted is read off the tensors")
    for name in ("layers_to_transform", "layers_pattern")
]
_OTHER_MODEL = [
    Rule("trainable_token_indices", "refused", "the adapter changes token embeddings, which can't be routed token by token"),
    Rule("layer_replication", "refused", "the adapter is for a base with repeated layers, another model than the plain base"),
    Rule("alora_invocation_tokens", "refused", "an activated LoRA acts only after its invocation tokens, which routing doesn't know"),
    Rule("megatron_config", "refused", "the adapter is for Megatron's parallel layers"),
    Rule("arrow_config", "refused", "Arrow is a router, not an adapter: add its experts to a pool and choose a router there"),
]  # fmt: skip

_LORA = [
    *_COMMON,
    *(Rule(name, "exact", "each module's rank and scale, as PEFT resolves them") for name in
      ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")),
    Rule("lora_bias", "exact", "an output bias, scaled like B A u"),
    Rule("use_dora", "exact", "c = m/‖W + sBA‖ from the base's weight, for linear layers"),
    Rule("init_lora_weights", "exact", "`true`, `false`, `null`, `gaussian`, `orthogonal`, `eva` and `mica` leave the base as it is; all others change it and are refused until `phatgoose convert` has made a plain LoRA of them"),
    *_LAYERS,
    *(Rule(name, "no effect", "acts in training or initialisation only") for name in
      ("lora_dropout", "loftq_config", "eva_config", "megatron_core", "qalora_group_size", "runtime_config",
       "velora_config", "monteclora_config")),
    *(Rule(name, "no effect", "ms-swift's settings of training") for name in ("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr")),
    Rule("ensure_weight_tying", "exact", "no effect, unless embeddings are adapted: then `true` is refused"),
    _BIAS,
    Rule("target_parameters", "exact", "`gate_up_proj`, `up_proj` and `down_proj` of a mixture's experts, expert by expert, and `weight` of linear layers; others are refused"),
    *_OTHER_MODEL,
    Rule("use_qalora", "refused", "QALoRA pools the input by groups before A", False),
    *(Rule(name, "refused", "it changes the base's weights; `phatgoose convert` makes a plain LoRA of it")
      for name in ("corda_config", "lora_ga_config")),
    *(Rule(name, "refused", "a variant of LoRA that isn't computed exactly here") for name in ("use_bdlora", "kasa_config")),
]  # fmt: skip

_ADALORA = [
    *_COMMON,
    *(Rule(name, "exact", "each module's scale alpha/(init_r + 10⁻⁵), and its rank: how many of the init_r were kept") for name in
      ("init_r", "lora_alpha", "rank_pattern")),
    _BIAS,
    *_LAYERS,
    *(Rule(name, "no effect", "acts in training or initialisation only") for name in
      ("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "init_lora_weights", "lora_dropout",
       "loftq_config", "eva_config", "megatron_core", "qalora_group_size", "runtime_config")),
    *(Rule(name, "no effect", "PEFT's AdaLoRA doesn't read it") for name in ("r", "alpha_pattern", "use_rslora", "ensure_weight_tying")),
    *(Rule(name, "refused", "AdaLoRA isn't defined with it", False) for name in ("use_dora", "lora_bias", "use_qalora")),
    *(Rule(name, "refused", "AdaLoRA isn't defined with it") for name in
      ("target_parameters", "corda_config", "lora_ga_config", "velora_config", "monteclora_config", "use_bdlora", "kasa_config")),
    *_OTHER_MODEL,
]  # fmt: skip

_VERA = [
    *_COMMON,
    *(Rule(name, "exact", "the shared A and B, as saved or as PEFT draws them from the seed") for name in
      ("r", "save_projection", "projection_prng_key")),
    _BIAS,
    *_LAYERS,
    *(Rule(name, "no effect", "acts in training or initialisation only") for name in ("vera_dropout", "d_initial", "init_weights")),
]  # fmt: skip

_IA3 = [
    *_COMMON,
    Rule("feedforward_modules", "exact", "scales the module's input there, its output elsewhere; read off the vectors' shapes"),
    Rule("init_ia3_weights", "no effect", "acts in training or initialisation only"),
]  # fmt: skip

RULES: dict[str, dict[str, Rule]] = {
    kind: {rule.setting: rule for rule in rules}
    for kind, rules in (("LORA", _LORA), ("IA3", _IA3), ("ADALORA", _ADALORA), ("VERA", _VERA))
}
"""PEFT type → setting → rule."""


def check_type(config: Mapping[str, Any], where: str) -> str:
    """The adapter's peft_type, which is one of RULES.

    Raises:
        ExpertError: it isn't.
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in RULES:
        raise ExpertError(
            f"{where}: peft_type is {brief(kind)}; {', '.join(map(repr, RULES))} can be routed exactly. Train it as one of these, "
            "or merge it into a base of its own."
        )
    return kind


def check_config(config: Mapping[str, Any], where: str, drop: Collection[str] = ()) -> None:
    """Refuses by name every PEFT setting that isn't handled exactly; `drop` names DROPPABLE ones to let pass.

    Raises:
        ExpertError: naming the setting and its value.
    """
    kind = check_type(config, where)
    for key, value in config.items():
        rule = RULES[kind].get(key)
        if rule is None:
            if value is None or value is False or value in ({}, []):
                continue
            raise ExpertError(
                f"{where}: unknown setting {brief(key)} = {brief(value)}; it may change what the adapter computes, so it is not ignored. "
                "If it has no effect at inference, remove it from the config."
            )
        empty = value is None or (value in ([], {}) and rule.default is None)
        if rule.how == "refused" and value != rule.default and not empty and key not in drop:
            advice = f"; or leave them out with drop={key!r} (--drop)" if key in DROPPABLE else ""
            raise ExpertError(
                f"{where}: {key} = {brief(value)} (expected {rule.default!r}): {rule.why}{advice}."
            )
    check_targets(config, where)
    saved = config.get("modules_to_save") or []
    if (
        not isinstance(saved, list)
        or len(saved) > 100
        or not all(isinstance(name, str) and name for name in saved)
    ):
        raise ExpertError(f"{where}: modules_to_save = {brief(saved)}, expected a list of at most 100 names.")
    if config.get("bias") not in (None, "none", "all", f"{_ONLY.get(kind, kind.lower())}_only"):
        raise ExpertError(
            f"{where}: bias = {brief(config['bias'])}, expected 'none', 'all' or '{_ONLY.get(kind, kind.lower())}_only'."
        )
    init = config.get("init_lora_weights", True)
    if kind == "LORA" and init not in PLAIN_INITS:
        raise ExpertError(
            f"{where}: init_lora_weights = {brief(init)} changes the base's weights, so the adapter is not an update of the plain base. "
            "Make a plain LoRA of it once: `phatgoose convert ADAPTER --base BASE --out FOLDER`."
        )


_ONLY = {"ADALORA": "lora"}
"""PEFT type → what its bias setting calls the modules that it adapts, where that isn't the type's own name."""


def check_drop(drop: Collection[str]) -> tuple[str, ...]:
    """`drop` in order, each a key of DROPPABLE.

    Raises:
        ExpertError: for anything else.
    """
    if isinstance(drop, str) or not isinstance(drop, Collection):
        raise ExpertError(f"what to leave out of an adapter is {brief(drop)}, expected a list of names.")
    for name in drop:
        if not isinstance(name, str) or name not in DROPPABLE:
            raise ExpertError(
                f"{brief(name)} can't be left out of an adapter; what can: {', '.join(DROPPABLE)}."
            )
    return tuple(sorted(set(drop)))


def table() -> str:
    """The rules as a Markdown table, settings of one rule in one row."""
    rows = ["| PEFT type | setting | what happens | why |", "|---|---|---|---|"]
    for kind, rules in RULES.items():
        rows += [f"| {kind} {row}" for row in rows_of(rules.values())]
    return "\n".join(rows)


def rows_of(rules: Iterable[Rule]) -> list[str]:
    """One row of a table for each rule: | setting, … | what happens | why |."""
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


BEGIN, END = "<!-- rules: begin -->", "<!-- rules: end -->"


def main(arguments: list[str]) -> int:
    """Writes the table into a page between its two marks, or with --check says whether it stands there."""
    return write_table(arguments, BEGIN, END, table())


def write_table(arguments: list[str], begin: str, end: str, text: str) -> int:
    """What `main` does, for any two marks and text."""
    path = Path(next((a for a in arguments if not a.startswith("-")), "docs/experts-and-pools.md"))
    page = path.read_text(encoding="utf-8")
    head, rest = page.split(begin)
    wanted = f"{head}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    if "--check" in arguments:
        return int(wanted != page)
    path.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The tensors of a PEFT adapter at one module → an update, for each kind that is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_lora import (
    Settings,
    check_targets,
    finite,
    in_float32,
    lora_update,
    of_parameters,
    whole,
)
from phatgoose.experts.adapters.tensors import Shape, check_tensors
from phatgoose.ops.update import Projections, SharedUpdate, Update, no_rows

Parts = Mapping[str, Tensor]
"""The tensors of one module, by part."""


@dataclass(frozen=True)
class Kind:
    """One of PEFT's kinds of adapter. `rules.toml` has rules for the settings of each."""

    display_name: str
    """What people call it."""
    parts: Mapping[str, str]
    """Part → pattern of what its key has behind the module's path; the pattern begins with a plain name."""
    bias_only: str
    """The value of the setting `bias` for the biases of adapted modules alone."""
    updates: Callable[[Mapping[str, Any], Mapping[str, Parts], Parts, str], dict[str, Update]]
    """(config, parts by module path, tensors that all modules share, name for messages) → updates by module path."""
    empty: bool = False
    """Whether tensors without values are allowed."""
    tag: str | None = None
    """The Hub's tag for it."""
    has_rank: bool = True
    """Whether the setting `r` is the rank of its updates."""

    def part(self, plain: str) -> tuple[str, str] | None:
        """The module's path and the part that a key names; None if it names none of this kind."""
        for name, pattern in self._patterns.items():
            if match := pattern.fullmatch(plain):
                return match[1], name
        return None

    @cached_property
    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {name: re.compile(rf"(.+)\.{part}") for name, part in self.parts.items()}

    @property
    def names(self) -> set[str]:
        """The names in keys of its tensors: "lora_A", …"""
        return {re.split(r"\W", part)[0] for part in self.parts.values()}


def _all_lora(
    config: Mapping[str, Any], found: Mapping[str, Parts], _: Parts, where: str
) -> dict[str, Update]:
    """LoRA's scale is alpha/r, or alpha/√r with rsLoRA. rank_pattern and alpha_pattern may give a module its
    own r and alpha."""
    settings = Settings(config, where)
    rest = dict(found)
    updates = of_parameters(rest, check_targets(config, where), settings, where)
    return updates | {path: lora_update(settings, path, parts, where) for path, parts in rest.items()}


def _all_ia3(_: Mapping[str, Any], found: Mapping[str, Parts], __: Parts, where: str) -> dict[str, Update]:
    """PEFT keeps l as [d_out, 1] if it scales the output, bias included, and as [1, d_in] if it scales the input."""
    updates = {}
    for path, parts in found.items():
        vector = parts["ia3"]
        if vector.ndim != 2 or 1 not in vector.shape or vector.numel() == 1:
            raise ExpertError(
                f"{where}: module {path} has ia3_l {list(vector.shape)}, expected [d_out, 1] or [1, d_in] of more than "
                "one value, so that it can be told whether it scales the output or the input."
            )
        flat = vector.reshape(-1)
        if vector.shape[0] == 1:
            updates[path] = Update(*no_rows(len(flat), None), input_scale=flat)
        else:
            updates[path] = Update(*no_rows(None, len(flat)), output_scale=flat)
    return updates


def _all_adalora(
    config: Mapping[str, Any], found: Mapping[str, Parts], _: Parts, where: str
) -> dict[str, Update]:
    """AdaLoRA (Zhang et al. 2023): ΔW = alpha/(init_r + 1e-5) · B (E ⊙ A), E [r, 1]. Modules whose rank became
    0 get no update."""
    first = whole(config.get("init_r", 12), 0, f"{where}: init_r")
    alpha = finite(config.get("lora_alpha", 8), f"{where}: lora_alpha")
    kept = _kept_ranks(config.get("rank_pattern"), where)
    updates = {}
    for path, parts in found.items():
        rank = kept.get(path, first)
        shapes: dict[str, Shape] = {"A": (rank, "d_in"), "B": ("d_out", rank), "E": (rank, 1)}
        hint = f": its rank is {rank} by init_r and rank_pattern"
        check_tensors(parts, shapes, f"{where}: module {path}", "lora_", hint)
        if rank:
            scale = in_float32(
                (alpha if alpha > 0 else rank) / (first + 1e-5), f"{where}: lora_alpha is {brief(alpha)}"
            )
            a, b, e = parts["A"], parts["B"], parts["E"]
            wide = torch.promote_types(torch.promote_types(a.dtype, e.dtype), torch.float32)
            updates[path] = Update(a.to(wide) * e.to(wide), b, scale)
    return updates


def _kept_ranks(pattern: Any, where: str) -> dict[str, int]:
    """Ranks by module path, from AdaLoRA's rank_pattern ("PATH.lora_E" → which of the init_r ranks were kept)."""
    ranks = {}
    for name, kept in (pattern or {}).items() if isinstance(pattern, dict | None) else [("", None)]:
        if not isinstance(kept, list) or not all(isinstance(one, bool) for one in kept):
            raise ExpertError(
                f"{where}: rank_pattern has {brief(kept)} for {brief(name)}, expected a list of true and false."
            )
        ranks[name.removesuffix(".default").removesuffix(".lora_E")] = sum(kept)
    return ranks


def _all_vera(
    config: Mapping[str, Any], found: Mapping[str, Parts], shared: Parts, where: str
) -> dict[str, Update]:
    """VeRA (Kopiczko et al. 2024): ΔW = diag(b) B diag(d) A. All modules share A and B, which are saved or
    drawn from a seed."""
    saved, seed = config.get("save_projection", True), config.get("projection_prng_key", 0)
    if not isinstance(saved, bool):
        raise ExpertError(f"{where}: save_projection is {brief(saved)}, expected true or false.")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ExpertError(f"{where}: projection_prng_key is {brief(seed)}, expected a whole number.")
    rank = whole(config.get("r", 256), 1, f"{where}: r")
    widest: dict[str, Shape] = {"vera_A": (rank, "columns"), "vera_B": ("rows", rank)}
    hint = f" for the configured rank {rank}"
    check_tensors(
        shared, widest if saved else {}, f"{where}: save_projection is {saved}, and the adapter", "", hint
    )
    projections = Projections(shared.get("vera_A"), shared.get("vera_B"), None if saved else seed)
    updates = {}
    for path, parts in found.items():
        check_tensors(parts, {"b": ("d_out",), "d": (rank,)}, f"{where}: module {path}", "vera_lambda_", hint)
        b, d = parts["b"], parts["d"]
        if saved and len(shared["vera_B"]) < len(b):
            raise ExpertError(
                f"{where}: module {path} has {len(b)} outputs, and vera_B only {len(shared['vera_B'])} rows."
            )
        updates[path] = Update(*no_rows(None, len(b)), shared=SharedUpdate(b, d, projections))
    return updates


KINDS = {
    "LORA": Kind(
        "LoRA",
        {
            "A": r"lora_A\.weight",
            "B": r"lora_B\.weight",
            "bias": r"lora_B\.bias",
            "magnitude": r"lora_magnitude_vector(?:\.weight)?",
            "embedding_A": "lora_embedding_A",
            "embedding_B": "lora_embedding_B",
        },
        "lora_only",
        _all_lora,
        tag="lora",
    ),
    "IA3": Kind("(IA)³", {"ia3": "ia3_l"}, "ia3_only", _all_ia3, tag="ia3", has_rank=False),
    "ADALORA": Kind(
        "AdaLoRA",
        {"A": "lora_A", "B": "lora_B", "E": "lora_E"},
        "lora_only",
        _all_adalora,
        empty=True,
        has_rank=False,
    ),
    "VERA": Kind("VeRA", {"b": "vera_lambda_b", "d": "vera_lambda_d"}, "vera_only", _all_vera),
}
"""By PEFT's name. `rules.toml` has rules for the same names."""

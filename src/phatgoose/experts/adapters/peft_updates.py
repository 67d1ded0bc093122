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
from phatgoose.experts.adapters.peft_lora import Settings, finite, in_float32, lora_update
from phatgoose.experts.adapters.peft_target_parameters import check_targets, of_parameters
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


def _ia3(path: str, parts: Mapping[str, Tensor], where: str) -> Update:
    """PEFT keeps l as [d_out, 1] if it scales the output, bias included, and as [1, d_in] if it scales the input."""
    if parts.keys() != {"ia3"}:
        raise ExpertError(
            f"{where}: module {path} has {', '.join(sorted(parts))}; an (IA)³ adapter has one ia3_l."
        )
    vector = parts["ia3"]
    if vector.ndim != 2 or 1 not in vector.shape:
        raise ExpertError(
            f"{where}: module {path} has ia3_l {list(vector.shape)}, expected [d_out, 1] or [1, d_in]."
        )
    if vector.shape[0] == 1 and vector.shape[1] != 1:
        return Update(*no_rows(vector.shape[1], None), input_scale=vector.reshape(-1))
    if vector.shape == (1, 1):
        raise ExpertError(
            f"{where}: module {path} has an ia3_l of one value: whether it scales the input or the output "
            "can't be told."
        )
    return Update(*no_rows(None, vector.shape[0]), output_scale=vector.reshape(-1))


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
    return {path: _ia3(path, parts, where) for path, parts in found.items()}


def _all_adalora(
    config: Mapping[str, Any], found: Mapping[str, Parts], _: Parts, where: str
) -> dict[str, Update]:
    """AdaLoRA (Zhang et al. 2023): ΔW = alpha/(init_r + 1e-5) · B (E ⊙ A), E [r, 1]. Modules whose rank became
    0 get no update."""
    first = finite(config.get("init_r", 12), f"{where}: init_r")
    alpha = finite(config.get("lora_alpha", 8), f"{where}: lora_alpha")
    if first != int(first) or first < 0:
        raise ExpertError(f"{where}: init_r is {brief(first)}, expected a whole number of at least 0.")
    kept = _kept_ranks(config.get("rank_pattern"), where)
    updates = {}
    for path, parts in found.items():
        if parts.keys() != {"A", "B", "E"}:
            raise ExpertError(
                f"{where}: module {path} has {', '.join(sorted(parts))}; AdaLoRA has lora_A, lora_B and lora_E."
            )
        a, b, e = parts["A"], parts["B"], parts["E"]
        rank = kept.get(path, int(first))
        if a.ndim != 2 or b.ndim != 2 or (a.shape[0], b.shape[1], tuple(e.shape)) != (rank, rank, (rank, 1)):
            raise ExpertError(
                f"{where}: module {path} has lora_A {list(a.shape)}, lora_B {list(b.shape)} and lora_E "
                f"{list(e.shape)}; expected [{rank}, d_in], [d_out, {rank}] and [{rank}, 1]: its rank is "
                f"{rank} by init_r and rank_pattern."
            )
        if rank:
            scale = in_float32(
                (alpha if alpha > 0 else rank) / (first + 1e-5), f"{where}: lora_alpha is {brief(alpha)}"
            )
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
    if (
        not isinstance(saved, bool)
        or (saved and shared.keys() != {"vera_A", "vera_B"})
        or (not saved and shared)
    ):
        raise ExpertError(
            f"{where}: save_projection is {brief(saved)}, and the file holds of vera_A and vera_B: "
            f"{', '.join(sorted(shared)) or 'none'}."
        )
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise ExpertError(f"{where}: projection_prng_key is {brief(seed)}, expected a whole number.")
    projections, rank = (
        Projections(shared.get("vera_A"), shared.get("vera_B"), None if saved else seed),
        config.get("r", 256),
    )
    updates = {}
    for path, parts in found.items():
        if parts.keys() != {"b", "d"}:
            raise ExpertError(
                f"{where}: module {path} has {', '.join(sorted(parts))}; VeRA has vera_lambda_b and vera_lambda_d."
            )
        b, d = parts["b"], parts["d"]
        if b.ndim != 1 or tuple(d.shape) != (rank,):
            raise ExpertError(
                f"{where}: module {path} has vera_lambda_b {list(b.shape)} and vera_lambda_d "
                f"{list(d.shape)}; expected [d_out] and [{brief(rank)}] for the configured rank."
            )
        if saved and (shared["vera_A"].ndim, shared["vera_B"].ndim) != (2, 2):
            raise ExpertError(f"{where}: vera_A and vera_B must be matrices.")
        if saved and (shared["vera_A"].shape[0], shared["vera_B"].shape[1]) != (rank, rank):
            raise ExpertError(
                f"{where}: vera_A is {list(shared['vera_A'].shape)} and vera_B "
                f"{list(shared['vera_B'].shape)}; expected [{rank}, …] and […, {rank}]."
            )
        if saved and shared["vera_B"].shape[0] < b.shape[0]:
            raise ExpertError(
                f"{where}: module {path} has {b.shape[0]} outputs, and vera_B only {shared['vera_B'].shape[0]} rows."
            )
        updates[path] = Update(*no_rows(None, b.shape[0]), shared=SharedUpdate(b, d, projections))
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

"""Merge a pool into one expert: average, TIES, DARE."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from phatgoose.errors import PoolError
from phatgoose.experts.adapters.peft import PREFIX
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.ops.update import Update


def merged(pool: Pool, name: str = "merged") -> Expert:
    """The exact average of the experts' updates, Δ = (1/E) Σ_e Δ_e, as one PEFT expert; absent updates count as zero.

    LoRA rows are concatenated: A = [A_1; …; A_E], B = [s_1 B_1, …, s_E B_E]/E, of rank Σ r_e, in float32, and
    biases are averaged. (PEFT's "linear", which averages A and B separately, is another function.) (IA)³ vectors are
    averaged.

    Raises:
        PoolError: the average is no single PEFT adapter: kinds are mixed, or DoRA or bottleneck adapters are among
            them. The router Uniform computes the same function without merging.
    """
    kinds = {u.kind for e in pool.experts for u in e.updates.values()}
    if kinds == {"(IA)³"}:
        return _peft_expert(pool, name, *_average_ia3(pool))
    if kinds == {"LoRA"}:
        return _peft_expert(pool, name, *_average_lora(pool))
    raise PoolError(
        f"experts of the kinds {', '.join(sorted(kinds))} don't average to one PEFT adapter; route with Uniform() "
        "instead, which is the same function."
    )


def ties(pool: Pool, density: float = 0.2, name: str = "ties") -> Expert:
    """TIES (Yadav et al. 2023, arXiv 2306.01708): trim, elect signs, average the entries that agree; λ = 1.

    Of each expert's ΔW, the `density` share of entries with the largest magnitudes is kept. For each entry, the
    sign with the larger total is elected, and entries of that sign are averaged over the experts that have one.
    PEFT's own function computes it, module by module (the paper trims over all modules at once). The result is one
    LoRA expert of full rank.

    Raises:
        PoolError: experts that aren't plain LoRA, or a density outside (0, 1].
    """
    from peft.utils.merge_utils import ties as merge_tensors

    def combine(path: str, deltas: list[Tensor]) -> Tensor:
        return merge_tensors(deltas, torch.ones(len(deltas)), density)

    return _dense(pool, name, {"kind": "ties", "density": density}, density, combine)


def dare(pool: Pool, density: float = 0.1, seed: int = 0, name: str = "dare") -> Expert:
    """DARE (Yu et al. 2024, arXiv 2311.03099), then the average. The result is one LoRA expert of full rank.

    Each entry of each ΔW is kept with probability `density`, and divided by it. Which entries are kept depends only
    on the seed, the module and the expert's position.

    Raises:
        PoolError: experts that aren't plain LoRA, or a density outside (0, 1].
    """
    from peft.utils.merge_utils import prune

    def combine(path: str, deltas: list[Tensor]) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(f"{seed}\0{path}".encode()))
            kept = [prune(delta, density, method="random", rescale=True) for delta in deltas]
        return torch.stack(kept).mean(0)

    return _dense(pool, name, {"kind": "dare", "density": density, "seed": seed}, density, combine)


def _dense(
    pool: Pool, name: str, how: dict[str, Any], density: float, combine: Callable[[str, list[Tensor]], Tensor]
) -> Expert:
    """Combines the ΔW of all experts, module by module; an absent update counts as zero."""
    if not 0 < density <= 1:
        raise PoolError(f"density is {density!r}, expected a share above 0 and at most 1.")
    for expert in pool.experts:
        for path, update in expert.updates.items():
            if not update.is_low_rank:
                raise PoolError(
                    f"expert {expert.name!r} is {update.described} at {path}; {how['kind']} is defined for plain "
                    "LoRA of linear layers."
                )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path in pool.modules:
        first = _updates_at(pool, path)[0]
        nothing = torch.zeros(first.d_out, first.d_in)
        parts = [e.updates[path].weight() if path in e.updates else nothing for e in pool.experts]
        with warnings.catch_warnings():
            # PEFT warns of a density of 1, which keeps everything.
            warnings.filterwarnings("ignore", "The density 1", UserWarning)
            delta = combine(path, parts)
        # ΔW as a product B A of full rank: ΔW itself is one factor, and the identity of the smaller size the other.
        wide = first.d_in >= first.d_out
        a, b = (delta, torch.eye(first.d_out)) if wide else (torch.eye(first.d_in), delta)
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
        ranks[path] = min(first.d_in, first.d_out)
    return _peft_expert(pool, name, _lora_config(ranks), tensors, how)


def _updates_at(pool: Pool, path: str) -> list[Update]:
    return [e.updates[path] for e in pool.experts if path in e.updates]


def _average_lora(pool: Pool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the average of LoRA experts."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    biased = any(u.bias is not None for e in pool.experts for u in e.updates.values())
    for path in pool.modules:
        updates = _updates_at(pool, path)
        share = 1 / len(pool.experts)  # this and each expert's scale go into B, so that the merged scale is 1
        names = ("embedding_A", "embedding_B") if updates[0].embedding else ("A.weight", "B.weight")
        tensors[f"{PREFIX}{path}.lora_{names[0]}"] = torch.cat([u.A.float() for u in updates])
        tensors[f"{PREFIX}{path}.lora_{names[1]}"] = torch.cat(
            [u.B.float() * (u.scale * share) for u in updates], dim=1
        )
        if biased and not updates[0].embedding:
            zero = torch.zeros(updates[0].d_out)
            total = sum((u.bias.float() * (u.scale * share) for u in updates if u.bias is not None), zero)
            tensors[f"{PREFIX}{path}.lora_B.bias"] = total
        ranks[path] = sum(u.rank for u in updates)
    return {**_lora_config(ranks), "lora_bias": biased}, tensors


def _lora_config(ranks: dict[str, int]) -> dict[str, Any]:
    """PEFT's settings for modules of these ranks whose scale is 1."""
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    special: dict[str, int] = {path: rank for path, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "r": common,
        "lora_alpha": common,
        "rank_pattern": special,
        "alpha_pattern": dict(special),
        "bias": "none",
    }


def _average_ia3(pool: Pool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of the average of (IA)³ experts."""
    tensors: dict[str, Tensor] = {}
    inputs: list[str] = []
    for path in pool.modules:
        updates = _updates_at(pool, path)
        of_input = {u.input_scale is not None for u in updates}
        if len(of_input) > 1:
            raise PoolError(
                f"some (IA)³ experts scale the input of {path} and some its output, which don't average to one "
                "adapter; route with Uniform() instead, which is the same function."
            )
        vectors = [u.input_scale if u.input_scale is not None else u.output_scale for u in updates]
        mean = 1 + torch.stack([v.float() - 1 for v in vectors if v is not None]).sum(0) / len(pool.experts)
        inputs += [path] if of_input == {True} else []
        tensors[f"{PREFIX}{path}.ia3_l"] = mean[None, :] if of_input == {True} else mean[:, None]
    return {"peft_type": "IA3", "feedforward_modules": sorted(inputs)}, tensors


def _peft_expert(
    pool: Pool,
    name: str,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    how: dict[str, Any] | None = None,
) -> Expert:
    first = pool.experts[0].adapter_config
    config = {
        **settings,
        "task_type": first.get("task_type"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "fan_in_fan_out": first.get("fan_in_fan_out", False),
        "target_modules": sorted(pool.modules),
        "inference_mode": True,
    }
    provenance: dict[str, Any] = {**(how or {"kind": "merged"}), "experts": list(pool.names)}
    if pool.base is not None:
        provenance["base"] = pool.base.to_json()
    return Expert(name, config, tensors, provenance=provenance)

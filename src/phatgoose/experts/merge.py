"""Pool → one expert."""

from __future__ import annotations

from typing import Any

import torch

from phatgoose.experts.expert import Expert
from phatgoose.experts.peft import PREFIX
from phatgoose.experts.pool import Pool


def merged(pool: Pool, name: str = "merged") -> Expert:
    """The average of the experts' updates, ΔW = (1/E) Σ_e s_e B_e A_e, exactly, as one LoRA expert.

    Rows are concatenated: A = [A_1; …; A_E], B = [s_1 B_1, …, s_E B_E]/E, of rank Σ r_e, in float32. An expert that has nothing
    at a module counts there as zero. (Averaging the A and the B apart, PEFT's "linear", is another function.)
    """
    tensors, ranks = {}, {}
    for path in pool.modules:
        updates = [e.updates[path] for e in pool.experts if path in e.updates]
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.cat([u.A.float() for u in updates])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.cat(
            [u.B.float() * (u.scale / len(pool.experts)) for u in updates], dim=1
        )
        ranks[path] = sum(u.rank for u in updates)
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    special: dict[str, int] = {path: rank for path, rank in ranks.items() if rank != common}
    first = pool.experts[0].adapter_config
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": first.get("task_type"),
        "base_model_name_or_path": first.get("base_model_name_or_path"),
        "fan_in_fan_out": first.get("fan_in_fan_out", False),
        "target_modules": sorted(ranks),
        "r": common,
        "lora_alpha": common,
        "rank_pattern": special,
        "alpha_pattern": dict(special),
        "bias": "none",
        "inference_mode": True,
    }
    provenance: dict[str, Any] = {"kind": "merged", "experts": list(pool.names)}
    if pool.base is not None:
        provenance["base"] = pool.base.to_json()
    return Expert(name, config, tensors, provenance=provenance)

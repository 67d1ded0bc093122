"""Small valid files to start from, made without a model: adapters of every kind, experts with gates, pools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool

PREFIX = "base_model.model."
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj")
BASE = {
    "spec": "tiny",
    "architecture": {"model_type": "llama", "hidden_size": 4, "layers": 2},
    "samples": {"embedding": [0.5, -0.25, 1e-3], "norm:model.norm.weight": [1.0, 1.0]},
}
PROVENANCE = {
    "kind": "expert", "base": BASE, "task": {"name": "task", "hash": "0" * 64, "rows": {"train": 3}},
    "validation_losses": [[0, 2.5], [10, 1.25]], "best_step": 10, "seed": 1, "versions": {"torch": "2"},
}  # fmt: skip


def lora(**more: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"],
        "lora_dropout": 0.0, "bias": "none", "base_model_name_or_path": "tiny", "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": None, "task_type": "CAUSAL_LM", **more,
    }  # fmt: skip


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def pairs(ranks: tuple[int, int] = (2, 2), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = {}
    for path, rank in zip(PATHS, ranks, strict=True):
        found[f"{PREFIX}{path}.lora_A.weight"] = _random(rank, 4, dtype=dtype)
        found[f"{PREFIX}{path}.lora_B.weight"] = _random(6, rank, dtype=dtype)
    return found


def extra(name: str, *shape: int) -> dict[str, Tensor]:
    return {f"{PREFIX}{path}.{name}": _random(*shape) for path in PATHS}


def adapters() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Config and tensors of one adapter of each kind that PEFT writes."""
    vocabulary = f"{PREFIX}model.embed_tokens"
    return {
        "lora": (lora(), pairs()),
        "patterns": (
            lora(
                use_rslora=True, rank_pattern={"q_proj": 3, r"layers\.[1-9]\.mlp": 7},
                alpha_pattern={"layers.1.mlp.up_proj": 8},
            ),
            pairs((3, 2), torch.bfloat16),
        ),
        "bias": (lora(lora_bias=True), {**pairs(dtype=torch.float16), **extra("lora_B.bias", 6)}),
        "dora": (lora(use_dora=True), {**pairs(), **extra("lora_magnitude_vector", 6)}),
        "embedding": (
            lora(target_modules=["embed_tokens", "q_proj", "up_proj"]),
            {
                **pairs(), f"{vocabulary}.lora_embedding_A": _random(2, 9),
                f"{vocabulary}.lora_embedding_B": _random(4, 2), f"{vocabulary}.base_layer.weight": _random(9, 4),
            },
        ),
        "ia3": (
            {
                "peft_type": "IA3", "target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"],
                "base_model_name_or_path": "tiny", "fan_in_fan_out": False, "init_ia3_weights": True,
                "modules_to_save": None,
            },
            {f"{PREFIX}{PATHS[0]}.ia3_l": _random(6, 1), f"{PREFIX}{PATHS[1]}.ia3_l": _random(1, 4)},
        ),
    }  # fmt: skip


def bottleneck() -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An AdapterHub adapter (Pfeiffer) of a two-layer Llama."""
    settings = {
        "mh_adapter": False, "output_adapter": True, "reduction_factor": 2, "non_linearity": "relu",
        "original_ln_before": True, "original_ln_after": False, "residual_before_ln": False,
        "ln_before": False, "ln_after": False, "scaling": 1.0, "is_parallel": False, "phm_layer": False,
        "inv_adapter": None, "cross_adapter": False, "leave_out": [],
    }  # fmt: skip
    config = {
        "config": settings, "hidden_size": 4, "model_class": "LlamaAdapterModel", "model_name": "tiny",
        "model_type": "llama", "name": "one", "version": "adapters.1.3.0", "config_id": "0",
    }  # fmt: skip
    tensors = {}
    for layer in range(2):
        stem = f"model.layers.{layer}.output_adapters.adapters.one"
        tensors |= {
            f"{stem}.adapter_down.0.weight": _random(2, 4), f"{stem}.adapter_down.0.bias": _random(2),
            f"{stem}.adapter_up.weight": _random(4, 2), f"{stem}.adapter_up.bias": _random(4),
        }  # fmt: skip
    return config, tensors


def write_adapter(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    weights: str = "adapter_model.safetensors",
) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / weights).write_bytes(save(tensors, {"format": "pt"}))


def expert(folder: Path, kind: str, name: str) -> Expert:
    """An expert of one kind with gates and a record."""
    config, tensors = adapters()[kind]
    write_adapter(folder, config, tensors)
    found = Expert.from_peft(folder, name=name, provenance=PROVENANCE)
    gates = {path: _random(update.gate_dim or 4) for path, update in found.updates.items()}
    texts = torch.nn.functional.normalize(_random(3, 5), dim=1)
    signature = DataSignature(gates, texts, "encoder", "e" * 64)
    return found.with_gates(gates, {"kind": "gate", "seconds": 1.5}).with_signature(
        signature, {"rows": 3, "texts": 3}
    )


def adapter_folders(folder: Path) -> list[Path]:
    for kind, (config, tensors) in adapters().items():
        write_adapter(folder / kind, config, tensors)
    return sorted(folder.iterdir())


def expert_folders(folder: Path) -> list[Path]:
    """As `save` writes them, but without the hashes, which would be all that a change meets."""
    found = []
    for kind in adapters():
        place = expert(folder / "plain" / kind, kind, kind).save(folder / kind)
        record = json.loads((place / "expert.json").read_text())
        for key in ("adapter_sha256", "gates_sha256", "signature_sha256"):
            del record[key]
        (place / "expert.json").write_text(json.dumps(record))
        found.append(place)
    return found


def pool_folders(folder: Path, change: Callable[[Path], object] | None = None) -> list[Path]:
    made = [expert(folder / "plain" / kind, kind, kind) for kind in ("lora", "bias", "ia3")]
    place = Pool(made).save(folder / "pool")
    if change is not None:
        change(place)
    return [place]

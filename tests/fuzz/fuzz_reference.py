"""The reference checkpoint as a target: a torch file of a base's experts, changed inside its archive and outside."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch

from phatgoose.experts.pool import Pool
from phatgoose.experts.reference_checkpoint import BaseShape, import_reference

LINEARS = {
    "encoder.block.0.layer.0.SelfAttention.q": (4, 6),
    "decoder.block.0.layer.2.DenseReluDense.wo": (6, 4),
}
EMBEDDING = "encoder.embed_tokens.weight"
BASE = BaseShape(
    "tiny", LINEARS, {EMBEDDING: (9, 4)}, True, is_own=lambda name, tensor: bool((tensor == 1).all())
)


def folders(folder: Path) -> list[Path]:
    """The same experts as float32 and as bfloat16, with and without the base's embeddings."""
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(1)
        tensors = {EMBEDDING: torch.ones(9, 4)} if dtype == torch.float32 else {}
        for module, (d_in, d_out) in LINEARS.items():
            for i in range(2):
                for part, shape in (
                    ("expert_lora.layer1", (16, d_in)),
                    ("expert_lora.layer2", (16, d_out)),
                    ("router.expert_embeddings", (d_in,)),
                ):
                    tensor = torch.randn(*shape, generator=generator).to(dtype)
                    # The authors' files hold layer1 as a transposed view.
                    tensors[f"{module}._addons.{part}__{i}"] = tensor.T if part.endswith("1") else tensor
        place = folder / str(dtype)
        place.mkdir(parents=True)
        torch.save(tensors, place / "checkpoint.pt")
        made.append(place)
    return made


def read(folder: Path, rng: random.Random) -> None:
    out = folder.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    import_reference(folder / "checkpoint.pt", BASE, out)
    pool = Pool.load(out)
    assert len(pool) == 2
    for expert in pool.experts:
        assert all(bool(torch.isfinite(t.float()).all()) for t in expert.tensors.values())

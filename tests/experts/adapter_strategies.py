"""Random valid adapters of every kind, for tests of properties that all of them have."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
PREFIX = "base_model.model."
SIZES = {
    "model.layers.0.q_proj": (4, 6),
    "model.layers.1.up_proj": (4, 5),
    "h.10.c_attn": (3, 3),
    "lm_head": (4, 7),
}
"""Module path → d_in, d_out; the same in every adapter, as in experts of one base."""
NUMBERS = st.floats(-1e30, 1e30) | st.integers(-(2**40), 2**40)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
RECORDS = st.dictionaries(
    TEXTS.filter(lambda key: key not in ("base", "dropped")),
    st.recursive(
        st.none() | st.booleans() | NUMBERS | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)


def tensor(seed: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@st.composite
def adapters(draw):
    """(config, tensors, {module path: its ΔW in float64, where ΔW is low-rank and all there is})."""
    if draw(st.integers(0, 3)) == 0:
        return draw(ia3())
    paths = draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, unique=True))
    dora = draw(st.booleans())
    bias = not dora and draw(st.booleans())
    rslora = draw(st.booleans())
    rank, alpha = draw(st.integers(1, 4)), draw(st.integers(-9, 99) | st.floats(-1e3, 1e3))
    ranks = {p: r for p in paths if (r := draw(st.none() | st.integers(1, 5))) is not None}
    alphas = {
        p.rpartition(".")[2]: a for p in paths if (a := draw(st.none() | st.floats(-50, 50))) is not None
    }
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "rank_pattern": ranks, "alpha_pattern": alphas,
        "use_rslora": rslora, "use_dora": dora, "lora_bias": bias,
        "target_modules": draw(st.sampled_from([paths, "all-linear", ".*proj"])),
        "lora_dropout": draw(st.floats(0, 1)), "bias": "none",
        "task_type": draw(st.none() | st.just("CAUSAL_LM")),
    }  # fmt: skip
    tensors, deltas = {}, {}
    for path in paths:
        (d_in, d_out), r = SIZES[path], ranks.get(path, rank)
        dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 2**20))
        a, b = tensor(seed, dtype, r, d_in), tensor(seed + 1, dtype, d_out, r)
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
        if bias:
            tensors[f"{PREFIX}{path}.lora_B.bias"] = tensor(seed, dtype, d_out)
        if dora:
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = tensor(seed, torch.float32, d_out)
        own = alphas.get(path.rpartition(".")[2], alpha)
        scale = own / (math.sqrt(r) if rslora else r)
        if not (bias or dora):
            deltas[path] = scale * (b.double() @ a.double())
    return config, tensors, deltas


@st.composite
def ia3(draw):
    paths = draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, unique=True))
    config = {"peft_type": "IA3", "target_modules": paths, "feedforward_modules": []}
    tensors = {}
    for path in paths:
        d_in, d_out = SIZES[path]
        shape = (1, d_in) if draw(st.booleans()) else (d_out, 1)
        tensors[f"{PREFIX}{path}.ia3_l"] = tensor(
            draw(st.integers(0, 2**20)), draw(st.sampled_from(DTYPES)), *shape
        )
    return config, tensors, {}

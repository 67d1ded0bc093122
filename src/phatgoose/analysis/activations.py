"""Mean inputs of the routed modules, and the gates that are parallel to them.

A gate that points nearly along the mean activation scores high on every token, so it wins everywhere, whatever
it was trained for. The means are measured on given texts. Nothing else of the texts is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.hooks import Hooks, run_eagerly
from phatgoose.models.base.base import Base, decoder_start
from phatgoose.models.moe.expert_linear import ExpertLinear
from phatgoose.models.moe.names import modules_by_path
from phatgoose.ops.reference import standardise


def mean_inputs(base: Base, modules: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
    """ū_m = (1/T) Σ_t (u_t − mean)/std: each module's standardised input averaged over all tokens, float32 [d_in].

    An embedding's output is averaged instead, since gates read that. Runs `base` as it is (with routing, if
    attached) over the texts one by one, so there is no padding. The decoder of an encoder–decoder reads only
    its start token for each text.

    Raises:
        RoutingError: a module isn't there or never ran, or there are no texts.
    """
    found = modules_by_path(base.model, modules)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def add(path: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        u = output if isinstance(module, nn.Embedding) else args[0]
        flat = standardise(u.detach().reshape(-1, u.shape[-1])).double().sum(0).cpu()
        sums[path] = sums.get(path, 0) + flat
        counts[path] = counts.get(path, 0) + u.numel() // u.shape[-1]

    for path in modules:
        if path not in found:
            raise RoutingError(f"this model has no module {path}: its inputs can't be averaged.")
    reading = [found[p].register_forward_hook(partial(run_eagerly, partial(add, p))) for p in modules]
    with Hooks(reading), torch.no_grad():
        for text in texts:
            batch = dict(base.tokenizer([text], return_tensors="pt").to(base.device))
            batch.pop("token_type_ids", None)
            if base.is_encoder_decoder:
                batch["decoder_input_ids"] = torch.full((1, 1), decoder_start(base.model), device=base.device)
            base.model(**batch)
    for path in modules:
        # A mixture may never use one of its experts.
        if path not in sums and not isinstance(found[path], ExpertLinear):
            raise RoutingError(
                f"{path} never ran on the {len(texts)} texts given: its inputs can't be averaged."
            )
    return {path: (total / counts[path]).float() for path, total in sums.items()}


def parallel_gates(
    pool: Pool, means: dict[str, Tensor], *, above: float = 0.5
) -> list[tuple[str, str, float]]:
    """(expert, module, cosine) of every gate with cos(v̄_e, ū) > `above`, the largest first.

    v̄_e is the standardised gate, ū from `mean_inputs`. Since score_e = v̄_eᵀū_t/√d, such a gate's mean score is
    cos·‖ū‖, high on every token. Modules that `means` lacks and experts without gates are left out.
    """
    found = []
    for expert in pool.experts:
        for path, gate in (expert.gates or {}).items():
            if path in means and means[path].shape == gate.shape:
                bar, mean = standardise(gate.double()), means[path].double()
                cosine = float(bar @ mean / (bar.norm() * mean.norm()).clamp(min=1e-30))
                if math.isfinite(cosine) and cosine > above:
                    found.append((expert.name, path, cosine))
    return sorted(found, key=lambda entry: -entry[2])

"""Mean inputs of an expert's modules over its own rows, summed in float64 and resumable."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phatgoose.errors import TrainingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import read_tensor_file
from phatgoose.files import write_bytes
from phatgoose.models.attach.attach import Routing, routing_of
from phatgoose.models.attach.hooks import Hooks, run_eagerly
from phatgoose.models.base.base import Base
from phatgoose.models.base.layers import first_argument
from phatgoose.models.moe.expert_linear import ExpertLinear, routing_context
from phatgoose.models.moe.names import modules_by_path
from phatgoose.models.text.batch import decoder_inputs, make_batch, target_logits
from phatgoose.models.text.encoding import Encoded
from phatgoose.training.trainer.preserve import expert_attached
from phatgoose.training.trainer.progress import Progress, Report, display

SAVE_SECONDS = 20.0
"""Time between two saves of the sums."""


def mean_activations(
    base: Base,
    expert: Expert,
    batches: Sequence[Sequence[Encoded]],
    file: Path,
    key: str,
    report: Report | None,
) -> tuple[dict[str, Tensor], int]:
    """(mean input [d] float32 of each adapted module, the most tokens that one of them saw).

    The base runs with the expert on every token.

    Args:
        file: keeps the sums so far, under `key`; a later call with the same key continues from there.

    Raises:
        TrainingError: inputs aren't finite. RoutingError, BaseModelError: the expert doesn't fit the base.
    """
    sums, counts, done = _load(file, key)
    label, saved = f"signature {expert.name}", time.monotonic()
    with _collecting(base, expert, sums, counts), display(label, len(batches)) as bar:
        show = report or bar
        for number, batch in enumerate(batches):
            show(Progress(label, number, len(batches), None, None, 0.0, math.inf))
            if number < done:
                continue
            _forward(base, batch)
            if time.monotonic() - saved > SAVE_SECONDS:
                _save(file, key, sums, counts, number + 1)
                saved = time.monotonic()
        show(Progress(label, len(batches), len(batches), None, None, 0.0, math.inf))
    means = {path: (total / counts[path]).float() for path, total in sums.items()}
    for path, module in modules_by_path(base.model, expert.updates).items():
        # No token reached this expert of a mixture. A mean of zeros scores 0 on every token, so it doesn't influence
        # routing.
        if isinstance(module, ExpertLinear) and path not in means:
            means[path] = torch.zeros(module.in_features)
    for path, mean in means.items():
        if not bool(mean.isfinite().all()):
            raise TrainingError(f"{label}: inputs of {path} aren't finite; load the base in another dtype.")
    return means, max(counts.values())


def _forward(base: Base, rows: Sequence[Encoded]) -> None:
    batch = {k: t.to(base.device) for k, t in make_batch(base, rows).items()}
    with torch.no_grad():
        if not base.is_encoder_decoder:
            target_logits(base.model, batch)
            return
        labels = batch.pop("labels")
        # Training passes no decoder mask: there the labels alone mark the decoder's padding.
        mask = (labels >= 0).long()
        inputs = decoder_inputs(base.model, labels)
        base.model(**batch, decoder_input_ids=inputs, decoder_attention_mask=mask, use_cache=False)


@contextlib.contextmanager
def _collecting(
    base: Base, expert: Expert, sums: dict[str, Tensor], counts: dict[str, int]
) -> Iterator[None]:
    """Inside, the base has the expert on every token, and its modules' inputs are summed over real tokens."""
    modules = modules_by_path(base.model, expert.updates)
    with Hooks() as hooks:
        for path, update in expert.updates.items():
            # Registered before the routing's own hook, so that it gets an embedding's output as the gate does.
            hook = partial(run_eagerly, _summing_hook(path, update.embedding, base.model, sums, counts))
            hooks.add([modules[path].register_forward_hook(hook, with_kwargs=True)])
        with expert_attached(base, expert):
            yield


def _summing_hook(
    path: str, embedding: bool, model: PreTrainedModel, sums: dict[str, Tensor], counts: dict[str, int]
) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        u = output if embedding else first_argument(args, kwargs)
        routing: Routing | None = routing_of(model)
        assert routing is not None
        flat = u.reshape(-1, u.shape[-1])
        tokens = routing_context(
            path, module, args, first_argument(args, kwargs), u.shape, routing.streams
        ).tokens()
        real = tokens.real.reshape(-1).to(u.device)
        total = flat[real].double().sum(0).cpu()
        sums[path] = sums[path] + total if path in sums else total
        counts[path] = counts.get(path, 0) + int(real.sum())

    return hook


def _load(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """(sums, counts, number of batches) of an interrupted call with this key; empty if there is none."""
    if not file.exists():
        return {}, {}, 0
    found = read_tensor_file(file, TrainingError)
    if found.metadata.get("key") != key:
        return {}, {}, 0
    tensors = dict(found.tensors)
    counts = {
        path: int(tensors.pop(f"count:{path}")[0]) for path in list(tensors) if f"count:{path}" in tensors
    }
    return tensors, counts, int(found.metadata["batches"])


def _save(file: Path, key: str, sums: dict[str, Tensor], counts: dict[str, int], batches: int) -> None:
    numbers = {f"count:{path}": torch.tensor([float(n)], dtype=torch.float64) for path, n in counts.items()}
    data = safetensors.torch.save({**sums, **numbers}, {"key": key, "batches": str(batches)})
    write_bytes(file, data)

"""Mean inputs of an expert's modules over its own rows, summed up in float64 and resumable."""

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
from phatgoose.models.attach.hooks import Hooks, apart
from phatgoose.models.base.base import Base
from phatgoose.models.base.layers import first_argument
from phatgoose.models.moe.expert_linear import ExpertLinear, routing_context
from phatgoose.models.moe.names import modules_by_path
from phatgoose.models.text.batch import decoder_inputs, make_batch, target_logits
from phatgoose.models.text.encoding import Encoded
from phatgoose.training.trainer.preserve import expert_attached
from phatgoose.training.trainer.progress import Progress, Report, display

SAVE_SECONDS = 20.0
"""Time between writing down how far the sums are."""


def mean_activations(
    base: Base,
    expert: Expert,
    batches: Sequence[Sequence[Encoded]],
    file: Path,
    key: str,
    report: Report | None,
) -> tuple[dict[str, Tensor], int]:
    """Mean input [d] float32 of each adapted module, with the expert on every token, and the most tokens one is over.

    Args:
        file: where the sums so far are kept under `key`; a later call with the same goes on from there.

    Raises:
        TrainingError: inputs that aren't finite. RoutingError, BaseModelError: the expert doesn't fit the base.
    """
    sums, counts, done = _kept(file, key)
    label, saved = f"signature {expert.name}", time.monotonic()
    with _watched(base, expert, sums, counts), display(label, len(batches)) as bar:
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
        # No token went to this expert of a mixture. A mean of zeros scores 0 on every token: it says nothing.
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
        # Not what training gives: there the decoder's padding is told by the labels alone.
        mask = (labels >= 0).long()
        inputs = decoder_inputs(base.model, labels)
        base.model(**batch, decoder_input_ids=inputs, decoder_attention_mask=mask, use_cache=False)


@contextlib.contextmanager
def _watched(base: Base, expert: Expert, sums: dict[str, Tensor], counts: dict[str, int]) -> Iterator[None]:
    """The base with the expert on every token, its modules' inputs summed up over real tokens."""
    modules = modules_by_path(base.model, expert.updates)
    with Hooks() as hooks:
        for path, update in expert.updates.items():
            # Before the routing's own hook, so that an embedding's output is seen as its gate sees it.
            hook = partial(apart, _adding(path, update.embedding, base.model, sums, counts))
            hooks.add([modules[path].register_forward_hook(hook, with_kwargs=True)])
        with expert_attached(base, expert):
            yield


def _adding(
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


def _kept(file: Path, key: str) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """Sums, counts and the number of batches that a stopped call had done; nothing if there is none, or it was of another."""
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

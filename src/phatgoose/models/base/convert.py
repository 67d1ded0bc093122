"""LoRA that changes its base at the start (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) → plain LoRA.

Such a method splits W = R + s B₀A₀, where R is the changed base and A₀, B₀ the initial adapter. The trained model is R
+ s BA, so ΔW = s (BA − B₀A₀): a LoRA of twice the rank, as in PEFT's `path_initial_model_for_weight_conversion`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.formats import read_adapter, to_contents
from phatgoose.experts.adapters.peft import PREFIX
from phatgoose.experts.adapters.peft_rules import PLAIN_INITS
from phatgoose.experts.expert import Expert
from phatgoose.experts.names import slug
from phatgoose.models.base.fingerprint import fingerprint
from phatgoose.ops.update import Update

RECOMPUTABLE = ("pissa", "olora")
"""Values of init_lora_weights that PEFT computes from the base's weights alone, so they can be recomputed."""
_PLAIN_SETTINGS: dict[str, Any] = {
    "init_lora_weights": True, "corda_config": None, "lora_ga_config": None, "loftq_config": {},
}  # fmt: skip
"""Changes of an adapter's config by which it is read as a plain LoRA."""
WITH_INITIAL = ("pissa", "olora", "corda", "lora_ga")
"""Values that can be converted with the initial adapter. (LoftQ quantises the base, so the difference isn't of low
rank.)"""
LARGE_CHANGE = 1.0
"""If training moved BA further than this many times ‖B₀A₀‖, the base is probably another one."""


def convert_to_lora(
    folder: Path,
    model: PreTrainedModel,
    spec: str,
    *,
    initial: Path | None = None,
    residual: bool = False,
    name: str | None = None,
) -> tuple[Expert, float | None]:
    """(the adapter in `folder` as a plain LoRA of `model`, the largest ‖BA − B₀A₀‖/‖B₀A₀‖ of its modules).

    The second value is None if nothing had to be subtracted (`residual`).

    Args:
        model: the base of the result; its weights are modified, so don't use it afterwards.
        spec: the base's name, for the record.
        initial: the adapter before training. Without it PEFT's initialisation runs again on `model`.
        residual: `model` is the changed base itself, on which the adapter is already a plain LoRA.

    Raises:
        ExpertError: the adapter needs no conversion, is of another kind, or something is missing; the message says
            what.
        BaseModelError: the base has no fingerprint.
    """
    config, file = read_adapter(folder)
    init = _init(config, folder)
    plain = {**config, **_PLAIN_SETTINGS}
    updates = to_contents(plain, file.tensors, str(folder)).updates
    base = fingerprint(model, spec)
    record = {"kind": "converted", "from": init, "base": base.to_json()}
    name = name or slug(folder.resolve().name)
    if residual:
        return Expert(name, plain, file.tensors, provenance={**record, "by": "the changed base"}), None
    own = set(map(id, file.tensors.values()))
    if not all(u.is_low_rank and {id(u.A), id(u.B)} <= own for u in updates.values()):
        raise ExpertError(
            f"{folder} is {init} with more than A and B of linear layers (DoRA, a bias, an embedding, bare "
            "parameters), which can't be converted. If you have the base that its training changed, give that with "
            "--base and --residual."
        )
    first = _start(init, model, updates, folder, initial)
    tensors, change = _difference(file.tensors, updates, first)
    by = "PEFT's initialisation, run again" if initial is None else "the initial adapter"
    return Expert(name, _double_rank(plain), tensors, provenance={**record, "by": by}), change


def _init(config: Mapping[str, Any], folder: Path) -> str:
    """The adapter's init_lora_weights, if it is one that changes the base."""
    init = config.get("init_lora_weights", True)
    if config.get("peft_type") != "LORA" or init in PLAIN_INITS:
        raise ExpertError(
            f"{folder} needs no conversion: it is {brief(config.get('peft_type'))} with init_lora_weights = "
            f"{brief(init)}, which changes no weights of the base."
        )
    if not isinstance(init, str) or not init.lower().startswith((*WITH_INITIAL, "loftq")):
        raise ExpertError(
            f"{folder} has init_lora_weights = {brief(init)}, which isn't known; known are "
            f"{', '.join((*WITH_INITIAL, 'loftq'))}."
        )
    return init


def _start(
    init: str, model: PreTrainedModel, updates: Mapping[str, Update], folder: Path, initial: Path | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """A₀ and B₀ by module path."""
    if init.lower().startswith("loftq"):
        raise ExpertError(
            f"{folder} was trained on LoftQ's quantised base, from which no update of low rank leads to the original. "
            "Give that base (save_pretrained of the model that replace_lora_weights_loftq or LoftQ's script made) with "
            "--base and --residual."
        )
    if initial is not None:
        return _saved_start(initial, updates, folder)
    if init.lower().startswith(RECOMPUTABLE) and "_niter_" not in init:
        return _reinitialise(model, updates, folder)
    raise ExpertError(
        f"{folder} began as {brief(init)}, which depends on data or chance and can't be computed again. Give the "
        "adapter as it was before training (saved with save_pretrained then) with --initial, or the changed base with "
        "--base and --residual."
    )


def _saved_start(
    folder: Path, updates: Mapping[str, Update], trained: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """A₀ and B₀ of a saved adapter, by module path."""
    config, file = read_adapter(folder)
    found = to_contents({**config, **_PLAIN_SETTINGS}, file.tensors, str(folder)).updates
    if found.keys() != updates.keys():
        odd = sorted(found.keys() ^ updates.keys())[0]
        raise ExpertError(f"{folder} isn't what {trained} began as: only one of them adapts {odd}.")
    for path, update in updates.items():
        first = found[path]
        if (first.A.shape, first.B.shape, first.scale) != (update.A.shape, update.B.shape, update.scale):
            raise ExpertError(
                f"{folder} isn't what {trained} began as: at {path} it has rank {first.rank} and scale "
                f"{first.scale:g}, the trained one {update.rank} and {update.scale:g}."
            )
    return {path: (update.A, update.B) for path, update in found.items()}


def _reinitialise(
    model: PreTrainedModel, updates: Mapping[str, Update], folder: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """A₀ and B₀ as PEFT computes them from the base's weights, by module path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about initialisations that change the base
        settings: Any = LoraConfig.from_pretrained(str(folder))
        settings.target_modules = "|".join(map(re.escape, updates))  # one regular expression of whole paths
        settings.exclude_modules = settings.layers_to_transform = settings.layers_pattern = None
        settings.modules_to_save, settings.inference_mode = None, True
        try:
            whole: Any = get_peft_model(model, settings)
        except Exception as cause:  # of many types: no such module, packed weights, too large a rank
            raise ExpertError(f"PEFT can't initialise {folder} on this base: {cause}") from cause
    found = {}
    for path, update in updates.items():
        layer = whole.get_base_model().get_submodule(path)
        a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        if a.shape != update.A.shape or b.shape != update.B.shape:
            raise ExpertError(
                f"{folder}: {path} has lora_A {list(update.A.shape)} and lora_B {list(update.B.shape)}; on this base "
                f"they would be {list(a.shape)} and {list(b.shape)}: it is of another base."
            )
        found[path] = a.cpu(), b.cpu()
    return found


def _difference(
    tensors: Mapping[str, Tensor], updates: Mapping[str, Update], first: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], float]:
    """The tensors of ΔW = s (BA − B₀A₀), with the adapter's other tensors; and the largest ‖BA − B₀A₀‖/‖B₀A₀‖."""
    keys = {id(tensor): key for key, tensor in tensors.items()}
    used = {keys[id(part)] for update in updates.values() for part in (update.A, update.B)}
    made = {key: tensor for key, tensor in tensors.items() if key not in used}
    change = 0.0
    for path, update in updates.items():
        a, b, a0, b0 = (t.float() for t in (update.A, update.B, *first[path]))
        made[f"{PREFIX}{path}.lora_A.weight"] = torch.cat([a, a0])
        made[f"{PREFIX}{path}.lora_B.weight"] = torch.cat([b, -b0], dim=1)
        start = torch.linalg.matrix_norm(b0 @ a0)
        change = max(change, float(torch.linalg.matrix_norm(b @ a - b0 @ a0) / start) if start > 0 else 0.0)
    return made, change


def _double_rank(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with twice the rank and the same scale (alpha/r, or alpha/√r with rsLoRA)."""
    more = 2**0.5 if config.get("use_rslora") else 2
    return {
        **config,
        "r": 2 * config.get("r", 8),
        "lora_alpha": more * config.get("lora_alpha", 8),
        "rank_pattern": {key: 2 * value for key, value in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: more * value for key, value in (config.get("alpha_pattern") or {}).items()},
    }

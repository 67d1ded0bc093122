"""PEFT's adapter format → updates. What can't be computed exactly is refused with an ExpertError."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_rules import check_config
from phatgoose.experts.adapters.peft_updates import KINDS
from phatgoose.ops.update import Update

PREFIX = "base_model.model."
SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}
"""Keys of tensors that belong to the whole adapter and not to one module."""
_COPIED = ("embed", "wte", "shared", "lm_head", "output")
_SHARDED = (
    "Adapters look so if they were saved from sharded training (DeepSpeed ZeRO-3, FSDP) without gathering "
    "the weights. Save it again with stage3_gather_16bit_weights_on_model_save (FSDP: with a full state "
    "dict), or convert the checkpoint with its zero_to_fp32.py."
)
_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile, FSDP and activation checkpointing put before the names of the modules they wrap."""
_PARTS = (
    *sorted(set[str]().union(*(kind.names for kind in KINDS.values()))),
    "lora_velora_embed",
    "vera_A",
    "vera_B",
    "modules_to_save",
    "trainable_tokens_delta",
)
"""What the adapter's name may follow in a key."""
_NAMED = re.compile(rf"(?P<head>(?:.+\.)?(?:{'|'.join(_PARTS)}))\.(?P<name>[^.]+)(?P<kind>\.weight|\.bias)?")


@dataclass(frozen=True)
class Contents:
    """What an adapter's tensors mean."""

    updates: dict[str, Update]
    """By the module's path in the base model."""
    base_copies: dict[str, Tensor]
    """The base's own weights that PEFT saved along ("lm_head.weight" → tensor). They are compared with the
    base's, never used."""


def to_contents(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str, drop: Collection[str] = ()
) -> Contents:
    """The update of every adapted module."""
    check_config(config, where, drop)
    if not tensors:
        raise ExpertError(f"{where}: its file of weights holds no tensors at all. {_SHARDED}")
    kind = KINDS[config["peft_type"]]
    found: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for key, plain in plain_keys(tensors, where).items():
        tensor = tensors[key]
        if _dropped(plain, config, drop) or _for_training(plain, config):
            continue
        if tensor.numel() == 0 and not kind.empty:
            raise ExpertError(
                f"{where}: tensor {brief(key)} has shape {list(tensor.shape)}, so no values. {_SHARDED}"
            )
        if plain in SHARED:
            _put(shared, SHARED[plain], tensor, key, where)
        elif part := kind.part(plain):
            _put(found.setdefault(part[0], {}), part[1], tensor, key, where)
        elif name := _base_parameter(plain):
            _put(copies, name, tensor, key, where)
        else:
            raise _refused(key, plain, config, where)
    _check_saved(config, copies, where, drop)
    if not found:
        raise ExpertError(
            f"{where}: it holds no adapter tensors, only {', '.join([*copies, *shared][:4]) or 'what was left out'}."
        )
    updates = kind.updates(config, found, shared, where)
    if not updates:
        raise ExpertError(f"{where}: every module has rank 0, so the adapter does nothing.")
    return Contents(updates, copies)


def plain_keys(keys: Iterable[str], where: str) -> dict[str, str]:
    """Key in the file → key as PEFT writes it, without "base_model.model." (SHARED keys keep it).

    These are removed: torch.compile's `_orig_mod.`, FSDP's `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`,
    DistributedDataParallel's `module.` if every key begins with it, a second "base_model.model.", and the
    adapter's name ("lora_A.default.weight") if it is the same everywhere.
    """
    found = {key: _WRAPPERS.sub("", key) for key in keys}
    # A PEFT model that was wrapped again has the prefix twice.
    for kept, gone in (("", "module."), (PREFIX, "module."), (PREFIX, PREFIX)):
        while found and all(key.startswith(kept + gone) for key in found.values()):
            found = {key: kept + plain.removeprefix(kept + gone) for key, plain in found.items()}
    names: set[str | None] = set()
    for key, plain in found.items():
        match = _NAMED.fullmatch(plain)
        if match and match["name"] not in ("weight", "bias"):
            names.add(match["name"])
            plain = match["head"] + (match["kind"] or "")
        elif match or plain.endswith(_PARTS):
            names.add(None)
        if plain not in SHARED:
            if not plain.startswith(PREFIX):
                raise ExpertError(
                    f"{where}: tensor {brief(key)} doesn't start with {PREFIX!r}, as PEFT's do."
                )
            plain = plain.removeprefix(PREFIX)
        found[key] = plain
    if len(names) > 1:
        listed = ", ".join(sorted("none" if name is None else repr(name) for name in names)[:5])
        raise ExpertError(
            f"{where}: its tensors are of several adapters (names in their keys: {listed}). Save each of "
            "them with PEFT's save_pretrained, which gives every adapter its own folder."
        )
    return found


def _put(into: dict[str, Tensor], name: str, tensor: Tensor, key: str, where: str) -> None:
    if name in into:
        raise ExpertError(f"{where}: tensor {key!r} is in the file twice, under two names.")
    into[name] = tensor


def _base_parameter(name: str) -> str | None:
    """The parameter of the base that PEFT saved along under this name; None if it is none.

    PEFT saves embeddings and heads: as base_layer if they are adapted, and under their own names if the
    vocabulary was resized or they are among modules_to_save.
    """
    path, _, kind = name.rpartition(".")
    path = path.removesuffix(".base_layer").removesuffix(".modules_to_save")
    last = re.split(r"\W", path)[-1]
    return f"{path}.{kind}" if kind in ("weight", "bias") and any(word in last for word in _COPIED) else None


def _dropped(plain: str, config: Mapping[str, Any], drop: Collection[str]) -> bool:
    """Whether the caller asked to leave this tensor out."""
    if "trainable_token_indices" in drop and "token_adapter." in plain:
        return True
    if "modules_to_save" not in drop:
        return False
    return _saved_by(plain, config) is not None or _base_parameter(plain) is not None


def _saved_by(plain: str, config: Mapping[str, Any]) -> str | None:
    """The name in modules_to_save that a tensor belongs to: PEFT saves the modules whose path ends in it."""
    saved = config.get("modules_to_save") or ()
    return next((name for name in saved if f"{name}." in plain), None)


def _for_training(plain: str, config: Mapping[str, Any]) -> bool:
    """Whether VeLoRA or MonteCLoRA keep this tensor for further training only: PEFT doesn't read it at inference."""
    return bool(
        (config.get("velora_config") and plain.endswith(".lora_velora_embed"))
        or (config.get("monteclora_config") and ".lora_monteclora_sampler." in plain)
    )


def _refused(key: str, plain: str, config: Mapping[str, Any], where: str) -> ExpertError:
    """Why a tensor can't be routed."""
    if _saved_by(plain, config) is not None:
        return ExpertError(
            f"{where}: modules_to_save = {brief(config['modules_to_save'])}: the adapter holds a whole module "
            f"({brief(key)}), which can't be routed token by token. Leave such modules out with "
            "drop='modules_to_save' (--drop)."
        )
    if plain.endswith(".bias") and config.get("bias") not in (None, "none"):
        return ExpertError(
            f"{where}: bias = {config['bias']!r}, and the adapter holds the base's own biases, retrained "
            f"({brief(key)}), which can't be routed token by token. Train it with bias='none', or with lora_bias=True."
        )
    return ExpertError(
        f"{where}: tensor {brief(key)} is no part of a {config['peft_type']} adapter, so it can't be routed."
    )


def _check_saved(
    config: Mapping[str, Any], copies: Collection[str], where: str, drop: Collection[str]
) -> None:
    """Refuses an adapter whose config says that it saved whole modules, if none of them is in the file."""
    saved = config.get("modules_to_save") or ()
    if saved and "modules_to_save" not in drop and not any(_saved_by(name, config) for name in copies):
        raise ExpertError(
            f"{where}: modules_to_save = {brief(saved)}, but none of these modules is in the file, so the "
            "adapter is incomplete. Save it again, or leave them out with drop='modules_to_save' (--drop)."
        )

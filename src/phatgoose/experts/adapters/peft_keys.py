"""Keys of a PEFT adapter's tensors, without the names that wrappers and PEFT left in them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from phatgoose.errors import ExpertError, brief
from phatgoose.experts.adapters.peft_updates import KINDS

PREFIX = "base_model.model."
SHARED = {"base_model.vera_A": "vera_A", "base_model.vera_B": "vera_B"}
"""Keys of tensors that belong to the whole adapter and not to one module."""

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


def plain_keys(keys: Iterable[str], where: str) -> dict[str, str]:
    """Key in the file → key as PEFT writes it, without "base_model.model." (SHARED keys keep it).

    These are removed: torch.compile's `_orig_mod.`, FSDP's `_fsdp_wrapped_module.`, `_checkpoint_wrapped_module.`,
    DistributedDataParallel's `module.` if every key begins with it, a second "base_model.model.", and the
    adapter's name ("lora_A.default.weight") if it is the same everywhere.

    Raises:
        ExpertError: a key isn't PEFT's, or the tensors are of several adapters.
    """
    found = {key: _WRAPPERS.sub("", key) for key in keys}
    for prefix in ("", PREFIX):
        while found and all(key.startswith(f"{prefix}module.") for key in found.values()):
            found = {key: prefix + plain.removeprefix(f"{prefix}module.") for key, plain in found.items()}
    # A PEFT model that was wrapped again has the prefix twice.
    while found and all(key.startswith(PREFIX + PREFIX) for key in found.values()):
        found = {key: plain.removeprefix(PREFIX) for key, plain in found.items()}
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

"""Names of experts, and of the files that experts and pools are made of."""

from __future__ import annotations

import re

from phatgoose.errors import ExpertError, brief

CONFIG_FILE = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
ADAPTERHUB_WEIGHTS = "adapter.safetensors"
WEIGHTS_FILES = (PEFT_WEIGHTS, ADAPTERHUB_WEIGHTS)
"""The adapter's tensors; its name says which format it has."""
INTERFACE_FILE = "adapter_interface.json"
"""AdapterHub's names for a model's layers; it saves this file with its adapters."""
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
"""AdapterHub's prediction heads; it saves these files with its adapters."""
GATES_FILE = "gates.safetensors"
SIGNATURE_FILE = "signature.safetensors"
RECORD_FILE = "expert.json"
CARD_FILE = "README.md"
EXPERT_FILES = (CONFIG_FILE, *WEIGHTS_FILES, GATES_FILE, SIGNATURE_FILE, RECORD_FILE)
"""Every file of an expert's folder that a pool's manifest lists with its sha256."""

MANIFEST = "pool.json"
HEADERS = {PEFT_WEIGHTS: "adapter_model.header", GATES_FILE: "gates.header"}
"""A packed expert's folder keeps the header of each of these files: its first bytes, up to the tensors."""
REST_FILE = "rest.safetensors"
"""Tensors of a packed expert that are in no stack, under "FILE/KEY"."""
PACKED_FILES = (*HEADERS.values(), REST_FILE)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def slug(text: str) -> str:
    """A valid expert name made from any text: "bigbench:tense" → "bigbench-tense"."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:100]
    return name or "expert"


def check_name(name: str) -> None:
    """Refuses what can't name an expert: the name is a folder in a pool, and part of what people type."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ExpertError(
            f"{brief(name)} can't name an expert: use letters, digits, '.', '_', '-' (at most 100, starting with a "
            f"letter or digit); for example {slug(str(name)[:100])!r}."
        )

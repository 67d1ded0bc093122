"""What a user of vLLM sets: the pool and the router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from phatgoose.errors import RoutingError
from phatgoose.registry import unknown
from phatgoose.shipped import pool_folder

METHOD = "phatgoose"
"""vLLM's quant_method, by which its options name this plugin."""


@dataclass(frozen=True)
class Settings:
    """The entries of vLLM's `quantization_config`, beside "quant_method": "phatgoose"."""

    pool: str
    """The pool's folder, or the name of one that comes with phatgoose."""
    router: str = "phatgoose:top_k=2"
    """As on phatgoose's command line: Gander, or a router that chooses by gates."""
    any_base: bool = False
    """Serve a base that the pool's experts were not trained on, as `route(any_base=True)`."""

    @staticmethod
    def parse(given: Mapping[str, Any]) -> Settings:
        """Raises RoutingError for no pool or an entry of the wrong type, UnknownName for an unknown entry."""
        entries = {k: v for k, v in given.items() if k != "quant_method"}
        kinds = get_type_hints(Settings)
        for name, value in entries.items():
            if name not in kinds:
                raise unknown(f"entry of the {METHOD} quantization_config", name, kinds)
            if type(value) is not kinds[name]:
                raise RoutingError(
                    f"quantization_config: {name} is {value!r}, expected "
                    f"{'true or false' if kinds[name] is bool else 'a text'}."
                )
        if not entries.get("pool"):
            example = '{"quantization_config": {"quant_method": "phatgoose", "pool": "FOLDER"}}'
            raise RoutingError(f"quantization_config names no pool: pass --hf-overrides '{example}'.")
        return Settings(**{**entries, "pool": str(pool_folder(Path(entries["pool"]).expanduser()).resolve())})

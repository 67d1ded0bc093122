"""The entry point of vLLM's group `vllm.general_plugins`, called in each of its processes."""

from __future__ import annotations

from phatgoose.vllm.settings import METHOD


def register() -> None:
    """Makes the quantization method "phatgoose" known. May be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from phatgoose.vllm.config import PhatgooseConfig

    register_quantization_config(METHOD)(PhatgooseConfig)

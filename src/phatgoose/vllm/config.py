"""What vLLM sees of a pool: a quantization config, the way in which vLLM lets others bring their own linear layers.

vLLM makes it in its front process, where everything is checked, and pickles it to the processes that run the model.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.platforms import current_platform

from phatgoose.errors import RoutingError
from phatgoose.experts.names import MANIFEST
from phatgoose.files import sha256_file
from phatgoose.ops import backend
from phatgoose.vllm.layers import Layers
from phatgoose.vllm.method import RoutedLinearMethod
from phatgoose.vllm.settings import METHOD, Settings


class PhatgooseConfig(QuantizationConfig):
    """Routes every adapted linear layer of the base; weights stay as they are."""

    def __init__(self, settings: Settings | None = None):
        super().__init__()
        self.settings = Settings.parse({}) if settings is None else settings  # --quantization alone: no pool
        self.samples: dict[str, tuple[float, ...]] | None = None
        self._mappers: list[Any] = []
        self._layers: Layers | None = None

    def __getstate__(self) -> dict[str, Any]:  # every process opens the pool for itself
        return {**self.__dict__, "_layers": None}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PhatgooseConfig:
        return cls(Settings.parse(config))

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        here = [torch.bfloat16, torch.float32]
        return here if current_platform.is_cpu() else [*here, torch.float16]

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Called in the front process, once it is known what is served.

        Raises:
            PhatgooseError: it can't be, as `check` says.
        """
        from phatgoose.vllm.check import check  # transformers' models take a while to import

        if current_platform.is_cpu():
            backend("cpu")  # compiled here, once, and not by every rank
        self.samples = dict(check(self.settings, model_name, revision))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._mappers.append(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        layers = self._open()
        if isinstance(layer, LinearBase):
            return RoutedLinearMethod(layers, self, prefix)
        if (path := layers.paths.get(prefix)) is not None:
            raise RoutingError(
                f"the pool adapts {path}, which is a {type(layer).__name__} in vLLM; only linear layers are routed there."
            )
        return None  # as it is

    def _open(self) -> Layers:
        if self._layers is None:
            config = get_current_vllm_config()
            _refuse(config)
            # Compiled graphs hold top_k and the shapes of stacks, and vLLM keeps them by a hash that knows nothing of the pool.
            if not isinstance(config.additional_config, dict):
                raise RoutingError(
                    "--additional-config of this platform can't hold an entry, which the pool needs there."
                )
            config.additional_config[METHOD] = self._digest()
            if self.samples is None:
                raise RoutingError(
                    "the pool was not checked against the base: this vLLM is not one that the plugin knows."
                )
            self._layers = Layers(self.settings, self.samples, self._renamed)
        return self._layers

    def _renamed(self, path: str) -> str:
        """What vLLM calls a module of the base."""
        for mapper in self._mappers:
            path = next(iter(mapper.apply_list([path])), path)
        return path

    def _digest(self) -> str:
        manifest = sha256_file(Path(self.settings.pool) / MANIFEST)
        return hashlib.sha256(json.dumps([self.settings.to_json(), manifest]).encode()).hexdigest()


def _refuse(config: Any) -> None:
    """What would drop the routing of some layer, or was never tried."""
    if config.lora_config is not None:
        raise RoutingError(
            "--enable-lora can't be used with a pool: its experts are routed already. Leave it out."
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise RoutingError(
            "--pipeline-parallel-size above 1 isn't supported with a pool. Use --tensor-parallel-size."
        )

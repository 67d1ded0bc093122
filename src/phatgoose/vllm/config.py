"""What vLLM sees of a pool: a quantization config and the method of its linear layers.

A quantization config is how vLLM lets a plugin bring its own linear layers. vLLM makes it in its front
process, where everything is checked, and pickles it to the processes that run the model.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.platforms import current_platform

from phatgoose.errors import RoutingError
from phatgoose.experts.names import MANIFEST
from phatgoose.files import sha256_file
from phatgoose.ops import backend
from phatgoose.vllm.gander import KEY
from phatgoose.vllm.layers import Checked, Layers
from phatgoose.vllm.settings import METHOD, Settings
from phatgoose.vllm.slices import Linear, Slice

CHILD = "phatgoose"
"""The name of the routing within a layer."""


@register_weight_loader_v2_supported_method
class RoutedLinearMethod(UnquantizedLinearMethod):
    """What a linear layer of vLLM computes: its own product, and the routed updates added to it.

    Layers that aren't adapted have one as well: only when every layer has asked is it known that the pool's
    modules were all found.
    """

    def __init__(self, layers: Layers, config: PhatgooseConfig, prefix: str):
        super().__init__()
        self._layers, self._config, self._prefix = layers, config, prefix
        self.slices: list[Slice] = []
        self.routed = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        *rest: Any,
        **more: Any,
    ) -> None:
        held_in, held_out = input_size_per_partition, output_partition_sizes
        super().create_weights(layer, held_in, held_out, input_size, *rest, **more)
        self.linear = _describe(layer, self._prefix, held_in, held_out, input_size)
        self.slices = self._layers.take(self.linear, self._config.packed_modules_mapping)
        latent = self._prefix.endswith("kv_b_proj") and get_current_vllm_config().model_config.use_mla
        if self.slices and latent:
            raise RoutingError(
                f"the pool adapts {self._prefix}, whose weight vLLM folds into its latent attention: it "
                "can't be routed there."
            )

    def process_weights_after_loading(self, layer: Any) -> None:
        self._layers.check_taken()
        made = None
        if self.slices and CHILD not in layer._modules:
            made = self._layers.make(
                self.linear, self.slices, layer.weight.data, tensor_model_parallel_all_reduce
            )
        super().process_weights_after_loading(layer)  # which may pack the weight
        if made is not None:
            self.routed = True
            layer.add_module(CHILD, made)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().apply(layer, x, bias)
        return getattr(layer, CHILD)(x, y) if self.routed else y


def _describe(layer: LinearBase, prefix: str, held_in: int, held_out: list[int], d_in: int) -> Linear:
    ranks = 1 if isinstance(layer, ReplicatedLinear) else layer.tp_size
    copies = [1] * len(held_out)
    if isinstance(layer, QKVParallelLinear) and layer.num_kv_head_replicas > 1:
        copies[1:] = [layer.num_kv_head_replicas] * (len(held_out) - 1)
    return Linear(prefix, d_in, layer.tp_rank, ranks, held_in, tuple(held_out), tuple(copies))


class PhatgooseConfig(QuantizationConfig):
    """Routes every adapted linear layer of the base; weights stay as they are."""

    def __init__(self, settings: Settings | None = None):
        super().__init__()
        self.settings = Settings.parse({}) if settings is None else settings  # --quantization alone: no pool
        self.checked: Checked | None = None
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
        """Called in the front process, once the model is known. Raises PhatgooseError, as `check` says."""
        from phatgoose.vllm.check import check  # transformers' models take a while to import

        if current_platform.is_cpu():
            backend("cpu")  # compiled here, once, and not by every rank
        self.checked = check(self.settings, model_name, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self._mappers.append(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        layers = self._open()
        if isinstance(layer, LinearBase):
            return RoutedLinearMethod(layers, self, prefix)
        if (path := layers.paths.get(prefix)) is not None:
            raise RoutingError(
                f"the pool adapts {path}, which is a {type(layer).__name__} in vLLM; only linear layers are "
                "routed there."
            )
        if isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead):
            layers.take_embedding(layer)
        return None

    def _open(self) -> Layers:
        if self._layers is None:
            config = get_current_vllm_config()
            _refuse(config)
            # Compiled graphs contain top_k and the shapes of stacks. vLLM caches graphs by a hash of its own
            # config, which knows nothing of the pool unless an entry there says so.
            if not isinstance(config.additional_config, dict):
                raise RoutingError(
                    "--additional-config of this platform can't hold an entry, which the pool needs there."
                )
            config.additional_config[METHOD] = self._digest()
            if self.checked is None:
                raise RoutingError(
                    "the pool was not checked against the base: this vLLM is not one that the plugin knows."
                )
            if self.checked.reading is not None:
                _refuse_for_gander(config)
            cache = config.cache_config
            self._layers = Layers(
                self.settings,
                self.checked,
                self._renamed,
                lambda: cache.block_size,
                current_platform.device_type,
            )
            if self._layers.gander is not None:
                config.compilation_config.static_forward_context[KEY] = self._layers.gander
        return self._layers

    def _renamed(self, path: str) -> str:
        """vLLM's name of a module of the base."""
        for mapper in self._mappers:
            path = next(iter(mapper.apply_list([path])), path)
        return path

    def _digest(self) -> str:
        manifest = sha256_file(Path(self.settings.pool) / MANIFEST)
        return hashlib.sha256(json.dumps([asdict(self.settings), manifest]).encode()).hexdigest()


def _refuse(config: Any) -> None:
    """Refuses what would drop the routing of some layer, or was never tried."""
    if config.lora_config is not None:
        raise RoutingError(
            "--enable-lora can't be used with a pool: its experts are routed already. Leave it out."
        )
    if config.parallel_config.pipeline_parallel_size > 1:
        raise RoutingError(
            "--pipeline-parallel-size above 1 isn't supported with a pool. Use --tensor-parallel-size."
        )


def _refuse_for_gander(config: Any) -> None:
    """Refuses what hides from Gander which request a token belongs to, or what it has read, or was never tried."""
    model, parallel, cache = config.model_config, config.parallel_config, config.cache_config
    kept_graphs = (
        not current_platform.is_cpu() and config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
    )
    found = {
        "CUDA graphs: pass --enforce-eager": kept_graphs,
        "speculative decoding: leave it out": config.speculative_config is not None,
        "keys and values from elsewhere (--kv-transfer-config, --kv-offloading-size): leave it out": (
            config.kv_transfer_config is not None
        ),
        "context parallelism: use --tensor-parallel-size": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        "micro-batches (--enable-dbo): leave it out": parallel.use_ubatching,
        "layers that skip tokens (--kv-sharing-fast-prefill): leave it out": cache.kv_sharing_fast_prefill,
        "embeddings in place of tokens (--enable-prompt-embeds): leave it out": model.enable_prompt_embeds,
        "models that read images or sound": model.is_multimodal_model,
        "encoder–decoders": model.is_encoder_decoder,
        "models that don't generate": model.runner_type != "generate",
        "models with layers other than attention to all tokens": (
            model.is_hybrid or model.is_attention_free or model.get_sliding_window() is not None
        ),
    }
    for what, is_there in found.items():
        if is_there:
            name, colon, instead = what.partition(": ")
            raise RoutingError(
                f"Gander can't be served by vLLM with {name}. "
                f"{instead.capitalize() + ', or use' if colon else 'Use'} `phatgoose serve`, or choose another router."
            )

"""What a linear layer of vLLM computes: its own product, and the routed updates added to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from phatgoose.errors import RoutingError
from phatgoose.vllm.layers import Layers
from phatgoose.vllm.slices import Linear, Slice

if TYPE_CHECKING:
    from phatgoose.vllm.config import PhatgooseConfig

CHILD = "phatgoose"
"""The name of the routing within a layer."""


@register_weight_loader_v2_supported_method
class RoutedLinearMethod(UnquantizedLinearMethod):
    """A layer, adapted or not: every layer asks, so that it is known when all have."""

    def __init__(self, layers: Layers, config: PhatgooseConfig, prefix: str):
        super().__init__()
        self._layers, self._config, self._prefix = layers, config, prefix
        self.slices: list[Slice] = []

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self.linear = _described(
            layer, self._prefix, input_size_per_partition, output_partition_sizes, input_size
        )
        self.slices = self._layers.take(self.linear, self._config.packed_modules_mapping)
        if (
            self.slices
            and self._prefix.endswith("kv_b_proj")
            and get_current_vllm_config().model_config.use_mla
        ):
            raise RoutingError(
                f"the pool adapts {self._prefix}, whose weight vLLM folds into its latent attention: it can't be routed there."
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
            layer.add_module(CHILD, made)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = super().apply(layer, x, bias)
        return getattr(layer, CHILD)(x, y) if self.slices else y


def _described(layer: LinearBase, prefix: str, held_in: int, held_out: list[int], d_in: int) -> Linear:
    ranks = 1 if isinstance(layer, ReplicatedLinear) else layer.tp_size
    copies = [1] * len(held_out)
    if isinstance(layer, QKVParallelLinear) and layer.num_kv_head_replicas > 1:
        copies[1:] = [layer.num_kv_head_replicas] * (len(held_out) - 1)
    return Linear(prefix, d_in, layer.tp_rank, ranks, held_in, tuple(held_out), tuple(copies))

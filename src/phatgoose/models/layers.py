"""What routing must know of the modules it attaches to: their sizes, their dtype, their weight."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import RoutingError
from phatgoose.experts.update import Update
from phatgoose.ops import Layer
from phatgoose.ops.bottleneck import Residual

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer of any kind (plain, Conv1D, quantised), None if it isn't one.

    Taken from the layer's own record of its sizes: a packed quantised weight has another shape.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):  # the second pair is transformers' Conv1D
        d_in, d_out = (getattr(module, name, None) for name in names)
        if isinstance(d_in, int) and isinstance(d_out, int):
            return d_in, d_out
    return None


def embedding_shape(module: nn.Module) -> tuple[int, int] | None:
    """(vocabulary, d_out) of a plain embedding; None for others, also for those that scale their output (Gemma's)."""
    if type(module) is nn.Embedding and module.max_norm is None:
        return module.num_embeddings, module.embedding_dim
    return None


def compute_dtype(module: nn.Module, model: PreTrainedModel) -> torch.dtype:
    """The dtype the module computes in: its weight's, or the model's if the weight is packed."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in FLOATS:
        return weight.dtype
    return model.dtype


def layer_of(module: nn.Module) -> Layer:
    """The module's bias and its product x → W x, without its hooks.

    An offloaded or packed module is asked to run, and its bias taken off again, which costs the bias' rounding.
    """
    bias = getattr(module, "bias", None)
    plain = not hasattr(module, "_hf_hook") and is_plain(module)

    def product(x: Tensor) -> Tensor:
        if plain and type(module) is nn.Linear:
            return F.linear(x, module.weight)
        if plain:
            return (x.reshape(-1, x.shape[-1]) @ module.weight).reshape(*x.shape[:-1], -1)  # type: ignore[operator]
        y = module.forward(x)
        return y if bias is None else y - bias.to(y.device, y.dtype)

    return Layer(bias if isinstance(bias, Tensor) else None, product)


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called with, however it was passed: its first argument."""
    return args[0] if args else next(iter(kwargs.values()))


def is_plain(module: nn.Module) -> bool:
    """Whether it is torch's or transformers' own linear layer, which makes a new tensor in every call."""
    return type(module) in (nn.Linear, Conv1D)


def unseen(module: nn.Module) -> bool:
    """Whether nobody but the hook that asks has seen the output of a plain module: then it may be written into."""
    return len(module._forward_hooks) == 1 and not _global_forward_hooks


def residual_source(model: nn.Module, parts: Iterable[Update | None]) -> nn.Module | None:
    """The module whose input is the residual stream that one of these updates of one module reads; None if none does.

    Raises:
        RoutingError: the model has no such module.
    """
    found = (p.bottleneck.residual for p in parts if p is not None and p.bottleneck is not None)
    if (path := next((path for path in found if path is not None), None)) is None:
        return None
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise RoutingError(
            f"a bottleneck adapter reads the input of {path}, which this model lacks: it is of another architecture."
        ) from None


def follow_residual(source: nn.Module, module: nn.Module, residual: Residual) -> list[RemovableHandle]:
    """Hooks that fill `residual` with what `source` is given, and empty it after `module`, whose own hooks stand already."""
    return [
        source.register_forward_pre_hook(partial(_fill, residual), with_kwargs=True),
        module.register_forward_hook(partial(_empty, residual)),
    ]


# No closures: a copied or pickled model's hooks must fill the copy's own.
def _fill(residual: Residual, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    residual.value = given(args, kwargs)


def _empty(residual: Residual, *_: Any) -> None:
    residual.value = None


def dense_weight(module: nn.Module, path: str) -> Tensor:
    """W as [d_out, d_in], of a plain, Conv1D, offloaded or packed linear layer.

    Raises:
        RoutingError: if a packed weight can't be unpacked.
    """
    from accelerate.utils import align_module_device
    from peft.utils.integrations import dequantize_module_weight

    with align_module_device(module):
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
            try:
                weight = dequantize_module_weight(module)
            except Exception as cause:  # each packing has its own errors
                raise RoutingError(
                    f"{path}: a DoRA expert needs the base's weight, which is packed and can't be unpacked ({cause}); "
                    "load the base unpacked."
                ) from cause
        weight = weight.detach().clone()
    return weight.T if isinstance(module, Conv1D) else weight


def same_weights(module: nn.Module, name: str, copy: Tensor, *, cut: bool = False) -> bool:
    """Whether `copy` is the module's own parameter, up to the rounding to its dtype.

    `cut`: the copy may lack the last rows: those of an embedding or a head that no token of the tokenizer has.
    """
    from accelerate.utils import align_module_device

    with align_module_device(module):
        own = getattr(module, name, None)
        if isinstance(own, Tensor) and cut and own.ndim == copy.ndim and len(copy) < len(own):
            own = own[: len(copy)]
        if not isinstance(own, Tensor) or own.shape != copy.shape:
            return False
        return torch.equal(copy.to(own.device, own.dtype), own) or torch.equal(
            copy.to(own.device, torch.float64),
            own.to(copy.dtype).double(),  # torch.equal knows no float8
        )

"""What routing needs to know about a module: its sizes, dtype, weight, bias and output."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import RoutingError
from phatgoose.ops import Layer
from phatgoose.ops.bottleneck import Residual
from phatgoose.ops.update import Update

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer of any kind (plain, Conv1D, quantised); None for other modules.

    The sizes are the layer's own attributes, since a packed quantised weight has another shape. A class with its own
    forward over a plain weight is run once: routers of mixtures, for example, return several tensors or one of another
    size.
    """
    for names in (("in_features", "out_features"), ("nx", "nf")):  # the second pair is transformers' Conv1D
        d_in, d_out = (getattr(module, name, None) for name in names)
        if isinstance(d_in, int) and isinstance(d_out, int):
            return (d_in, d_out) if _returns_product(module, d_in, d_out) else None
    return None


@torch.no_grad()
def _returns_product(module: nn.Module, d_in: int, d_out: int) -> bool:
    """True if the module returns one tensor of d_out values a token; a packed or well-known layer isn't run."""
    weight = getattr(module, "weight", None)
    usual = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    if usual or not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
        return True
    device = "cpu" if weight.is_meta and hasattr(module, "_hf_hook") else weight.device
    try:
        y = module.forward(torch.zeros(1, 2, d_in, dtype=weight.dtype, device=device))
    except Exception:  # whatever the error, the module can't be called like a linear layer
        return False
    return isinstance(y, Tensor) and y.shape == (1, 2, d_out)


def embedding_shape(module: nn.Module) -> tuple[int, int] | None:
    """(vocabulary, d_out) of an embedding that returns its weight's rows, or these times `embed_scale`; else None."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if type(module).forward is not nn.Embedding.forward and not _only_scales(module):
        return None
    return module.num_embeddings, module.embedding_dim


def embed_scale(module: nn.Module) -> float:
    """The factor an embedding multiplies its rows by. Gemma's, BART's and M2M100's do so inside the module."""
    return 1.0 if type(module).forward is nn.Embedding.forward else float(getattr(module, "embed_scale", 1.0))


@torch.no_grad()
def _only_scales(module: nn.Embedding) -> bool:
    with align_module_device(module):
        if module.weight.is_meta:
            return hasattr(module, "embed_scale")
        ids = torch.arange(min(4, module.num_embeddings), device=module.weight.device)
        rows = F.embedding(ids, module.weight)
        try:
            y = type(module).forward(module, ids)
            return torch.allclose(y, rows * embed_scale(module), rtol=1e-2)
        except Exception:  # it can't be called like an embedding
            return False


def compute_dtype(module: nn.Module, model: PreTrainedModel) -> torch.dtype:
    """The dtype that the module computes in: its weight's, or the model's if the weight is packed."""
    weight = getattr(module, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) and weight.dtype in FLOATS else model.dtype


class ModuleLayer(Layer):
    """A module's bias and its product x → W x, without its hooks. Both are read at each use.

    An offloaded or packed module runs its own forward, and the bias is subtracted again: exact up to the bias'
    rounding.
    """

    def __init__(self, module: nn.Module) -> None:
        # Not the weights: these change when the model is copied, moved, offloaded or trained.
        object.__setattr__(self, "module", module)

    @property
    def bias(self) -> Tensor | None:
        module: nn.Module = self.__dict__["module"]
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and bias.is_meta:
            with align_module_device(module):
                bias = module.bias
        return bias if isinstance(bias, Tensor) else None

    def product(self, x: Tensor) -> Tensor:
        module: Any = self.__dict__["module"]
        if is_plain_linear(module) and not hasattr(module, "_hf_hook"):
            if type(module) is nn.Linear:
                return F.linear(x, module.weight)
            return (x.reshape(-1, x.shape[-1]) @ module.weight).reshape(*x.shape[:-1], -1)
        y: Tensor = module.forward(x)
        bias = self.bias
        return y if bias is None else y - bias.to(y.device, y.dtype)


def weight_state(module: nn.Module) -> tuple[object, ...] | None:
    """Changes when the weight is replaced, moved or written to (except through `.data`); None while it is offloaded."""
    weight, owner = getattr(module, "weight", None), getattr(module, "weight_owner", module)
    if not isinstance(weight, Tensor) or weight.is_meta or has_offloaded_params(owner):
        return None
    return weight.data_ptr(), weight.dtype, weight.device, 0 if weight.is_inference() else weight._version


def resolve_update(update: Update, module: nn.Module, path: str) -> Update:
    """The update as this module applies it: DoRA gets `dense_weight`, an embedding's is scaled by `embed_scale`."""
    if update.magnitude is not None:
        return update.resolved(dense_weight(module, path))
    if update.embedding and (scale := embed_scale(module)) != 1:
        return replace(update, scale=update.scale * scale)
    return update


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first argument of a module's call, whether it was passed by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def is_plain_linear(module: nn.Module) -> bool:
    """True for torch's and transformers' own linear layers, which return a new tensor in every call."""
    return type(module) in (nn.Linear, Conv1D)


def may_modify_output(module: nn.Module) -> bool:
    """True if no other hook can hold a plain linear layer's output, so the calling hook may modify it in place."""
    return len(module._forward_hooks) == 1 and not _global_forward_hooks


def residual_source(model: nn.Module, parts: Iterable[Update | None]) -> nn.Module | None:
    """The module whose input is the residual stream that one of these updates (all of one module) reads, if any.

    A RoutingError if the model has no such module.
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


def track_residual(source: nn.Module, module: nn.Module, residual: Residual) -> list[RemovableHandle]:
    """Hooks that set `residual` to the input of `source` and clear it after `module` has run.

    Call it after the hooks on `module` that read the residual are registered: hooks run in this order.
    """
    return [
        source.register_forward_pre_hook(partial(_fill, residual), with_kwargs=True),
        module.register_forward_hook(partial(_empty, residual)),
    ]


# Partial functions and not closures: the hooks of a copied or pickled model must fill the copy's own residual.
def _fill(residual: Residual, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    residual.value = first_argument(args, kwargs)


def _empty(residual: Residual, *_: Any) -> None:
    residual.value = None


def dense_weight(module: nn.Module, path: str) -> Tensor:
    """A copy of W [d_out, d_in] of a plain, Conv1D, offloaded or packed linear layer, which stays unchanged.

    A RoutingError if a packed weight can't be unpacked.
    """
    from peft.utils.integrations import dequantize_module_weight

    # Fetching a weight that the running pass has fetched already would end in removing it from under that pass.
    is_offloaded = getattr(getattr(module, "weight", None), "is_meta", False)
    owner = getattr(module, "weight_owner", module)  # an `ExpertLinear`'s experts module
    with align_module_device(owner) if is_offloaded else nullcontext():
        weight = module.weight
        if not isinstance(weight, Tensor) or weight.dtype not in FLOATS:
            try:
                weight = dequantize_module_weight(_copy_packed(module))
            except Exception as cause:  # each packing has its own errors
                raise RoutingError(
                    f"{path}: a DoRA expert needs the base's weight, which is packed and can't be unpacked ({cause}); "
                    "load the base unpacked."
                ) from cause
        weight = weight.detach().clone()
    return weight.T if isinstance(module, Conv1D) else weight


def _copy_packed(module: nn.Module) -> nn.Module:
    """A packed layer with copies of its tensors and quantisation state, because unpacking moves and replaces these."""
    copied = copy.copy(module)
    memo: dict[int, Any] = {}
    for name in ("_parameters", "_buffers", "state", "quant_state"):
        if name in copied.__dict__:
            copied.__dict__[name] = copy.deepcopy(copied.__dict__[name], memo)
    return copied


def same_weights(module: nn.Module, name: str, copy: Tensor, *, cut: bool = False) -> bool:
    """True if `copy` equals the module's own parameter up to rounding to its dtype.

    `cut`: the copy may lack the last rows, which in an embedding or a head may belong to no token.
    """
    with align_module_device(module):
        own = getattr(module, name, None)
        if isinstance(own, Tensor) and cut and own.ndim == copy.ndim and len(copy) < len(own):
            own = own[: len(copy)]
        if not isinstance(own, Tensor) or own.shape != copy.shape:
            return False
        return torch.equal(copy.to(own.device, own.dtype), own) or torch.equal(
            copy.to(own.device, torch.float64),
            own.to(copy.dtype).double(),  # torch.equal doesn't take float8
        )

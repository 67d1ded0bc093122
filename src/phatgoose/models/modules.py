"""The modules of a model that a pool's experts adapt, checked against what the experts say of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from phatgoose.errors import RoutingError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.experts.update import sizes_agree
from phatgoose.models.layers import embedding_shape, linear_shape, same_weights
from phatgoose.registry import unknown


def shape_of(module: nn.Module, embedding: bool) -> tuple[int, int]:
    """Of a module that `module_at` gave: (d_in, d_out), or of an embedding (vocabulary, d_out)."""
    shape = embedding_shape(module) if embedding else linear_shape(module)
    assert shape is not None  # module_at has refused others
    return shape


def module_at(modules: dict[str, nn.Module], path: str, pool: Pool) -> nn.Module:
    """The model's module at `path`, checked against the updates and gates of every expert that adapts it.

    Raises:
        RoutingError: it isn't there, is of another kind or shape, or a gate is of another length.
    """
    owner = next(e for e in pool.experts if path in e.sizes)
    if path not in modules:
        raise RoutingError(
            f"expert {owner.name!r} adapts a module this model lacks: {unknown('module', path, modules)}"
        )
    module, embedding = modules[path], owner.sizes[path][2]
    shape = embedding_shape(module) if embedding else linear_shape(module)
    if shape is None:
        wanted = "plain embeddings" if embedding else "linear layers"
        raise RoutingError(
            f"expert {owner.name!r} adapts {path}, a {type(module).__name__}; only {wanted} can be routed in this way."
        )
    for expert in pool.experts:
        size = expert.sizes.get(path)
        if size is None:
            continue
        if not all(map(sizes_agree, size[:2], shape)):
            raise RoutingError(
                f"expert {expert.name!r} has an update {size[0]} → {size[1]} at {path}, where this model has {shape[0]} → {shape[1]}."
            )
        gate, wanted_length = (expert.gates or {}).get(path), shape[1] if embedding else shape[0]
        if gate is not None and gate.shape[0] != wanted_length:
            raise RoutingError(
                f"expert {expert.name!r} has a gate of {gate.shape[0]} values at {path}, where this model needs {wanted_length}."
            )
    return module


def check_copies(modules: dict[str, nn.Module], experts: Iterable[Expert]) -> None:
    """Refuses experts that bring their own, changed copy of a base weight: it would be lost without a word.

    Raises:
        RoutingError: naming the expert and the weight.
    """
    for expert in experts:
        for key, copy in expert.base_copies.items():
            path, _, name = key.rpartition(".")
            if path not in modules or not same_weights(modules[path], name, copy):
                raise RoutingError(
                    f"expert {expert.name!r} brings its own {key} {list(copy.shape)}, which is not this model's: its vocabulary was "
                    "resized or its embeddings were retrained, and that can't be routed. If they weren't, it is of another base."
                )

"""Which router routes a pool on a model when the user names none."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import check_base
from phatgoose.models.attach.hooks import Hooks
from phatgoose.models.attach.modules import module_at
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.attach.site import placed_pool, setup_of
from phatgoose.models.base.base import Base, known_base, unwrap_model
from phatgoose.models.base.layers import first_argument
from phatgoose.models.context.memory import DummyLayer
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.expert_linear import ExpertLinear
from phatgoose.models.text.generate import answer_settings, run_generate
from phatgoose.routers.fitting import Fit, Obstacles, fitting_router

PROBE = "One two three"
"""What the base reads when it is looked whether its modules' tokens can be told."""


def fit_router(
    model: Base | PreTrainedModel, pool: Pool, options: RouteOptions | None = None, *, shared: bool = False
) -> Fit:
    """The router for a pool on this model. Nothing stays attached.

    Args:
        model: a bare one, perhaps without weights, isn't run: whether its modules' tokens can be told isn't looked at.
        shared: several requests are to run in one pass, as in a server.

    Raises:
        BaseModelError: `model` isn't the pool's base. RoutingError: it lacks a module, or has one of another shape.
    """
    options, bare = options or RouteOptions(), unwrap_model(model)
    base = known_base(model)
    if base is not None:
        check_base(base, pool, options)
    placed, modules, _ = placed_pool(bare, pool)
    for path in placed.modules:
        module_at(modules, path, placed)
    streams = Streams(bare, remembers=True)
    inside = next((path for path in placed.modules if isinstance(modules[path], ExpertLinear)), None)
    sequences = other = ""
    if options.device_memory is not None:
        other = "--device-memory is for routers that choose by gates"
    elif inside is not None and shared:
        sequences = f"{inside} is inside a mixture's experts, where requests can't be told apart"
    elif DummyLayer is None:
        sequences = "transformers before 5.23 has no cache that keeps what was read"
    elif base is not None:
        sequences = _why_no_sequences(base, {path: modules[path] for path in placed.modules}, streams)
    return fitting_router(setup_of(bare, placed, streams), Obstacles(sequences, other))


def _why_no_sequences(base: Base, modules: Mapping[str, nn.Module], streams: Streams) -> str:
    """Why it can't be told which tokens some module sees while the base writes; "" if it can."""

    def look(path: str, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, Tensor):  # anything else is refused when it is routed
            streams.context(path, first_argument(args, kwargs), output.shape).check()

    ids = base.tokenizer(PROBE, verbose=False)["input_ids"]
    with Hooks(streams.attach()) as hooks:
        hooks.add(
            module.register_forward_hook(partial(look, path), with_kwargs=True)
            for path, module in modules.items()
            if not isinstance(module, ExpertLinear)
        )
        try:
            run_generate(base.model, [ids], answer_settings(base, 2))
        except RoutingError as error:
            return str(error).rstrip(".")
        except Exception as error:  # whatever a base can't do here, routing must not be what says so
            return f"the base can't write an answer ({type(error).__name__}: {error})"
    return ""

"""One model out of a pile of PEFT adapters, routed token by token (PHATGOOSE, arXiv 2402.05859).

Everything public is here and is imported on first use, so that `import phatgoose` and `phatgoose --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phatgoose.errors import PhatgooseError
    from phatgoose.evaluation.run import EvaluationConfig, evaluate
    from phatgoose.experts.expert import Expert
    from phatgoose.experts.merge import merged
    from phatgoose.experts.pool import Pool
    from phatgoose.models.attach.attach import cache_use, prompted, route, unroute
    from phatgoose.models.base.base import Base
    from phatgoose.models.base.load import load_base
    from phatgoose.models.trace.record import trace
    from phatgoose.records import Example, Task
    from phatgoose.routers import (
        LAG,
        PHATGOOSE,
        Arrow,
        AverageActivation,
        Centroid,
        Gander,
        Random,
        Retrieval,
        Single,
        SoftCentroid,
        SpectR,
        Uniform,
        WeightOnly,
        parse_router,
    )
    from phatgoose.tasks import load_task
    from phatgoose.training.config import ExpertConfig, GateConfig, SignatureConfig, WritingConfig
    from phatgoose.training.expert import train_expert
    from phatgoose.training.gate import train_gate
    from phatgoose.training.generated import train_generated_gate
    from phatgoose.training.signature import make_signature
    from phatgoose.workflows.page import report

__version__ = _version("phatgoose")

_PUBLIC = {
    "errors": "PhatgooseError",
    "evaluation.run": "EvaluationConfig evaluate",
    "experts.expert": "Expert",
    "experts.merge": "merged",
    "experts.pool": "Pool",
    "models.attach.attach": "cache_use prompted route unroute",
    "models.base.base": "Base",
    "models.base.load": "load_base",
    "models.trace.record": "trace",
    "records": "Example Task",
    "routers": "Arrow AverageActivation Centroid Gander LAG PHATGOOSE Random Retrieval "
    "Single SoftCentroid SpectR Uniform WeightOnly parse_router",
    "tasks": "load_task",
    "training.config": "ExpertConfig GateConfig SignatureConfig WritingConfig",
    "training.expert": "train_expert",
    "training.gate": "train_gate",
    "training.generated": "train_generated_gate",
    "training.signature": "make_signature",
    "workflows.page": "report",
}
"""Module → the public names in it."""
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = [
    "LAG",
    "PHATGOOSE",
    "Arrow",
    "AverageActivation",
    "Base",
    "Centroid",
    "EvaluationConfig",
    "Example",
    "Expert",
    "ExpertConfig",
    "Gander",
    "GateConfig",
    "PhatgooseError",
    "Pool",
    "Random",
    "Retrieval",
    "SignatureConfig",
    "Single",
    "SoftCentroid",
    "SpectR",
    "Task",
    "Uniform",
    "WeightOnly",
    "WritingConfig",
    "cache_use",
    "evaluate",
    "load_base",
    "load_task",
    "make_signature",
    "merged",
    "parse_router",
    "prompted",
    "report",
    "route",
    "trace",
    "train_expert",
    "train_gate",
    "train_generated_gate",
    "unroute",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(import_module(f"phatgoose.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'phatgoose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

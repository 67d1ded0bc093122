"""phatgoose: one model out of a pile of PEFT adapters, routed token by token (PHATGOOSE, arXiv 2402.05859).

Everything public is here and is imported on first use, so that `import phatgoose` and `phatgoose --help` are quick.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phatgoose.analysis.page import report
    from phatgoose.errors import PhatgooseError
    from phatgoose.evaluation.run import EvaluationConfig, evaluate
    from phatgoose.experts.expert import Expert
    from phatgoose.experts.merge import merged
    from phatgoose.experts.pool import Pool
    from phatgoose.models.attach.attach import route, unroute
    from phatgoose.models.attach.device_memory import cache_use
    from phatgoose.models.base.base import Base
    from phatgoose.models.base.load import load_base
    from phatgoose.models.context.prompted import prompted
    from phatgoose.models.trace.trace import trace
    from phatgoose.records import Example, Task
    from phatgoose.routers import (
        LAG,
        PHATGOOSE,
        Arrow,
        AverageActivation,
        Centroid,
        Random,
        Retrieval,
        Single,
        SoftCentroid,
        SpectR,
        Uniform,
        WeightOnly,
    )
    from phatgoose.tasks import load_task
    from phatgoose.training.expert import ExpertConfig, train_expert
    from phatgoose.training.gate import GateConfig, train_gate
    from phatgoose.training.generated import WritingConfig, train_generated_gate
    from phatgoose.training.signature import SignatureConfig, make_signature

__version__ = _version("phatgoose")

_PUBLIC = {
    "LAG": "routers",
    "PHATGOOSE": "routers",
    "Arrow": "routers",
    "AverageActivation": "routers",
    "Base": "models.base.base",
    "Centroid": "routers",
    "EvaluationConfig": "evaluation.run",
    "Example": "records",
    "Expert": "experts.expert",
    "ExpertConfig": "training.expert",
    "GateConfig": "training.gate",
    "PhatgooseError": "errors",
    "Pool": "experts.pool",
    "Random": "routers",
    "Retrieval": "routers",
    "SignatureConfig": "training.signature",
    "Single": "routers",
    "SoftCentroid": "routers",
    "SpectR": "routers",
    "Task": "records",
    "Uniform": "routers",
    "WeightOnly": "routers",
    "WritingConfig": "training.generated",
    "cache_use": "models.attach.device_memory",
    "evaluate": "evaluation.run",
    "load_base": "models.base.load",
    "load_task": "tasks",
    "make_signature": "training.signature",
    "merged": "experts.merge",
    "prompted": "models.context.prompted",
    "report": "analysis.page",
    "route": "models.attach.attach",
    "trace": "models.trace.trace",
    "train_expert": "training.expert",
    "train_gate": "training.gate",
    "train_generated_gate": "training.generated",
    "unroute": "models.attach.attach",
}
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
    if name in _PUBLIC:
        value = getattr(import_module(f"phatgoose.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'phatgoose' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

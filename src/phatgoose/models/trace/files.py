"""A trace on disk and as a table.

One safetensors file: a header (JSON in its metadata: format, version, names, places) and tensors, `tokens.G.FIELD` for every
group of modules that read the same tokens, `choices.I.experts|weights|margins` or `loads.I.FIELD` for the I-th module.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.files import write_bytes
from phatgoose.models.base.module_names import ModuleLocation
from phatgoose.models.trace.choices import Choices, Load
from phatgoose.models.trace.recorder import TOKEN_FIELDS, Tokens

if TYPE_CHECKING:
    from pandas import DataFrame

    from phatgoose.models.trace.trace import Trace

FORMAT, VERSION = "phatgoose-trace", 1
_SMALL = {"rows": torch.int32, "positions": torch.int32, "inputs": torch.int32, "ids": torch.int32}
_LOAD_FIELDS = {"weight": torch.float64, "acted": torch.int64, "first": torch.int64, "tokens": torch.int64}


def save(trace: Trace, path: Path) -> Path:
    """Writes `path`, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    groups: dict[int, int] = {}
    modules: list[dict[str, Any]] = []
    for i, c in enumerate(trace.choices):
        if id(c.tokens) not in groups:
            groups[id(c.tokens)] = len(groups)
            for name in TOKEN_FIELDS:
                values = getattr(c.tokens, name)
                tensors[f"tokens.{len(groups) - 1}.{name}"] = values.to(_SMALL.get(name, values.dtype))
        modules.append({"path": c.path, "tokens": groups[id(c.tokens)]})
        tensors |= {f"choices.{i}.experts": c.experts, f"choices.{i}.weights": c.weights}
        if c.margins is not None:
            tensors[f"choices.{i}.margins"] = c.margins
    if trace.sums_only:
        for i, (module, load) in enumerate(trace.loads.items()):
            modules.append({"path": module})
            tensors |= {f"loads.{i}.{name}": getattr(load, name) for name in _LOAD_FIELDS}
    header = {
        "experts": trace.experts,
        "places": [dataclasses.asdict(place) for place in trace.locations.values()],
        "modules": modules,
        **{name: getattr(trace, name) for name in ("encoder_decoder", "share", "sums_only", "reordered")},
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header)}
    copies = {
        name: tensor.clone() for name, tensor in tensors.items()
    }  # modules' choices are views of one tensor
    write_bytes(path, to_bytes(copies, metadata))
    return path


def load(path: Path) -> Trace:
    """Reads and checks what `save` wrote."""
    from phatgoose.models.trace.trace import Trace

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError:
        raise RoutingError(f"{path} does not exist.") from None
    except (OSError, SafetensorError) as cause:
        raise RoutingError(f"{path} is not a whole safetensors file: {cause}") from cause
    found = (metadata.get("format"), metadata.get("version"))
    if found != (FORMAT, str(VERSION)):
        raise RoutingError(
            f"{path} is not a trace this version reads: expected {FORMAT} {VERSION}, found {found}."
        )
    try:
        header = json.loads(metadata["header"])
        experts = tuple(map(str, header["experts"]))
        trace = Trace(
            experts,
            {p["path"]: ModuleLocation(**p) for p in header["places"]},
            bool(header["encoder_decoder"]),
            float(header["share"]),
            bool(header["sums_only"]),
            bool(header["reordered"]),
        )
        groups: dict[int, Tokens] = {}  # shared by modules, as when they were recorded
        for i, module in enumerate(header["modules"]):
            name = str(module["path"])
            if trace.sums_only:
                trace._loads[name] = Load(*(tensors[f"loads.{i}.{field}"] for field in _LOAD_FIELDS))
            else:
                group = int(module["tokens"])
                groups[group] = tokens = groups.get(group) or _tokens(tensors, group)
                margins = tensors.get(f"choices.{i}.margins")
                trace._choices[name] = [
                    Choices(name, tensors[f"choices.{i}.experts"], tensors[f"choices.{i}.weights"], tokens, margins)
                ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as cause:
        raise RoutingError(f"{path} lacks a part of a trace or has a malformed one: {cause!r}") from cause
    _check(trace, path)
    return trace


def _tokens(tensors: dict[str, Tensor], group: int) -> Tokens:
    values = [tensors[f"tokens.{group}.{name}"] for name in TOKEN_FIELDS]
    return Tokens(*(v.long() if name in _SMALL else v for name, v in zip(TOKEN_FIELDS, values, strict=True)))


def _check(trace: Trace, path: Path) -> None:
    e = len(trace.experts)
    for c in trace.choices:
        n, k = len(c.tokens), c.experts.shape[1] if c.experts.ndim == 2 else -1
        shapes = [tuple(c.experts.shape), tuple(c.weights.shape)]
        if shapes != [(n, k)] * 2 or (c.margins is not None and tuple(c.margins.shape) != (n,)):
            raise RoutingError(f"{path}: {c.path} has choices of shapes {shapes} on {n} tokens.")
        if c.experts.dtype != torch.int16 or not c.weights.is_floating_point():
            raise RoutingError(
                f"{path}: {c.path} has choices of dtype {c.experts.dtype} and weights of {c.weights.dtype}."
            )
        if n and k and (int(c.experts.min()) < -1 or int(c.experts.max()) >= e):
            raise RoutingError(f"{path}: {c.path} names experts up to {int(c.experts.max())}, there are {e}.")
        if not bool(c.weights.isfinite().all()):
            raise RoutingError(f"{path}: {c.path} has weights that are not finite.")
        if len({len(getattr(c.tokens, name)) for name in TOKEN_FIELDS}) != 1:
            raise RoutingError(f"{path}: the tokens of {c.path} have fields of different lengths.")
    for name, load in trace._loads.items():
        shapes = [tuple(getattr(load, field).shape) for field in _LOAD_FIELDS]
        if shapes != [(2, e + 1)] * 3 + [(2,)]:
            raise RoutingError(f"{path}: {name} has sums of shapes {shapes} for {e} experts.")
    for name in (*trace._choices, *trace._loads):
        if name not in trace.locations:
            raise RoutingError(f"{path}: module {name} has no place.")


def to_pandas(trace: Trace) -> DataFrame:
    """One row per token, module and choice, in the order of modules, tokens, choices."""
    try:
        import pandas as pd
    except ImportError:
        raise RoutingError(
            "a table of a trace needs pandas, which isn't installed: pip install pandas."
        ) from None
    if trace.sums_only:
        raise RoutingError(
            "this trace holds sums, not single choices: record without histogram=True for a table."
        )
    parts = []
    for c in trace.choices:
        n, k = c.experts.shape
        place = trace.locations[c.path]
        columns: dict[str, Any] = {
            name: getattr(c.tokens, name).repeat_interleave(k).numpy()
            for name in ("inputs", "rows", "positions", "ids", "generated")
        }
        none = torch.full((n,), torch.nan)
        margins = (none if c.margins is None else c.margins.float()).repeat_interleave(k).numpy()
        columns |= {"module": c.path, "layer": place.layer, "kind": place.kind, "part": place.part}
        columns |= {
            "choice": torch.arange(k).repeat(n).numpy(),
            "expert": pd.Categorical.from_codes(
                c.experts.reshape(-1).numpy(), categories=list(trace.experts)
            ),
            "weight": c.weights.float().reshape(-1).numpy(),
            "margin": margins,
        }
        parts.append(pd.DataFrame(columns))
    names = {"inputs": "input", "rows": "row", "positions": "position", "ids": "id"}
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True).rename(columns=names)
    for name in ("module", "kind", "part"):
        table[name] = table[name].astype("category")
    return table

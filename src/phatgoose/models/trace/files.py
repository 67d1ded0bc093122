"""A trace on disk, in one safetensors file, and as a table.

The file has a header (JSON in its metadata: format, version, names, places) and tensors, `tokens.G.FIELD` for every
group of modules that read the same tokens, `choices.I.experts|weights|margins` or `loads.I.FIELD` for the I-th module.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from phatgoose.errors import RoutingError
from phatgoose.files import write_bytes
from phatgoose.models.base.module_names import ModuleLocation
from phatgoose.models.trace.choices import TOKEN_FIELDS, Choices, Load, Tokens

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT, VERSION = "phatgoose-trace", 1
_SMALL = {"rows": torch.int32, "positions": torch.int32, "inputs": torch.int32, "ids": torch.int32}
"""In files these fields are narrower than in memory."""
_LOAD_FIELDS = tuple(f.name for f in dataclasses.fields(Load))
_FLAGS = ("encoder_decoder", "share", "sums_only", "reordered")


@dataclass(eq=False)
class Header:
    """What a trace says of the model and of itself."""

    experts: tuple[str, ...]
    locations: dict[str, ModuleLocation] = field(default_factory=dict)
    """Every routed module, in the pool's order."""
    encoder_decoder: bool = False
    share: float = 1.0
    """Share of the tokens that were kept; below 1 they are a random sample, the same tokens at all modules."""
    sums_only: bool = False
    """Recorded with histogram=True: `loads` is there, `choices` is empty."""
    reordered: bool = False
    """Beam search moved sequences to other rows: `rows` follow no sequence, `inputs` do, as beams share a number."""


def save(path: Path, header: Header, choices: Iterable[Choices], loads: Mapping[str, Load]) -> Path:
    """Writes `path`, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    groups: dict[int, int] = {}
    modules: list[dict[str, Any]] = []
    for i, c in enumerate(choices):
        if id(c.tokens) not in groups:
            groups[id(c.tokens)] = len(groups)
            for name in TOKEN_FIELDS:
                values = getattr(c.tokens, name)
                tensors[f"tokens.{len(groups) - 1}.{name}"] = values.to(_SMALL.get(name, values.dtype))
        modules.append({"path": c.path, "tokens": groups[id(c.tokens)]})
        tensors |= {f"choices.{i}.experts": c.experts, f"choices.{i}.weights": c.weights}
        if c.margins is not None:
            tensors[f"choices.{i}.margins"] = c.margins
    for i, (path_of_module, load) in enumerate(loads.items()):
        modules.append({"path": path_of_module})
        tensors |= {f"loads.{i}.{name}": getattr(load, name) for name in _LOAD_FIELDS}
    data = {
        "experts": header.experts,
        "places": [dataclasses.asdict(location) for location in header.locations.values()],
        "modules": modules,
        **{name: getattr(header, name) for name in _FLAGS},
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(data)}
    # Modules' choices are views of one tensor, and safetensors writes no views.
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    write_bytes(path, to_bytes(copies, metadata))
    return path


def load(path: Path) -> tuple[Header, list[Choices], dict[str, Load]]:
    """Reads and checks what `save` wrote.

    Raises:
        RoutingError: it is no such file, damaged, or inconsistent.
    """
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
        header, choices, loads = _parse(json.loads(metadata["header"]), tensors)
    except (KeyError, TypeError, ValueError, RecursionError) as cause:
        raise RoutingError(f"{path} lacks a part of a trace or has a malformed one: {cause!r}") from cause
    for c in choices:
        _check_choices(path, c, len(header.experts))
    for name, load in loads.items():
        shapes = [tuple(getattr(load, field).shape) for field in _LOAD_FIELDS]
        if shapes != [(2, len(header.experts) + 1)] * 3 + [(2,)]:
            raise RoutingError(
                f"{path}: {name} has sums of shapes {shapes} for {len(header.experts)} experts."
            )
    for name in (*(c.path for c in choices), *loads):
        if name not in header.locations:
            raise RoutingError(f"{path}: module {name} has no place.")
    return header, choices, loads


def _parse(data: Any, tensors: dict[str, Tensor]) -> tuple[Header, list[Choices], dict[str, Load]]:
    header = Header(
        tuple(map(str, data["experts"])),
        {p["path"]: ModuleLocation(**p) for p in data["places"]},
        bool(data["encoder_decoder"]),
        float(data["share"]),
        bool(data["sums_only"]),
        bool(data["reordered"]),
    )
    choices: list[Choices] = []
    loads: dict[str, Load] = {}
    groups: dict[int, Tokens] = {}  # shared by modules, as when they were recorded
    for i, module in enumerate(data["modules"]):
        name = str(module["path"])
        if header.sums_only:
            loads[name] = Load(*(tensors[f"loads.{i}.{field}"] for field in _LOAD_FIELDS))
            continue
        group = int(module["tokens"])
        if group not in groups:
            values = {field: tensors[f"tokens.{group}.{field}"] for field in TOKEN_FIELDS}
            groups[group] = Tokens(**values | {field: values[field].long() for field in _SMALL})
        tokens = groups[group]
        experts, weights = tensors[f"choices.{i}.experts"], tensors[f"choices.{i}.weights"]
        choices.append(Choices(name, experts, weights, tokens, tensors.get(f"choices.{i}.margins")))
    return header, choices, loads


def _check_choices(path: Path, c: Choices, experts: int) -> None:
    n, k = len(c.tokens), c.experts.shape[1] if c.experts.ndim == 2 else -1
    shapes = [tuple(c.experts.shape), tuple(c.weights.shape)]
    if shapes != [(n, k)] * 2 or (c.margins is not None and tuple(c.margins.shape) != (n,)):
        raise RoutingError(f"{path}: {c.path} has choices of shapes {shapes} on {n} tokens.")
    if c.experts.dtype != torch.int16 or not c.weights.is_floating_point():
        raise RoutingError(
            f"{path}: {c.path} has choices of dtype {c.experts.dtype} and weights of {c.weights.dtype}."
        )
    if n and k and (int(c.experts.min()) < -1 or int(c.experts.max()) >= experts):
        raise RoutingError(
            f"{path}: {c.path} names experts up to {int(c.experts.max())}, there are {experts}."
        )
    if not bool(c.weights.isfinite().all()):
        raise RoutingError(f"{path}: {c.path} has weights that are not finite.")
    if len({len(getattr(c.tokens, name)) for name in TOKEN_FIELDS}) != 1:
        raise RoutingError(f"{path}: the tokens of {c.path} have fields of different lengths.")


def to_pandas(
    choices: Sequence[Choices], locations: Mapping[str, ModuleLocation], experts: Sequence[str]
) -> DataFrame:
    """One row per token, module and choice, in the order of modules, tokens, choices."""
    try:
        import pandas as pd
    except ImportError:
        raise RoutingError(
            "a table of a trace needs pandas, which isn't installed: pip install pandas."
        ) from None
    parts = []
    for c in choices:
        n, k = c.experts.shape
        location = locations[c.path]
        fields = {
            "input": "inputs",
            "row": "rows",
            "position": "positions",
            "id": "ids",
            "generated": "generated",
        }
        columns: dict[str, Any] = {
            column: getattr(c.tokens, name).repeat_interleave(k).numpy() for column, name in fields.items()
        }
        columns |= {"module": c.path, "layer": location.layer, "kind": location.kind, "part": location.part}
        columns["choice"] = torch.arange(k).repeat(n).numpy()
        columns["expert"] = pd.Categorical.from_codes(c.experts.reshape(-1).numpy(), categories=list(experts))
        columns["weight"] = c.weights.float().reshape(-1).numpy()
        margins = torch.full((n,), torch.nan) if c.margins is None else c.margins.float()
        columns["margin"] = margins.repeat_interleave(k).numpy()
        parts.append(pd.DataFrame(columns))
    if not parts:
        return pd.DataFrame()
    table = pd.concat(parts, ignore_index=True)
    for name in ("module", "kind", "part"):
        table[name] = table[name].astype("category")
    return table

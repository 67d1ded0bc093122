"""What one expert does at one module: an update Δ(u) of what the module computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from phatgoose.ops.bottleneck import Bottleneck


@dataclass(frozen=True, eq=False)
class Projections:
    """VeRA's random matrices, which all modules of an adapter share: A [r, widest d_in] and B [widest d_out, r].

    Each module takes A's first d_in columns and B's first d_out rows.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    seed: int | None = None
    """What PEFT draws them from, where they weren't saved along."""

    def drawn(self, rank: int, d_in: int, d_out: int) -> Projections:
        """These, or those that PEFT draws from the seed for modules of at most these sizes."""
        if self.seed is None:
            return self
        generator = torch.Generator().manual_seed(self.seed)
        shapes = ((rank, d_in), (d_out, rank))
        # Kaiming's uniform distribution. PEFT rounds its bound in this order, and other bounds would draw
        # other numbers.
        bounds = (math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(columns)) for _, columns in shapes)
        a, b = (
            torch.empty(shape).uniform_(-bound, bound, generator=generator)
            for shape, bound in zip(shapes, bounds, strict=True)
        )
        return Projections(a, b)


@dataclass(frozen=True, eq=False)
class SharedUpdate:
    """VeRA (Kopiczko et al. 2024, arXiv 2310.11454): b ⊙ B (d ⊙ A u), b [d_out], d [r]."""

    b: Tensor
    d: Tensor
    projections: Projections


_DEFAULTS: dict[type, list[tuple[str, Any]]] = {}
"""By the kind of update, its fields behind A and B, and their defaults."""


@dataclass(frozen=True, eq=False)
class Update:
    """Δ(u) of an expert at one module that computes y = W u + b. Absent parts are None; an absent low-rank
    part has rank 0.

    Δ(u) = scale·(B A u + bias) + (c−1) ⊙ y + W((l−1) ⊙ u) + bottleneck(y)

    LoRA and rsLoRA are the first term, (IA)³ is one of the next two. DoRA is the first two with W u in place
    of y, after `resolved` has put the base's weight in. Tensors are kept as trained, in any float dtype.
    """

    A: Tensor
    """[r, d_in]; of an embedding [r, vocabulary]."""
    B: Tensor
    """[d_out, r]."""
    scale: float = 1.0
    bias: Tensor | None = None
    """[d_out], LoRA's own bias of B."""
    output_scale: Tensor | None = None
    """c: [d_out]."""
    covers_bias: bool = True
    """Whether c scales W u + b, as in (IA)³, or W u alone, as in DoRA."""
    input_scale: Tensor | None = None
    """l: [d_in]."""
    magnitude: Tensor | None = None
    """DoRA's m: [d_out]. Must be `resolved` before the update can be computed."""
    bottleneck: Bottleneck | None = None
    embedding: bool = False
    """Whether the module is an embedding: u are token ids, A u are columns of A."""
    shared: SharedUpdate | None = None
    """VeRA's vectors. Must be `placed` before the update can be computed: only the base knows the sizes."""

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def width(self) -> int:
        """r of the low-rank part or of the bottleneck, whichever is larger; 0 if there is neither."""
        if self.shared is not None:
            return self.shared.d.shape[0]
        return self.rank if self.bottleneck is None else max(self.rank, self.bottleneck.down.shape[0])

    @property
    def d_in(self) -> int:
        """0 if only the base knows it, as where (IA)³ scales an output."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """0 if only the base knows it, as where (IA)³ scales an input."""
        return self.B.shape[0]

    @property
    def gate_dim(self) -> int:
        """Length of the gate: of the module's input, or of an embedding's output, whose input has no direction."""
        return self.d_out if self.embedding else self.d_in

    @property
    def is_low_rank(self) -> bool:
        """Whether Δ(u) = scale · B A u is all there is."""
        return self.fields_set() <= LOW_RANK_FIELDS

    def fields_set(self) -> set[str]:
        """The names of its fields that aren't at their defaults, other than A and B.

        Code that handles some fields only compares them with this, so that it refuses a field that is added later.
        """
        own, kind, found = vars(self), type(self), set()
        # Thousands of experts at hundreds of modules come this way.
        if (defaults := _DEFAULTS.get(kind)) is None:
            defaults = _DEFAULTS[kind] = [(field.name, field.default) for field in fields(self)[2:]]
        for name, default in defaults:
            value = own[name]
            if value is not default and (isinstance(value, Tensor) or value != default):
                found.add(name)
        return found

    def vectors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The vectors of Δ(u) in this dtype, by the names of `stack.VECTOR_TERMS`; 0 changes nothing."""
        found = {}
        if self.bias is not None:
            found["bias"] = self.bias.detach().to(dtype) * self.scale
        if self.output_scale is not None:
            found["output_scale" if self.covers_bias else "linear_scale"] = (
                self.output_scale.detach().to(dtype) - 1
            )
        if self.input_scale is not None:
            found["input_scale"] = self.input_scale.detach().to(dtype) - 1
        return found

    @property
    def kind(self) -> str:
        """The method's name: "LoRA", "DoRA", "(IA)³", "VeRA", "bottleneck", or several joined by "+"."""
        names = []
        if self.shared is not None:
            names.append("VeRA")
        if self.rank:
            resolved = self.output_scale is not None and not self.covers_bias
            names.append("DoRA" if self.magnitude is not None or resolved else "LoRA")
        if self.input_scale is not None or (self.output_scale is not None and self.covers_bias):
            names.append("(IA)³")
        if self.bottleneck is not None:
            names.append("bottleneck")
        return "+".join(names) or "LoRA"

    @property
    def described(self) -> str:
        """Its kind, and what plain LoRA lacks: "an embedding's LoRA", "LoRA with a bias"."""
        name = f"an embedding's {self.kind}" if self.embedding else self.kind
        return name + " with a bias" * (self.bias is not None)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of it, by name."""
        owners: list[tuple[str, object]] = [("", self)]
        if self.bottleneck is not None:
            owners.append(("bottleneck.", self.bottleneck))
        if self.shared is not None:
            owners += [("shared.", self.shared), ("projections.", self.shared.projections)]
        for prefix, owner in owners:
            for name, value in vars(owner).items():
                if isinstance(value, Tensor):
                    yield prefix + name, value

    def numbers(self) -> dict[str, object]:
        """Everything but its tensors that decides what it computes, where it isn't the default."""
        others = {name: getattr(self, name) for name in self.fields_set()}
        found: dict[str, object] = {"scale": self.scale} | {
            name: value
            for name, value in others.items()
            if not isinstance(value, Tensor | Bottleneck | SharedUpdate)
        }
        if self.bottleneck is not None:
            b = self.bottleneck
            found["bottleneck"] = [b.activation, b.scale]
            if b.residual is not None:
                found["bottleneck_reads"] = [b.residual, b.reads_output]
        if self.shared is not None and self.shared.projections.seed is not None:
            found["projection_seed"] = self.shared.projections.seed
        return found

    def resolved(self, weight: Tensor) -> Update:
        """DoRA with the base's weight [d_out, d_in] put in: c = m/‖W + s B A‖ (norms of rows), Δ = (c−1) ⊙ W u
        + c ⊙ s B A u.

        Liu et al. 2024, arXiv 2402.09353, eq. 5. Computed in float32 or wider. Other updates are returned as they are.
        """
        if self.magnitude is None:
            return self
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, weight.dtype), torch.float32)
        a, b, w, m = (t.detach().to("cpu", dtype) for t in (self.A, self.B, weight, self.magnitude))
        c = m.reshape(-1) / torch.linalg.vector_norm(w + self.scale * (b @ a), dim=1)
        return replace(self, A=a, B=c[:, None] * b, output_scale=c, covers_bias=False, magnitude=None)

    def placed(self, d_in: int, projections: Projections) -> Update:
        """VeRA at a module of d_in inputs as a low-rank update, in float32 or wider; `projections` that have
        their matrices.

        Raises:
            ValueError: A has fewer columns than the module has inputs, or B fewer rows than it has outputs.
        """
        if self.shared is None:
            return self
        a, b, d, rows = projections.A, projections.B, self.shared.d, self.shared.b
        assert a is not None
        assert b is not None
        if a.shape[1] < d_in or b.shape[0] < len(rows):
            raise ValueError(
                f"vera_A {list(a.shape)} and vera_B {list(b.shape)} are too small for {d_in} → {len(rows)}"
            )
        dtype = torch.promote_types(torch.promote_types(a.dtype, d.dtype), torch.float32)
        a, b, d, rows = (t.detach().to(dtype) for t in (a[:, :d_in], b[: len(rows)], d, rows))
        return replace(self, A=d[:, None] * a, B=rows[:, None] * b, shared=None)

    def weight(self) -> Tensor:
        """ΔW = scale · B A of the low-rank part: [d_out, d_in] in float32."""
        return self.scale * (self.B.float() @ self.A.float())


LOW_RANK_FIELDS = {"scale", "covers_bias"}
"""What a low-rank update may have set besides A and B: covers_bias only says how an output_scale is meant."""


def no_rows(d_in: int | None, d_out: int | None) -> tuple[Tensor, Tensor]:
    """A and B of an update without a low-rank part; a size that only the base knows is None, and stands as 0."""
    return torch.zeros(0, d_in or 0), torch.zeros(d_out or 0, 0)


def sizes_agree(one: int, other: int) -> bool:
    """Whether two sizes can be of one module: equal, or one is 0, which only the base knows."""
    return 0 in (one, other) or one == other

"""Settings of the two trainings. Defaults are the paper's (PHATGOOSE, arXiv 2402.05859, section 4 and its appendix)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from phatgoose.errors import TrainingError

Precision = Literal["auto", "float32", "bfloat16"]
Kind = Literal["lora", "ia3", "bottleneck"]
Placement = Literal["pfeiffer", "houlsby", "parallel"]
Activation = Literal["relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu"]
LEARNING_RATES: dict[str, float] = {"lora": 5e-3, "ia3": 3e-3, "bottleneck": 1e-3}
"""PHATGOOSE's for LoRA, T-Few's (Liu et al. 2022) for (IA)³, one from the range that Houlsby et al. (2019) swept for bottlenecks."""
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rank", "alpha", "rslora", "dora", "lora_bias"), ("lora",)),
    **dict.fromkeys(("placement", "reduction", "activation"), ("bottleneck",)),
    **dict.fromkeys(("init_std", "dropout"), ("lora", "bottleneck")),
    "target_modules": ("lora", "ia3"),
}
"""Setting → kinds of adapter it belongs to."""
_NO_EFFECT_ON_RESULT = ("save_every",)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What training an expert and training its gate have in common.

    Raises (when built):
        TrainingError: naming the setting that is out of range.
    """

    steps: int = 1000
    """Updates of the weights."""
    rows_per_step: int = 1024
    """Rows whose gradient makes one update, over all processes. Rows come in shuffled passes over the training split."""
    rows_per_batch: int = 16
    """Rows that are in memory at once, per process; must divide rows_per_step (÷ processes). Smaller saves memory, and
    saves padding: the rows of a step are sorted by length before they are cut into batches. The gradient is the same."""
    max_length: int = 512
    """Tokens of a row (prompt and target; encoder–decoder: each of the two). Longer prompts are cut at the left and
    counted in the provenance; a longer target is an error."""
    learning_rate: float = 5e-3
    """AdamW's step size after warm-up."""
    warmup_share: float = 0.06
    """Share of the steps over which the learning rate grows linearly from zero; constant afterwards."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float | None = None
    """Clips a step's gradient to this norm. The paper doesn't mention clipping; its authors' code has 1.0."""
    base_dropout: bool = True
    """Whether the base's own dropout (T5: 0.1 in its config; Llama, Qwen: none) acts in training, as in the authors' code."""
    validate_every: int = 100
    """Steps between validations; the last step is validated too, and the weights with the lowest loss are the result.
    0: no validation, the last weights are the result."""
    validation_rows: int = 512
    """At most this many rows of the validation split, always the same ones."""
    save_every: int = 50
    """Steps between checkpoints, from which a killed training continues; only with a work folder. 0: none."""
    seed: int = 0
    """Of the order of rows, of A's first values, and of dropout."""
    precision: Precision = "auto"
    """How base and adapter are computed: "bfloat16", "float32", or "auto": the base's own dtype. What is trained is always
    kept in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""

    def __post_init__(self) -> None:
        for name in ("steps", "rows_per_step", "rows_per_batch", "validation_rows"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("validate_every", "save_every", "seed"):
            _check(self, name, getattr(self, name) >= 0, "at least 0")
        _check(self, "max_length", self.max_length >= 3, "at least 3")
        _check(
            self,
            "learning_rate",
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "a positive number",
        )
        _check(self, "warmup_share", 0 <= self.warmup_share < 1, "at least 0 and below 1")
        _check(
            self,
            "weight_decay",
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "a number not below 0",
        )
        _check(
            self, "max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "positive or None"
        )
        _check(
            self,
            "precision",
            self.precision in ("auto", "float32", "bfloat16"),
            '"auto", "float32" or "bfloat16"',
        )
        _check(
            self,
            "rows_per_batch",
            self.rows_per_step % self.rows_per_batch == 0,
            f"a divisor of rows_per_step = {self.rows_per_step}",
        )

    @property
    def warmup_steps(self) -> int:
        return int(self.steps * self.warmup_share + 1e-9)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def key(self) -> dict[str, Any]:
        """The settings that decide the result."""
        return {k: v for k, v in self.to_json().items() if k not in _NO_EFFECT_ON_RESULT}


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(LoopConfig):
    """How an expert is trained: 1000 steps of 1024 rows, LoRA of rank 16 and scale 1/16 on every linear layer.

    Settings that don't belong to the kind of adapter must keep their defaults.
    """

    kind: Kind = "lora"
    """The kind of adapter: "lora", "ia3" (vectors that scale keys, values and the inputs of the second feed-forward layer; Liu et
    al. 2022) or "bottleneck" (a small network after a layer; Houlsby et al. 2019, Pfeiffer et al. 2021)."""
    learning_rate: float | None = None  # type: ignore[assignment]  # a number once it is built
    """AdamW's step size after warm-up. None: the kind's own: 5e-3 for lora, 3e-3 for ia3, 1e-3 for bottleneck."""
    target_modules: str | tuple[str, ...] = "auto"
    """Which linear layers a lora or ia3 adapts. "auto": with lora the same as "all-linear", with ia3 those that PEFT names for the
    base's architecture. "all-linear": every linear layer of attention and feed-forward, not the output head; in a
    vision-language base only those that read text, in a mixture of experts not the fused experts, and none that PEFT refuses. A warning
    says what is left out.
    Or names, each the whole path or the end of the path of linear layers: ("q_proj", "v_proj")."""
    rank: int = 16
    """lora: r, columns of B and rows of A."""
    alpha: float = 1.0
    """lora: its scale is alpha / rank (alpha / √rank with rslora)."""
    rslora: bool = False
    """lora: scale by alpha / √rank."""
    dora: bool = False
    """lora: weight-decomposed (DoRA, Liu et al. 2024), which also learns the norm of every row of W + scale·B A."""
    lora_bias: bool = False
    """lora: also an output bias, scaled like B A u. Not with dora."""
    placement: Placement = "pfeiffer"
    """bottleneck: "pfeiffer", one a layer, after the feed-forward block, which reads the residual stream; "houlsby", two a layer,
    after attention and after feed-forward, which read the block's output; "parallel", one beside the feed-forward block with scale
    4 (He et al. 2021)."""
    reduction: int = 16
    """bottleneck: its size is the base's hidden size ÷ this, rounded down, at least 1."""
    activation: Activation = "relu"
    """bottleneck: its nonlinearity."""
    init_std: float = 0.01
    """lora and bottleneck: A (the down-projection) starts as N(0, init_std²), B (the up-projection) as zero. (PEFT's own "gaussian"
    would have 1 / rank.)"""
    dropout: float = 0.0
    """lora and bottleneck: dropout while training, on the input of A, or on the bottleneck's output."""

    def __post_init__(self) -> None:
        _check(self, "kind", self.kind in LEARNING_RATES, " or ".join(f'"{k}"' for k in LEARNING_RATES))
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.kind])
        super().__post_init__()
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", _names(self.target_modules))
        _check(self, "target_modules", bool(self.target_modules), '"auto", "all-linear" or at least one name')
        self._check_kind()
        _check(self, "rank", self.rank >= 1, "at least 1")
        _check(self, "alpha", math.isfinite(self.alpha) and self.alpha != 0, "a number other than 0")
        _check(
            self,
            "lora_bias",
            not (self.lora_bias and self.dora),
            "False with dora, for which PEFT doesn't define it",
        )
        _check(self, "placement", self.placement in get_args(Placement), " or ".join(get_args(Placement)))
        _check(self, "reduction", self.reduction >= 1, "at least 1")
        _check(self, "activation", self.activation in get_args(Activation), " or ".join(get_args(Activation)))
        _check(self, "init_std", math.isfinite(self.init_std) and self.init_std > 0, "a positive number")
        _check(self, "dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        if self.kind == "lora" and self.target_modules == "auto":
            object.__setattr__(self, "target_modules", "all-linear")

    def _check_kind(self) -> None:
        for field in fields(self):
            kinds = _ONLY_FOR.get(field.name, (self.kind,))
            unused = self.kind not in kinds and getattr(self, field.name) != field.default
            _check(self, field.name, not unused, f"its default, as it has no effect with kind={self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class GateConfig(LoopConfig):
    """How a gate is trained: as its expert, for 100 steps. v starts as zero, so that σ(vᵀu) starts as ½ everywhere."""

    steps: int = 100
    """Updates of the gates."""


def _names(value: Sequence[str]) -> tuple[str, ...]:
    names = tuple(value)
    if not all(isinstance(n, str) and n for n in names):
        raise TrainingError(f"target_modules = {value!r}: expected names of modules.")
    return names


def _check(config: LoopConfig, name: str, good: bool, expected: str) -> None:
    if not good:
        raise TrainingError(
            f"{type(config).__name__}.{name} = {getattr(config, name)!r}: expected {expected}."
        )

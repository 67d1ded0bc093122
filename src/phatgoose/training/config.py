"""Settings of the trainings, of written texts and of data signatures.

Defaults of the trainings are the paper's (PHATGOOSE, arXiv 2402.05859, section 4 and its appendix). This file imports
no torch, so that commands and recipes can read it quickly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from phatgoose.errors import TrainingError

Precision = Literal["auto", "float32", "bfloat16"]
Kind = Literal["lora", "ia3", "bottleneck"]
Placement = Literal["pfeiffer", "houlsby", "parallel"]
Activation = Literal["relu", "gelu", "gelu_new", "swish", "tanh", "leakyrelu"]
LEARNING_RATES: dict[str, float] = {"lora": 5e-3, "ia3": 3e-3, "bottleneck": 1e-3}
"""PHATGOOSE's for LoRA, T-Few's (Liu et al. 2022) for (IA)³, one from the range that Houlsby et al. (2019) swept for
bottlenecks."""
_ONLY_FOR: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("rank", "alpha", "rslora", "dora", "lora_bias"), ("lora",)),
    **dict.fromkeys(("placement", "reduction", "activation"), ("bottleneck",)),
    **dict.fromkeys(("init_std", "dropout"), ("lora", "bottleneck")),
    "target_modules": ("lora", "ia3"),
}
"""Setting → the kinds of adapter it applies to."""
MOST_TEXTS = 1000
"""The same number as in phatgoose.experts.data_signature, repeated here because importing that would import torch."""


class _Settings:
    """What all of these dataclasses share: JSON, the key of a result, and checks that name the setting."""

    NO_EFFECT_ON_RESULT: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]  # every subclass is a dataclass

    def key(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return {k: v for k, v in self.to_json().items() if k not in self.NO_EFFECT_ON_RESULT}

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise TrainingError(
                f"{type(self).__name__}.{name} = {getattr(self, name)!r}: expected {expected}."
            )

    def _check_least(self, least: int, *names: str) -> None:
        for name in names:
            self._check(name, getattr(self, name) >= least, f"at least {least}")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._check(name, math.isfinite(value) and value > 0, "a positive number")

    def _check_choice(self, name: str, choices: Sequence[str]) -> None:
        *most, last = (f'"{choice}"' for choice in choices)
        self._check(name, getattr(self, name) in choices, f"{', '.join(most)} or {last}")


@dataclass(frozen=True, kw_only=True)
class LoopConfig(_Settings):
    """Settings that the training of an expert and of its gate have in common.

    Raises (when built):
        TrainingError: naming the setting that is out of range.
    """

    NO_EFFECT_ON_RESULT = ("save_every",)

    steps: int = 1000
    """Updates of the weights."""
    rows_per_step: int = 1024
    """Rows per update, over all processes. Rows come in shuffled passes over the training split."""
    rows_per_batch: int = 16
    """Rows in memory at once, per process; must divide rows_per_step (÷ processes). A smaller number saves memory and
    padding, as the rows of a step are sorted by length before they are cut into batches. The gradient is the same."""
    max_length: int = 512
    """Tokens of a row (prompt and target; encoder–decoder: each of the two). Longer prompts are truncated at the left
    and counted in the provenance; a longer target is an error."""
    learning_rate: float = 5e-3
    """AdamW's step size after warm-up."""
    warmup_share: float = 0.06
    """Share of the steps during which the learning rate grows linearly from zero; constant afterwards."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: float | None = None
    """Clips a step's gradient to this norm. The paper doesn't mention clipping; its authors' code has 1.0."""
    base_dropout: bool = True
    """Use the base's own dropout in training (T5: 0.1 in its config; Llama, Qwen: none), as the authors' code does."""
    validate_every: int = 100
    """Steps between validations. The last step is validated too, and the weights with the lowest loss are the result.
    0: no validation; the last weights are the result."""
    validation_rows: int = 512
    """Most rows of the validation split to use, always the same ones."""
    save_every: int = 50
    """Steps between checkpoints, from which an interrupted training continues (only with a work folder). 0: none."""
    seed: int = 0
    """Seed of the order of rows, of A's initial values, and of dropout."""
    precision: Precision = "auto"
    """dtype of the computation: "bfloat16", "float32", or "auto": the base's own. Trained weights are always kept in
    float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: much less memory, about a third more time."""

    def __post_init__(self) -> None:
        self._check_least(1, "steps", "rows_per_step", "rows_per_batch", "validation_rows")
        self._check_least(0, "validate_every", "save_every", "seed")
        self._check_least(3, "max_length")
        self._check_positive("learning_rate")
        self._check("warmup_share", 0 <= self.warmup_share < 1, "at least 0 and below 1")
        decay, norm = self.weight_decay, self.max_grad_norm
        self._check("weight_decay", math.isfinite(decay) and decay >= 0, "a number not below 0")
        self._check("max_grad_norm", norm is None or norm > 0, "positive or None")
        self._check_choice("precision", get_args(Precision))
        divides = self.rows_per_step % self.rows_per_batch == 0
        self._check("rows_per_batch", divides, f"a divisor of rows_per_step = {self.rows_per_step}")

    @property
    def warmup_steps(self) -> int:
        return int(self.steps * self.warmup_share + 1e-9)


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(LoopConfig):
    """How an expert is trained: 1000 steps of 1024 rows, LoRA of rank 16 and scale 1/16 on every linear layer.

    Settings that don't belong to the kind of adapter must keep their defaults.
    """

    kind: Kind = "lora"
    """The kind of adapter: "lora", "ia3" (vectors that scale keys, values and the inputs of the second feed-forward
    layer; Liu et al. 2022) or "bottleneck" (a small network after a layer; Houlsby et al. 2019, Pfeiffer et al.
    2021)."""
    learning_rate: float | None = None  # type: ignore[assignment]  # a number after __post_init__
    """AdamW's step size after warm-up. None: 5e-3 for lora, 3e-3 for ia3, 1e-3 for bottleneck."""
    target_modules: str | tuple[str, ...] = "auto"
    """lora and ia3: which linear layers are adapted. "all-linear": every linear layer of attention and feed-forward,
    but not the output head, in a vision-language base only layers that read text, in a mixture of experts not the fused
    experts, and none that PEFT refuses; a warning says what is left out. "auto": for lora the same as "all-linear", for
    ia3 the layers that PEFT lists for the base's architecture. Or names: whole paths of linear layers or their ends, as
    ("q_proj", "v_proj")."""
    rank: int = 16
    """lora: r, the number of columns of B and of rows of A."""
    alpha: float = 1.0
    """lora: the scale is alpha / rank (alpha / √rank with rslora)."""
    rslora: bool = False
    """lora: scale by alpha / √rank."""
    dora: bool = False
    """lora: weight-decomposed (DoRA, Liu et al. 2024): also learns the norm of every row of W + scale·B A."""
    lora_bias: bool = False
    """lora: also learn an output bias, scaled like B A u. Not with dora."""
    placement: Placement = "pfeiffer"
    """bottleneck: "pfeiffer", one per layer, after the feed-forward block, reading the residual stream; "houlsby", two
    per layer, after attention and after feed-forward, reading the block's output; "parallel", one beside the
    feed-forward block, with scale 4 (He et al. 2021)."""
    reduction: int = 16
    """bottleneck: its width is the base's hidden size ÷ this number, rounded down, at least 1."""
    activation: Activation = "relu"
    """bottleneck: its nonlinearity."""
    init_std: float = 0.01
    """lora and bottleneck: A (the down-projection) starts as N(0, init_std²), B (the up-projection) as zero. (PEFT's
    "gaussian" has 1 / rank as standard deviation.)"""
    dropout: float = 0.0
    """lora: dropout on the input of A during training; bottleneck: on its output."""

    def __post_init__(self) -> None:
        self._check_choice("kind", list(LEARNING_RATES))
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.kind])
        super().__post_init__()
        if not isinstance(names := self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(names))
        named = bool(self.target_modules) and all(
            isinstance(name, str) and name for name in self.target_modules
        )
        self._check("target_modules", named, '"auto", "all-linear" or at least one name')
        self._check_kind()
        self._check_least(1, "rank", "reduction")
        self._check("alpha", math.isfinite(self.alpha) and self.alpha != 0, "a number other than 0")
        both = self.lora_bias and self.dora
        self._check("lora_bias", not both, "False with dora, for which PEFT doesn't define it")
        self._check_choice("placement", get_args(Placement))
        self._check_choice("activation", get_args(Activation))
        self._check_positive("init_std")
        self._check("dropout", 0 <= self.dropout < 1, "at least 0 and below 1")
        if self.kind == "lora" and self.target_modules == "auto":
            object.__setattr__(self, "target_modules", "all-linear")

    def _check_kind(self) -> None:
        """Refuses settings that have no effect with this kind of adapter."""
        for field in fields(self):
            kinds = _ONLY_FOR.get(field.name, (self.kind,))
            unused = self.kind not in kinds and getattr(self, field.name) != field.default
            self._check(field.name, not unused, f"its default, as it has no effect with kind={self.kind!r}")


@dataclass(frozen=True, kw_only=True)
class GateConfig(LoopConfig):
    """How a gate is trained: like its expert, but for 100 steps. v starts as zero, so σ(vᵀu) starts as ½ everywhere."""

    steps: int = 100
    """Updates of the gates."""


@dataclass(frozen=True, kw_only=True)
class WritingConfig(_Settings):
    """How the base with an expert writes the rows of a task.

    Raises (when built):
        TrainingError: naming the setting that is out of range.
    """

    rows: int = 512
    """Usable texts to write. A tenth of them are for validation."""
    max_new_tokens: int = 64
    """Most tokens of a text; longer texts are cut off there and counted."""
    temperature: float = 1.0
    """Sampling temperature; 1 is the model's own distribution. No top-k, top-p or penalties are applied."""
    seed: int = 0
    """Sampling seed."""
    rows_per_batch: int = 64
    """Texts written at once. Another number gives other texts."""

    def __post_init__(self) -> None:
        self._check_least(1, "rows", "max_new_tokens", "rows_per_batch")
        self._check_positive("temperature")
        self._check_least(0, "seed")


@dataclass(frozen=True, kw_only=True)
class SignatureConfig(_Settings):
    """What a data signature is made of.

    Raises (when built):
        TrainingError: naming the setting that is out of range.
    """

    NO_EFFECT_ON_RESULT = ("encoder", "rows_per_batch")  # the encoder's sha256 is part of the key instead

    rows: int = 1000
    """Training rows over whose tokens each module's inputs are averaged; 0: no activations."""
    texts: int = 1000
    """Training prompts to embed, at most 1000 (Jang et al. 2023); 0: none. Embeddings reveal more about the data than
    averages do: don't publish any if the data must stay private."""
    encoder: str = "all-minilm-l6-v2"
    """The sentence encoder: all-minilm-l6-v2, a folder, or a Hub id."""
    max_length: int = 512
    """Tokens of a row, as in training; longer prompts are truncated at the left."""
    rows_per_batch: int = 16
    """Rows in one forward pass."""
    seed: int = 0
    """Seed of the choice of rows, if there are more."""

    def __post_init__(self) -> None:
        self._check_least(0, "rows", "texts", "seed")
        self._check_least(1, "rows_per_batch")
        self._check_least(3, "max_length")
        self._check("texts", self.texts <= MOST_TEXTS, f"at most {MOST_TEXTS}")
        if not self.rows and not self.texts:
            raise TrainingError("SignatureConfig: rows and texts are both 0, so there is nothing to make.")

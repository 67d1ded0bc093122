"""Compare the fingerprints of two bases. `models.base.fingerprint` takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phatgoose.errors import BaseModelError, brief
from phatgoose.records import Fingerprint

RELATIVE = 2.0**-7
"""Two casts of one value differ by less: bfloat16 rounds by at most 2^-8 of the value, float16 by 2^-11."""
ABSOLUTE = 6e-8
"""The smallest float16 above zero: below it a cast to float16 keeps nothing of a value."""
CLOSE_COSINE = 0.9
"""Between the samples of two bases; a 4-bit copy of a model has about 0.99, an unrelated one about 0."""


@dataclass(frozen=True)
class Verdict:
    """What comparing two fingerprints gave."""

    level: Literal["same", "close", "different"]
    """"same": one checkpoint up to a cast. "close": one architecture, samples alike but not equal. Else "different"."""
    reason: str
    """The first difference, with numbers; for "same", what was compared."""
    compared: tuple[str, ...] = ()
    """The kinds of samples both have: of "embedding", "norm", "linear"."""


def same_base(a: Fingerprint, b: Fingerprint) -> Verdict:
    """Compares two bases, whatever dtype or 8-/4-bit packing each was loaded in. Symmetric in its level.

    "same" needs an equal architecture, every sample group that both have equal within a cast's error
    (|a − b| ≤ 2^-7·max(|a|, |b|) + 6e-8), and among these groups the embedding and a norm or linear weight.
    "close" needs an equal architecture and, for each kind of group, a cosine above 0.9: a dequantised copy or a
    fine-tuned sibling, which can't be told apart. A difference smaller than a cast's error can't be seen at all.
    """
    if field := _architecture_difference(a.architecture, b.architecture):
        return Verdict("different", field)
    shared = [group for group in a.samples if group in b.samples]
    kinds = tuple(dict.fromkeys(kind_of(group) for group in shared))
    if not shared:
        return Verdict("different", "no group of weights was sampled in both")
    for group in shared:
        if len(a.samples[group]) != len(b.samples[group]):
            sizes = f"{len(a.samples[group])} and {len(b.samples[group])}"
            return Verdict("different", f"samples of {brief(group)} have {sizes} values", kinds)
    if a.samples == b.samples:
        return Verdict("same", f"equal samples of {', '.join(kinds)}", kinds)
    excess, worst = max((_excess(a.samples[g], b.samples[g]), g) for g in shared)
    if excess <= 1:
        if "embedding" in kinds and len(kinds) > 1:
            return Verdict("same", f"equal within a cast's error in {', '.join(kinds)}", kinds)
        return Verdict("close", f"equal in {', '.join(kinds)}, but too little was sampled in both", kinds)
    cosines = {kind: _cosine_of_kind(kind, shared, a, b) for kind in kinds}
    reason = _describe(worst, a.samples[worst], b.samples[worst], cosines)
    return Verdict("close" if min(cosines.values()) > CLOSE_COSINE else "different", reason, kinds)


def check_same_base(
    expected: Fingerprint, found: Fingerprint, what: str, *, allow_close: bool = False
) -> Verdict:
    """Does nothing but return the verdict if `found` is the base that is `expected`.

    Args:
        what: whose base this is about, at the start of the message: "expert 'plural'".
        allow_close: also accept "close", e.g. a dequantised copy of the base that experts were trained on.

    Raises:
        BaseModelError: the bases differ; the message has both specs, the first difference and what to do.
    """
    verdict = same_base(expected, found)
    if verdict.level == "same" or (verdict.level == "close" and allow_close):
        return verdict
    message = (
        f"{what}: expected the base {brief(expected.spec)}, found {brief(found.spec)}, and they are "
        f"{'not the same model' if verdict.level == 'different' else 'close, but not the same'}: {verdict.reason}. "
    )
    if verdict.level == "close":
        message += (
            "That is what a dequantised (GGUF) copy or a fine-tuned sibling looks like; the two can't be "
            "told apart, so neither is accepted unasked. "
        )
    raise BaseModelError(message + f"Load the expected base: load_base({brief(expected.spec)}).")


def kind_of(group: str) -> str:
    """The kind of a sample group: "linear:model.layers.0.mlp.up_proj.weight" → "linear"."""
    return group.partition(":")[0]


def _architecture_difference(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    for field in [*a, *(f for f in b if f not in a)]:
        if a.get(field) != b.get(field):
            return (
                f"architecture: {field[:100]} is {brief(a.get(field))} expected, {brief(b.get(field))} found"
            )
    return None


def _excess(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference in units of what casts explain."""
    return max((_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _difference(x: float, y: float) -> float:
    if not (math.isfinite(x) and math.isfinite(y)):  # only in a record that was tampered with
        return math.inf
    return abs(x - y) / (RELATIVE * max(abs(x), abs(y)) + ABSOLUTE)


def _cosine_of_kind(kind: str, shared: Sequence[str], a: Fingerprint, b: Fingerprint) -> float:
    groups = [g for g in shared if kind_of(g) == kind]
    x = [value for g in groups for value in a.samples[g]]
    y = [value for g in groups for value in b.samples[g]]
    norms = math.hypot(*x) * math.hypot(*y)
    if norms == 0:
        return float(math.hypot(*x) == math.hypot(*y))
    return sum(p * q for p, q in zip(x, y, strict=True)) / norms


def _describe(group: str, a: Sequence[float], b: Sequence[float], cosines: dict[str, float]) -> str:
    at = max(range(len(a)), key=lambda i: _difference(a[i], b[i]))
    listed = ", ".join(f"{kind} {cosine:.4f}" for kind, cosine in cosines.items())
    return (
        f"weights differ by more than a cast explains, most in {brief(group)}, sample {at}: {a[at]:.6g} expected, "
        f"{b[at]:.6g} found (cosine of the samples: {listed})"
    )

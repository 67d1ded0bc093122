"""Compare the fingerprints of two bases. `models.base.fingerprint` takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phatgoose.errors import BaseModelError, brief
from phatgoose.records import Fingerprint

RELATIVE = 2.0**-7
"""Two casts of one value differ by less than this share of it. bfloat16 rounds by at most 2^-8, float16 by 2^-11."""
ABSOLUTE = 6e-8
"""The smallest float16 above zero. A cast to float16 turns what is smaller into zero."""
CLOSE_COSINE = 0.9
"""The least cosine of two bases' samples at which they are "close". A 4-bit copy of a model has about
0.99 with it, an unrelated model about 0."""


@dataclass(frozen=True)
class Verdict:
    """How two bases compare."""

    level: Literal["same", "close", "different"]
    """"same": one checkpoint, perhaps cast to another dtype. "close": one architecture, with samples that
    are alike but not equal. "different": anything else."""
    reason: str
    """The first difference, with numbers; for "same", what was compared."""
    compared: tuple[str, ...] = ()
    """Which kinds of samples both bases have: "embedding", "norm", "linear"."""


def same_base(a: Fingerprint, b: Fingerprint) -> Verdict:
    """Compares two bases, in whatever dtype or 8-/4-bit packing each was loaded, and whichever comes first.

    "same": the architectures are equal, and so are all groups of samples that both have, up to the error of a cast,
    |a − b| ≤ 2^-7·max(|a|, |b|) + 6e-8. Among these groups are the embedding and a norm or linear weight.
    "close": the architectures are equal, and the samples of each kind have a cosine above 0.9. That is a dequantised
    copy or a fine-tuned sibling; samples can't tell which. Nor do they show a change smaller than a cast's error.
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
    largest, worst = max((_largest_difference(a.samples[g], b.samples[g]), g) for g in shared)
    if largest <= 1:
        if "embedding" in kinds and len(kinds) > 1:
            return Verdict("same", f"equal within a cast's error in {', '.join(kinds)}", kinds)
        return Verdict("close", f"equal in {', '.join(kinds)}, but too little was sampled in both", kinds)
    cosines = {kind: _cosine_of_kind(kind, shared, a, b) for kind in kinds}
    reason = _describe(worst, a.samples[worst], b.samples[worst], cosines)
    return Verdict("close" if min(cosines.values()) > CLOSE_COSINE else "different", reason, kinds)


def check_same_base(
    expected: Fingerprint, found: Fingerprint, what: str, *, allow_close: bool = False
) -> Verdict:
    """Refuses a base that isn't the `expected` one; else returns the verdict.

    Args:
        what: whose base it is, for the message, which begins with it: "expert 'plural'".
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


def _largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference of two samples, in units of what a cast explains."""
    return max((_difference(x, y) for x, y in zip(a, b, strict=True)), default=0.0)


def _difference(x: float, y: float) -> float:
    if not (math.isfinite(x) and math.isfinite(y)):  # only a record that was tampered with has such samples
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
    worst = max(range(len(a)), key=lambda i: _difference(a[i], b[i]))
    listed = ", ".join(f"{kind} {cosine:.4f}" for kind, cosine in cosines.items())
    return (
        f"weights differ by more than a cast explains, most in {brief(group)}, sample {worst}: "
        f"{a[worst]:.6g} expected, {b[worst]:.6g} found (cosine of the samples: {listed})"
    )

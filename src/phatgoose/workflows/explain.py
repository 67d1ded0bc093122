"""Why this answer: what changes without each expert, and with each alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from phatgoose.analysis.measures import expert_shares
from phatgoose.analysis.prompts import RoutedPrompt, routed_prompt
from phatgoose.errors import EvaluationError
from phatgoose.experts.pool import Pool
from phatgoose.models.attach.attach import prompted, route_with, unroute
from phatgoose.models.attach.options import RouteOptions
from phatgoose.models.base.base import Base
from phatgoose.models.text.batch import IGNORED, target_logits
from phatgoose.models.trace.record import trace_answer
from phatgoose.routers import PHATGOOSE, Gander, Router
from phatgoose.routers.masked import Masked, Switches
from phatgoose.workflows.evidence import Evidence, gathered

MATTERS = 0.1
"""An expert mattered if leaving it out changes the answer's log-likelihood by at least this many nats (a tenth of its
probability), or changes what a greedy answer would be."""


@dataclass(frozen=True)
class Effect:
    """What one expert does to the answer. Log-likelihoods are of the whole answer given the prompt, in nats."""

    expert: str
    share: float
    """Its share of the routing weight over all tokens read and all modules."""
    without: float
    """The answer's log-likelihood with this expert left out of the pool."""
    change: float
    """`without` minus the log-likelihood of the whole pool. Negative: the expert made the answer likelier."""
    keeps_answer: bool
    """Whether the greedy answer stays the same, token by token, without it."""
    alone: float
    """The answer's log-likelihood with this expert on every token it has something for, and no other."""

    @property
    def mattered(self) -> bool:
        return abs(self.change) >= MATTERS or not self.keeps_answer


@dataclass(frozen=True)
class Explanation:
    """An answer and the experts it rests on, in the order of their `change`: the largest loss first."""

    prompt: str
    answer: str
    tokens: tuple[str, ...]
    router: dict[str, Any]
    log_likelihood: float
    base_log_likelihood: float
    base_keeps_answer: bool
    effects: tuple[Effect, ...]
    left_out: int
    """Active experts that were not examined, those with the least weight, because of `most`."""
    evidence: Evidence | None = None
    """What spoke for whom in the prompt, if Gander chose."""

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        for record, effect in zip(data["effects"], self.effects, strict=True):
            record["mattered"] = effect.mattered
        return {"format": "phatgoose-explanation/1", **data}


@dataclass(frozen=True)
class ExplainOptions:
    """How an answer is generated and examined."""

    max_new_tokens: int = 64
    most: int | None = None
    """Examine only this many experts, those with the most routing weight; None: all that acted."""
    batch_rows: int = 8
    """Variants of the pool in one forward pass."""
    route: RouteOptions = field(default_factory=RouteOptions)


@dataclass(frozen=True)
class Answered:
    """A prompt [1, T], its answer [A], and the texts that routers read in place of the prompt."""

    prompt: Tensor
    answer: Tensor
    read: tuple[str, ...]


def explain(
    base: Base,
    pool: Pool,
    ids: Tensor,
    router: Router | None = None,
    *,
    prompt: str,
    read: Sequence[str] = (),
    options: ExplainOptions | None = None,
) -> tuple[Explanation, RoutedPrompt]:
    """Answers greedily and finds the experts that the answer rests on; also returns its routing, token by token.

    The answer's tokens are scored behind the prompt once with the whole pool, once with the base, and twice for
    each active expert (without it, it alone). Several of these variants share a forward pass, one a row.

    Args:
        ids: the prompt's tokens, int64 [1, T]; `prompt` is its text.
        router: one that chooses by scores; PHATGOOSE() if None.
        read: what routers that read text get in place of the whole prompt, such as a chat's last turn without its
            template.

    Raises:
        RoutingError: the router can't switch experts off. EvaluationError: the answer is empty.
    """
    router, options = router or PHATGOOSE(), options or ExplainOptions()
    ids, switches = ids.to(base.device), Switches()
    route_with(base, pool, Masked(router, switches), options.route)
    try:
        with prompted(base, read):
            recorded, answer = trace_answer(base, ids, options.max_new_tokens)
        if not len(answer):
            raise EvaluationError("the model answered nothing, so there is nothing to explain.")
        shares = expert_shares(recorded)
        active = sorted((name for name in pool.names if shares[name] > 0), key=lambda name: -shares[name])
        chosen = active[: options.most]  # all if most is None
        evidence = gathered(base, router, ids, chosen) if isinstance(router, Gander) else None
        variants = _variants(pool.names, chosen).split(options.batch_rows)
        likelihoods, kept = _scored(base, switches, Answered(ids, answer, tuple(read)), variants)
    finally:
        unroute(base)
    text = str(base.tokenizer.decode(answer, skip_special_tokens=True))
    found = Explanation(
        prompt, text, tuple(str(base.tokenizer.decode([token])) for token in answer.tolist()), router.describe(),
        likelihoods[0], likelihoods[1], kept[1], _effects(chosen, shares, likelihoods, kept),
        len(active) - len(chosen), evidence,
    )  # fmt: skip
    routed = routed_prompt(
        recorded, base, task="", prompt=prompt, expected="", answer=text.strip(), correct=False
    )
    return found, routed


def _effects(
    chosen: Sequence[str], shares: Mapping[str, float], likelihoods: Sequence[float], kept: Sequence[bool]
) -> tuple[Effect, ...]:
    """From what each variant scored, in the order of `_variants`."""
    pairs = zip(chosen, likelihoods[2::2], kept[2::2], likelihoods[3::2], strict=True)
    effects = [
        Effect(name, shares[name], without, without - likelihoods[0], keeps, alone)
        for name, without, keeps, alone in pairs
    ]
    return tuple(sorted(effects, key=lambda effect: effect.change))


def _variants(names: Sequence[str], chosen: Sequence[str]) -> Tensor:
    """Which experts are on, bool [2 + 2·chosen, experts]: all, none, then all but each chosen one, and it alone."""
    rows = [torch.ones(len(names), dtype=torch.bool), torch.zeros(len(names), dtype=torch.bool)]
    for name in chosen:
        alone = torch.tensor([other == name for other in names])
        rows += [~alone, alone]
    return torch.stack(rows)


def _scored(
    base: Base, switches: Switches, answered: Answered, batches: Sequence[Tensor]
) -> tuple[list[float], list[bool]]:
    """Each variant's log-likelihood of the answer in nats, and whether its likeliest tokens are the first one's."""
    likelihoods: list[float] = []
    kept: list[bool] = []
    # The first variant's likeliest tokens are the answer's, except where another batch size or a cache tips a tie.
    greedy: Tensor | None = None
    for allowed in batches:
        switches.allowed = allowed
        logits = _logits(base, answered, len(allowed)).float()
        answer = answered.answer.expand(len(allowed), -1)
        likelihoods += logits.log_softmax(-1).gather(-1, answer[..., None])[..., 0].sum(1).tolist()
        likeliest = logits.argmax(-1)
        greedy = likeliest[0] if greedy is None else greedy
        kept += (likeliest == greedy).all(1).tolist()
    if not all(math.isfinite(value) for value in likelihoods):
        raise EvaluationError(
            "a log-likelihood of the answer is not finite: the model's outputs are damaged."
        )
    return likelihoods, kept


@torch.no_grad()
def _logits(base: Base, answered: Answered, rows: int) -> Tensor:
    """What predicts each token of the answer: [rows, answer, vocabulary]."""
    prompt, answer = answered.prompt.expand(rows, -1), answered.answer.expand(rows, -1)
    if answered.read and not base.is_encoder_decoder:
        # Routers can't tell where a prompt ends that they are given as a text: the answer goes in a pass of its own.
        with prompted(base, answered.read):
            first = base.model(input_ids=prompt, use_cache=True)
            if (cache := getattr(first, "past_key_values", None)) is not None:
                last = first.logits[:, -1:]
                if answer.shape[1] == 1:
                    return last
                rest = base.model(input_ids=answer[:, :-1], past_key_values=cache).logits
                return torch.cat([last, rest], dim=1)
    whole = prompt if base.is_encoder_decoder else torch.cat([prompt, answer], dim=1)
    batch = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "labels": answer}
    assert IGNORED not in answer
    with prompted(base, answered.read or [prompt[0].tolist()]):
        return target_logits(base.model, batch)


def words(found: Explanation) -> list[str]:
    """The explanation in sentences."""
    gain = found.log_likelihood - found.base_log_likelihood
    same = "gives the same greedy answer" if found.base_keeps_answer else "would answer differently"
    lines = [
        f"The base alone {same}; the experts make this answer {_times(gain)} ({found.base_log_likelihood:.2f} → "
        f"{found.log_likelihood:.2f} nats)."
    ]
    mattered = [e for e in found.effects if e.mattered]
    if not mattered:
        lines.append(
            "No expert mattered by itself: without any one of them the answer stays the same, and about as likely."
        )
    for e in mattered:
        line = f"{e.expert} mattered: without it the answer is {_times(e.change)} ({e.change:+.2f} nats)"
        line += "" if e.keeps_answer else " and the greedy answer is another"
        gap = e.alone - found.log_likelihood
        alone = (
            "does better than" if gap > MATTERS else "does as well as" if gap > -MATTERS else "falls short of"
        )
        lines.append(f"{line}; on its own it {alone} the pool ({e.alone:.2f} nats).")
    others = [e.expert for e in found.effects if not e.mattered]
    if mattered and others:
        left = "it" if len(others) == 1 else "any one of them"
        lines.append(f"{', '.join(others)} acted, but leaving {left} out hardly changes the answer.")
    if found.left_out:
        lines.append(f"{found.left_out} more experts acted, with less weight, and were not looked at.")
    return lines


def _times(nats: float) -> str:
    """A difference of log-likelihoods as how many times likelier or less likely."""
    if abs(nats) < math.log(1.05):
        return "about as likely"
    factor = math.exp(min(abs(nats), 700.0))
    text = f"{factor:.1f}" if factor < 100 else f"{factor:,.0f}" if factor < 1e6 else f"{factor:.0e}"
    return f"{text} times {'likelier' if nats > 0 else 'less likely'}"

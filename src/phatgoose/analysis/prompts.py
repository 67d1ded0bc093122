"""One prompt with the experts that acted on each of its tokens, from a trace."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

from transformers import PreTrainedTokenizerBase

from phatgoose.errors import EvaluationError, RoutingError
from phatgoose.models.base.base import Base
from phatgoose.models.base.module_names import layer_and_kind
from phatgoose.models.text.decoding import IncrementalDecoder
from phatgoose.models.trace.choices import Choices
from phatgoose.models.trace.result import Trace

Pairs = tuple[tuple[int, float], ...]
UNSEEN = -2


class Said(TypedDict):
    """What `RoutedPrompt` says besides a trace."""

    task: str
    prompt: str
    expected: str
    answer: str
    correct: bool | None


@dataclass(frozen=True)
class RoutedPrompt:
    """A prompt, its answer, and which experts acted where.

    Experts act while the model reads a token. So those at the last prompt token wrote the first token of the
    answer. The answer's last token was never read, so it is not in `tokens`.
    """

    task: str
    prompt: str
    expected: str
    answer: str
    correct: bool | None
    """None if there is no right answer to compare with."""
    tokens: tuple[str, ...]
    """Text of each token that was read, in order: an encoder–decoder's encoder first, then its decoder."""
    generated_from: int
    """Index of the first token that the model wrote (in an encoder–decoder, the decoder's first)."""
    experts: tuple[str, ...]
    modules: tuple[str, ...]
    choices: tuple[tuple[Pairs, ...], ...] = field(repr=False)
    """Per module, per token: (index in `experts`, weight), best first. Index −1: the weight went to no expert.
    Empty: the module doesn't see this token."""


def routed_prompt(
    trace: Trace, base: Base, *, row: int = 0, generated_from: int | None = None, **said: Unpack[Said]
) -> RoutedPrompt:
    """The record of one sequence (`row` of each call) in a trace of one call of the model, or of one generate().

    A sequence must keep its row from call to call: so it does in greedy decoding and sampling, but not in beam search.

    Args:
        said: task, prompt, expected, answer and correct, as in `RoutedPrompt`.
        generated_from: index of the first token of the answer; by default the first that was read behind a
            cache (for an encoder–decoder, the decoder's first).

    Raises:
        RoutingError: if the trace has nothing on that row, no token ids, a sample of the tokens only, or
            tokens of several sequences, as a beam search's rows have.
    """
    _check_complete(trace)
    calls = [(trace.locations[c.path].reads, c) for c in trace.choices if bool((c.rows == row).any())]
    if not calls:
        raise RoutingError(f"the trace has no tokens of row {row}: run the model inside `with trace(model)`.")
    ids = {name: _ids(name, [c for s, c in calls if s == name], row) for name in ("encoder", "decoder")}
    place = {where: index for index, where in enumerate((name, p) for name in ids for p in ids[name])}
    if generated_from is None:
        prompt_ids = [c.positions[(c.rows == row) & ~c.tokens.generated] for s, c in calls if s == "decoder"]
        generated_from = len(ids["encoder"]) or (len(prompt_ids[0].unique()) if prompt_ids else 0)
    return RoutedPrompt(
        **said,
        tokens=tuple(text for found in ids.values() for text in token_texts(base.tokenizer, found.values())),
        generated_from=generated_from,
        experts=trace.experts,
        modules=tuple(dict.fromkeys(c.path for _, c in calls)),
        choices=_choices(calls, place, row),
    )


def _check_complete(trace: Trace) -> None:
    """Raises RoutingError unless the trace holds every token, each sequence in a row of its own."""
    if trace.sums_only or trace.share < 1:
        raise RoutingError(
            "this trace doesn't hold every token: record without histogram=True or sample, with more "
            "max_bytes or fewer tokens."
        )
    if trace.reordered:
        raise RoutingError(
            "beam search moved sequences between rows, so a row is no prompt: trace with num_beams=1."
        )


def _ids(stream: str, calls: list[Choices], row: int) -> dict[int, int]:
    """Position → token id of one row in one stream, in order of positions."""
    found: dict[int, int] = {}
    for c in calls:
        if bool((c.ids[c.rows == row] < 0).any()):
            raise RoutingError(
                "the trace has no token ids (the model was given embeddings), so no text to show."
            )
        mine = c.rows == row
        for position, token in zip(c.positions[mine].tolist(), c.ids[mine].tolist(), strict=True):
            if found.setdefault(position, token) != token:
                raise RoutingError(
                    f"the trace has several sequences in row {row}: token {position} of the {stream} is "
                    f"{found[position]} in one call and {token} in another. Trace one prompt at a time."
                )
    places = sorted(found)
    if places and places != list(range(places[0], places[-1] + 1)):
        raise RoutingError(f"the trace lacks tokens of row {row}: it has positions {places} of the {stream}.")
    return {position: found[position] for position in places}


def _choices(
    calls: list[tuple[str, Choices]], place: dict[tuple[str, int], int], row: int
) -> tuple[tuple[Pairs, ...], ...]:
    table: dict[str, list[Pairs]] = {}
    for stream, c in calls:
        cells = table.setdefault(c.path, [()] * len(place))
        mine = c.rows == row
        columns = (c.positions[mine].tolist(), c.experts[mine].tolist(), c.weights[mine].double().tolist())
        for position, experts, weights in zip(*columns, strict=True):
            pairs = sorted(zip(experts, weights, strict=True), key=lambda pair: -pair[1])
            cells[place[stream, position]] = tuple(pairs)
    return tuple(tuple(cells) for cells in table.values())


@dataclass(frozen=True)
class Span:
    """A span of the answer led by one expert: its text, and that expert's share of the routing weight."""

    text: str
    expert: str
    share: float


def answer_spans(prompt: RoutedPrompt) -> list[Span]:
    """The answer in spans with one leading expert each, "no expert" if the base led.

    The leading expert of a token has most weight over all modules at the token before it, where it was
    decided. The answer's last token is "…", since its text isn't in the trace.
    """
    names = (*prompt.experts, "no expert")
    begin = prompt.generated_from
    # If modules that read the prompt read the answer as well, there is one stack. Otherwise the prompt was
    # read by an encoder, and the decoder's first token is at `begin`. One module is enough to tell: the
    # head, for example, reads only a prompt's last token.
    one_stack = begin >= len(prompt.tokens) or any(
        cells[begin - 1] and cells[begin] for cells in prompt.choices
    )
    first = max(begin - 1, 0) if one_stack else begin
    found: list[tuple[str, str, float, int]] = []
    for t in range(first, len(prompt.tokens)):
        sums = [0.0] * len(names)
        for cells in prompt.choices:
            for expert, weight in cells[t]:
                sums[expert] += weight  # −1 is the last name
        lead = max(range(len(names)), key=sums.__getitem__)
        share = sums[lead] / (math.fsum(sums) or 1.0)
        text = prompt.tokens[t + 1] if t + 1 < len(prompt.tokens) else "…"
        if found and found[-1][1] == names[lead]:
            before, name, mean, count = found[-1]
            found[-1] = (before + text, name, (mean * count + share) / (count + 1), count + 1)
        else:
            found.append((text, names[lead], share, 1))
    return [Span(text, name, share) for text, name, share, _ in found]


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Any) -> list[str]:
    """The text that each token of a whole sequence adds. A token that ends inside a character adds nothing."""
    decoder = IncrementalDecoder(tokenizer, special=True)
    texts = [decoder.push(token) for token in ids]
    return [*texts[:-1], texts[-1] + decoder.flush()] if texts else []


def encoded(prompt: RoutedPrompt, where: str) -> dict[str, Any]:
    """`prompt` as compact JSON data. `choices` and `weights` (in thousandths) are, for each module, [tokens ·
    k] whole numbers as little-endian int16 in base64, so that 2,000 tokens × 210 modules stay below 5 MB and
    are read at once.

    Choice −1: no expert; −2: a filler (the module does not see the token, or made fewer than k choices).

    Raises:
        EvaluationError: if its parts don't fit together; the message starts with `where`.
    """
    _fits(prompt, where)
    k = max((len(pairs) for cells in prompt.choices for pairs in cells), default=1) or 1
    choices, weights = [], []
    for cells in prompt.choices:
        padded = [(*pairs, *[(UNSEEN, 0.0)] * (k - len(pairs))) for pairs in cells]
        choices.append(packed([expert for pairs in padded for expert, _ in pairs]))
        weights.append(packed([round(1000 * weight) for pairs in padded for _, weight in pairs]))
    return {
        "task": prompt.task,
        "prompt": prompt.prompt,
        "expected": prompt.expected,
        "answer": prompt.answer,
        "correct": None if prompt.correct is None else bool(prompt.correct),
        "tokens": list(prompt.tokens),
        "generated_from": prompt.generated_from,
        "experts": list(prompt.experts),
        "modules": list(prompt.modules),
        "sites": [list(site) for site in layer_and_kind(prompt.modules)],
        "k": k,
        "choices": choices,
        "weights": weights,
    }


def packed(values: list[int]) -> str:
    """Whole numbers between −32768 and 32767 as little-endian int16 in base64."""
    return base64.b64encode(struct.pack(f"<{len(values)}h", *values)).decode()


def _fits(prompt: RoutedPrompt, where: str) -> None:
    if not 0 <= prompt.generated_from <= len(prompt.tokens):
        raise EvaluationError(
            f"{where}: generated_from is {prompt.generated_from}, there are {len(prompt.tokens)} tokens."
        )
    if len(prompt.choices) != len(prompt.modules):
        raise EvaluationError(
            f"{where} has {len(prompt.modules)} modules and choices of {len(prompt.choices)}."
        )
    for path, cells in zip(prompt.modules, prompt.choices, strict=True):
        if len(cells) != len(prompt.tokens):
            raise EvaluationError(
                f"{where}, {path}: {len(prompt.tokens)} tokens and choices at {len(cells)}."
            )
        for expert, weight in (pair for pairs in cells for pair in pairs):
            if not -1 <= expert < len(prompt.experts) or not abs(weight) <= 30:
                raise EvaluationError(
                    f"{where}, {path}: expert {expert} with weight {weight}; there are {len(prompt.experts)} experts."
                )

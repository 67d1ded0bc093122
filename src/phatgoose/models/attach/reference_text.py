"""What a module sees when nothing in particular is asked: its inputs on a short text of many kinds, the same for every base."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.errors import RoutingError
from phatgoose.models.attach.hooks import Hooks, apart
from phatgoose.models.base.base import device_of
from phatgoose.models.base.layers import first_argument
from phatgoose.models.text.batch import decoder_inputs

PIECE = 64
"""Tokens of a piece: the text is read in pieces of equal length, so that none needs padding and every context has room."""

Observer = Callable[[Tensor], None]

TEXT = """\
The weather in the valley changes quickly: a bright morning can turn into heavy rain before noon, so hikers carry a jacket
even in July. Last year the footbridge was closed for six weeks after a storm.

Question: Which planet is closest to the sun?
Answer: Mercury

def mean(values):
    total = sum(values)
    return total / len(values) if values else 0.0

Dear Ms Alvarez, thank you for your letter of the third. We have looked into the delay and would like to offer you a refund.
Please let us know which account it should go to.

To make the soup, chop two onions and fry them gently in butter for ten minutes. Add the stock, bring it to the boil, and
season to taste.

If 3x + 5 = 20, then 3x = 15 and therefore x = 5. Checking: 3 times 5 is 15, and 15 plus 5 is 20.

"Nobody believed me the first time either," she said, laughing, and put the lamp back on the shelf.

Summarise the following paragraph in one sentence. The river has been used for transport since the Middle Ages, when barges
carried salt and timber to the coast.
Summary: The river has long been a trade route.

User: My screen stays black after the update, what can I do?
Assistant: Hold the power button for ten seconds, then start in safe mode.

The committee voted seven to two in favour of the new budget, which raises spending on schools by four percent over three years.

Is the following sentence true or false? A square has five sides.
false

{"name": "Lena", "age": 34, "languages": ["German", "Polish"], "active": true}

The enzyme binds its substrate at the active site and lowers the activation energy of the reaction without being consumed.

Translate into French: Good morning, where is the station?
Bonjour, où est la gare ?

Choose the best answer. Why is the ball under the table? (a) it rolled there (b) it is blue (c) tables are made of wood
(a) it rolled there

In 1911 the expedition reached the pole after a journey of fifty-six days; its rivals arrived five weeks later. Both had
chosen their dogs, their clothing and their route with care.
"""


def show_reference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    observers: Sequence[tuple[nn.Module, bool, Observer]],
) -> None:
    """Runs the model once over the reference text and hands each observer what its module saw.

    Args:
        observers: (module, whether its output is wanted instead of its input, what takes the [N, d] tensor).
        tokenizer: the model's. An encoder–decoder reads each piece in its encoder and writes it in its decoder.

    Raises:
        RoutingError: the text has no tokens, or the model computes values that aren't finite.
    """
    ids = _pieces(tokenizer).to(device_of(model))
    inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = decoder_inputs(model, ids)
    with _watched(observers), _evaluating(model), torch.no_grad():
        model(**inputs)


def _pieces(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The text's tokens in rows of equal length, int64 [pieces, PIECE]; a last, shorter piece is left out."""
    ids = torch.tensor(tokenizer(TEXT, verbose=False)["input_ids"], dtype=torch.long)
    if not len(ids):
        raise RoutingError(
            "the tokenizer makes no tokens of the reference text, so scores can't be compared."
        )
    size = min(PIECE, len(ids))
    return ids[: len(ids) // size * size].reshape(-1, size)


@contextlib.contextmanager
def _watched(observers: Sequence[tuple[nn.Module, bool, Observer]]) -> Iterator[None]:
    with Hooks() as hooks:
        for module, output, observe in observers:
            hook = partial(apart, _handing(output, observe))
            hooks.add([module.register_forward_hook(hook, with_kwargs=True)])
        yield


def _handing(wants_output: bool, observe: Observer) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen = output if wants_output else first_argument(args, kwargs).to(output.device)
        if not seen.isfinite().all():
            raise RoutingError(
                "the base computes values that aren't finite on the reference text; load it in another dtype."
            )
        observe(seen.reshape(-1, seen.shape[-1]))

    return hook


@contextlib.contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

"""Which experts acted where: routed prompts for the page, and every task's routing profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from phatgoose.analysis.page import RoutedPrompt, routed_prompt
from phatgoose.experts.pool import Pool
from phatgoose.models.base import Base
from phatgoose.models.routed import route, unroute
from phatgoose.models.trace import trace
from phatgoose.records import Task
from phatgoose.routers import Router
from phatgoose.workflows.recipe import Recipe

PROFILE_ROWS = 16
NEW_TOKENS = 24


def traced_prompts(
    base: Base, pool: Pool, router: Router, tasks: Mapping[str, Sequence[Task]], recipe: Recipe
) -> tuple[list[RoutedPrompt], dict[str, dict[str, float]]]:
    """(routed prompts, profiles): a greedy answer to the first test row of some tasks with every choice, and for each task
    the share of the routing weight that each expert gets on the prompts of its first test rows, averaged over modules."""
    route(base, pool, router)
    try:
        every = [task for members in tasks.values() for task in members]
        profiles = {task.name: _profile(base, task) for task in every}
        prompts = [_answer(base, task) for task in every[: recipe.shown_prompts]]
    finally:
        unroute(base)
    return prompts, profiles


def _profile(base: Base, task: Task) -> dict[str, float]:
    texts = [e.input for e in task.test[:PROFILE_ROWS]]
    with trace(base) as recorded, torch.no_grad():
        for text in texts:  # one by one: no padding, and memory stays small
            batch = base.tokenizer([text], return_tensors="pt").to(base.device)
            (base.model.get_encoder() if base.is_encoder_decoder else base.model)(**batch)
    shares = torch.stack(list(recorded.shares().values())).mean(0)
    return {name: round(float(share), 4) for name, share in zip(recorded.experts, shares, strict=True)}


def _answer(base: Base, task: Task) -> RoutedPrompt:
    row = task.test[0]
    batch = base.tokenizer([row.input], return_tensors="pt").to(base.device)
    with trace(base) as recorded:
        out = cast(Any, base.model).generate(
            **batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=base.tokenizer.pad_token_id
        )
    start = 1 if base.is_encoder_decoder else batch["input_ids"].shape[1]
    answer = str(base.tokenizer.decode(out[0, start:], skip_special_tokens=True)).split("\n")[0].strip()
    return routed_prompt(
        recorded, base, task=task.name, prompt=row.input, expected=" / ".join(row.targets), answer=answer,
        correct=answer in row.targets,
    )  # fmt: skip

"""`phatgoose generate`: answer one prompt."""

from __future__ import annotations

import phatgoose
from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import (
    BackendOptions,
    BaseOptions,
    ChatOption,
    GenerationOptions,
    PoolOption,
    PromptArgument,
    RouterOption,
    read_prompt,
)


@expand_options
def command(
    prompt: PromptArgument,
    base: BaseOptions,
    generation: GenerationOptions,
    backend: BackendOptions,
    pool: PoolOption = None,
    router: RouterOption = None,
    chat: ChatOption = False,
) -> None:
    """Answer one prompt, with a pool's experts or with the base alone.

    Experts answer best to prompts like those they were trained on: see `phatgoose tasks show`.
    """
    text = read_prompt(prompt)
    from phatgoose.cli.common.loading import load_routed, show_cache_use
    from phatgoose.cli.common.streaming import encode, stream

    model, experts, _ = load_routed(pool, router, base, backend)
    ids, read = encode(model, experts, text, chat=chat)
    with phatgoose.prompted(model, read):
        stream(model, ids, generation)
    show_cache_use(model)

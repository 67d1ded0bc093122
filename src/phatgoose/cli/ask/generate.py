"""`phatgoose generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from phatgoose.cli.common.options import (
    ROUTER_HELP,
    BackendOption,
    DeviceMemoryOption,
    DeviceOption,
    DtypeOption,
    PoolBaseOption,
    PoolOption,
)
from phatgoose.cli.measure import show

RouterOption = Annotated[str | None, typer.Option("--router", help=ROUTER_HELP)]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
TemperatureOption = Annotated[
    float,
    typer.Option(
        "--temperature",
        min=0.0,
        help="0 always takes the likeliest token; above 0 draws. The checkpoint's own generation settings (penalties, forced or "
        "suppressed tokens, beams, lengths) aren't used, only its end tokens.",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Of the draws, where the temperature is above 0.")
]


def command(
    prompt: Annotated[str, typer.Argument(help="The prompt; - reads it from standard input.")],
    base: PoolBaseOption = None,
    pool: PoolOption = None,
    router: RouterOption = None,
    max_new_tokens: TokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--raw", help="Put the prompt through the model's chat template, or give it as it is."
        ),
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    device_memory: DeviceMemoryOption = None,
) -> None:
    """Answer one prompt, with a pool's experts or with the base alone.

    Experts answer best to prompts like those they were trained on: see `phatgoose tasks show`.
    """
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise typer.BadParameter("it is empty.", param_hint="PROMPT")
    from phatgoose.cli.common.loading import attach, choose, load_for, load_pool, show_cache_use
    from phatgoose.models.attach.options import RouteOptions

    experts = load_pool(pool)
    choice = choose(router, experts, RouteOptions(backend, device_memory=device_memory))
    model = load_for(experts, base, dtype, device)
    attach(model, experts, choice)
    from phatgoose.cli.common.streaming import stream
    from phatgoose.models.context.prompted import prompted
    from phatgoose.models.text.encoding import encode_chat, encode_prompt
    from phatgoose.workflows.prompt_forms import fitting_form, read_of_turn

    _, remark = fitting_form(experts, "chat" if chat else "raw", model.tokenizer.chat_template is not None)
    if remark:
        show.note(f"note: {remark}")
    ids = encode_chat(model, [{"role": "user", "content": text}]) if chat else encode_prompt(model, text)
    with prompted(model, read_of_turn(experts, text) if chat else []):
        stream(model, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    show_cache_use(model)

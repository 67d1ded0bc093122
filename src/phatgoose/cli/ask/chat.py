"""`phatgoose chat`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.ask.generate import RouterOption, SeedOption, TemperatureOption, TokensOption
from phatgoose.cli.common.options import (
    BackendOption,
    DeviceMemoryOption,
    DeviceOption,
    DtypeOption,
    PoolBaseOption,
    PoolOption,
)
from phatgoose.cli.measure import show
from phatgoose.errors import PhatgooseError

if TYPE_CHECKING:
    from torch import Tensor

    from phatgoose.analysis.prompts import RoutedPrompt
    from phatgoose.cli.common.loading import Choice
    from phatgoose.experts.pool import Pool
    from phatgoose.models.base.base import Base

HELP = r"""/router R   choose who routes: phatgoose, phatgoose:top_k=3, single:NAME, random:seed=1, uniform, merged, ties, base
/router     show who routes, and the experts' names
/base       the base alone: the same as /router base
/trace      show or hide which experts lead each part of an answer
/reset      forget the conversation
/help       this
/quit       end, as does Ctrl-D
With --raw every line is a prompt by itself, and \n in it is a line break."""


def command(
    base: PoolBaseOption = None,
    pool: PoolOption = None,
    router: RouterOption = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--chat",
            show_default="as the pool's experts were trained; else --chat if the model has a chat template",
            help="Give every line to the model as it is, or as a turn of a conversation through its chat template.",
        ),
    ] = None,
    show_trace: Annotated[
        bool,
        typer.Option("--trace", help="Show beside each answer which experts led it; /trace switches it."),
    ] = False,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    device_memory: DeviceMemoryOption = None,
) -> None:
    """Talk with a pool or a base. /help shows what can be typed."""
    from phatgoose.cli.common.loading import attach, choose, load_for, load_pool
    from phatgoose.models.attach.options import RouteOptions

    experts = load_pool(pool)
    choice = choose(router, experts, RouteOptions(backend, device_memory=device_memory))
    model = load_for(experts, base, dtype, device)
    attach(model, experts, choice)
    has_template = model.tokenizer.chat_template is not None
    if raw is False and not has_template:
        raise PhatgooseError(f"the tokenizer of {model.spec} has no chat template: use --raw.")
    from phatgoose.workflows.prompt_forms import fitting_form

    form, remark = fitting_form(experts, None if raw is None else "raw" if raw else "chat", has_template)
    as_is = form == "raw"
    chat = Chat(model, experts, choice, as_is, max_new_tokens, temperature, seed, show_trace)
    show.note(f"{model.spec}, router: {choice.text}, {'raw prompts' if as_is else 'chat'}; /help, /quit")
    if remark:
        show.note(f"note: {remark}")
    for line in lines():
        try:
            if chat.take(line):
                return
        except PhatgooseError as error:
            show.fail(str(error))
        except KeyboardInterrupt:
            show.note("\n(stopped)")


def lines() -> Iterator[str]:
    """What is typed or piped, line by line, without blank lines, until it ends."""
    typed = sys.stdin.isatty()
    if typed:
        import contextlib

        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() then has history and editing
    while True:
        if typed:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                show.say()
                return
        elif not (line := sys.stdin.readline()):
            return
        if line.strip():
            yield line.strip()


@dataclass
class Chat:
    """A conversation and what answers in it."""

    base: Base
    pool: Pool | None
    choice: Choice
    raw: bool
    max_new_tokens: int
    temperature: float
    seed: int
    trace: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Obeys or answers one line; True at the end."""
        if not line.startswith("/"):
            self.answer(line)
            return False
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return True
        if name == "/help":
            show.say(HELP)
        elif name == "/reset":
            self.messages.clear()
            show.note("forgotten")
        elif name == "/trace":
            self.trace = not self.trace
            show.note("experts are shown" if self.trace else "experts are hidden")
        elif name == "/base":
            self.switch("base")
        elif name == "/router" and rest.strip():
            self.switch(rest.strip())
        elif name == "/router":
            names = ", ".join(self.pool.names) if self.pool else "none (no --pool)"
            show.say(f"router: {self.choice.text}; experts: {names}")
        else:
            from phatgoose.registry import unknown

            raise unknown("command", name, ["/router", "/base", "/trace", "/reset", "/help", "/quit"])
        return False

    def switch(self, text: str) -> None:
        """Another router; the old one stays if the new one is refused."""
        from phatgoose.cli.common.loading import attach, choose

        choice = choose(text, self.pool, self.choice.options)
        attach(self.base, self.pool, choice)
        self.choice = choice
        show.note(f"router: {choice.text}")

    def answer(self, line: str) -> None:
        from phatgoose.models.text.encoding import encode_chat, encode_prompt

        if self.raw:
            self.generate(encode_prompt(self.base, line.replace("\\n", "\n")))
            return
        turn = [*self.messages, {"role": "user", "content": line}]
        from phatgoose.models.context.prompted import prompted
        from phatgoose.workflows.prompt_forms import read_of_turn

        with prompted(self.base, read_of_turn(self.pool, line)):
            text = self.generate(encode_chat(self.base, turn))
        self.messages = [*turn, {"role": "assistant", "content": text}]

    def generate(self, ids: Tensor) -> str:
        """Streams what follows the prompt, and then, if asked for, who led it."""
        from phatgoose.cli.common.streaming import stream

        settings = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}
        if not self.trace or self.choice.router is None:
            return stream(self.base, ids, **settings)  # type: ignore[arg-type]
        from phatgoose.analysis.prompts import routed_prompt
        from phatgoose.models.trace.record import trace

        with trace(self.base, margins=False) as recorded:
            text = stream(self.base, ids, **settings)  # type: ignore[arg-type]
        routed = routed_prompt(
            recorded, self.base, task="", prompt="", expected="", answer=text, correct=False
        )
        show_leaders(routed)
        return text


def show_leaders(routed: RoutedPrompt) -> None:
    """The answer's stretches with their leading experts, on standard error, so that a piped answer stays alone."""
    from phatgoose.analysis.prompts import written

    stretches = written(routed)
    width = min(max((len(repr(w.text)) for w in stretches), default=0), 60)
    for w in stretches:
        text = repr(w.text)
        show.note(
            f"  {text if len(text) <= 60 else text[:58] + '…' + text[-1]:<{width}}  {w.expert} {100 * w.share:.0f} %"
        )

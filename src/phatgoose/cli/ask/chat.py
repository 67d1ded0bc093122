"""`phatgoose chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

import phatgoose
from phatgoose.cli.common.expand import expand_options
from phatgoose.cli.common.options import (
    BackendOptions,
    BaseOptions,
    GenerationOptions,
    PoolOption,
    RouterOption,
)
from phatgoose.cli.measure import show
from phatgoose.errors import PhatgooseError
from phatgoose.registry import unknown

if TYPE_CHECKING:
    from torch import Tensor

    from phatgoose.cli.common.loading import Choice

HELP = r"""/router R   choose the router: phatgoose, phatgoose:top_k=3, single:NAME, random:seed=1, merged, base
/router     show the router, and the experts' names
/base       the base alone: the same as /router base
/trace      show or hide which experts lead each part of an answer
/reset      forget the conversation
/help       this
/quit       end, as does Ctrl-D
With --raw every line is a prompt by itself, and \n in it is a line break."""


@expand_options
def command(
    base: BaseOptions,
    backend: BackendOptions,
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
        bool, typer.Option("--trace", help="Show which experts led each answer; /trace switches it.")
    ] = False,
    generation: GenerationOptions = GenerationOptions(max_new_tokens=256),  # noqa: B008 - it is frozen
) -> None:
    """Talk with a pool or a base. /help shows what can be typed."""
    from phatgoose.cli.common.loading import load_routed
    from phatgoose.workflows.prompt_forms import fitting_form

    model, experts, choice = load_routed(pool, router, base, backend)
    has_template = model.tokenizer.chat_template is not None
    if raw is False and not has_template:
        raise PhatgooseError(f"the tokenizer of {model.spec} has no chat template: use --raw.")
    form, remark = fitting_form(experts, None if raw is None else "raw" if raw else "chat", has_template)
    chat = Chat(model, experts, choice, form == "raw", generation, show_trace)
    show.note(f"{model.spec}, router: {choice.text}, {'raw prompts' if chat.raw else 'chat'}; /help, /quit")
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
    """The lines that are typed or piped, without blank ones."""
    typed = sys.stdin.isatty()
    if typed:
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
    """A conversation, and the routed model that answers."""

    base: phatgoose.Base
    pool: phatgoose.Pool | None
    choice: Choice
    raw: bool
    generation: GenerationOptions
    trace: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def take(self, line: str) -> bool:
        """Runs a command or answers a prompt; True if the conversation ends."""
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
            raise unknown("command", name, ["/router", "/base", "/trace", "/reset", "/help", "/quit"])
        return False

    def switch(self, text: str) -> None:
        """Attaches another router; the old one stays if the new one is refused."""
        from phatgoose.cli.common.loading import attach, choose

        choice = choose(text, self.pool, self.choice.options)
        attach(self.base, self.pool, choice)
        self.choice = choice
        show.note(f"router: {choice.text}")

    def answer(self, line: str) -> None:
        from phatgoose.models.text.encoding import encode_chat, encode_prompt
        from phatgoose.workflows.prompt_forms import read_of_turn

        if self.raw:
            self.generate(encode_prompt(self.base, line.replace("\\n", "\n")))
            return
        turn = [*self.messages, {"role": "user", "content": line}]
        with phatgoose.prompted(self.base, read_of_turn(self.pool, line)):
            text = self.generate(encode_chat(self.base, turn))
        self.messages = [*turn, {"role": "assistant", "content": text}]

    def generate(self, ids: Tensor) -> str:
        """Streams the answer, and then, if asked for, the experts that led it."""
        from phatgoose.analysis.prompts import answer_spans, routed_prompt
        from phatgoose.cli.common.streaming import stream

        if not self.trace or self.choice.router is None:
            return stream(self.base, ids, self.generation)
        with phatgoose.trace(self.base, margins=False) as recorded:
            text = stream(self.base, ids, self.generation)
        routed = routed_prompt(
            recorded, self.base, task="", prompt="", expected="", answer=text, correct=False
        )
        # On standard error, so that a piped answer stays clean.
        spans = [
            (repr(span.text), f"{span.expert} {100 * span.share:.0f} %") for span in answer_spans(routed)
        ]
        width = min(max((len(quoted) for quoted, _ in spans), default=0), 60)
        for quoted, led in spans:
            short = quoted if len(quoted) <= 60 else quoted[:58] + "…" + quoted[-1]
            show.note(f"  {short:<{width}}  {led}")
        return text

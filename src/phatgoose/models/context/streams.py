"""Which tokens a model is running over right now, noted by hooks on its stacks.

While a pass runs, only references are kept (`Run`): its arguments, and its cache's length, as the cache grows
meanwhile. Tokens, positions and padding (`Sequences`) are worked out when somebody asks, once a pass. A module then
asks by its path and its input:

1. Whose tokens does it see? Its place in the model says so, except that keys and values of cross-attention read the
   encoder's tokens inside the decoder. They are known by their input, which is what the decoder was given to
   cross-attend to (`_reads`).
2. Which of them? The shape of its output says so (`matching.py`). What can't be told is refused when a router or a
   trace asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from phatgoose.errors import RoutingError
from phatgoose.models.attach.hooks import run_eagerly
from phatgoose.models.base.module_names import plain_name, reads_encoder
from phatgoose.models.context.matching import (
    is_in_expert_list,
    is_repeated,
    match,
    match_head,
    same_memory,
    unmatchable_stacks,
)
from phatgoose.models.context.memory import keep, recalled
from phatgoose.models.context.prompts import PromptTracker
from phatgoose.models.context.runs import Caches, ForgottenByCopies, Now, Run, arguments_by_name, run_of
from phatgoose.routers.context import PassMemory, RoutingContext, Sequences


class _Location(NamedTuple):
    """What a module's path says of the tokens it sees."""

    stack: str
    """The stack it stands in, or behind."""
    inside: bool
    named_cross: bool
    """Whether its name is that of keys and values in cross-attention."""
    refusal: str | None
    """Why its shape can't say which tokens it sees."""
    dispatched: bool
    """Whether it may be one of several experts, for which tokens are picked."""
    sees_all: bool
    """Whether an output of the pass's shape means that it saw the pass."""


class Streams:
    """Notes the running pass of each stack, and tells modules which of its tokens they see.

    Where a router reads text, it also has the `PromptTracker`; where one remembers, it keeps its `PassMemory`.
    """

    def __init__(self, model: PreTrainedModel, reads_text: bool = False, remembers: bool = False):
        self.model, self.remembers = model, remembers
        encoder_decoder = bool(model.config.is_encoder_decoder)
        self._now = Now()
        self.prompt_tracker = PromptTracker(encoder_decoder, self._now) if reads_text else None
        self.stacks: dict[str, nn.Module] = {"decoder": model.base_model}
        if encoder_decoder:
            self.stacks = {"encoder": model.get_encoder(), "decoder": model.get_decoder()}
        self._inner = None if encoder_decoder else _inner_decoder(model)
        paths = {module: plain_name(path) + "." if path else "" for path, module in model.named_modules()}
        self.prefixes = {name: paths[stack] for name, stack in self.stacks.items() if stack in paths}
        self._text = paths[self._inner] if self._inner is not None else ""
        self._caches = Caches()
        self._encoder_runs = ForgottenByCopies()  # what the encoder returned → its Run
        self._unmatchable = unmatchable_stacks(model)
        self._known: dict[str, _Location] = {}
        self.asked = True
        """Whether anybody may ask for the tokens of a pass. If nobody does, a compiled pass needn't leave its graph."""

    def attach(self) -> Iterator[RemovableHandle]:
        """Puts hooks on the stacks and the head model, one as each is taken."""
        # partial, and no closures: a copied or pickled model's hooks must be the copy's own.
        watched = list(self.stacks.items())
        if self._inner is not None:
            watched.append(("decoder", self._inner))
        for name, stack in watched:
            enter, leave = (partial(self._outside_graph, hook, name) for hook in (self._enter, self._leave))
            yield stack.register_forward_pre_hook(enter, with_kwargs=True)
            yield stack.register_forward_hook(leave, with_kwargs=True)
        if all(stack is not self.model for _, stack in watched):
            enter, leave = (
                partial(self._outside_graph, hook) for hook in (self._enter_head, self._leave_head)
            )
            yield self.model.register_forward_pre_hook(enter, with_kwargs=True)
            yield self.model.register_forward_hook(leave)

    def _outside_graph(self, hook: Callable[..., None], *call: Any) -> None:
        if not torch.compiler.is_compiling():
            hook(*call)
        elif self.asked:
            run_eagerly(hook, *call)

    def stream_of(self, path: str) -> str:
        """ "encoder" or "decoder": whose tokens the module at `path` sees, as far as its name says so. `context`
        knows it."""
        if "encoder" not in self.stacks:
            return "decoder"
        location = self._locate(path)
        return "encoder" if location.named_cross else location.stack

    def stack_of(self, path: str) -> str:
        """ "encoder" or "decoder": the stack that the module at `path` stands in, or behind."""
        return self._locate(path).stack

    def context(self, path: str, u: object, shape: torch.Size) -> RoutingContext:
        """One call of the module at `path`, on `u`, with an output of this shape: [..., d]."""
        stream, run, problem = self._reads(path, u)
        lead = tuple(shape[:-1])
        reader = None if self.prompt_tracker is None else self.prompt_tracker.texts_of
        recall = partial(self._memory_of, path) if self.remembers else None
        if run is None:
            rows = lead[0] if len(lead) > 1 else 1
            length = shape[:-1].numel() // max(rows, 1)
            return RoutingContext(path, rows, length, None, None, reader, recall, None, stream, problem)
        location, (batch, length) = self._locate(path), run.shape
        if location.inside:
            # Beams may repeat what was encoded once, for modules that read the encoder's tokens inside the decoder.
            repeats, past = stream != location.stack, run.past.tokens
            found = match(lead, batch, length, repeats=repeats, dispatched=location.dispatched, past=past)
        else:
            found = match_head(lead, batch, length, self._now.keep)
        problem = problem or location.refusal or found.problem
        by_row = found.by_row if location.refusal is None else batch == 1
        rows, length, built = found.rows, found.length, run.built()
        again = found.again if problem == found.problem else 0
        return RoutingContext(
            path, rows, length, built, None, reader, recall, found.kept, stream, problem, by_row, again=again
        )

    def whole_pass(self, path: str, u: object, shape: torch.Size) -> tuple[str, Sequences | None]:
        """Whose tokens such a call sees, and the pass's tokens if it sees all of them in order; None also if nobody has
        asked for them yet."""
        stream, run, _ = self._reads(path, u)
        location = self._locate(path)
        if run is None or run.shape != shape[:-1] or not location.inside or location.refusal is not None:
            return stream, None
        return stream, run.sequences

    def memory_of_whole(self, path: str, shape: torch.Size) -> PassMemory | None:
        """The memory of the running pass, if the module at `path`, with an output of this shape, surely sees all of it
        in order; None if that isn't so or takes longer to tell."""
        run = self._now.runs.get("decoder")
        # Where there is cross-attention, a module's input says whose tokens it sees.
        if (
            run is None
            or run.over
            or len(self.stacks) > 1
            or run.encoded is not None
            or run.shape != shape[:-1]
        ):
            return None
        location = self._known.get(path) or self._locate(path)
        if not location.sees_all:
            return None
        return run.memory or self._memory_of(path)

    def _memory_of(self, path: str) -> PassMemory:
        """The memory of the pass that the module at `path` runs in, or of the encoder's pass that its decoder reads."""
        runs, has_encoder = self._now.runs, "encoder" in self.stacks
        stack = self._locate(path).stack
        if (run := runs.get(stack)) is None:
            raise RoutingError(
                f"module {path} ran outside of a call of the model, so its sequences are unknown."
            )
        if run.over and self._locate(path).inside:
            raise RoutingError(
                f"module {path} runs again after its pass is over, as gradient checkpointing does, and it can't be "
                "told whose tokens these are: switch it off, or choose a router that decides by single tokens."
            )
        if has_encoder and stack == "decoder":
            encoded = None if run.encoded is None else run.encoded()
            found = None if encoded is None else self._encoder_run(encoded, run.before)
            if found is None:
                raise RoutingError(
                    "the decoder reads states that this model's encoder didn't compute while this router was attached: "
                    "run the encoder again."
                )
            run = found
        if run.memory is None:
            rows = run.shape[0]
            run.memory = PassMemory(run.built(), partial(recalled, run.past, rows, self), has_encoder)
        return run.memory

    def _locate(self, path: str) -> _Location:
        if path not in self._known:
            inside = not self.prefixes or path.startswith(tuple(self.prefixes.values()))
            stack = "encoder" if path.startswith(self.prefixes.get("encoder", "\0")) else "decoder"
            refusal = self._unmatchable.get(stack) if inside else None
            if inside and self._inner is not None and not path.startswith(self._text):
                refusal = "it isn't in the part of the model that reads the text, so it sees no tokens."
            dispatched = is_in_expert_list(self.model, path)
            sees_all = inside and refusal is None and not dispatched
            self._known[path] = _Location(stack, inside, reads_encoder(path), refusal, dispatched, sees_all)
        return self._known[path]

    def _reads(self, path: str, u: object) -> tuple[str, Run | None, str | None]:
        """Whose tokens a call sees, the run they are of, and why that can't be known, if it can't."""
        runs, location = self._now.runs, self._locate(path)
        if location.stack == "encoder":
            return "encoder", runs.get("encoder"), None
        run, named_cross = runs.get("decoder"), location.named_cross
        encoded = None if run is None or run.encoded is None else run.encoded()
        if encoded is None or not isinstance(u, Tensor):
            if named_cross and run is not None:
                return "encoder", None, "it reads states that the decoder wasn't given."
            return "decoder", run, None
        # The input decides, not the name: the same memory as the encoder's states, or a copy of them.
        if same_memory(u, encoded):
            as_given = u.shape == encoded.shape and u.stride() == encoded.stride()
        elif named_cross or u.device != encoded.device:  # moved to another device, it is a copy
            as_given = u.shape == encoded.shape and torch.equal(u.to(encoded.device), encoded)
            if not as_given and not named_cross:
                return "decoder", run, None
        else:
            return "decoder", run, None
        if not as_given:
            return "encoder", None, "it reads the encoder's states in another form than the decoder."
        if run is None or (encoder_run := self._encoder_run(encoded, run.before)) is None:
            return "encoder", None, "it reads states that this model's encoder didn't compute while routed."
        return "encoder", encoder_run, None

    def _encoder_run(self, encoded: Tensor, last: Tensor | None) -> Run | None:
        """The run that returned these states, or `last`, if these are its rows, each repeated (beams); else None."""
        if encoded not in self._encoder_runs and last is not None and is_repeated(encoded, last):
            self._encoder_runs[encoded] = self._encoder_runs[last]
        return self._encoder_runs.get(encoded)

    def select_encoded(self, encoded: Tensor, selected: Tensor, rows: Tensor) -> None:
        """`selected` is rows (int64 [n]) of what the encoder returned."""
        if (run := self._encoder_runs.get(encoded)) is not None:
            self._encoder_runs[selected] = run.selected(rows)

    def _enter_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._now.outer, self._now.keep = None, arguments_by_name(module, args, kwargs).get("logits_to_keep")

    def _leave_head(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._now.keep = None

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now = self._now
        if name == "decoder":
            # The base model and the text decoder inside it both have this hook: the outer one counts.
            if now.outer is not None and now.outer is not module:
                return
            now.outer = module
        given = arguments_by_name(module, args, kwargs)
        now.runs[name] = run = run_of(given, self._caches)
        # In continuous batching the mask says which tokens attend to which; there is no padding.
        if given.get("cu_seq_lens_q") is not None and getattr(given.get("attention_mask"), "ndim", 0) != 2:
            run.given["attention_mask"] = None
        if name == "decoder" and run.encoded is not None:
            run.before = None if now.encoded is run.encoded() else now.encoded
            now.encoded = None

    def _leave(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        now = self._now
        if name == "decoder":
            if now.outer is not module:
                return
            now.outer = None
        run = now.runs.get(name)
        if run is None:
            return
        run.over = True
        self._caches.after(run.given, output, run.past, *run.shape)
        if run.memory is not None and not run.memory.whole:
            keep(run.memory, run.past, output, self)
        if name == "encoder":
            states = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", None)
            if isinstance(states, Tensor):
                self._encoder_runs[states] = run
                now.encoded = states
        if self.prompt_tracker is not None:
            self.prompt_tracker.leave(name, run, output)


def _inner_decoder(model: PreTrainedModel) -> PreTrainedModel | None:
    """The text decoder inside a model without an encoder, if it isn't the base model itself.

    OPT's head model calls it directly. In a vision-language model everything beside it sees no text.
    """
    inner = model.get_decoder()
    if inner is model.base_model or not isinstance(inner, PreTrainedModel):
        return None
    return inner if any(inner is module for module in model.base_model.modules()) else None

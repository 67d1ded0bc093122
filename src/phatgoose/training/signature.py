"""Make a data signature of an expert's own rows: mean activations, mean prompts, embedded prompts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from phatgoose.errors import TrainingError
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.experts.files.safetensors_file import read_tensor_file
from phatgoose.extras import installed_versions
from phatgoose.files import sha256_json, work_place, write_bytes
from phatgoose.models.attach.attach import Routing, routing_of
from phatgoose.models.attach.hooks import Hooks, run_eagerly
from phatgoose.models.base.base import Base, as_base, eval_mode
from phatgoose.models.base.layers import first_argument
from phatgoose.models.base.sentence_encoder import SentenceEncoder, load_encoder
from phatgoose.models.context.streams import Streams
from phatgoose.models.moe.expert_linear import ExpertLinear, routing_context
from phatgoose.models.moe.names import modules_by_path
from phatgoose.models.text.batch import decoder_inputs, make_batch, prompt_batch, target_logits
from phatgoose.models.text.capabilities import check_scorable
from phatgoose.models.text.encoding import Encoded, chat_template_key, decode_text, encode_input
from phatgoose.ops.reference import standardise
from phatgoose.records import Task
from phatgoose.tasks.load import without_paths
from phatgoose.training.config import SignatureConfig
from phatgoose.training.gate import match_to_base
from phatgoose.training.trainer.preserve import expert_attached, refuse_routed
from phatgoose.training.trainer.progress import Progress, Report, display
from phatgoose.training.trainer.rows import draw_rows, encode_rows

FOLDER = "signature"
_MADE_OF = ("activations", "prompts", "texts")
"""Part of every key, so that a signature of fewer parts is made again."""
SAVE_SECONDS = 20.0
"""Time between two saves of the sums."""
_COUNT = "count:"


def make_signature(
    base: Base | PreTrainedModel,
    expert: Expert,
    task: Task,
    config: SignatureConfig | None = None,
    *,
    work_folder: str | Path | None = None,
    report: Report | None = None,
) -> Expert:
    """The expert with a data signature of its own task's training rows.

    Activations: for each adapted module the mean input (for an embedding: output) over all tokens of the rows, prompt
    and target as in training, in the base with this expert on every token. Prompts: for each adapted module that reads
    prompts as a whole, the mean of its standardised input ū over the tokens of the same rows' prompts, in the base
    alone, as a router sees it before any expert acts. Both are summed in float64. Texts: embeddings of the prompts as
    the base's tokenizer decodes them again.

    Args:
        work_folder: keeps the sums so far. After a kill the same call continues from them, with the same result.

    Returns:
        a new expert; provenance["signature"] says how it was made.

    Raises:
        TrainingError: no training rows, routing attached to the base, values that aren't finite, or the expert doesn't
            fit the base.
        BaseModelError: the expert was made on another base, or the encoder can't be loaded.
    """
    base, config = as_base(base), config or SignatureConfig()
    here, own = match_to_base(base, expert)
    _check(base, task)
    started = time.monotonic()
    encoder = load_encoder(config.encoder) if config.texts else None
    key = signature_key(base, expert, task, config, encoder)
    rows = encode_rows(
        base, task, "training", _chosen_rows(task, config.rows, config.seed), config.max_length
    )
    activations, prompts, tokens = None, None, 0
    if rows:
        found = []
        for kind in (_Sums, _PromptSums):
            sums = kind(base, here, f"{key}/{config.rows_per_batch}")
            sums.add(list(rows.values()), config.rows_per_batch, work_folder, report)
            found.append({own.get(path, path): mean for path, mean in sums.means().items()})
            tokens = max(tokens, sums.tokens)
        activations, prompts = found
    texts, cut = (None, 0) if encoder is None else _embed_texts(base, task, config, encoder)
    name, sha256 = (encoder.name, encoder.sha256) if encoder else (None, None)
    record = {
        "kind": "signature", "key": key, "config": {**config.to_json(), "encoder": name},
        "task": {"name": task.name, "source": without_paths(task.source), "hash": task.hash},
        "rows": len(rows), "tokens": tokens, "prompts": bool(prompts),
        "texts": 0 if texts is None else len(texts), "texts_cut": cut,
        "encoder": name, "seconds": round(time.monotonic() - started, 3),
        "versions": installed_versions("phatgoose", "torch", "transformers"),
    }  # fmt: skip
    return expert.with_signature(DataSignature(activations, texts, name, sha256, prompts=prompts), record)


def _check(base: Base, task: Task) -> None:
    refuse_routed(base)
    if not task.train:
        raise TrainingError(f"task {task.name!r} has no training rows to make a signature of.")
    check_scorable(base.model)


def signature_key(
    base: Base, expert: Expert, task: Task, config: SignatureConfig, encoder: SentenceEncoder | None
) -> str:
    """sha256 of everything that a signature depends on."""
    adapter, sha256 = replace(expert, gates=None).hash, encoder.sha256 if encoder else None
    rendered = list(chat_template_key(base, task).values())
    return sha256_json([_MADE_OF, config.key(), task.hash, adapter, base.facts(), sha256, *rendered])


def _chosen_rows(task: Task, count: int, seed: int) -> list[int]:
    """Numbers of at most `count` training rows."""
    return sorted(draw_rows(len(task.train), min(count, len(task.train)), seed))


def _embed_texts(
    base: Base, task: Task, config: SignatureConfig, encoder: SentenceEncoder
) -> tuple[Tensor, int]:
    """(embeddings of training prompts, how many of them were too long for the encoder)."""
    chosen = (task.train[index] for index in _chosen_rows(task, config.texts, config.seed))
    # The prompts as a router decodes them from their tokens, which may differ: T5's tokenizer drops line breaks.
    prompts = [decode_text(base.tokenizer, encode_input(base, example)) for example in chosen]
    return encoder(prompts), encoder.cut(prompts)


class _Sums:
    """Sums of the inputs of an expert's modules, in float64, with the expert on every token of the base."""

    file = "sums.safetensors"

    def __init__(self, base: Base, expert: Expert, key: str) -> None:
        """`key`: what the sums depend on, including the order of batches."""
        self.base, self.expert, self.key = base, expert, key
        self.modules = modules_by_path(base.model, expert.updates)
        self.values: dict[str, Tensor] = {}
        """By module path: the sum [d], and the number of tokens [1] under "count:PATH"."""

    @property
    def label(self) -> str:
        return f"signature {self.expert.name}"

    @property
    def tokens(self) -> int:
        """The most tokens that one module saw."""
        return int(max((float(n) for name, n in self.values.items() if name.startswith(_COUNT)), default=0))

    def add(
        self, rows: Sequence[Encoded], size: int, work_folder: str | Path | None, report: Report | None
    ) -> None:
        """Runs the rows in batches of this size, the longest first, so that a batch has rows of similar length.

        The work folder keeps the sums so far. They are continued if their key is the same.
        """
        rows = sorted(rows, key=lambda row: -row.length)
        batches, saved = [rows[i : i + size] for i in range(0, len(rows), size)], time.monotonic()
        with work_place(work_folder) as folder, self._collecting():
            file = folder / FOLDER / self.file
            done = self._load(file)
            with display(self.label, len(batches), report) as show:
                for number, batch in enumerate(batches):
                    show(Progress(self.label, number, len(batches)))
                    if number < done:
                        continue
                    self._run(batch)
                    if time.monotonic() - saved > SAVE_SECONDS:
                        metadata = {"key": self.key, "batches": str(number + 1)}
                        write_bytes(file, safetensors.torch.save(self.values, metadata))
                        saved = time.monotonic()
                show(Progress(self.label, len(batches), len(batches)))

    def _run(self, rows: Sequence[Encoded]) -> None:
        _forward(self.base, rows)

    def _load(self, file: Path) -> int:
        """Takes the sums of an interrupted call with this key; returns the number of batches in them."""
        if not file.exists():
            return 0
        found = read_tensor_file(file, TrainingError)
        if found.metadata.get("key") != self.key:
            return 0
        self.values = dict(found.tensors)
        return int(found.metadata["batches"])

    def means(self) -> dict[str, Tensor]:
        """The mean input [d] float32 of each module. A TrainingError if one isn't finite."""
        means = self._means()
        for path in self.expert.updates:
            # No token reached this expert of a mixture. A mean of zeros scores 0 on every token, so it doesn't
            # influence routing.
            if isinstance(module := self.modules[path], ExpertLinear) and path not in means:
                means[path] = torch.zeros(module.in_features)
        return means

    def _means(self) -> dict[str, Tensor]:
        """The mean of each module that saw something. A TrainingError if one isn't finite."""
        sums = {path: total for path, total in self.values.items() if not path.startswith(_COUNT)}
        means = {path: (total / self.values[_COUNT + path]).float() for path, total in sums.items()}
        for path, mean in means.items():
            if not bool(mean.isfinite().all()):
                raise TrainingError(
                    f"{self.label}: inputs of {path} aren't finite; load the base in another dtype."
                )
        return means

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        """Inside, the base has the expert on every token, and its modules' inputs are summed over real tokens."""
        with Hooks() as hooks:
            for path, update in self.expert.updates.items():
                # Registered before the routing's own hook, so that it gets an embedding's output as the gate does.
                hook = partial(run_eagerly, self._hook, path, update.embedding)
                hooks.add([self.modules[path].register_forward_hook(hook, with_kwargs=True)])
            with expert_attached(self.base, self.expert):
                yield

    def _hook(
        self, path: str, embedding: bool, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        u = output if embedding else first_argument(args, kwargs)
        routing: Routing | None = routing_of(self.base)
        assert routing is not None
        context = routing_context(path, module, args, first_argument(args, kwargs), u.shape, routing.streams)
        self._count(path, u.reshape(-1, u.shape[-1])[context.tokens().real.reshape(-1).to(u.device)])

    def _count(self, path: str, inputs: Tensor) -> None:
        """Adds inputs [N, d] to the sums of a module."""
        total, count = inputs.double().sum(0).cpu(), torch.tensor([float(len(inputs))], dtype=torch.float64)
        for name, value in ((path, total), (_COUNT + path, count)):
            self.values[name] = self.values[name] + value if name in self.values else value


class _PromptSums(_Sums):
    """Sums of the standardised inputs of the bare base's modules over prompts, in float64."""

    file = "prompt-sums.safetensors"

    def __init__(self, base: Base, expert: Expert, key: str) -> None:
        super().__init__(base, expert, key)
        # A mixture's experts see some tokens only, and an embedding's input is no vector.
        self.read = [
            path for path, update in expert.updates.items()
            if not update.embedding and not isinstance(self.modules[path], ExpertLinear)
        ]  # fmt: skip
        self.streams = Streams(base.model)

    @property
    def label(self) -> str:
        return f"signature {self.expert.name}, prompts"

    def means(self) -> dict[str, Tensor]:
        return self._means()

    def _run(self, rows: Sequence[Encoded]) -> None:
        inputs = prompt_batch(self.base, rows)
        model = self.base.model
        # Without the head, which reads no prompt as a whole.
        stack = model.get_encoder() if self.base.is_encoder_decoder else model.base_model
        with torch.no_grad():
            stack(**{name: one.to(self.base.device) for name, one in inputs.items()})

    @contextlib.contextmanager
    def _collecting(self) -> Iterator[None]:
        """Inside, the base is as it is, and its modules' inputs are summed over real tokens."""
        with Hooks(self.streams.attach()) as hooks, eval_mode(self.base.model):
            for path in self.read:
                hook = partial(run_eagerly, self._read, path)
                hooks.add([self.modules[path].register_forward_hook(hook, with_kwargs=True)])
            yield

    def _read(self, path: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        u = first_argument(args, kwargs)
        real = self.streams.context(path, u, output.shape).tokens().real.reshape(-1).to(u.device)
        self._count(path, standardise(u.reshape(-1, u.shape[-1])[real]))


def _forward(base: Base, rows: Sequence[Encoded]) -> None:
    batch = {k: t.to(base.device) for k, t in make_batch(base, rows).items()}
    with torch.no_grad():
        if not base.is_encoder_decoder:
            target_logits(base.model, batch)
            return
        labels = batch.pop("labels")
        # Training passes no decoder mask: there the labels alone mark the decoder's padding.
        mask = (labels >= 0).long()
        inputs = decoder_inputs(base.model, labels)
        base.model(**batch, decoder_input_ids=inputs, decoder_attention_mask=mask, use_cache=False)

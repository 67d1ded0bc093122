"""Make a data signature: mean activations and embedded prompts of an expert's own rows."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from phatgoose.errors import TrainingError
from phatgoose.experts.data_signature import DataSignature
from phatgoose.experts.expert import Expert
from phatgoose.extras import installed_versions
from phatgoose.files import sha256_json, work_place
from phatgoose.models.attach.attach import routing_of
from phatgoose.models.base.base import Base, as_base
from phatgoose.models.base.sentence_encoder import SentenceEncoder, load_encoder
from phatgoose.models.text.capabilities import check_scorable
from phatgoose.models.text.encoding import Encoded, chat_template_key, decode_text, encode_input
from phatgoose.records import Example, Task
from phatgoose.tasks.load import without_paths
from phatgoose.training.activations import mean_activations
from phatgoose.training.config import SignatureConfig
from phatgoose.training.gate import match_to_base
from phatgoose.training.trainer.progress import Report
from phatgoose.training.trainer.rows import draw_rows, encode_rows

__all__ = ["SignatureConfig", "make_signature"]
FOLDER, FILE = "signature", "sums.safetensors"


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
    and target as in training, in the base with this expert on every token. Summed in float64. Texts: embeddings of
    the prompts as the base's tokenizer decodes them again.

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
    if routing_of(base) is not None:
        raise TrainingError("routing is attached to the base: call unroute(base) first.")
    if not task.train:
        raise TrainingError(f"task {task.name!r} has no training rows to make a signature of.")
    check_scorable(base.model)
    started = time.monotonic()
    encoder = load_encoder(config.encoder) if config.texts else None
    key = signature_key(base, expert, task, config, encoder)
    rows = _encode_rows(base, task, config)
    activations, tokens = None, 0
    if rows:
        size = config.rows_per_batch
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        with work_place(work_folder) as folder:
            file, file_key = folder / FOLDER / FILE, f"{key}/{size}"
            means, tokens = mean_activations(base, here, batches, file, file_key, report)
        activations = {own.get(path, path): mean for path, mean in means.items()}
    texts, cut = (None, 0) if encoder is None else _embed_texts(base, task, config, encoder)
    name, sha256 = (encoder.name, encoder.sha256) if encoder else (None, None)
    record = {
        "kind": "signature", "key": key, "config": {**config.to_json(), "encoder": name},
        "task": {"name": task.name, "source": without_paths(task.source), "hash": task.hash},
        "rows": len(rows), "tokens": tokens, "texts": 0 if texts is None else len(texts), "texts_cut": cut,
        "encoder": name, "seconds": round(time.monotonic() - started, 3),
        "versions": installed_versions("phatgoose", "torch", "transformers"),
    }  # fmt: skip
    return expert.with_signature(DataSignature(activations, texts, name, sha256), record)


def signature_key(
    base: Base, expert: Expert, task: Task, config: SignatureConfig, encoder: SentenceEncoder | None
) -> str:
    """sha256 of everything that a signature depends on."""
    adapter, sha256 = replace(expert, gates=None).hash, encoder.sha256 if encoder else None
    rendered = list(chat_template_key(base, task).values())
    return sha256_json([config.key(), task.hash, adapter, base.facts(), sha256, *rendered])


def _encode_rows(base: Base, task: Task, config: SignatureConfig) -> list[Encoded]:
    """The rows as training encodes them, the longest first, so that batches hold rows of similar length."""
    which = sorted(draw_rows(len(task.train), min(config.rows, len(task.train)), config.seed))
    found = encode_rows(base, task.name, "training", task.train, which, config.max_length)
    return sorted(found.values(), key=lambda row: -row.length)


def _embed_texts(
    base: Base, task: Task, config: SignatureConfig, encoder: SentenceEncoder
) -> tuple[Tensor, int]:
    """(embeddings of training prompts, how many of them were too long for the encoder)."""
    chosen = sorted(draw_rows(len(task.train), min(config.texts, len(task.train)), config.seed))
    prompts = [decoded_prompt(base, task.train[index]) for index in chosen]
    return encoder(prompts), encoder.cut(prompts)


def decoded_prompt(base: Base, example: Example) -> str:
    """The prompt as a router decodes it from its tokens, which may differ: T5's tokenizer drops line breaks."""
    return decode_text(base.tokenizer, encode_input(base, example))

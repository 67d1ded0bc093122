"""Loading a base: a Hub id, a folder, a GGUF file or an alias → `Base`. See docs/bases.md."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from phatgoose.errors import BaseModelError
from phatgoose.hub_errors import look_up
from phatgoose.models.base import DTYPES
from phatgoose.models.base.base import Base, model_class
from phatgoose.models.base.gguf import ALIASES, copy_of_alias, copy_of_file
from phatgoose.models.base.load_errors import check_folder, explain_load_errors
from phatgoose.registry import unknown

DEFAULT_BASE = "smollm2-135m-instruct-q4"
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@(?P<revision>[^\s@]+))?")


@dataclass(frozen=True)
class Source:
    """Where a base's files are, and what transformers reads of them."""

    spec: str
    place: Path | str
    """A local folder, or (a string) a repository on the Hub."""
    revision: str | None = None
    notes: tuple[str, ...] = ()
    copy: bool = False
    """`place` is a converted copy in our cache, which the user never named."""

    def explain(self, part: str) -> contextlib.AbstractContextManager[None]:
        """`explain_load_errors` for a part of this base. For a Hub id it says which other readings failed."""
        if isinstance(self.place, Path):
            return explain_load_errors(self.spec, part, self.place)
        tried = f"There is also no folder or file {self.spec!r} here."
        if "/" not in self.spec:
            tried += f" As an alias: {unknown('base', self.spec, ALIASES)}."
        return explain_load_errors(self.spec, part, None, tried)

    def config(self) -> PreTrainedConfig:
        with self.explain("the configuration"):
            if isinstance(self.place, str):
                look_up(self.place, self.revision, "config.json")
            return AutoConfig.from_pretrained(**self._arguments)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        with self.explain("the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(**self._arguments)
            if len(tokenizer) - len(tokenizer.added_tokens_encoder) < 4:  # transformers makes an empty one up
                raise BaseModelError(
                    f"can't load the tokenizer of {self.spec!r}: it comes without one (no tokenizer.json, "
                    "spiece.model, …)."
                )
            return tokenizer

    def model(self, options: dict[str, Any], config: PreTrainedConfig | None = None) -> PreTrainedModel:
        """The weights alone, without a tokenizer. `options`: the result of `load_options`."""
        config = config or self.config()
        with self.explain("the weights"), hide_progress_bars(self.copy):
            model, info = model_class(config).from_pretrained(
                **self._arguments, config=config, use_safetensors=True, output_loading_info=True, **options
            )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise BaseModelError(
                f"{self.spec!r} is a PEFT adapter, not a base: load {model.name_or_path!r}, its base."
            )
        if missing := sorted(info["missing_keys"]):
            raise BaseModelError(
                f"{self.spec!r} has no weights for {len(missing)} tensors of {type(model).__name__}, {missing[0]!r} "
                f"among them: they would be random. Its config says {config.architectures}; a base needs a "
                "language-model head."
            )
        return model

    def empty_model(self, buffers: bool = False) -> PreTrainedModel:
        """The model on the meta device, without values. buffers: those have values, such as rotary frequencies."""
        config = self.config()
        empty = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
        with self.explain("the modules"), empty:
            return model_class(config).from_config(config, trust_remote_code=False)

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": str(self.place),
            "revision": self.revision,
            "trust_remote_code": False,
        }


def load_base(
    spec: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantization: Any = None,
) -> Base:
    """Loads a base model and its tokenizer, ready to train experts on or to route: in eval mode, on `device`.

    Args:
        spec: an alias (`DEFAULT_BASE`), a folder, a GGUF file, "org/name" or "org/name@revision" on the Hub, or
            "folder:file.gguf", "org/name:file.gguf". A folder or file goes before a Hub model of the same name.
        revision: a branch, tag or commit on the Hub.
        dtype: "auto" (the checkpoint's own; float32 for a GGUF file), "float32", "bfloat16", "float16" or a torch
            dtype.
        device: where the whole model goes, e.g. "cuda:0"; the CPU if None.
        device_map: spreads the model over devices instead, as in transformers, e.g. "auto".
        quantization: "8bit" or "4bit" (NF4) through bitsandbytes, or any quantization config of transformers.

    Code from a repository is never run, and only safetensors and GGUF files are read. A tokenizer without a padding
    token pads with its end-of-sequence token. A decoder-only model's tokenizer pads on the left.

    Raises:
        BaseModelError: the base doesn't exist, is damaged, gated, an adapter or of an unknown architecture, or there
            is no network; the message says what was tried and what to do.
        DownloadError: a base with an alias can't be fetched, or isn't the pinned file.
        StorageError: no space or permission to keep what was downloaded or converted.
    """
    options = load_options(dtype, device, device_map, quantization)
    source = find_source(spec, revision)
    config = source.config()
    tokenizer = source.tokenizer()  # first, so that a missing tokenizer costs no long download
    model = source.model(options, config)
    _set_padding(source.spec, model, tokenizer)
    if device is not None and "device_map" not in options:
        with explain_load_errors(source.spec, f"the model on {device}", None):
            model = model.to(device)  # type: ignore[arg-type]
    if source.copy:  # adapters record this name, and a path in our cache means nothing elsewhere
        model.name_or_path = model.config.name_or_path = source.spec
    forced = forced_start(model, tokenizer)
    return Base(model, tokenizer, spec=source.spec, notes=(*source.notes, *([forced] if forced else [])))


def forced_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A note for checkpoints that force an answer's first token (BART's <s>, mBART's language), else None."""
    token = getattr(model.generation_config, "forced_bos_token_id", None)
    if token is None:
        return None
    return (
        f"its checkpoint forces every answer to begin with {tokenizer.convert_ids_to_tokens(token)!r}; here nothing is "
        "forced: an answer begins with the likeliest token, as in training and evaluation."
    )


def load_weights(spec: str | os.PathLike[str], dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """A base's model alone, on the CPU, for callers that need no tokenizer. Arguments and errors as for `load_base`."""
    return find_source(spec).model(load_options(dtype))


def load_options(
    dtype: Any = "auto", device: Any = None, device_map: Any = None, quantization: Any = None
) -> dict[str, Any]:
    """Arguments for transformers' from_pretrained, from those of `load_base`. Bad ones are BaseModelErrors."""
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise BaseModelError(str(unknown("dtype", dtype, ["auto", *DTYPES])))
        dtype = getattr(torch, dtype)
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise BaseModelError(
            f"dtype must be one of auto, {', '.join(DTYPES)} or a floating torch dtype, got {dtype!r}."
        )
    options: dict[str, Any] = {"dtype": dtype}
    if device is not None:
        if device_map is not None:
            raise BaseModelError(f"give device ({device!r}) or device_map ({device_map!r}), not both.")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError) as error:
            said = str(error).splitlines()[0]
            raise BaseModelError(f"the device {device!r} can't be used: {said}") from error
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization)
        if device is not None:  # a quantised model can't be moved after loading
            device_map = {"": str(device)}
    if device_map is not None:
        options["device_map"] = device_map
    return options


def _quantization(asked: Any) -> Any:
    if isinstance(asked, str) and asked not in ("8bit", "4bit"):
        raise BaseModelError(str(unknown("quantization", asked, ["8bit", "4bit"])))
    if isinstance(asked, str | BitsAndBytesConfig) and importlib.util.find_spec("bitsandbytes") is None:
        which = f"a {asked} base" if isinstance(asked, str) else "this quantization"
        raise BaseModelError(f"{which} needs the package bitsandbytes: `pip install bitsandbytes`.")
    if asked == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return BitsAndBytesConfig(load_in_8bit=True) if asked == "8bit" else asked


def find_source(
    place: str | os.PathLike[str], revision: str | None = None, *, needs_weights: bool = True
) -> Source:
    """What a spec names, in this order: an alias, a folder, a file, a GGUF file inside one of the two, a Hub id.

    needs_weights: refuse a folder without weights; else one with a configuration is enough.
    """
    # What an adapter's config names may be no path at all: os.path says so, where pathlib raises.
    spec, path = os.fspath(place), Path(os.path.expanduser(place))
    if not needs_weights and os.path.isfile(path / "config.json"):
        return Source(spec, path)
    if spec in ALIASES:
        _no_revision(spec, revision, "an alias")
        alias = ALIASES[spec]
        return Source(spec, copy_of_alias(spec, alias), notes=(alias.note,), copy=True)
    if spec and os.path.isdir(path):
        _no_revision(spec, revision, "a folder")
        check_folder(path, spec)
        return Source(spec, path)
    if os.path.isfile(path):
        _no_revision(spec, revision, "a file")
        if path.suffix.lower() != ".gguf":
            raise BaseModelError(
                f"{spec} is a file, and not a GGUF file: give the folder that holds config.json."
            )
        return _gguf(spec, path)
    outer, colon, file = spec.rpartition(":")
    if colon and file.lower().endswith(".gguf"):
        if os.path.isdir(folder := os.path.expanduser(outer)):
            return find_source(Path(folder) / file, revision)
        if (hub := _hub(outer, revision)) is not None:
            with hub.explain(file):
                look_up(str(hub.place), hub.revision, file)
                found = Path(hf_hub_download(str(hub.place), file, revision=hub.revision))
            return _gguf(spec, found)
    elif (hub := _hub(spec, revision)) is not None and not spec.lower().endswith(".gguf"):
        # A misspelt alias is also a valid Hub id: don't ask the network about it. "org/name" is no alias.
        if "/" not in spec and difflib.get_close_matches(spec.lower(), ALIASES, cutoff=0.6):
            hint = f"There is no folder or file {spec!r} here."
            raise BaseModelError(str(unknown("base", spec, ALIASES, hint)))
        return hub
    raise BaseModelError(
        f'there is no base {spec!r}: no such file or folder, and it is not a Hub id ("org/name").'
    )


def _hub(spec: str, revision: str | None) -> Source | None:
    if (match := _HUB_ID.fullmatch(spec)) is None:
        return None
    inside = match["revision"]
    if inside and revision and inside != revision:
        raise BaseModelError(f"two revisions: {inside!r} in {spec!r}, and revision={revision!r}. Give one.")
    chosen = inside or revision
    return Source(f"{match['id']}@{chosen}" if chosen else match["id"], match["id"], chosen)


def _gguf(spec: str, file: Path) -> Source:
    note = f"converted from {file.name}: if that file is quantised, this is a dequantised copy, not the original model."
    return Source(spec, copy_of_file(file), notes=(note,), copy=True)


def _no_revision(spec: str, revision: str | None, what: str) -> None:
    if revision is not None:
        raise BaseModelError(f"{spec!r} is {what} and has no revisions, but revision={revision!r} was given.")


def _set_padding(spec: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the padding token and side. Refuses a tokenizer that isn't this model's."""
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            f"the tokenizer of {spec!r} has no end-of-sequence token: answers could not be ended or scored."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows = model.get_input_embeddings().num_embeddings
    for name in ("eos_token", "pad_token"):
        if (number := getattr(tokenizer, f"{name}_id")) >= rows:
            raise BaseModelError(
                f"the tokenizer of {spec!r} has its {name} at {number}, but the model embeds only {rows} tokens: they "
                "do not belong together."
            )
    if not model.config.is_encoder_decoder:
        tokenizer.padding_side = "left"
    if model.generation_config is not None and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def hide_progress_bars(hide: bool) -> Iterator[None]:
    """Hides transformers' progress bars, if `hide`: reading a cached copy takes less than a second."""
    hide = hide and transformers_logging.is_progress_bar_enabled()
    if hide:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            transformers_logging.enable_progress_bar()

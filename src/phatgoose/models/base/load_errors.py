"""Any error while a base is loaded → one BaseModelError that says what to do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub.constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open

from phatgoose.errors import BaseModelError, PhatgooseError
from phatgoose.files import storage_errors
from phatgoose.hub_errors import chain, explain, hide_tokens

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_UNKNOWN_ARCHITECTURE = (
    "does not recognize this architecture", "Unrecognized model", "Unrecognized configuration",
)  # fmt: skip


@contextlib.contextmanager
def explain_load_errors(spec: str, part: str, folder: Path | None, tried: str = "") -> Iterator[None]:
    """Turns any error while `part` ("the configuration", "the weights", …) of `spec` is read into a BaseModelError.

    Its message names the spec, the cause and what to do. No space to keep a download is a StorageError.
    """
    try:
        hub_cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
        with storage_errors(hub_cache) if folder is None else contextlib.nullcontext():
            yield
    except PhatgooseError:
        raise
    except Exception as error:  # transformers and its many backends share no error type
        raise BaseModelError(
            f"can't load {part} of {spec!r}: {_explain(error, spec, folder, tried)}"
        ) from error


def _explain(error: Exception, spec: str, folder: Path | None, tried: str) -> str:
    if said := explain(error, spec.partition("@")[0].partition(":")[0], tried=tried):
        return said
    causes = list(chain(error))
    if any(isinstance(e, SafetensorError) for e in causes):
        return f"{_damaged(folder)}: {causes[-1]}. Delete it and download or copy it again."
    text = hide_tokens(str(error))
    if "bitsandbytes" in text or "accelerate" in text:
        return (
            f"{text[:300]} Quantised bases need `pip install bitsandbytes accelerate` and supported hardware."
        )
    if "trust_remote_code" in text or "contains custom code" in text:
        return "it needs Python code from its own repository to run, which is never done here."
    if "model.safetensors" in text and any(w in text for w in ("no file named", "not appear to have a file")):
        return pickle_only(spec, "no *.safetensors file")
    if any(w in text for w in _UNKNOWN_ARCHITECTURE):
        return f"transformers doesn't know its architecture as a language model: {text[:300]}"
    if any(isinstance(e, (EntryNotFoundError, FileNotFoundError)) for e in causes):
        return f"a file is missing: {text[:300]}"
    return f"{type(error).__name__}: {text[:500] or 'no message'}"


def pickle_only(spec: str, found: str) -> str:
    """The message about a base whose weights exist only as pickle files."""
    return (
        f"it has {found}; weights in pickle files are not read, because opening one can run code. On the Hub, look "
        'among the model\'s pull requests for a safetensors version and load "NAME@refs/pr/NUMBER". Or, if you trust '
        f"its source, convert it once: `python -c \"import transformers as t; s = '{spec}'; "
        "c = t.AutoConfig.from_pretrained(s); "
        "a = t.AutoModelForSeq2SeqLM if c.is_encoder_decoder else t.AutoModelForCausalLM; "
        "a.from_pretrained(s, use_safetensors=False).save_pretrained('converted'); "
        't.AutoTokenizer.from_pretrained(s).save_pretrained(\'converted\')"` and load "./converted".'
    )


def check_folder(folder: Path, spec: str) -> None:
    """Refuses a folder that holds no base, by its files' names: an adapter, GGUF files or pickles only, no checkpoint.

    A file that may not be read is refused too. All of these are BaseModelErrors.
    """
    try:
        names = sorted(p.name for p in folder.iterdir())
    except OSError as error:
        raise BaseModelError(f"{spec} can't be read: {error.strerror}.") from error
    if "adapter_config.json" in names:
        raise BaseModelError(
            f"{spec} is a PEFT adapter, not a base: load the base that its adapter_config.json names."
        )
    # transformers reports some files that it may not read as missing.
    readable = partial(os.access, mode=os.R_OK, effective_ids=os.access in os.supports_effective_ids)
    ours = [n for n in names if n.endswith((".json", ".safetensors", ".model", ".txt", ".jinja"))]
    if locked := [n for n in ours if not readable(folder / n)]:
        raise BaseModelError(f"{folder / locked[0]} can't be read: no permission.")
    if "config.json" not in names:
        if ggufs := [n for n in names if n.lower().endswith(".gguf")]:
            raise BaseModelError(f"{spec} holds GGUF files: say which one, as {f'{spec}:{ggufs[0]}'!r}.")
        raise BaseModelError(
            f"{spec} holds no model: there is no config.json in it (found {names[:8] or 'nothing'})."
        )
    if not any(n.endswith((".safetensors", ".safetensors.index.json")) for n in names):
        pickles = [n for n in names if n.endswith(PICKLES)]
        if pickles:
            raise BaseModelError(f"can't load {spec!r}: {pickle_only(spec, f'only {pickles[0]}')}")
        raise BaseModelError(
            f"{spec} holds no weights: there is no *.safetensors file in it (found {names[:8]})."
        )


def _damaged(folder: Path | None) -> str:
    """Which safetensors file of the folder can't be opened."""
    for file in sorted(folder.glob("*.safetensors")) if folder else ():
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError:
            return f"{file} is damaged"
    return "a safetensors file is damaged"

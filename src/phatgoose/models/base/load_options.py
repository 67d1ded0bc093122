"""The options of `load_base`, checked before anything is fetched."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from phatgoose.errors import BaseModelError
from phatgoose.registry import unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_options(dtype: Any, device: Any, device_map: Any, quantization: Any) -> dict[str, Any]:
    """Arguments for transformers' from_pretrained, from those of `load_base`.

    Raises:
        BaseModelError: an unknown dtype or quantization, a device that doesn't exist, or device and device_map
            together.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in DTYPES:
            raise BaseModelError(str(unknown("dtype", dtype, ["auto", *DTYPES])))
        dtype = DTYPES[dtype]
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise BaseModelError(
            f"dtype must be one of auto, {', '.join(DTYPES)} or a floating torch dtype, got {dtype!r}."
        )
    options: dict[str, Any] = {"dtype": dtype}
    if device is not None:
        if device_map is not None:
            raise BaseModelError(f"give device ({device!r}) or device_map ({device_map!r}), not both.")
        _check_device(device)
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization)
        if device is not None:  # a quantised model can't be moved after loading
            device_map = {"": str(device)}
    if device_map is not None:
        options["device_map"] = device_map
    return options


def _check_device(device: Any) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BaseModelError(f"the device {device!r} can't be used: {str(error).splitlines()[0]}") from error


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
    if asked == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return asked

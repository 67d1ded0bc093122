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
    """What transformers' from_pretrained is given for these arguments of `load_base`.

    Raises:
        BaseModelError: an unknown dtype or quantization, a device that isn't there, or two that exclude each other.
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
        if device is not None:  # a packed model can't be moved afterwards
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
    if isinstance(asked, str):
        if asked not in ("8bit", "4bit"):
            raise BaseModelError(str(unknown("quantization", asked, ["8bit", "4bit"])))
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        if importlib.util.find_spec("bitsandbytes") is None:
            raise BaseModelError(
                f"a {asked} base needs the package bitsandbytes: `pip install bitsandbytes`."
            )
        asked = (
            BitsAndBytesConfig(load_in_4bit=True, **nf4)
            if asked == "4bit"
            else BitsAndBytesConfig(load_in_8bit=True)
        )
    elif isinstance(asked, BitsAndBytesConfig) and importlib.util.find_spec("bitsandbytes") is None:
        raise BaseModelError("this quantization needs the package bitsandbytes: `pip install bitsandbytes`.")
    return asked

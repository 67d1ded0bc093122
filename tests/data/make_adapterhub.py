"""Makes tests/data/adapterhub: adapters written by the `adapters` library itself, and what it computes with them.

`adapters` needs an older transformers than phatgoose, so this runs in an environment of its own (torch as in
constraints.txt):

    python -m venv ENV && ENV/bin/pip install torch==2.13.0 adapters==1.3.0
    ENV/bin/python tests/data/make_adapterhub.py

FAMILY/model.safetensors, config.json      a tiny random base
FAMILY/expected.safetensors                inputs, the base's logits, and "logits.CASE" of each adapter
FAMILY/CASE/…                              an adapter as the library saves it
activations.safetensors                    x, and each nonlinearity of it by the library's name
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path

import adapters
import torch
from adapters import AdapterPlusConfig, BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from adapters.methods.modeling import Activation_Function_Class
from safetensors.torch import save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

OUT = Path(__file__).parent / "adapterhub"
VOCABULARY, LENGTH = 24, 7
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip

SEQ = SeqBnConfig(reduction_factor=4)
DOUBLE = DoubleSeqBnConfig(reduction_factor=4)
PARALLEL = ParBnConfig(reduction_factor=2, mh_adapter=True)
SIMPLE = {"pfeiffer": SEQ, "houlsby": DOUBLE, "parallel": PARALLEL}
CASES = {
    "llama": {
        **SIMPLE,
        "channel": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
        "learned": DoubleSeqBnConfig(reduction_factor=4, scaling="learned", non_linearity="gelu_new", dropout=0.3),
        "stream": BnConfig(True, True, {"1": 2, "default": 4}, "tanh", original_ln_before=True, scaling=0.7),
        "normed": SeqBnConfig(reduction_factor=4, ln_before=True, non_linearity="LeakyReLU"),
        "few": SeqBnConfig(reduction_factor=8, leave_out=[0], residual_before_ln=True),
    },
    "mistral": SIMPLE,
    "qwen2": SIMPLE,
    "qwen3": {"pfeiffer": SEQ},
    "gpt2": SIMPLE,
    "t5": {
        **SIMPLE,
        "cross": DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True),
        "cross_parallel": ParBnConfig(reduction_factor=4, cross_adapter=True, mh_adapter=True),
    },
    "mt5": {"cross": SeqBnConfig(reduction_factor=4, cross_adapter=True)},
}  # fmt: skip
WITH_HEAD = ("llama", "pfeiffer")
"""The one that is saved with its prediction head, as the library does unless it is told not to."""


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(3)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE))
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**SHAPE))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    if family == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=32, initializer_range=0.3,
                pad_token_id=0, eos_token_id=1, bos_token_id=None,
            )
        )  # fmt: skip
    if family == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=4))
    model, config = (
        (T5ForConditionalGeneration, T5Config) if family == "t5" else (MT5ForConditionalGeneration, MT5Config)
    )
    return model(
        config(
            vocab_size=VOCABULARY, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    """Two rows, one padded at the left (at the right for encoder–decoders)."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    padded = slice(5, None) if family in ("t5", "mt5") else slice(0, 2)
    ids[1, padded], mask[1, padded] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family in ("t5", "mt5"):
        inputs["decoder_input_ids"] = torch.randint(2, VOCABULARY, (2, 4), generator=generator)
    return inputs


@torch.no_grad()
def make(family: str) -> None:
    folder = OUT / family
    base = model_of(family).eval()
    base.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    inputs = inputs_of(family)
    expected = {**inputs, "logits.base": base(**inputs).logits}
    for number, (case, config) in enumerate(CASES[family].items()):
        model = copy.deepcopy(base)
        adapters.init(model)
        model.add_adapter(case, config=config)
        model.set_active_adapters(case)
        generator = torch.Generator().manual_seed(number)
        for name, parameter in model.named_parameters():
            if f".adapters.{case}." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4 + ("norm" in name))
        expected[f"logits.{case}"] = model.eval()(**inputs).logits
        difference = (expected[f"logits.{case}"] - expected["logits.base"]).abs().max()
        assert difference > 0.05, (family, case, difference)
        save(model, case, folder / case, with_head=(family, case) == WITH_HEAD)
        print(f"{family}/{case}: differs from the base by {difference:.3f}")
    save_file({k: v.contiguous() for k, v in expected.items()}, folder / "expected.safetensors")


def save(model: PreTrainedModel, case: str, folder: Path, with_head: bool) -> None:
    try:
        model.save_adapter(str(folder), case, use_safetensors=True, with_head=with_head)
    except RuntimeError:
        # Its layer norm stands twice in the state dict, which safetensors refuses:
        # the way from its pickle, as a user would go.
        with tempfile.TemporaryDirectory() as other:
            model.save_adapter(other, case, with_head=with_head)
            tensors = torch.load(Path(other, "pytorch_adapter.bin"), weights_only=True)
        save_file({k: v.clone() for k, v in tensors.items()}, folder / "adapter.safetensors")


def activations() -> None:
    from transformers.activations import ACT2FN

    x = torch.tensor([-7.0, -3.2, -1.0, -0.4, -0.01, 0.0, 0.02, 0.5, 1.0, 2.9, 6.5])
    found = {}
    for name in [*ACT2FN, "leakyrelu"]:
        if name not in ("prelu", "xielu"):  # they have parameters
            found[name] = Activation_Function_Class(name)(x.clone())
    save_file({"x": x, **found}, OUT / "activations.safetensors")


if __name__ == "__main__":
    if OUT.exists():
        shutil.rmtree(OUT)
    OUT.mkdir()
    for family in CASES:
        make(family)
    activations()

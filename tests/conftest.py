"""Tiny random models of every family we route in, with a tokenizer trained on the spot: no network, no downloads."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton kernels run without a GPU; 0 runs them on one

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from phatgoose.models.base.base import Base, _contiguous

if TYPE_CHECKING:
    from phatgoose.experts.expert import Expert

pytest_plugins = ["changed"]
# Before a test file imports them: a file that is run alone would warn, which is an error.
pytest.register_assert_rewrite("cli_fixtures", "pages", "serving_fixtures")

VOCABULARY = 320
CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "What is the past tense of walk? Answer: walked",
    "yes no maybe true false entailment neutral contradiction",
    "0 1 2 3 4 5 6 7 8 9 plus minus times equals",
]


def hooked(model):
    """Names of the modules with hooks; without the one that a Base sets on the head for good."""
    return [
        name
        for name, module in model.named_modules()
        if module._forward_hooks
        or any(hook is not _contiguous for hook in module._forward_pre_hooks.values())
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(unk_token=None))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


def make_model(family: str, seed: int = 0, layers: int = 2) -> PreTrainedModel:
    """A random model: 'llama', 'qwen', 'gpt2' or 't5' (gated-gelu, untied: the shape of google/t5-xl-lm-adapt)."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1}
    decoder = {**common, "bos_token_id": None, "initializer_range": 0.2}
    llama = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, **decoder,
    }  # fmt: skip
    model: PreTrainedModel
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**llama))
    elif family == "qwen":
        model = Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **llama))
    elif family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 512}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **decoder))
    elif family == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": 4}
        own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.0}
        start = {"decoder_start_token_id": 0, "initializer_factor": 1.0}
        model = T5ForConditionalGeneration(T5Config(**sizes, **own, **start, **common))
    else:
        raise ValueError(family)
    return model.eval()


def write_base(base: Base, folder: Path) -> str:
    """Writes a base into a folder that `load_base` reads; the folder, as a text."""
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by path, but the lock."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def relative(found: torch.Tensor, expected: torch.Tensor, without: torch.Tensor | float = 0.0) -> float:
    """The relative error of what came on top of `without`: a missing update must not hide behind the output."""
    found, expected = found.double() - without, expected.double() - without
    return float((found - expected).norm() / expected.norm().clamp(min=1e-30))


def with_random_adapter(model: PreTrainedModel, config, generator: torch.Generator, scale: float = 0.2):
    """PEFT's model of a copy of this one, with random values wherever the adapter would train."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights and merging
        made = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "ia3_l" in name or "magnitude" in name:
                p.mul_(1 + 0.3 * torch.randn(p.shape, generator=generator).to(p.dtype))
            elif any(part in name for part in ("lora_", "token_adapter", "vera_lambda")):
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return made.eval()


def save_adapter(model, folder: Path, **settings) -> Path:
    """Writes what PEFT's model adds to its base."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about embeddings it saves along
        model.save_pretrained(folder, **settings)
    return folder


def random_expert(
    base: Base,
    folder: Path,
    name="one",
    rank=4,
    alpha=8,
    targets=None,
    seed=0,
    gates=True,
    scale=0.15,
    **lora,
) -> Expert:
    """A random LoRA expert, written below `folder` by PEFT itself, and random gates."""
    from peft import LoraConfig

    from phatgoose.experts.expert import Expert

    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets or TARGETS[base.spec.split("-")[1]],
        fan_in_fan_out="gpt2" in base.spec, init_lora_weights=True, **lora,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    made = with_random_adapter(base.model, config, generator, scale)
    written = save_adapter(made, folder / f"peft-{name}-{seed}")
    expert = Expert.from_peft(written, name=name, provenance={"base": base.fingerprint.to_json()})
    if not gates:
        return expert
    vectors = {p: torch.randn(u.d_in, generator=generator) for p, u in expert.updates.items()}
    return expert.with_gates(vectors, {"kind": "random"})


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


FAMILIES = ("llama", "qwen", "gpt2", "t5")
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}


@pytest.fixture
def make_base(tokenizer):
    """make_base(family, seed=0, layers=2, dtype=torch.float32) → a fresh tiny Base."""

    def make(family: str, seed: int = 0, layers: int = 2, dtype: torch.dtype = torch.float32) -> Base:
        return Base(make_model(family, seed, layers).to(dtype), tokenizer, spec=f"tiny-{family}-{seed}")

    return make


@pytest.fixture
def make_expert(tmp_path):
    """make_expert(base, name, rank=4, alpha=8, targets=None, seed=0, gates=True, **lora) → as `random_expert`."""

    def make(base: Base, *args, **settings) -> Expert:
        return random_expert(base, tmp_path, *args, **settings)

    return make

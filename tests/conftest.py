"""Tiny random models of every family we route in, with a tokenizer trained on the spot: no network, no downloads."""

from __future__ import annotations

import os

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

pytest_plugins = ["changed"]
pytest.register_assert_rewrite(
    "cli_fixtures", "pages"
)  # before a test file imports it, or a file run alone warns, which is an error

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
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.2,
                **ids,
            )
        )
    elif family == "qwen":
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.2,
                tie_word_embeddings=True,
                **ids,
            )
        )
    elif family == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=layers,
                n_head=4,
                n_positions=512,
                initializer_range=0.2,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ids,
            )
        )
    elif family == "t5":
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=layers,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                dropout_rate=0.0,
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
                initializer_factor=1.0,
            )
        )
    else:
        raise ValueError(family)
    return model.eval()


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
    """make_expert(base, name, rank=4, alpha=8, targets=None, seed=0, gates=True, **lora)
    → a random Expert written by PEFT itself."""
    import copy

    from peft import LoraConfig, get_peft_model

    from phatgoose.experts.expert import Expert

    def make(
        base, name="one", rank=4, alpha=8, targets=None, seed=0, gates=True, scale=0.15, **lora
    ) -> Expert:
        family = base.spec.split("-")[1]
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets or TARGETS[family],
            fan_in_fan_out=family == "gpt2",
            init_lora_weights=True,
            **lora,
        )
        model = get_peft_model(copy.deepcopy(base.model), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        folder = tmp_path / f"peft-{name}-{seed}"
        model.save_pretrained(folder)
        expert = Expert.from_peft(folder, name=name, provenance={"base": base.fingerprint.to_json()})
        if gates:
            vectors = {p: torch.randn(u.d_in, generator=generator) for p, u in expert.updates.items()}
            expert = expert.with_gates(vectors, {"kind": "random"})
        return expert

    return make

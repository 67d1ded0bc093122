"""Tiny random models of the architectures that people have adapters of, for the table in docs/bases.md."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 320

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_inner": 48, "rotary_dim": 4,
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_dim": 48, "d_kv": 8, "d_ff": 48,
    "num_layers": 2, "word_embed_proj_dim": 32, "moe_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24, "n_shared_experts": 1,
    "q_lora_rank": 12, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_rate": 0.0, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "attn_dropout": 0.0, "resid_dropout": 0.0, "embed_dropout": 0.0,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2, "initializer_range": 0.2,
    "init_std": 0.2, "use_cache": True, "sliding_window": 64, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "layerdrop": 0.0, "router_jitter_noise": 0.0, "tie_word_embeddings": False,
}  # fmt: skip
"""What a config is given where it has such a setting."""

GEMMA = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "query_pre_attn_scalar": 8, "dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
    "initializer_range": 0.2, "attention_dropout": 0.0,
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "ministral": {}, "ministral3": {}, "qwen2": {}, "qwen3": {}, "gemma": {},
    "gemma2": {}, "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4,
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "global_head_dim": 8,
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
    },
    "vaultgemma": {}, "phi": {}, "phi3": {}, "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "gpt_neox": {}, "gptj": {}, "codegen": {},
    "gpt_bigcode": {}, "bloom": {}, "falcon": {}, "mpt": {}, "starcoder2": {}, "cohere": {}, "cohere2": {},
    "olmo": {}, "olmo2": {}, "olmo3": {}, "granite": {}, "opt": {}, "xglm": {}, "stablelm": {}, "smollm3": {},
    "nemotron": {}, "persimmon": {}, "biogpt": {}, "glm": {}, "glm4": {}, "seed_oss": {}, "exaone4": {},
    "ernie4_5": {}, "helium": {}, "apertus": {}, "hunyuan_v1_dense": {}, "qwen2_moe": {}, "qwen3_moe": {},
    "mixtral": {}, "olmoe": {}, "gpt_oss": {}, "phimoe": {}, "jetmoe": {},
    "deepseek_v2": {
        "head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": None,
        "topk_group": None,
    },
    "deepseek_v3": {
        "head_dim": 4, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "glm4_moe": {}, "ernie4_5_moe": {}, "granitemoe": {}, "llama4_text": {},
    "minicpm3": {"head_dim": 4, "num_key_value_heads": 4}, "minimax": {},
    "youtu": {"head_dim": 4, "num_key_value_heads": 4}, "doge": {}, "bert": {"is_decoder": True},
    "modernbert-decoder": {}, "openai-gpt": {}, "xlnet": {"d_inner": 48}, "rwkv": {},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 64},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8},
    "falcon_mamba": {},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "nemotron_h": {
        "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8,
        "layers_block_type": ["mamba", "attention", "mlp", "moe"], "num_hidden_layers": 4,
        "moe_shared_expert_intermediate_size": 24,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_d_state": 8,
        "n_mamba_heads": 8, "mamba_ngroups": 1, "mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1,
        "attention_head_dim": 16, "attention_hidden_size": 64, "hybrid_layer_ids": [1],
    },
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "bamba": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "attn_layer_indices": [1],
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "partial_rotary_factor": 0.5,
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "partial_rotary_factor": 0.5,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "layer_types": ["mamba", "attention"], "shared_intermediate_size": 24,
    },
}  # fmt: skip
"""model_type → settings beside SIZES."""

ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {}, "mt5": {}, "umt5": {}, "longt5": {}, "t5gemma": {"encoder": GEMMA, "decoder": GEMMA},
    "bart": {}, "mbart": {}, "pegasus": {}, "pegasus_x": {}, "bigbird_pegasus": {}, "led": {}, "marian": {},
    "mvp": {}, "plbart": {}, "blenderbot": {}, "blenderbot-small": {}, "m2m_100": {},
    "nllb-moe": {"encoder_sparse_step": 2, "decoder_sparse_step": 2},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "prophetnet": {
        "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "fsmt": {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
}  # fmt: skip

ALL = {**DECODERS, **ENCODER_DECODERS}


def make(name: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random model of the architecture, in float32 and eval mode."""
    torch.manual_seed(seed)
    kind = CONFIG_MAPPING[name]
    known = vars(kind())
    mapped = set(kind.attribute_map)
    sizes = {k: v for k, v in SIZES.items() if k in known or k in mapped}
    start = {"decoder_start_token_id": 2} if name in ENCODER_DECODERS else {}
    config = kind(**{**sizes, **start, **ALL[name], **settings})
    auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()

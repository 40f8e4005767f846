"""Tiny checkpoints of many architectures. Names and shapes of the tensors are those of the published checkpoints; the
weights are random.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB_SIZE = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": _EXPERTS,
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "falcon": {},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gpt_oss": {"num_local_experts": 3, "head_dim": 8},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 3, "n_heads": 4},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 3},
    "stablelm": {},
    "starcoder2": {},
    "cohere": {},
    "olmo2": {},
    "olmoe": _EXPERTS,
    "granite": {},
    "granitemoe": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "deepseek_v2": _MLA | {"topk_method": "greedy"},
    "deepseek_v3": _MLA,
    "glm4_moe": _MLA | {"head_dim": 8, "num_key_value_heads": 2},
    "mamba": {"state_size": 4},
    "jamba": {
        "num_experts": 2,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 4,
    },
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "attn_layer_indices": [1]},
}
"""Extra configuration fields beside the common fields, by transformers' model type."""


SERVED_COMMON: dict[str, Any] = _COMMON | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 192,
    "max_position_embeddings": 2048,
    "head_dim": 32,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
"""Sizes that vLLM's CPU kernels run."""
_SERVED_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SERVED_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = _SERVED_EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_WINDOW = {"sliding_window": 48}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 256}
_HYBRID = ["mamba", "attention", "mamba"]
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "tie_word_embeddings": True}
_GPT = {"n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 2048}
SERVED: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": _WINDOW,
    "mixtral": _SERVED_LOCAL_EXPERTS,
    "qwen2": {},
    "qwen2_moe": _SERVED_EXPERTS | {"shared_expert_intermediate_size": 64},
    "qwen3": {},
    "qwen3_moe": _SERVED_EXPERTS,
    "gemma": {},
    "gemma2": _WINDOW | {"query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    "gemma3_text": _WINDOW | {"query_pre_attn_scalar": 32},
    "gemma4_text": _WINDOW,
    "phi": {},
    "phi3": {},
    "olmo2": {},
    "olmo3": _WINDOW,
    "olmoe": _SERVED_EXPERTS,
    "glm4": {},
    "glm4_moe": _ROUTED_EXPERTS,
    "dots1": _ROUTED_EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 32},
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 32},
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 128},
    "granite": {},
    "granitemoe": _SERVED_LOCAL_EXPERTS,
    "granitemoehybrid": _MAMBA2
    | _SERVED_LOCAL_EXPERTS
    | {"shared_intermediate_size": 64, "layer_types": _HYBRID, "layers_block_type": _HYBRID},
    "falcon_h1": _MAMBA2 | {"mamba_d_ssm": 256},
    "jamba": {**ARCHITECTURES["jamba"], "mamba_d_state": 16},
    "lfm2": _CONVOLUTIONS | {"block_dim": 128, "conv_dim": 128, "conv_dim_out": 128},
    "lfm2_moe": _CONVOLUTIONS | _SERVED_EXPERTS | {"num_dense_layers": 1},
    "cohere": {"logit_scale": 1.0, "tie_word_embeddings": True},
    "starcoder2": {},
    "stablelm": {},
    "nemotron": {},
    "exaone4": _WINDOW,
    "smollm3": {},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "arcee": {},
}
"""Architectures to run on a real engine: configuration fields beside SERVED_COMMON."""


def save_served(model_type: str, folder: Path) -> Path:
    """Write a checkpoint that a real engine runs; see SERVED."""
    return _save(model_type, folder, {**SERVED_COMMON, **SERVED[model_type]})


def save(model_type: str, folder: Path, **save_options: Any) -> Path:
    """Write config.json and the weights of a random model. `save_options`: options of save_pretrained."""
    return _save(model_type, folder, {**_COMMON, **ARCHITECTURES[model_type]}, **save_options)


def _save(model_type: str, folder: Path, fields: Mapping[str, Any], **save_options: Any) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder, **save_options)
    return folder

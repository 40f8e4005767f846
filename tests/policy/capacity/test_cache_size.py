"""The calculated size of the KV cache equals published figures of ten models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.capacity.cache_size import CacheSize, cache_size, layer_kinds
from cluster.policy.capacity.gpus import GIB

WITHIN = 0.03
HUGGING_FACE = "Hugging Face, Llama 3.1 - 405B, 70B & 8B with multilinguality and long context (2024), KV cache at 128k"
DEEPSEEK = "DeepSeek-AI, Insights into DeepSeek-V3 (2025), table 1, bytes of a token"
JAMBA = "Lieber et al., Jamba (2024), table 1, KV cache at 256k tokens"
VLLM = (
    "Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention (2023), section 3, bytes of a token"
)


def _grouped(layers: int, hidden: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """Return the fields of config.json that matter."""
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {"model_type": "llama", "num_hidden_layers": layers, **sizes, **more}


PUBLISHED: Mapping[str, tuple[Mapping[str, Any], int, float, str]] = {
    "Llama-3.1-8B": (_grouped(32, 4096, 32, 8), 128_000, 15.62 * GIB, HUGGING_FACE),
    "Llama-3.1-70B": (_grouped(80, 8192, 64, 8), 128_000, 39.06 * GIB, HUGGING_FACE),
    "Llama-3.1-405B": (_grouped(126, 16384, 128, 8), 1, 516_096, DEEPSEEK),
    "Qwen2.5-72B": (
        _grouped(80, 8192, 64, 8, model_type="qwen2", sliding_window=131072, use_sliding_window=False),
        1,
        327_680,
        DEEPSEEK,
    ),
    "DeepSeek-V3": (
        _grouped(61, 7168, 128, 128, model_type="deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=64),
        1,
        70_272,
        DEEPSEEK,
    ),
    "Llama-2-7B": (_grouped(32, 4096, 32, 32), 256 * 1024, 128 * GIB, JAMBA),
    "Mistral-7B-v0.2": (
        _grouped(32, 4096, 32, 8, model_type="mistral", sliding_window=None),
        256 * 1024,
        32 * GIB,
        JAMBA,
    ),
    "Mixtral-8x7B": (
        _grouped(32, 4096, 32, 8, model_type="mixtral", sliding_window=None),
        256 * 1024,
        32 * GIB,
        JAMBA,
    ),
    "Jamba-v0.1": (
        _grouped(32, 4096, 32, 8, model_type="jamba", attn_layer_period=8, attn_layer_offset=4)
        | {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2},
        256 * 1024,
        4 * GIB,
        JAMBA,
    ),
    "OPT-13B": (
        {"model_type": "opt", "num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40},
        1,
        800 * 1024,
        VLLM,
    ),
}
"""By model: its config.json, a number of tokens, the published bytes, and where they are published."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    """The calculated bytes differ from the published ones by at most WITHIN."""
    config, tokens, published, source = PUBLISHED[name]
    assert cache_size(config, "bfloat16").sequence_bytes(tokens) == pytest.approx(published, rel=WITHIN), source


@given(st.integers(1, 10_000), st.integers(1, 4096))
def test_a_window_bounds_what_a_sequence_keeps(tokens: int, window: int) -> None:
    """A sliding layer keeps at most its window, and a full layer keeps every token."""
    sizes = CacheSize(token_bytes=10, window_bytes=7, window=window, state_bytes=3, state_layers=2)
    assert sizes.sequence_bytes(tokens) == 10 * tokens + 7 * min(tokens, window) + 6
    assert sizes.sequence_bytes(tokens + 1) >= sizes.sequence_bytes(tokens)
    assert sizes.sequence_bytes(tokens, 100, 16) >= sizes.sequence_bytes(tokens)


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({"model_type": "gemma3_text", "sliding_window": 512}, ["sliding"] * 5 + ["full"]),
        ({"model_type": "gemma2", "sliding_window": 512}, ["sliding", "full"] * 3),
        ({"model_type": "mistral", "sliding_window": 512}, ["sliding"] * 6),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, ["sliding"] * 3 + ["full"] + ["sliding"] * 2),
        ({"model_type": "qwen3_next", "full_attention_interval": 3}, ["state", "state", "full"] * 2),
        ({"model_type": "falcon_h1"}, ["both"] * 6),
        ({"layer_types": ["full_attention", "sliding_attention"] * 3}, ["full", "sliding"] * 3),
    ],
)
def test_kinds_of_layers(config: Mapping[str, Any], kinds: list[str]) -> None:
    """Each layer's kind is read from the list of layers, or from the model type's rule."""
    assert layer_kinds({"num_hidden_layers": 6, **config}) == kinds

"""The memory that a model's KV cache takes, from its config.json.

The sizes are those of vLLM's layers (v1/kv_cache_interface.py): keys and values of each attention layer, one latent
vector with multi-head latent attention, at most a window of a sliding layer, and one state of constant size for each
sequence of a linear layer (model_executor/layers/mamba/mamba_utils.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

BYTES: Final[Mapping[str, float]] = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "nvfp4": 0.5625}
"""Bytes of one number by dtype. Names that begin with fp8 take one byte; other names count as 16 bits."""
INDEXER_BYTES: Final = 132
"""Bytes a token and layer of the index of DeepSeek's sparse attention: 128 numbers in 8 bits and a scale."""

Config = Mapping[str, Any]
_KINDS: Final = {
    "full_attention": "full",
    "attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "sliding",
    "linear_attention": "state",
    "mamba": "state",
    "mamba2": "state",
    "conv": "state",
    "hybrid": "both",
    "M": "state",
    "*": "full",
}
"""Kind of cache by the name of a layer in config.json. A layer with another name has none."""
_UNGROUPED: Final = ("gpt2", "gptj", "gpt_neox", "opt", "bloom")
"""Model types in which each query head has its own KV head, whatever else config.json has."""
_WINDOWED: Final = ("mistral", "ministral", "starcoder2", "phi3", "mixtral", "exaone")
"""Model types in which a `sliding_window` holds for all layers."""


@dataclass(frozen=True, slots=True)
class CacheSize:
    """The KV cache of one model, over all its layers and before it is divided among ranks.

    `token_bytes`: bytes of each token, in layers that keep all. `window_bytes`: bytes of each of a sequence's last
    `window` tokens, in sliding layers, whose blocks have `window_block` times as many tokens. `state_bytes`: bytes of
    each sequence in one of `state_layers` linear layers. `layer_bytes`: bytes of each token in the largest layer that
    keeps all. `heads`: KV heads, over which tensor parallelism divides the bytes of tokens; 1 if every rank keeps all
    of them.
    """

    token_bytes: int
    window_bytes: int = 0
    window: int = 0
    window_block: int = 1
    state_bytes: int = 0
    state_layers: int = 0
    layer_bytes: int = 0
    heads: int = 1

    def sequence_bytes(self, tokens: int, step_tokens: int = 0, block: int = 1) -> int:
        """Return the bytes of a sequence, as vLLM counts them (`max_memory_usage_bytes`).

        `step_tokens`: tokens of a step, which a window keeps in addition. `block`: tokens of a block. A window that is
        not filled counts as full attention. A state takes whole blocks of a layer that keeps all.
        """
        whole = _up(tokens, block)
        wide = block * self.window_block if block > 1 else 1
        kept = min(tokens, self.window - 1 + step_tokens)
        in_window = _up(tokens, wide) if tokens <= self.window else _up(kept, wide) + wide
        state = _up(self.state_bytes, block * self.layer_bytes) if self.layer_bytes else self.state_bytes
        return whole * self.token_bytes + in_window * self.window_bytes + self.state_layers * state


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def number_bytes(dtype: str) -> float:
    """Return the bytes of one number of a dtype of weights or of the KV cache."""
    return 1 if dtype.startswith("fp8") else BYTES.get(dtype, 2)


def first(config: Config, *names: str, default: Any = None) -> Any:
    """Return the first of the fields that is present and not null."""
    return next((config[name] for name in names if config.get(name) is not None), default)


def cache_size(config: Config, dtype: str, cache_dtype: str = "auto") -> CacheSize:
    """Return the size of the KV cache. Raises ValueError, which names the field that is missing.

    `config`: config.json, with the fields of a nested text model merged in. `dtype`: dtype of the weights.
    `cache_dtype`: vLLM's `kv_cache_dtype`.
    """
    number = number_bytes(dtype if cache_dtype == "auto" else cache_dtype)
    kinds = layer_kinds(config)
    own = kinds[: len(kinds) - int(first(config, "num_kv_shared_layers", default=0))]
    bytes_by_layer = [int(_token_numbers(config, layer, kind) * number) for layer, kind in enumerate(own)]
    if first(config, "index_head_dim") is not None:
        bytes_by_layer = [size + INDEXER_BYTES for size in bytes_by_layer]
    full = [size for size, kind in zip(bytes_by_layer, own, strict=True) if kind in ("full", "both")]
    sliding = [size for size, kind in zip(bytes_by_layer, own, strict=True) if kind == "sliding"]
    state_layers = sum(kind in ("state", "both") for kind in own)
    latent = first(config, "kv_lora_rank") is not None
    return CacheSize(
        sum(full),
        sum(sliding),
        int(first(config, "sliding_window", "attention_chunk_size", default=0)) if sliding else 0,
        max(full, default=0) // max(sliding, default=1) or 1,
        int(state_numbers(config) * number_bytes(dtype)) if state_layers else 0,
        state_layers,
        max(full, default=0),
        1 if latent or not (full or sliding) else kv_heads(config),
    )


def _token_numbers(config: Config, layer: int, kind: str) -> int:
    """Return the numbers that a layer keeps of a token. Raises ValueError."""
    if kind not in ("full", "both", "sliding"):
        return 0
    if first(config, "kv_lora_rank") is not None:
        return int(_needed(config, "kv_lora_rank")) + int(first(config, "qk_rope_head_dim", default=0))
    by_layer = first(config, "per_layer_config", default={}).get(str(layer), {})
    if kind == "full" and not by_layer:
        wide = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
        by_layer = {key: config[name] for key, name in wide.items() if config.get(name) is not None}
    mine = {**config, **by_layer}
    return kv_heads(mine) * head_width(mine)


def _needed(config: Config, *names: str) -> Any:
    value = first(config, *names)
    if value is None:
        raise ValueError(f"config.json has no {names[0]}")
    return value


def layers(config: Config) -> int:
    """Return the number of layers. Raises ValueError."""
    return int(_needed(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers"))


def attention_heads(config: Config) -> int:
    """Return the number of query heads. Raises ValueError."""
    return int(_needed(config, "num_attention_heads", "n_head", "n_heads"))


def kv_heads(config: Config) -> int:
    """Return the number of KV heads. Raises ValueError."""
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else attention_heads(config)
    if config.get("model_type") == "gpt_bigcode" and config.get("multi_query", True):
        return 1
    nested = config.get("attn_config")
    if isinstance(nested, Mapping) and nested.get("kv_n_heads") is not None:
        return int(nested["kv_n_heads"])
    if config.get("model_type") in _UNGROUPED:
        return attention_heads(config)
    given = first(config, "num_key_value_heads", "num_kv_heads", "multi_query_group_num")
    if isinstance(given, Sequence):
        return max(map(int, given))
    return int(given) if given is not None else attention_heads(config)


def head_width(config: Config) -> int:
    """Return the numbers that one KV head keeps of a token: its key and its value. Raises ValueError."""
    given = first(config, "head_dim", "attention_head_dim", "kv_channels")
    key = int(given) if given is not None else hidden(config) // attention_heads(config)
    return key + int(first(config, "v_head_dim", default=key))


def hidden(config: Config) -> int:
    """Return the width of the model. Raises ValueError."""
    return int(_needed(config, "hidden_size", "n_embd", "d_model"))


def layer_kinds(config: Config) -> list[str]:
    """Return the kind of cache of each layer: full, sliding, state, both (a state and full attention) or none."""
    count, family = layers(config), str(config.get("model_type", ""))
    names = first(config, "layer_types", "layers_block_type", "hybrid_override_pattern")
    if names is not None:
        return [_KINDS.get(name, "none") for name in names]
    if family == "falcon_h1":
        return ["both"] * count
    if family in ("mamba", "mamba2", "falcon_mamba"):
        return ["state"] * count
    if (at := first(config, "attn_layer_indices", "full_attn_idxs")) is not None:
        return ["full" if layer in at else "state" for layer in range(count)]
    if (period := first(config, "attn_layer_period")) is not None:
        offset = int(first(config, "attn_layer_offset", default=0))
        return ["full" if layer % int(period) == offset else "state" for layer in range(count)]
    if (interval := first(config, "full_attention_interval")) is not None:
        return ["state" if (layer + 1) % int(interval) else "full" for layer in range(count)]
    if (types := first(config, "attn_type_list")) is not None:
        return ["full" if kind else "state" for kind in types]
    return [_attention_kind(config, family, layer) for layer in range(count)]


def _attention_kind(config: Config, family: str, layer: int) -> str:
    """Return the kind of a layer of a model that has attention only, and no list of its layers."""
    if first(config, "attention_chunk_size") is not None and family.startswith("llama4"):
        return "sliding" if (layer + 1) % 4 else "full"
    if first(config, "sliding_window") is None or config.get("use_sliding_window") is False:
        return "full"
    if family == "gemma2":
        return "full" if layer % 2 else "sliding"
    pattern = first(config, "sliding_window_pattern", default={"gemma3_text": 6, "gemma3": 6, "cohere2": 4}.get(family))
    if isinstance(pattern, int) and pattern > 0:
        return "sliding" if (layer + 1) % pattern else "full"
    if isinstance(pattern, str):
        return "sliding" if pattern[layer % len(pattern)] == "L" else "full"
    return "sliding" if family in _WINDOWED else "full"


def state_numbers(config: Config) -> int:
    """Return the numbers in the state of one linear layer for one sequence. Raises ValueError for an unknown form."""
    if (width := first(config, "conv_L_cache")) is not None:  # short convolutions
        return hidden(config) * (int(width) - 1)
    if first(config, "linear_num_value_heads") is not None:  # gated delta net
        keys = int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
        values = int(config["linear_num_value_heads"]) * int(config["linear_value_head_dim"])
        kernel = int(first(config, "linear_conv_kernel_dim", default=4)) - 1
        return (2 * keys + values) * kernel + values * int(config["linear_key_head_dim"])
    if first(config, "attn_type_list") is not None:  # lightning attention, in 32 bits
        return 2 * attention_heads(config) * (head_width(config) // 2) ** 2
    states = int(_needed(config, "mamba_d_state", "ssm_state_size", "state_size"))
    kernel = int(first(config, "mamba_d_conv", "conv_kernel", "mamba_conv_kernel", default=4)) - 1
    heads = first(config, "mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads")
    if heads is None:  # the first Mamba
        inner = int(first(config, "intermediate_size") if "state_size" in config else 0) or _inner(config)
        return inner * kernel + inner * states
    width = int(first(config, "mamba_d_head", "mamba_head_dim", "mamba_headdim", "head_dim"))
    inner = int(heads) * width
    groups = int(first(config, "mamba_n_groups", "n_groups", "mamba_ngroups", default=1))
    return (inner + 2 * groups * states) * kernel + inner * states


def _inner(config: Config) -> int:
    return int(first(config, "mamba_expand", "expand", default=2)) * hidden(config)

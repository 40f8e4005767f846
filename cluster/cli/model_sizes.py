"""A model's sizes, read from its folder, its config.json or the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.api.types import ModelSpec
from cluster.config.paths import cache_dir
from cluster.policy.capacity import cache_size
from cluster.policy.capacity.fit import UTILIZATION, Engine, Shape
from cluster.policy.capacity.gpus import GIB
from cluster.worker.weights.safetensors_header import BYTES, HeaderError, read_header
from cluster.worker.weights.sources import SourceRules, from_hub, resolve
from cluster.worker.weights.vocabulary import read_json, text_config

FLOATS: Final = ("F32", "F16", "BF16", "F64")
"""Types of the numbers that are loaded in the model's dtype. Others are quantized, and stay as they are."""
INDEX: Final = "model.safetensors.index.json"
_DIGITS: Final = r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)[bB](?![A-Za-z0-9])"
_BITS: Final = (
    (r"(?i)[123]bit|gguf|q[1-8]_|exl[23]|bnb|bitsandbytes|hqq|aqlm", 1.5),
    (r"(?i)awq|gptq|int4|w4a|4bit|fp4|gpt-oss", 4.0),
    (r"(?i)fp8|int8|w8a|8bit|f8", 8.0),
)
"""Fewest bits of a number of a model with such a name or quantization. gpt-oss is published in four bits."""
SHARED_EXPERTS: Final = 0.83
"""Part of `8x7B` times seven billion that such a model has, since its experts share the attention."""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model's sizes. `dtype`: dtype of its computation. `longest`: greatest length of a prompt with its answer, 0 if
    config.json does not have it. `weights_from`: where the size of the weights is from."""

    shape: Shape
    dtype: str
    longest: int
    weights_from: str


def model_size(spec: ModelSpec, rules: SourceRules | None = None) -> ModelSize:
    """Return the sizes of a model. Raises ValueError with the reason and the remedy.

    `spec.source`: a folder, a config.json, `hf://organisation/name` or a demo model. Of a model on the hub,
    config.json and the index of the weights are fetched. A folder without weights is counted by transformers. `rules`:
    where models are fetched from, and into which cache; None for the public hub and the user's cache folder.
    """
    folder, file = _folder(spec, rules or SourceRules(cache_dir()))
    config = read_json(folder / file)
    if not config:
        raise ValueError(f"{folder / file} is not there; name a model's folder, its config.json, or hf://org/name")
    try:
        return _size_of(spec, folder, config)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        if str(error).startswith(str(folder)):
            raise
        raise ValueError(f"{folder / file} describes no model: {type(error).__name__}: {error}") from None


def _size_of(spec: ModelSpec, folder: Path, config: Mapping[str, Any]) -> ModelSize:
    text = text_config(config)
    dtype = spec.dtype
    if dtype == "auto":  # as vLLM: weights of 32 bits are loaded in 16
        stored = str(cache_size.first(text, "dtype", "torch_dtype", default="bfloat16"))
        dtype = "bfloat16" if stored == "float32" else stored
    weights, weights_from = _weights(folder, config, dtype)
    quantization = str(spec.engine.get("quantization") or "")
    if quantization.startswith("fp8") and not config.get("quantization_config"):
        vocabulary = 2 * int(text.get("vocab_size", 0)) * cache_size.hidden(text) * 2
        weights = vocabulary + (weights - vocabulary) // 2
        weights_from += ", in 8 bits but for the vocabulary"
    cache = cache_size.cache_size(text, dtype, str(spec.engine.get("kv_cache_dtype") or "auto"))
    used = int(cache_size.first(text, "num_experts_per_tok", "moe_topk", default=1))
    by_layer = cache_size.first(text, "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", default=0)
    mlp = max(map(int, by_layer)) if isinstance(by_layer, list) else int(by_layer)
    return ModelSize(
        Shape(
            weights,
            cache,
            cache_size.layers(text),
            int(cache_size.first(text, "num_attention_heads", "n_head", "n_heads", default=1)),
            cache_size.hidden(text),
            mlp * used,
            int(text.get("vocab_size", 0)),
        ),
        dtype,
        int(cache_size.first(text, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", default=0)),
        weights_from,
    )


def _folder(spec: ModelSpec, rules: SourceRules) -> tuple[Path, str]:
    """Return the folder with a model's configuration, and the name of its file."""
    source = spec.source
    if source.startswith("hf://"):
        files = ("config.json", INDEX)
        return from_hub("source", source.removeprefix("hf://"), spec.revision, files, rules), "config.json"
    if source.startswith("demo://"):
        return resolve(spec, rules), "config.json"
    if "://" in source:
        raise ValueError(f"{source}: only a folder, a config.json, hf://org/name or a demo model can be planned")
    path = Path(source).expanduser()
    if path.is_dir():
        return path, "config.json"
    if path.is_file():
        return path.parent, path.name
    on_hub = f"; for a model on the hub write hf://{source}" if source.count("/") == 1 and source[0].isalnum() else ""
    raise ValueError(f"there is no folder or file {source!r}{on_hub}")


def _weights(folder: Path, config: Mapping[str, Any], dtype: str) -> tuple[int, str]:
    """Return the bytes of the weights, and where they are from."""
    if files := sorted(folder.glob("*.safetensors")):
        return sum(_file_bytes(file, dtype) for file in files), "the files"
    index = read_json(folder / INDEX)
    size = index.get("metadata", {}).get("total_size") if isinstance(index.get("metadata"), dict) else None
    if isinstance(size, int) and size > 0:
        stored = str(cache_size.first(config, "dtype", "torch_dtype", default=dtype))
        factor = cache_size.number_bytes(dtype) / cache_size.number_bytes(stored)
        return int(size if config.get("quantization_config") else size * factor), INDEX
    if config.get("quantization_config"):
        raise ValueError(f"{folder}: the size of quantized weights needs the files *.safetensors, or {INDEX}")
    return int(parameters(folder, config) * cache_size.number_bytes(dtype)), "the number of parameters"


def _file_bytes(file: Path, dtype: str) -> int:
    try:
        with file.open("rb") as stream:
            tensors = read_header(stream, file.stat().st_size)
    except HeaderError as error:
        raise ValueError(f"{file} {error}") from None
    number = cache_size.number_bytes(dtype)
    return int(
        sum(math.prod(one.shape) * (number if one.dtype in FLOATS else BYTES[one.dtype]) for one in tensors.values())
    )


def parameters(folder: Path, config: Mapping[str, Any]) -> int:
    """Return the number of a model's parameters, which transformers counts without memory. Raises ValueError."""
    try:
        import torch
        import transformers
    except ImportError:
        raise ValueError(
            f"{folder}: without weights, their size is counted by transformers, which is not installed here; add "
            f"{INDEX}, or plan where workers run"
        ) from None
    named = config.get("architectures") or ("",)
    try:
        settings = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        model_class: Any = getattr(transformers, named[0], None) or transformers.AutoModelForCausalLM
        with torch.device("meta"):
            build = getattr(model_class, "from_config", None) or model_class._from_config
            model = build(settings)
        return sum(parameter.numel() for parameter in model.parameters())
    except Exception as error:
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{folder}: transformers does not know {named[0] or 'this model'}: {why}; add {INDEX}"
        ) from None


def named_bytes(source: str, dtype: str, quantization: str = "") -> int | None:
    """Return the bytes of the weights that a model's name announces, such as `Llama-3.1-70B-Instruct`; None if it
    announces none.

    This is for checks without a network. The largest size in the name's last part counts.
    """
    name = source.partition("@")[0].rsplit("/", 1)[-1]
    sizes = re.findall(_DIGITS, name)
    if not sizes:
        return None
    experts, billions = max(sizes, key=lambda size: float(size[0] or 1) * float(size[1]))
    count = float(billions) * 1e9 * (int(experts) * SHARED_EXPERTS if experts else 1)
    bits = next((bits for pattern, bits in _BITS if re.search(pattern, f"{name} {quantization}")), None)
    return int(count * (cache_size.number_bytes(dtype) if bits is None else bits / 8))


def engine_of(spec: ModelSpec) -> Engine:
    """Return the settings of an entry that matter for its memory."""
    cache_bytes = spec.engine.get("kv_cache_memory_bytes")
    return Engine(
        spec.tensor_parallel_size,
        spec.pipeline_parallel_size,
        _number(spec, "gpu_memory_utilization", UTILIZATION),
        int(_number(spec, "max_num_batched_tokens", 0)),
        int(_number(spec, "max_num_seqs", 0)),
        int(cache_bytes) if isinstance(cache_bytes, int | float) else None,
        int(_number(spec, "block_size", 16)),
        int(_number(spec, "cpu_offload_gb", 0) * GIB),
    )


def _number(spec: ModelSpec, argument: str, default: float) -> float:
    value = spec.engine.get(argument)
    return value if isinstance(value, int | float) and value > 0 else default

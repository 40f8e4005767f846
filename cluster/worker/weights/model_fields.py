"""Checks of the values in a model's config.json and generation_config.json, before anything is built from them.

Problem: the engine finds a wrong value in the middle of its start, and reports it without the field's name, or not at
all: a negative number of heads reads as another model, and a wrong temperature fails each call. Only values that no
architecture can have are refused here. Fields that are absent or null have the architecture's default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from cluster.config.model import SamplingDefaults
from cluster.wire.bundle import PLAIN_SAMPLING
from cluster.worker.weights.vocabulary import read_json, text_config

MOST: Final = 1 << 31
"""Greatest size or count that a field may have: more than any known model has."""
REMEDY: Final = "correct the file, or fetch or copy it again"
_SIZES: Final = ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
_SIZES_BY_LAYER: Final = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
_FACTORS: Final = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor"),
}
"""The values that each type of rotary scaling needs."""


def check_fields(folder: Path) -> None:
    """Raise ValueError, which names the file, the field and the remedy, if a value in the folder's configuration files
    cannot be right."""
    config = read_json(folder / "config.json")
    for fault in _faults(config):
        raise ValueError(f"{folder / 'config.json'}: {fault}; {REMEDY}")
    for fault in _sampling_faults(read_json(folder / "generation_config.json")):
        raise ValueError(f"{folder / 'generation_config.json'}: {fault}; {REMEDY}")


def _faults(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the values of a config.json."""
    classes = config.get("architectures")
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) and name for name in classes):
        yield f"architectures must be a list with the name of the model's class, got {_shown(classes)}"
    for name, kind, is_right in (
        ("model_type", "a text", _is_text),
        ("hidden_act", "a text", _is_text),
        ("dtype", "the name of a torch dtype", _is_dtype),
        ("torch_dtype", "the name of a torch dtype", _is_dtype),
        ("quantization_config", "an object with values", lambda value: isinstance(value, dict) and bool(value)),
        ("tie_word_embeddings", "true or false", lambda value: isinstance(value, bool)),
    ):
        if config.get(name) is not None and not is_right(config[name]):
            yield f"{name} must be {kind}, got {_shown(config[name])}"
    text = text_config(config)
    layers = text.get("num_hidden_layers")
    for name in (*_SIZES, *_SIZES_BY_LAYER):
        value = text.get(name)
        by_layer = name in _SIZES_BY_LAYER and isinstance(value, list) and len(value) == layers
        if value is not None and not all(map(_is_size, value if by_layer else [value])):
            yield f"{name} must be a whole number from 1 to {MOST}, got {_shown(value)}"
    yield from _head_faults(text)
    for name, value in text.items():
        if name.endswith(("_eps", "_epsilon")) and value is not None and not _is_number(value, least=0):
            yield f"{name} must be a number of at least 0, got {_shown(value)}"
    for name in ("bos_token_id", "eos_token_id"):
        if fault := _id_fault(name, text.get(name)):
            yield fault
    for name in ("rope_parameters", "rope_scaling"):
        yield from _rope_faults(name, text.get(name))
    if text.get("rope_theta") is not None and not _is_number(text["rope_theta"], above=0):
        yield f"rope_theta must be a number above 0, got {_shown(text['rope_theta'])}"


def _head_faults(text: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the numbers of attention heads, which share the hidden size and the keys evenly."""
    width, heads, keys = (text.get(name) for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
        return
    if isinstance(keys, int) and keys > 0 and heads % keys:
        yield f"num_key_value_heads ({keys}) must divide num_attention_heads ({heads})"
    if isinstance(width, int) and width % heads and not any("head_dim" in name for name in text):
        yield f"num_attention_heads ({heads}) must divide hidden_size ({width}), since there is no head_dim"


def _id_fault(name: str, value: Any) -> str:
    ids = value if isinstance(value, list) else [value]
    if value is None or all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
        return ""
    return f"{name} must be a token id or a list of ids, got {_shown(value)}"


def _rope_faults(name: str, value: Any) -> Iterator[str]:
    """Yield what is wrong with the settings of the rotary positions, of the whole model or by kind of layer."""
    if value is None:
        return
    if not isinstance(value, dict):
        yield f"{name} must be an object, got {_shown(value)}"
        return
    for kind, inner in value.items():
        if isinstance(inner, dict):
            yield from _rope_faults(f"{name}.{kind}", inner)
    for key in ("rope_theta", "factor"):
        if value.get(key) is not None and not _is_number(value[key], above=0):
            yield f"{name}.{key} must be a number above 0, got {_shown(value[key])}"
    kind = value.get("rope_type", value.get("type"))
    for key in _FACTORS.get(kind, ()) if isinstance(kind, str) else ():
        if value.get(key) is None:
            yield f"{name}.{key} is lacking, which rope_type {kind!r} needs"


def _sampling_faults(generation: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the sampling defaults of a generation_config.json: a call with them would be refused."""
    given = {name: generation[name] for name in PLAIN_SAMPLING if generation.get(name) is not None}
    if (most := generation.get("max_new_tokens")) is not None:
        given["max_tokens"] = most
    try:
        SamplingDefaults.model_validate(given)
    except ValidationError as error:
        for found in error.errors():
            name = str(found["loc"][0])
            yield f"{'max_new_tokens' if name == 'max_tokens' else name}: {found['msg']}, got {_shown(found['input'])}"
    if fault := _id_fault("eos_token_id", generation.get("eos_token_id")):
        yield fault


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_dtype(value: Any) -> bool:
    import torch

    if isinstance(value, dict):  # by part of a multimodal model
        return all(map(_is_dtype, value.values()))
    return value == "auto" or (
        _is_text(value) and isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST


def _is_number(value: Any, *, least: float = -math.inf, above: float = -math.inf) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) and value >= least and value > above


def _shown(value: Any) -> str:
    return repr(value)[:80]

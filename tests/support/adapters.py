"""Adapters (LoRA in PEFT's form) for tests, written with numpy alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.worker.weights.adapter import CONFIG, WEIGHTS, base_shapes

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Arrays = Mapping[str, "np.ndarray[Any, Any]"]
_DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int32": "I32"}


def write_adapter(
    folder: Path,
    base: Path,
    rank: int = 8,
    seed: int = 0,
    *,
    alpha: float = 16.0,
    spread: float = 0.2,
    targets: Sequence[str] = TARGETS,
    **config: object,
) -> Path:
    """Write an adapter for the base model in `base` into `folder`, and return `folder`.

    `seed` decides the weights, which are normally distributed with the standard deviation `spread`. `config`: further
    keys of adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, r=rank, lora_alpha=alpha, target_modules=list(targets), **config)
    write_tensors(folder / WEIGHTS, adapter_arrays(base, rank, seed, spread, targets))
    return folder


def adapter_arrays(
    base: Path, rank: int, seed: int = 0, spread: float = 0.2, targets: Sequence[str] = TARGETS
) -> dict[str, np.ndarray[Any, Any]]:
    """Return the random tensors of an adapter for the model in `base`, by name. `spread`: standard deviation of the
    numbers. `targets`: the modules that the adapter changes."""
    random = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for module, (outputs, inputs) in base_shapes(base).items():
        if module.rpartition(".")[2] in targets:
            for part, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                values = random.normal(0.0, spread, shape).astype(np.float32)
                arrays[f"base_model.model.{module}.lora_{part}.weight"] = values
    return arrays


def write_config(folder: Path, **changes: object) -> None:
    """Write adapter_config.json as PEFT does. `changes`: keys to set; None is written as null."""
    values: dict[str, object] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / CONFIG).write_text(json.dumps(values | changes))


def write_tensors(file: Path, arrays: Arrays, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. An array of uint16 holds BF16 values, the upper halves of float32."""
    header, data = header_of(arrays), b"".join(array.tobytes() for array in arrays.values())
    write_parts(file, ({"__metadata__": dict(metadata)} if metadata else {}) | header, data)


def header_of(arrays: Arrays) -> dict[str, Any]:
    """Return the header of a safetensors file with these tensors, in this order."""
    header, at = dict[str, Any](), 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    return header


def write_parts(file: Path, header: object, data: bytes) -> None:
    """Write a safetensors file from a header, which may be invalid, and its data."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(content).to_bytes(8, "little") + content + data)

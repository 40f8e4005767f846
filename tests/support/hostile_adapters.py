"""Hostile adapters: broken, forged and huge files, made from a good adapter."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cluster.worker.weights.adapter import CONFIG, LARGEST, MAX_CONFIG_BYTES, WEIGHTS
from cluster.worker.weights.safetensors_header import MAX_HEADER_BYTES, MAX_TENSORS
from tests.support.adapters import (
    TARGETS,
    adapter_arrays,
    header_of,
    write_adapter,
    write_config,
    write_parts,
    write_tensors,
)

MAX_RANK = 64
"""Greatest rank of the engine to which the adapters are offered, or a lower one."""
SIZES = (1, 3, 60)
"""Sizes with which each way to spoil an adapter is used."""


def first_pair(arrays: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the first two tensors, which belong to one layer."""
    a, b = list(arrays)[:2]
    return a, b


CONFIGS: dict[str, dict[str, object]] = {
    "no LORA": {"peft_type": "LOHA"},
    "no type": {"peft_type": None},
    "DoRA": {"use_dora": True},
    "DoRA as a text": {"use_dora": "yes"},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "QALoRA": {"use_qalora": True},
    "transposed": {"fan_in_fan_out": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rank_pattern": {"rank_pattern": {"(a+)+$": 8}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 8}},
    "layer_replication": {"layer_replication": [[0, 1]]},
    "aLoRA": {"alora_invocation_tokens": [1]},
    "BD-LoRA": {"use_bdlora": {"a": 1}},
    "experts": {"target_parameters": ["experts.w1"]},
    "token embeddings": {"trainable_token_indices": [1]},
    "PiSSA": {"init_lora_weights": "pissa"},
    "odd init": {"init_lora_weights": [1]},
    "odd rslora": {"use_rslora": "no"},
    "rank 0": {"r": 0},
    "rank -1": {"r": -1},
    "rank above the bound": {"r": MAX_RANK + 1},
    "huge rank": {"r": 10**4000},
    "rank as a float": {"r": 8.0},
    "rank true": {"r": True},
    "no rank": {"r": None},
    "alpha 0": {"lora_alpha": 0},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "huge alpha": {"lora_alpha": 10**4000},
    "alpha as a text": {"lora_alpha": "16"},
    "no targets": {"target_modules": None},
    "empty targets": {"target_modules": []},
    "targets that are no names": {"target_modules": [1, 2]},
    "unknown targets": {"target_modules": ["q_proj", "transformer.h.0.attn"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "layers outside": {"layers_to_transform": [5]},
    "odd layers": {"layers_to_transform": ["0"]},
    "layer true": {"layers_to_transform": True},
}
"""Changes of adapter_config.json that must be refused."""

Spoil = Callable[[Path, int, dict[str, Any]], None]
SPOILED: dict[str, Spoil] = {}
"""Ways to spoil a good adapter: functions of the folder, the size and the adapter's tensors."""


def spoil(name: str) -> Callable[[Spoil], Spoil]:
    """Register a function that spoils an adapter, under `name`."""

    def add(function: Spoil) -> Spoil:
        SPOILED[name] = function
        return function

    return add


def _bytes_config(content: Callable[[int], bytes]) -> Spoil:
    def run(folder: Path, size: int, arrays: dict[str, Any]) -> None:
        (folder / CONFIG).write_bytes(content(size))

    return run


for _name, _content in {
    "empty config": lambda _: b"",
    "no JSON": lambda size: b"{" * size,
    "deep config": lambda size: b'{"a":' * (size * 400) + b"1" + b"}" * (size * 400),
    "deep value": lambda size: b'{"peft_type":"LORA","modules_to_save":' + b"[" * (size * 4) + b"]" * (size * 4) + b"}",
    "a list": lambda size: b"[1" + b",1" * size + b"]",
    "no UTF-8": lambda size: b"\xff\xfe" * size,
    "a key twice": lambda _: b'{"peft_type":"LORA","r":8,"r":9999}',
    "huge number": lambda size: b'{"peft_type":"LORA","r":' + b"9" * (size * 100) + b"}",
    "large config": lambda _: b" " * (MAX_CONFIG_BYTES + 1),
    "long texts": lambda size: json.dumps({"peft_type": "\U0001f600" * size * 100}).encode(),
}.items():
    SPOILED[_name] = _bytes_config(_content)


def _header(change: Callable[[dict[str, Any], int], object]) -> Spoil:
    def run(folder: Path, size: int, arrays: dict[str, Any]) -> None:
        header = header_of(arrays)
        made = change(header, size)
        data = b"".join(array.tobytes() for array in arrays.values())
        write_parts(folder / WEIGHTS, header if made is None else made, data)

    return run


def _first(header: dict[str, Any], **changes: object) -> None:
    next(iter(header.values())).update(changes)


for _name, _change in {
    "header is a list": lambda header, size: [header] * size,
    "header with a key twice": lambda header, _: (
        b'{"a":1,' + json.dumps(header).encode()[1:].replace(b'{"d', b'{"a":1,"d')
    ),
    "deep header": lambda header, size: b'{"a":' * size * 500 + b"1" + b"}" * size * 500,
    "header with a space before it": lambda header, _: b" " + json.dumps(header).encode(),
    "header with NaN": lambda header, _: _first(header, shape=[float("nan"), 8]),
    "no offsets": lambda header, _: next(iter(header.values())).pop("data_offsets") and None,
    "another key": lambda header, _: _first(header, more=1),
    "tensor is a number": lambda header, _: header.update({next(iter(header)): 7}),
    "dtype unknown": lambda header, _: _first(header, dtype="F128"),
    "dtype is a list": lambda header, _: _first(header, dtype=["F32"]),
    "dtype without fraction": lambda header, _: _first(header, dtype="I32"),
    "shape of texts": lambda header, _: _first(header, shape=["8", "64"]),
    "shape negative": lambda header, _: _first(header, shape=[-8, -64]),
    "shape huge": lambda header, size: _first(header, shape=[2**31] * size),
    "shape above all": lambda header, size: _first(header, shape=[10 ** (70 * size), 1]),
    "shape true": lambda header, _: _first(header, shape=[True, 1]),
    "offsets beyond the end": lambda header, size: _first(header, data_offsets=[0, 10**size]),
    "offsets negative": lambda header, _: _first(header, data_offsets=[-2048, 0]),
    "offsets backwards": lambda header, _: _first(header, data_offsets=[4096, 0]),
    "offsets overlap": lambda header, _: list(header.values())[1].update(data_offsets=[0, 2048]),
    "metadata of numbers": lambda header, _: header.update({"__metadata__": {"a": 1}}),
    "metadata a list": lambda header, _: header.update({"__metadata__": [1]}),
    "many tensors": lambda header, size: {
        f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(MAX_TENSORS + size)
    },
    "no tensors": lambda header, _: b"{}",
}.items():
    SPOILED[_name] = _header(_change)


@spoil("empty file")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / WEIGHTS).write_bytes(b"")


@spoil("cut off")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size * size // 100)


@spoil("one byte short")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 1)


@spoil("bytes appended")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    with (folder / WEIGHTS).open("ab") as file:
        file.write(bytes(size))


@spoil("a zip archive appended")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("data.pkl", pickle.dumps([0] * size))
    with (folder / WEIGHTS).open("ab") as file:
        file.write(archive.getvalue())


@spoil("a pickle")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps([0.5] * size))


@spoil("only a pickle")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


@spoil("pointer of Git LFS")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * size)


@spoil("header length of 2^64 - 1")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}" * size)


@spoil("header larger than allowed")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    write_parts(folder / WEIGHTS, b"{" + b" " * MAX_HEADER_BYTES + b"}", b"")


@spoil("a sparse file of a terabyte")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    os.truncate(folder / WEIGHTS, min(size, 8) << 40)


@spoil("link to weights")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / WEIGHTS).rename(folder / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder / "elsewhere")


@spoil("link to nothing")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("x" * size)


@spoil("link to a device as config")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to("/dev/zero")


@spoil("a pipe")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


@spoil("a folder")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


@spoil("nothing")
def _(folder: Path, size: int, arrays: dict[str, Any]) -> None:
    (folder / CONFIG).unlink()
    (folder / WEIGHTS).unlink()


def _tensors(change: Callable[[dict[str, Any], int], object]) -> Spoil:
    def run(folder: Path, size: int, arrays: dict[str, Any]) -> None:
        change(arrays, size)
        write_tensors(folder / WEIGHTS, arrays)

    return run


def _set(arrays: dict[str, Any], which: int, value: float) -> None:
    values = arrays[list(arrays)[which]]
    values[values.shape[0] // 2, -1] = value


def _renamed(arrays: dict[str, Any], old: str, new: str) -> None:
    for name in list(arrays):
        arrays[name.replace(old, new)] = arrays.pop(name)


def _copied(arrays: dict[str, Any], name: str) -> None:
    arrays[name] = next(iter(arrays.values()))


for _name, _make in {
    "NaN": lambda arrays, _: _set(arrays, 5, float("nan")),
    "infinite": lambda arrays, _: _set(arrays, 3, float("-inf")),
    "too large for float16": lambda arrays, _: _set(arrays, 0, LARGEST * 1.01),
    "too large with alpha": lambda arrays, _: _set(arrays, 1, LARGEST * 0.6),
    "A without B": lambda arrays, _: arrays.pop(first_pair(arrays)[1]),
    "B without A": lambda arrays, _: arrays.pop(first_pair(arrays)[0]),
    "A and B exchanged": lambda arrays, _: arrays.update(
        zip(first_pair(arrays), (arrays[name] for name in reversed(first_pair(arrays))), strict=True)
    ),
    "transposed A": lambda arrays, _: arrays.update({first_pair(arrays)[0]: arrays[first_pair(arrays)[0]].T.copy()}),
    "flat A": lambda arrays, _: arrays.update({first_pair(arrays)[0]: arrays[first_pair(arrays)[0]].ravel()}),
    "another rank in one layer": lambda arrays, size: arrays.update(
        {first_pair(arrays)[0]: np.zeros((8 + size, 64), np.float32)}
    ),
    "bias": lambda arrays, _: _copied(arrays, "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"),
    "whole layer": lambda arrays, _: _copied(arrays, "base_model.model.lm_head.weight"),
    "DoRA's vector": lambda arrays, _: _copied(
        arrays, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    ),
    "embedding": lambda arrays, _: _copied(arrays, "base_model.model.model.embed_tokens.lora_embedding_A"),
    "output layer": lambda arrays, _: _copied(arrays, "base_model.model.lm_head.lora_A.weight"),
    "layer that does not exist": lambda arrays, size: _renamed(arrays, "layers.0", f"layers.{size * 100}"),
    "layer with a huge number": lambda arrays, size: _renamed(arrays, "layers.0", f"layers.{'9' * size}"),
    "fused layer": lambda arrays, _: _renamed(arrays, "layers.1.self_attn.q_proj", "layers.1.self_attn.qkv_proj"),
    "norm": lambda arrays, _: _renamed(arrays, "self_attn.q_proj", "input_layernorm"),
    "experts": lambda arrays, _: _renamed(arrays, "mlp.gate_proj", "mlp.experts.0.gate_proj"),
    "with and without the prefix": lambda arrays, _: _copied(
        arrays, first_pair(arrays)[0].removeprefix("base_model.model.")
    ),
    "prefix twice": lambda arrays, _: _renamed(arrays, "base_model.model.", "base_model.model.base_model.model."),
    "name of an adapter": lambda arrays, _: _renamed(arrays, ".weight", ".default.weight"),
    "name with a path": lambda arrays, size: _renamed(arrays, "model.layers", "../" * size + "model.layers"),
    "name with a zero byte": lambda arrays, _: _renamed(arrays, "q_proj", "q_proj\0"),
    "long names": lambda arrays, size: _renamed(arrays, "q_proj", "q" * (600 * size) + "_proj"),
    "name of other letters": lambda arrays, _: _renamed(arrays, "q_proj", "\u0441_proj"),
    "surrogate in a name": lambda arrays, _: _renamed(arrays, "q_proj", "\udc80_proj"),
    "integers": lambda arrays, _: arrays.update({first_pair(arrays)[0]: np.zeros((8, 64), np.int32)}),
}.items():
    SPOILED[_name] = _tensors(_make)


def spoil_config(folder: Path, name: str) -> None:
    """Write adapter_config.json with one of the hostile configurations."""
    write_config(folder, **({"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS)} | CONFIGS[name]))


def write_hostile_adapters(folder: Path, base: Path) -> list[str]:
    """Write invalid adapters below `folder`, and return the names of their folders.

    For each entry of CONFIGS there is one adapter with this configuration. For each function in SPOILED and each size
    in SIZES there is one adapter that the function has damaged. `base`: folder of the base model.
    """
    names = []
    for number, name in enumerate(CONFIGS):
        names.append(f"config-{number}")
        spoil_config(write_adapter(folder / names[-1], base), name)
    arrays = adapter_arrays(base, 8)
    for number, name in enumerate(SPOILED):
        for size in SIZES:
            names.append(f"spoiled-{number}-{size}")
            SPOILED[name](write_adapter(folder / names[-1], base), size, dict(arrays))
    return names

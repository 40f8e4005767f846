"""Checks of adapters: a good adapter is accepted, and every hostile one is refused with the one error type."""

from __future__ import annotations

import io
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.worker.weights.adapter import (
    CONFIG,
    LARGEST,
    MAX_CONFIG_BYTES,
    WEIGHTS,
    AdapterError,
    adapter_digest,
    base_shapes,
    check_adapter,
)
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
MEMORY_BYTES = 256 << 20
"""Bound of the memory for one check. The largest header that is read is 4 MiB of JSON."""


def write_base(folder: Path, hidden: int, layers: int = 2) -> Path:
    """Write a checkpoint with the linear layers of a Llama, of zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"model.embed_tokens.weight": np.zeros((2 * hidden, hidden), np.float16)}
    for layer in range(layers):
        for name in TARGETS:
            part = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            shape = {
                "gate_proj": (2 * hidden, hidden),
                "up_proj": (2 * hidden, hidden),
                "down_proj": (hidden, 2 * hidden),
            }
            arrays[f"model.layers.{layer}.{part}.{name}.weight"] = np.zeros(
                shape.get(name, (hidden if name in ("q_proj", "o_proj") else hidden // 2, hidden)), np.float16
            )
        arrays[f"model.layers.{layer}.input_layernorm.weight"] = np.zeros(hidden, np.float16)
    write_tensors(folder / "model.safetensors", arrays)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with hidden size 64."""
    return write_base(tmp_path_factory.mktemp("base"), 64)


def first_pair(arrays: dict[str, Any]) -> tuple[str, str]:
    """Return the names of the first layer's two tensors."""
    a, b = list(arrays)[:2]
    return a, b


# ---- good adapters


@pytest.mark.parametrize("rank", [1, 8, MAX_RANK])
@pytest.mark.parametrize("targets", [TARGETS, ("q_proj",), ("gate_proj", "down_proj")])
def test_a_good_adapter_is_accepted(tmp_path: Path, base: Path, rank: int, targets: tuple[str, ...]) -> None:
    folder = write_adapter(tmp_path / "a", base, rank, targets=targets)
    checked = check_adapter(folder, base_shapes(base), MAX_RANK)
    assert (checked.rank, checked.modules) == (rank, 2 * len(targets))
    assert checked.size_bytes == sum((folder / name).stat().st_size for name in (CONFIG, WEIGHTS))
    assert checked.digest == adapter_digest(folder)


def _as_bf16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("convert", [_as_bf16, lambda values: values.astype(np.float16)])
def test_16_bit_adapters_are_accepted(tmp_path: Path, base: Path, convert: Callable[[Any], Any]) -> None:
    folder = write_adapter(tmp_path / "a", base)
    arrays = {name: convert(values) for name, values in adapter_arrays(base, 8).items()}
    write_tensors(folder / WEIGHTS, arrays)
    assert check_adapter(folder, base_shapes(base), MAX_RANK).rank == 8


@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": ["model.layers.0.self_attn.q_proj"]},
        {"layers_to_transform": [0, 1]},
        {"init_lora_weights": "gaussian"},
        {"a_key_of_a_later_release": {"deep": [1, 2]}},
        {"lora_alpha": 0.5},
    ],
)
def test_what_does_not_change_the_meaning_is_accepted(tmp_path: Path, base: Path, config: dict[str, object]) -> None:
    folder = write_adapter(tmp_path / "a", base)
    write_config(folder, **{"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS), **config})
    assert check_adapter(folder, base_shapes(base), MAX_RANK).modules == 14


def test_names_without_a_prefix_and_other_files_are_accepted(tmp_path: Path, base: Path) -> None:
    """Some tools leave the prefix base_model.model. out. Files that the check does not read do not matter."""
    folder = write_adapter(tmp_path / "a", base)
    digest = adapter_digest(folder)
    (folder / "README.md").write_text("# Adapter")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    assert check_adapter(folder, base_shapes(base), MAX_RANK).digest == digest
    plain = {name.removeprefix("base_model.model."): values for name, values in adapter_arrays(base, 8).items()}
    write_tensors(folder / WEIGHTS, plain, {"format": "pt"})
    assert check_adapter(folder, base_shapes(base), MAX_RANK).digest != digest


def test_the_digest_depends_on_every_byte_of_both_files(tmp_path: Path, base: Path) -> None:
    digests = {adapter_digest(write_adapter(tmp_path / f"{seed}", base, seed=seed)) for seed in range(3)}
    digests.add(adapter_digest(write_adapter(tmp_path / "alpha", base, alpha=17.0)))
    assert len(digests) == 4
    assert adapter_digest(write_adapter(tmp_path / "again", base, seed=0)) in digests


# ---- hostile adapters

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
    """Register a way to spoil an adapter."""

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


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_configuration_is_refused_by_name(tmp_path: Path, base: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "a", base)
    write_config(folder, **({"r": 8, "lora_alpha": 16, "target_modules": list(TARGETS)} | CONFIGS[name]))
    with pytest.raises(AdapterError) as refusal:
        check_adapter(folder, base_shapes(base), MAX_RANK)
    assert str(folder) in str(refusal.value)
    assert next(iter(CONFIGS[name])) in str(refusal.value), "the key is named"


@pytest.mark.parametrize("size", [1, 3, 60])
@pytest.mark.parametrize("name", SPOILED)
def test_a_hostile_adapter_raises_the_one_error(tmp_path: Path, base: Path, name: str, size: int) -> None:
    """A hostile adapter raises AdapterError with a short text, and its check takes little memory."""
    folder = write_adapter(tmp_path / "a", base)
    arrays = adapter_arrays(base, 8)
    SPOILED[name](folder, size, arrays)
    shapes = base_shapes(base)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError) as refusal:
            check_adapter(folder, shapes, MAX_RANK)
        assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES
    finally:
        tracemalloc.stop()
    text = str(refusal.value)
    assert len(text) < 1000 + len(str(folder))
    assert str(folder) in text


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, base: Path) -> None:
    """vLLM accepts an adapter of a smaller model; the check names the layer and both shapes."""
    other = write_base(tmp_path / "other", 32)
    folder = write_adapter(tmp_path / "a", other)
    with pytest.raises(AdapterError, match=r"q_proj.*\[8, 32\].*\[8, 64\].*belongs to another model"):
        check_adapter(folder, base_shapes(base), MAX_RANK)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_bytes_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever bytes change in either file, the check accepts it or raises AdapterError."""
    folder = tmp_path_factory.mktemp("fuzzed")
    base = write_base(folder / "base", 16, layers=1)
    write_adapter(folder / "a", base, 2, targets=("q_proj", "down_proj"))
    file = folder / "a" / data.draw(st.sampled_from((CONFIG, WEIGHTS)))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content) - 1, 1500)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    file.write_bytes(content)
    try:
        checked = check_adapter(folder / "a", base_shapes(base), MAX_RANK)
    except AdapterError:
        return
    assert checked.digest == adapter_digest(folder / "a")


def test_a_base_model_without_readable_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no safetensors"):
        base_shapes(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(AdapterError, match=r"model\.safetensors"):
        base_shapes(tmp_path)


def test_shapes_of_quantized_layers_are_known(tmp_path: Path) -> None:
    """The shape of a layer with packed weights in GPTQ's form follows from its groups."""
    arrays = {
        "model.layers.0.self_attn.q_proj.qweight": np.zeros((8, 32), np.int32),
        "model.layers.0.self_attn.q_proj.g_idx": np.zeros(64, np.int32),
    }
    write_tensors(tmp_path / "model.safetensors", arrays)
    assert base_shapes(tmp_path) == {"model.layers.0.self_attn.q_proj": (32, 64)}

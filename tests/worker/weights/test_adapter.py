"""Checks of adapters: a good adapter is accepted, and every hostile adapter is refused with AdapterError."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.worker.weights.adapter import (
    CONFIG,
    WEIGHTS,
    AdapterError,
    adapter_digest,
    base_shapes,
    check_adapter,
)
from tests.support.adapters import (
    TARGETS,
    adapter_arrays,
    write_adapter,
    write_config,
    write_tensors,
)
from tests.support.hostile_adapters import CONFIGS, MAX_RANK, SIZES, SPOILED, spoil_config

MEMORY_BYTES = 256 << 20
"""Bound of the memory for one check. The largest header that is read is 4 MiB of JSON."""


def write_base(folder: Path, hidden: int, layers: int = 2) -> Path:
    """Write a checkpoint with the linear layers of a Llama, all zeros."""
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
    """An adapter is accepted if its tensor names lack the prefix `base_model.model.`, which some tools omit. Files that
    the check does not read do not matter."""
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


@pytest.mark.parametrize("name", CONFIGS)
def test_a_hostile_configuration_is_refused_by_name(tmp_path: Path, base: Path, name: str) -> None:
    folder = write_adapter(tmp_path / "a", base)
    spoil_config(folder, name)
    with pytest.raises(AdapterError) as refusal:
        check_adapter(folder, base_shapes(base), MAX_RANK)
    assert str(folder) in str(refusal.value)
    assert next(iter(CONFIGS[name])) in str(refusal.value), "the key is named"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SPOILED)
def test_a_hostile_adapter_raises_the_one_error(tmp_path: Path, base: Path, name: str, size: int) -> None:
    """A hostile adapter raises AdapterError with a short text, and the check takes little memory."""
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
    """An adapter of a smaller model, which vLLM would accept, is refused. The error names the layer and both shapes."""
    other = write_base(tmp_path / "other", 32)
    folder = write_adapter(tmp_path / "a", other)
    with pytest.raises(AdapterError, match=r"q_proj.*\[8, 32\].*\[8, 64\].*belongs to another model"):
        check_adapter(folder, base_shapes(base), MAX_RANK)


@pytest.mark.parametrize("names_layers", [True, False])
@pytest.mark.parametrize(
    ("layer", "config", "says"),
    [
        ("kv_b_proj", None, "is not served: in models with .*MLA.*train without this layer"),
        ("kv_b_proj", "[", "is not served: in models with"),
        ("kv_b_proj", '{"architectures": ["DeepseekV3ForCausalLM"]}', "is not served: in models with"),
        ("kv_b_proj", '{"architectures": ["MiniCPM3ForCausalLM"]}', None),
        ("q_a_proj", '{"architectures": ["DeepseekV3ForCausalLM"]}', None),
        ("q_a_proj", '{"architectures": ["LongcatFlashForCausalLM"]}', "is no layer of the base model"),
    ],
)
def test_layers_that_vllm_computes_without_the_adapter_are_refused(
    tmp_path: Path, layer: str, config: str | None, says: str | None, names_layers: bool
) -> None:
    """An adapter is refused if it changes a layer that vLLM computes without it, at least in some steps. The error
    names the layer. In other architectures a layer of the same name is served."""
    base, folder, module = tmp_path / "base", tmp_path / "a", f"model.layers.0.self_attn.{layer}"
    base.mkdir()
    folder.mkdir()
    write_tensors(base / "model.safetensors", {f"{module}.weight": np.zeros((32, 16), np.float16)})
    if config is not None:
        (base / "config.json").write_text(config)
    parts = {"A": np.ones((4, 16), np.float32), "B": np.ones((32, 4), np.float32)}
    arrays = {f"base_model.model.{module}.lora_{part}.weight": values for part, values in parts.items()}
    write_tensors(folder / WEIGHTS, arrays)
    write_config(folder, r=4, lora_alpha=8, target_modules=[layer] if names_layers else "all-linear")
    if says is None:
        assert check_adapter(folder, base_shapes(base), MAX_RANK).modules == 1
    else:
        with pytest.raises(AdapterError, match=f"{layer}.* {says}"):
            check_adapter(folder, base_shapes(base), MAX_RANK)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_bytes_is_refused_or_harmless(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """If any bytes of either file change, the check accepts the adapter or raises AdapterError, and no other error."""
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
    """The shape of a layer with packed weights in GPTQ's form is derived from its group indices."""
    arrays = {
        "model.layers.0.self_attn.q_proj.qweight": np.zeros((8, 32), np.int32),
        "model.layers.0.self_attn.q_proj.g_idx": np.zeros(64, np.int32),
    }
    write_tensors(tmp_path / "model.safetensors", arrays)
    assert base_shapes(tmp_path) == {"model.layers.0.self_attn.q_proj": (32, 64)}

"""Checks of an adapter's files (LoRA in PEFT's form) against the base model, in pure Python, before an engine reads
them.

Problem: vLLM accepts an adapter of another model, and its answers are then nonsense. vLLM finds damage only in the
middle of a step, which ends the engine for all callers. With several ranks, even a failed load leaves the ranks'
replies in disorder. So an adapter must not reach an engine if the engine could refuse it, or would interpret it
differently than the adapter's author.

Only two files are read, adapter_config.json and adapter_model.safetensors, but both completely. The limits below bound
the time and the memory of the checks. Every fault raises AdapterError, which names file, key, value and remedy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from cluster.worker.weights.checkpoint import LONGEST_HEADER
from cluster.worker.weights.safetensors_header import (
    MAX_HEADER_BYTES,
    HeaderError,
    Tensor,
    read_header,
    short,
    unique_keys,
)

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
FILES: Final = (CONFIG, WEIGHTS)
MAX_CONFIG_BYTES: Final = 1 << 20
MAX_WEIGHT_BYTES: Final = 16 << 30
MAX_BASE_FILES: Final = 4096
"""Maximum number of safetensors files of a base model."""
PIECE_BYTES: Final = 4 << 20
LARGEST: Final = 65504.0
"""Largest absolute value of a weight: float16's largest number, since an engine may compute in float16."""
FLOATS: Final = ("F32", "F16", "BF16")
TARGETS: Final = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "out_proj", "in_proj", "q_a_proj", "q_b_proj"),
        *(
            "kv_a_proj_with_mqa",
            "kv_b_proj",
            "query_key_value",
            "query",
            "key",
            "value",
            "Wqkv",
            "W_pack",
            "wqkv",
            "wo",
        ),
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "fc1", "fc2", "fc_in", "fc_out"),
        *("dense", "dense_h_to_4h", "dense_4h_to_h", "c_attn", "c_proj", "c_fc", "attn_qkv"),
    )
)
"""Layers that an adapter may change, by the last part of their name."""
KV_B: Final = "kv_b_proj"
"""A layer of multi-head latent attention (MLA). vLLM derives the weights of decode steps from it when a model is loaded
(0.32, model_executor/layers/attention/mla_attention.py: W_UK_T, W_UV), so an adapter would change prefill only."""
PLAIN_KV_B: Final = "MiniCPM3ForCausalLM"
"""The only architecture with `kv_b_proj` that vLLM computes with plain attention."""
UNWRAPPED: Final[Mapping[str, frozenset[str]]] = {
    "LongcatFlashForCausalLM": frozenset(("q_a_proj", "kv_a_proj_with_mqa")),
}
"""Layers by architecture that vLLM 0.32 fuses to a layer for which it has no adapters. It logs that they "will be
ignored" (lora/model_manager.py)."""
EMBEDDINGS: Final = frozenset(("embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "embed_out", "output"))

AGAIN: Final = "save the adapter again with PEFT, or copy it again"
_PLAIN: Final = "train or convert it to a plain LoRA adapter"
_NOT_TRUE = {
    "use_dora": f"DoRA is not served; {_PLAIN}",
    "lora_bias": f"biases of adapters are not served; {_PLAIN}",
    "use_qalora": f"QALoRA is not served; {_PLAIN}",
    "fan_in_fan_out": "layers with transposed weights are not served; convert the adapter to one for linear layers",
}
_NOT_SET = {
    "modules_to_save": f"whole layers in an adapter are not served; merge them into the base model, or {_PLAIN}",
    "rank_pattern": f"ranks by layer are not served; train it with one rank r, or {_PLAIN}",
    "alpha_pattern": f"alphas by layer are not served; train it with one lora_alpha, or {_PLAIN}",
    "layer_replication": f"replicated layers are not served; {_PLAIN}",
    "alora_invocation_tokens": f"activated LoRA is not served; {_PLAIN}",
    "use_bdlora": f"block-diagonal LoRA is not served; {_PLAIN}",
    "target_parameters": "adapters of parameters (experts) are not served; target linear layers",
    "trainable_token_indices": "trained token embeddings are not served; train without them",
    "megatron_config": f"Megatron's adapters are not served; {_PLAIN}",
}
_INITIAL = frozenset(("gaussian", "eva", "orthogonal", "mica", "lora_ga"))
"""Values of init_lora_weights that leave the base model's weights as they are."""
_WHY_NO_KV_B = (
    f"is not served: in models with multi-head latent attention (MLA), vLLM computes {KV_B} with the adapter for the "
    "prompt and without it for each further token; train without this layer"
)
_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<part>[AB])\.weight")
_LAYER = re.compile(r"\.(\d+)\.")


class AdapterError(ValueError):
    """An error for an adapter that cannot be served. The message names the file, the key, the value and the remedy."""


@dataclass(frozen=True, slots=True)
class CheckedAdapter:
    """The result of `check_adapter`.

    `digest`: SHA-256 of the files, in hexadecimal. `modules`: number of layers that the adapter changes.
    """

    digest: str
    rank: int
    modules: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Config:
    rank: int
    scaling: float
    targets: tuple[str, ...]
    layers: frozenset[int] | None


Shapes = Mapping[str, tuple[int, int]]
"""Shapes of linear layers as (outputs, inputs), by the layer's name in the checkpoint."""


def check_adapter(folder: Path, base: Shapes, max_rank: int) -> CheckedAdapter:
    """Check an adapter's files against the base model's layers; return the files' digest, rank and sizes. Blocks.

    `base`: the result of `base_shapes`. `max_rank`: the engine's max_lora_rank. Raises only AdapterError.
    """
    with _guarded(folder):
        content, config_hash = _read_config(folder)
        config = _check_config(folder, content, base, max_rank)
        with open_regular(folder, WEIGHTS, most_weight_bytes(base, max_rank)) as stream:
            tensors = _read_tensors(folder, stream)
            modules = _check_names(folder, tensors, config)
            _check_shapes(folder, modules, base, config)
            weights_hash = _check_values(folder, stream, tensors, config)
            size = max((tensor.end for tensor in tensors.values()), default=0)
        return CheckedAdapter(_digest(config_hash, weights_hash), config.rank, len(modules), size + len(content))


def adapter_digest(folder: Path) -> str:
    """Return the SHA-256 of an adapter's files in hexadecimal, without checking the files. Blocks.

    Raises AdapterError.
    """
    with _guarded(folder):
        hashes = []
        for name, most in ((CONFIG, MAX_CONFIG_BYTES), (WEIGHTS, MAX_WEIGHT_BYTES)):
            with open_regular(folder, name, most) as stream:
                digest = hashlib.sha256()
                for piece in _pieces(stream, os.fstat(stream.fileno()).st_size):
                    digest.update(piece)
                hashes.append(digest.hexdigest())
        return _digest(*hashes)


def _digest(config_hash: str, weights_hash: str) -> str:
    return hashlib.sha256(f"{CONFIG}\0{config_hash}\n{WEIGHTS}\0{weights_hash}\n".encode()).hexdigest()


def base_shapes(folder: Path) -> Shapes:
    """Return the shapes of a base model's linear layers, from the headers of its safetensors files. The call blocks on
    file reads.

    A layer is left out if its weights are packed in a form that does not show their shape, or if vLLM would not
    compute all steps with its adapter. Raises AdapterError.
    """
    if not folder.is_dir():
        raise AdapterError(f"the base model's folder {folder} does not exist")
    names = sorted(file.name for file in folder.glob("*.safetensors"))[:MAX_BASE_FILES]
    if not names:
        raise AdapterError(f"{folder} holds no safetensors files: adapters need a base model in that form")
    found: dict[str, tuple[int, int]] = {}
    left_out = _layers_without_adapters(folder)
    for name in names:
        try:
            with (folder / name).open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(length, LONGEST_HEADER)))
            shapes = {tensor: list(part["shape"]) for tensor, part in header.items() if tensor != "__metadata__"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AdapterError(f"{folder}/{name} has no readable header ({error}); copy the checkpoint again") from None
        for tensor, shape in shapes.items():
            module, _, kind = tensor.rpartition(".")
            if module.rpartition(".")[2] in left_out:
                continue
            groups = shapes.get(f"{module}.g_idx")
            if kind == "weight" and len(shape) == 2:
                found[module] = (shape[0], shape[1])
            elif kind == "qweight" and groups and len(shape) == 2:  # GPTQ
                found[module] = (shape[1], groups[0])
    return found


def _layers_without_adapters(folder: Path) -> frozenset[str]:
    """Return the last parts of the names of layers that vLLM would not compute with an adapter in all steps, although
    adapters of other models may change layers of this name. A folder without a readable config.json counts as a model
    with MLA."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    names = config.get("architectures") if isinstance(config, dict) else None
    architectures = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    of_mla = frozenset() if PLAIN_KV_B in architectures else frozenset((KV_B,))
    return of_mla.union(*(UNWRAPPED.get(name, frozenset()) for name in architectures))


def most_weight_bytes(base: Shapes, max_rank: int) -> int:
    """Return the size in bytes of the largest adapter that an engine with this `max_lora_rank` can hold."""
    weights = sum(outputs + inputs for outputs, inputs in base.values()) * max_rank
    return min(4 * weights + MAX_HEADER_BYTES + 8, MAX_WEIGHT_BYTES)


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """While the context is open, turn OSError into AdapterError."""
    try:
        yield
    except OSError as error:
        raise AdapterError(
            f"{folder}: cannot be read: {error.strerror or error}; check its path and permissions"
        ) from None


@contextmanager
def open_regular(folder: Path, name: str, most_bytes: int) -> Iterator[BinaryIO]:
    """Open a regular file of a folder, without ever blocking. Symbolic links and special files are refused.

    Raises AdapterError, OSError.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        remedy = "an adapter in PEFT's form has adapter_config.json and adapter_model.safetensors"
        if name == WEIGHTS and any((folder / other).exists() for other in ("adapter_model.bin", "adapter_model.pt")):
            remedy = "pickled weights can run code and are not read; save the adapter with safe_serialization=True"
        raise AdapterError(f"{folder}: there is no {name}; {remedy}") from None
    except OSError as error:
        if (folder / name).is_symlink():
            raise AdapterError(f"{folder}/{name} is a link; copy the file itself into the folder") from None
        raise AdapterError(f"{folder}/{name} cannot be opened: {error.strerror}; check its permissions") from None
    with open(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise AdapterError(f"{folder}/{name} is no regular file; copy the file itself into the folder")
        if status.st_size > most_bytes:
            raise AdapterError(f"{folder}/{name} has {status.st_size} bytes, at most {most_bytes} are allowed")
        yield stream


def _read_config(folder: Path) -> tuple[bytes, str]:
    with open_regular(folder, CONFIG, MAX_CONFIG_BYTES) as stream:
        content = stream.read(MAX_CONFIG_BYTES + 1)
    return content, hashlib.sha256(content).hexdigest()


def _check_config(folder: Path, content: bytes, base: Shapes, max_rank: int) -> _Config:
    where = f"{folder}/{CONFIG}"
    try:
        values = json.loads(content.decode(), object_pairs_hook=unique_keys)
    except RecursionError:
        raise AdapterError(f"{where} is nested too deeply; {AGAIN}") from None
    except ValueError as error:
        raise AdapterError(f"{where} is no valid JSON: {short(error)}; {AGAIN}") from None
    if not isinstance(values, dict):
        raise AdapterError(f"{where} must hold a JSON object; {AGAIN}")
    if values.get("peft_type") != "LORA":
        raise AdapterError(f"{where}: peft_type: {_shown(values, 'peft_type')} is not served, only LORA; {_PLAIN}")
    _check_features(where, values)
    rank = values.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"{where}: r: {_shown(values, 'r')} must be a whole number of at least 1; {AGAIN}")
    if rank > max_rank:
        raise AdapterError(
            f"{where}: r: {short(rank)} is above the engine's max_lora_rank {max_rank}; set engine.max_lora_rank of "
            "the model, or train the adapter with a lower rank"
        )
    return _Config(rank, _scaling(where, values, rank), _targets(where, values, base), _layers(where, values))


def _check_features(where: str, values: Mapping[str, Any]) -> None:
    for key, remedy in _NOT_TRUE.items():
        if values.get(key) not in (None, False):
            raise AdapterError(f"{where}: {key}: {_shown(values, key)}: {remedy}")
    for key, remedy in _NOT_SET.items():
        if values.get(key):
            raise AdapterError(f"{where}: {key}: {_shown(values, key)}: {remedy}")
    if values.get("bias", "none") != "none":
        raise AdapterError(f"{where}: bias: {_shown(values, 'bias')}: only none is served; {_PLAIN}")
    initial = values.get("init_lora_weights", True)
    if not isinstance(initial, bool | None) and not (isinstance(initial, str) and initial.lower() in _INITIAL):
        raise AdapterError(
            f"{where}: init_lora_weights: {_shown(values, 'init_lora_weights')}: such adapters belong to a changed "
            "base model; convert it with PEFT's path_initial_model_for_weight_conversion"
        )
    if not isinstance(values.get("use_rslora", False), bool | None):
        raise AdapterError(f"{where}: use_rslora: {_shown(values, 'use_rslora')} must be true or false; {AGAIN}")


def _shown(values: Mapping[str, Any], key: str) -> str:
    return short(values[key]) if key in values else "is missing and"


def _scaling(where: str, values: Mapping[str, Any], rank: int) -> float:
    alpha = values.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < abs(alpha) <= LARGEST:
        shown = _shown(values, "lora_alpha")
        raise AdapterError(f"{where}: lora_alpha: {shown} must be a number other than 0, at most {LARGEST:g}; {AGAIN}")
    return abs(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _targets(where: str, values: Mapping[str, Any], base: Shapes) -> tuple[str, ...]:
    targets = values.get("target_modules")
    if isinstance(targets, str) and 0 < len(targets) <= 4096:
        return ()  # a pattern, or all-linear: the tensors show what it has matched
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise AdapterError(
            f"{where}: target_modules: {_shown(values, 'target_modules')} must be a list of names; {AGAIN}"
        )
    known = {module.rpartition(".")[2] for module in base}
    for name in targets:
        last = name.rpartition(".")[2]
        if last in EMBEDDINGS:
            raise AdapterError(f"{where}: target_modules: {_why_no_embedding(name)}")
        if last == KV_B and last not in known:
            raise AdapterError(f"{where}: target_modules: {short(name)} {_WHY_NO_KV_B}")
        if last not in known or last not in TARGETS:
            raise AdapterError(
                f"{where}: target_modules: {short(name)} is no layer of the base model that adapters may change; the "
                f"adapter belongs to another model, or target some of {', '.join(sorted(known & TARGETS))}"
            )
    return tuple(targets)


def _why_no_embedding(name: str) -> str:
    return f"{short(name)}: adapters of embeddings and of the output layer are not served; train without this layer"


def _layers(where: str, values: Mapping[str, Any]) -> frozenset[int] | None:
    """Return the layer numbers in `layers_to_transform`; None if all layers are transformed."""
    layers = values.get("layers_to_transform")
    if layers is None:
        return None
    numbers = layers if isinstance(layers, list) else [layers]
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        shown = _shown(values, "layers_to_transform")
        raise AdapterError(f"{where}: layers_to_transform: {shown} must be whole numbers; {AGAIN}")
    return frozenset(numbers)


def _read_tensors(folder: Path, stream: BinaryIO) -> Mapping[str, Tensor]:
    try:
        return read_header(stream, os.fstat(stream.fileno()).st_size)
    except HeaderError as error:
        raise AdapterError(f"{folder}/{WEIGHTS} {error}; {AGAIN}") from None


def _check_names(folder: Path, tensors: Mapping[str, Tensor], config: _Config) -> Mapping[str, Mapping[str, Tensor]]:
    """Check the tensors' names; return the tensors `A` and `B` of each layer that the adapter changes."""
    where = f"{folder}/{WEIGHTS}"
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            if any(part in EMBEDDINGS or part.startswith("lora_embedding") for part in name.split(".")):
                raise AdapterError(f"{where}: {_why_no_embedding(name)}")
            raise AdapterError(f"{where}: {short(name)} is no weight lora_A or lora_B of a layer; {_PLAIN}")
        module = match["module"]
        last = module.rpartition(".")[2]
        if last in EMBEDDINGS:
            raise AdapterError(f"{where}: {_why_no_embedding(name)}")
        if last not in TARGETS or ".experts." in f".{module}.":
            raise AdapterError(f"{where}: {short(name)}: adapters of this layer are not served; train without it")
        if tensor.dtype not in FLOATS:
            raise AdapterError(
                f"{where}: {short(name)}: dtype {tensor.dtype} is not one of {', '.join(FLOATS)}; {AGAIN}"
            )
        if config.layers is not None and not config.layers & set(map(_number, _LAYER.findall(f".{module}."))):
            raise AdapterError(f"{where}: {short(name)} is of a layer outside of layers_to_transform; {AGAIN}")
        parts = modules.setdefault(module, {})
        if match["part"] in parts:
            raise AdapterError(f"{where}: {short(name)} is there twice, with and without base_model.model.; {AGAIN}")
        parts[match["part"]] = tensor
    if not modules:
        raise AdapterError(f"{where} holds no tensors; {AGAIN}")
    for module, parts in modules.items():
        if lacking := {"A", "B"} - set(parts):
            raise AdapterError(f"{where}: {short(module)} has no lora_{min(lacking)}.weight; {AGAIN}")
    return modules


def _number(digits: str) -> int:
    return int(digits) if len(digits) < 10 else -1


def _check_shapes(folder: Path, modules: Mapping[str, Mapping[str, Tensor]], base: Shapes, config: _Config) -> None:
    where = f"{folder}/{WEIGHTS}"
    for module, parts in modules.items():
        shape = base.get(module) or base.get(module.removeprefix("model."))
        if shape is None:
            raise AdapterError(f"{where}: {short(module)} {_why_no_layer(module, base)}")
        expected = {"A": (config.rank, shape[1]), "B": (shape[0], config.rank)}
        for part, tensor in parts.items():
            if tensor.shape != expected[part]:
                raise AdapterError(
                    f"{where}: {short(module)}.lora_{part}.weight has the shape {short(list(tensor.shape))}, and r "
                    f"{config.rank} with the base model's layer {list(shape)} asks for {list(expected[part])}; the "
                    "adapter belongs to another model, or adapter_config.json to another adapter"
                )


def _why_no_layer(module: str, base: Shapes) -> str:
    parent, _, last = module.rpartition(".")
    if last == KV_B:
        return _WHY_NO_KV_B
    parts: Sequence[str] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }.get(last, ())
    if parts and all(f"{parent}.{part}" in base for part in parts):
        return f"is a fused layer, and the base model's adapters name {', '.join(parts)}; split it"
    return "is no layer of the base model whose shape is known; the adapter belongs to another model"


def _check_values(folder: Path, stream: BinaryIO, tensors: Mapping[str, Tensor], config: _Config) -> str:
    """Read and check all values in the order of the file; return the file's SHA-256."""
    digest = hashlib.sha256()
    stream.seek(0)
    begin = min(tensor.start for tensor in tensors.values())
    for piece in _pieces(stream, begin):
        digest.update(piece)
    for name, tensor in tensors.items():
        bound = LARGEST / max(config.scaling, 1.0) if ".lora_B." in name else LARGEST
        for piece in _pieces(stream, tensor.end - tensor.start):
            digest.update(piece)
            if fault := _fault(piece, tensor.dtype, bound):
                raise AdapterError(
                    f"{folder}/{WEIGHTS}: {short(name)} holds {fault}: every answer would be nonsense; {AGAIN}, or "
                    "train it again"
                )
    return digest.hexdigest()


def _pieces(stream: BinaryIO, length: int) -> Iterator[bytes]:
    """Yield the next `length` bytes in pieces of at most PIECE_BYTES. This size is a multiple of 2 and 4, the sizes of
    a weight in bytes, so no weight of a tensor is divided between two pieces.

    Raises AdapterError if the file has become shorter.
    """
    while length > 0:
        piece = stream.read(min(length, PIECE_BYTES))
        if len(piece) < min(length, PIECE_BYTES):
            raise AdapterError(f"{WEIGHTS} became shorter while it was read; copy the adapter again")
        yield piece
        length -= len(piece)


def _fault(piece: bytes, dtype: str, bound: float) -> str:
    import numpy as np

    if dtype == "BF16":
        values = (np.frombuffer(piece, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(piece, "<f2" if dtype == "F16" else "<f4")
    largest = float(np.abs(values).max())
    if math.isnan(largest):
        return "NaN"
    return "" if largest <= bound else f"numbers above {bound:g} (with lora_alpha / r)"

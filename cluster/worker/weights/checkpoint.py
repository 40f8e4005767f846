"""Checks of a checkpoint's weight files before an engine is built. Only the files' headers are read.

Problem: vLLM finds some damage only after minutes, in a rank and with an unclear reason. Other damage it never finds:
for a missing tensor it uses whatever the memory contains. The checks here compare the files with their own headers and
with config.json. An unknown case (another format, an architecture with its own code) passes, and vLLM decides. Errors
name the file and the remedy.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.api.types import ModelSpec
from cluster.worker.weights.expected_tensors import differences
from cluster.worker.weights.safetensors_header import read_header, short, unique_keys
from cluster.worker.weights.vocabulary import read_bounded, read_json, text_config

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_WEIGHT_FILES = 4096
READS_SAFETENSORS = ("safetensors", "auto", "fastsafetensors", "instanttensor", "runai_streamer")
"""Load formats that read safetensors files."""
LONGEST_HEADER = 100 << 20
"""Greatest number of bytes in a header, which is the limit of safetensors itself."""
MOST_NAMED = 3
"""Greatest number of tensors that an error names."""
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_WEIGHT_FILE = re.compile(r"[A-Za-z0-9_][\w.-]{0,200}\.safetensors")
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_QUANTIZED = ("quantization_config", "compression_config")
_QUANTIZED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
FLOATS = ("F16", "BF16", "F32", "F64")
AGAIN = "fetch or copy the checkpoint again"

MOST_LAYERS = 1000
"""Greatest number of layers in a model built for comparison: more than any known model has, yet quick to build."""

OUTPUT = "lm_head.weight"
ALWAYS_TIED = (
    "CohereForCausalLM",
    "Cohere2ForCausalLM",
    "Cohere2MoeForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3nForCausalLM",
    "Gemma3nForConditionalGeneration",
    "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM",
    "Zamba2ForCausalLM",
)
"""Architectures whose class in vLLM takes the embeddings as output matrix, whatever the checkpoint has."""
PIECE_BYTES = 1 << 20


class CheckpointError(ValueError):
    """An error for damaged or incomplete checkpoint files. The message names the file, the fault and the remedy."""


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers of a checkpoint's safetensors files: shape, dtype and file of each tensor."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def check_weights(spec: ModelSpec, folder: Path) -> None:
    """Raise CheckpointError if weight files are damaged or incomplete, or if their shapes do not match config.json."""
    headers = check_files(spec, folder)
    if headers.shapes and not _is_quantized(folder) and not _overrides_config(spec):
        where = f"models[{spec.name}].source: {folder}"
        _check_experts(where, headers)
        _check_tensors(where, folder, headers)
        _check_output_matrix(where, folder, headers)


def check_files(spec: ModelSpec, folder: Path) -> Headers:
    """Return the headers of the weight files; empty if the load format reads no safetensors files. Raises
    CheckpointError if a file is damaged or missing."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if spec.load_format not in READS_SAFETENSORS or not names:
        return Headers()
    where = f"models[{spec.name}].source: {folder}"
    weight_map = _weight_map(where, folder)
    if weight_map is not None:
        names = _check_indexed_files(where, weight_map, names)
    else:
        _check_shards(where, names)
    headers = _read_headers(where, folder, names)
    if not headers.shapes:
        raise CheckpointError(f"{where}: {listed(names)} holds no tensors; {AGAIN}")
    if lacking := [name for name in weight_map or () if name not in headers.shapes]:
        raise CheckpointError(
            f"{where}: {INDEX} names tensors that no file holds: "
            f"{listed([f'{name} (in {(weight_map or {})[name]})' for name in lacking])}; {AGAIN}"
        )
    return headers


def _weight_map(where: str, folder: Path) -> Mapping[str, str] | None:
    """Return the file of each tensor according to the checkpoint's index; None if there is no index."""
    try:
        return read_index(read_bounded(folder / INDEX, MAX_INDEX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{where}/{INDEX} cannot be read: {error}; {AGAIN}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{where}/{error}") from None


def read_index(content: bytes) -> Mapping[str, str]:
    """Return the file of each tensor according to the content of an index. Raises CheckpointError."""
    try:
        weight_map = json.loads(content.decode(), object_pairs_hook=unique_keys)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        fault = f"has no JSON object weight_map ({type(error).__name__}: {short(error)})"
        raise CheckpointError(f"{INDEX} {_content_fault(content, fault)}") from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX}: weight_map must map tensors to file names; {AGAIN}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _WEIGHT_FILE.fullmatch(name):
            raise CheckpointError(
                f"{INDEX}: weight_map: {short(tensor)}: {short(name)} is not the plain name of a safetensors file in "
                f"the same folder; {AGAIN}"
            )
    if len(set(weight_map.values())) > MAX_WEIGHT_FILES:
        raise CheckpointError(f"{INDEX}: weight_map names more than {MAX_WEIGHT_FILES} files; {AGAIN}")
    return weight_map


def _check_indexed_files(where: str, weight_map: Mapping[str, str], names: Sequence[str]) -> list[str]:
    wanted = sorted(set(weight_map.values()))
    if lacking := [name for name in wanted if name not in names]:
        raise CheckpointError(
            f"{where} lacks {listed(lacking)}, which {INDEX} names: {len(lacking)} of {len(wanted)} weight files "
            f"are not there; {AGAIN}"
        )
    return wanted


def _check_shards(where: str, names: Sequence[str]) -> None:
    """Raise CheckpointError if weight files are missing. Each file's name states how many files there are."""
    for name in names:
        if shard := _SHARD.fullmatch(name):
            stem, _, total = shard.groups()
            expected = [f"{stem}-{number:05}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
            if lacking := [file for file in expected if file not in names]:
                raise CheckpointError(
                    f"{where} lacks {listed(lacking)}: {len(lacking)} of {int(total)} weight files are not there, "
                    f"and neither is {INDEX}; {AGAIN}"
                )


def _read_headers(where: str, folder: Path, names: Sequence[str]) -> Headers:
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    files: dict[str, str] = {}
    for name in names:
        try:
            with safe_open(str(folder / name), framework="np") as file:
                for tensor in file.keys():  # noqa: SIM118 - not a mapping
                    part = file.get_slice(tensor)
                    shapes[tensor], dtypes[tensor] = tuple(part.get_shape()), str(part.get_dtype())
                    files[tensor] = name
        except OSError as error:
            raise CheckpointError(f"{where}/{name} cannot be read: {error}; {AGAIN}") from None
        except (SafetensorError, RecursionError) as error:
            raise CheckpointError(f"{where}/{name} {_file_fault(folder / name, str(error))}") from None
    return Headers(shapes, dtypes, files)


def _file_fault(file: Path, error: str) -> str:
    """Return what is wrong with a file that safetensors cannot read. Most such files are truncated."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(200)
        stream.seek(8)
        length = int.from_bytes(head[:8], "little")
        header = stream.read(length) if length <= min(size, LONGEST_HEADER) else b""
    try:
        tensors: dict[str, Any] = json.loads(header)
        end = max(part["data_offsets"][1] for name, part in tensors.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return _content_fault(head, f"is damaged ({error})")
    if 8 + length + end > size:
        return f"is cut off: it has {size} bytes, and its header describes {8 + length + end}; {AGAIN}"
    return f"is damaged ({error}); {AGAIN}"


def _content_fault(content: bytes, otherwise: str) -> str:
    """Return what is wrong with a file's content, and the remedy.

    `otherwise`: the fault to name if no known fault is found.
    """
    if not content.strip():
        return f"is empty; {AGAIN}"
    if b"git-lfs" in content[:200]:
        return "is a pointer of Git LFS, not the file itself; run `git lfs pull` in the folder"
    return f"{otherwise}; {AGAIN}"


def _is_quantized(folder: Path) -> bool:
    """Return whether the checkpoint is quantized.

    Tensors of a quantized checkpoint can differ from the architecture in name, type and shape.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    return any(part.get(name) for part in parts for name in _QUANTIZED) or any(
        (folder / name).exists() for name in _QUANTIZED_FILES
    )


def _overrides_config(spec: ModelSpec) -> bool:
    """Return whether the catalog entry overrides config.json, or lets vLLM start although tensors are missing."""
    loader = spec.engine.get("model_loader_extra_config")
    return "hf_overrides" in spec.engine or (isinstance(loader, dict) and loader.get("enable_weights_track") is False)


def _check_experts(where: str, headers: Headers) -> None:
    """Raise CheckpointError if the experts of a layer differ in their tensors' names or shapes."""
    layers: dict[str, dict[str, dict[int, tuple[int, ...]]]] = {}
    for name, shape in headers.shapes.items():
        if match := _EXPERT.fullmatch(name):
            layers.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = shape
    for layer, tensors in layers.items():
        experts = sorted(set().union(*tensors.values()))
        lacking = [
            f"{layer}.{expert}.{name}" for name, have in tensors.items() for expert in experts if expert not in have
        ]
        if lacking:
            raise CheckpointError(f"{where}: no file holds the tensors {listed(lacking)}; {AGAIN}")
        for name, have in tensors.items():
            usual = Counter(have.values()).most_common(1)[0][0]
            if odd := [expert for expert in experts if have[expert] != usual]:
                tensor = f"{layer}.{odd[0]}.{name}"
                raise CheckpointError(
                    f"{where}: {tensor} in {headers.files[tensor]} has the shape {list(have[odd[0]])} where other "
                    f"experts have {list(usual)}; {AGAIN}"
                )


def _check_tensors(where: str, folder: Path, headers: Headers) -> None:
    floats = {name: shape for name, shape in headers.shapes.items() if headers.dtypes[name] in FLOATS}
    if len(floats) < len(headers.shapes) / 2:
        return  # packed in a way that config.json does not describe
    layers = text_config(read_json(folder / "config.json")).get("num_hidden_layers")
    if isinstance(layers, int) and layers > max(MOST_LAYERS, len(headers.shapes)):
        raise CheckpointError(
            f"{where}: num_hidden_layers of config.json is {layers}, and the files hold {len(headers.shapes)} tensors; "
            "correct config.json, or fetch it again"
        )
    compared = differences(folder, headers.shapes)
    if compared.missing:
        raise CheckpointError(
            f"{where}: no file holds the tensors {listed(compared.missing)}, which the model of config.json has "
            f"({len(compared.missing)} of {compared.expected}); {AGAIN}, or correct config.json. A model that needs "
            "none of them is served with engine.model_loader_extra_config: {enable_weights_track: false}"
        )
    if compared.misshapen:
        texts = [
            f"{name}{f' in {headers.files[name]}' if name in headers.files else ''} has the shape {list(has)} where "
            f"config.json asks for {list(wanted)}"
            for name, has, wanted in compared.misshapen
        ]
        raise CheckpointError(f"{where}: {listed(texts)}; {AGAIN}, or correct config.json")


def _check_output_matrix(where: str, folder: Path, headers: Headers) -> None:
    """Raise CheckpointError if vLLM would ignore the checkpoint's output matrix and answer otherwise than it does."""
    architectures = read_json(folder / "config.json").get("architectures")
    ignoring = [name for name in ALWAYS_TIED if isinstance(architectures, list) and name in architectures]
    inner = [name for name in headers.shapes if name.endswith("embed_tokens.weight")]
    if not ignoring or OUTPUT not in headers.shapes or len(inner) != 1:
        return
    if not _are_equal(folder, headers, OUTPUT, inner[0]):
        raise CheckpointError(
            f"{where}/{headers.files[OUTPUT]}: {OUTPUT} differs from {inner[0]}, but vLLM's {ignoring[0]} has no "
            f"output matrix and takes the embeddings; serve another model, or remove {OUTPUT} if it is not meant"
        )


def _are_equal(folder: Path, headers: Headers, one: str, other: str) -> bool:
    """Return whether two tensors have the same type, shape and bytes."""
    if headers.dtypes[one] != headers.dtypes[other] or headers.shapes[one] != headers.shapes[other]:
        return False
    with contextlib.ExitStack() as opened:
        streams = []
        for name in (one, other):
            file = folder / headers.files[name]
            stream = opened.enter_context(file.open("rb"))
            tensor = read_header(stream, file.stat().st_size)[name]
            stream.seek(tensor.start)
            streams.append(stream)
        left = tensor.end - tensor.start
        while left > 0:
            piece, same = (stream.read(min(left, PIECE_BYTES)) for stream in streams)
            if piece != same:
                return False
            left -= PIECE_BYTES
    return True


def listed(names: Sequence[str]) -> str:
    """Return the first MOST_NAMED names and the number of the others."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")

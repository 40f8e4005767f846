"""Memory of GPUs by Ray's accelerator types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

GIB: Final = 1 << 30
GPU_GIB: Final[Mapping[str, float]] = {
    "T4": 14.6,
    "V100": 15.8,
    "A10": 22.1,
    "A10G": 22.1,
    "L4": 22.0,
    "L40S": 44.4,
    "RTX-4090": 23.6,
    "RTX-5090": 31.4,
    "A100": 79.2,
    "A100-40G": 39.4,
    "A100-80G": 79.2,
    "H100": 79.1,
    "H20": 95.1,
    "H200": 139.8,
    "GH200": 94.5,
    "B200": 178.4,
    "B300": 267.6,
    "MI300X": 191.5,
    "MI325X": 255.8,
    "MI355X": 287.6,
}
"""Memory in GiB that a process sees: less than the size by which the GPU is sold."""
_BY_SIZE: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?GI?B?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A type of GPU and its memory in bytes."""

    name: str
    memory: int


def in_gib(size: float) -> str:
    """Return a number of bytes as GPUs' memory is written."""
    return f"{size / GIB:.1f} GiB"


def gpu(name: str) -> Gpu | None:
    """Return the GPU of a type such as H100, or of a size such as 24GiB; None for an unknown type."""
    by_lower = {known.lower().replace("-", ""): (known, size) for known, size in GPU_GIB.items()}
    word = re.sub(r"^(nvidia|amd|instinct)[ -]|[ -_](sxm\d?|pcie|nvl)\b", "", name.strip(), flags=re.IGNORECASE)
    if (found := by_lower.get(word.lower().replace("-", ""))) is not None:
        return Gpu(found[0], int(found[1] * GIB))
    if sized := _BY_SIZE.fullmatch(name.strip()):
        return Gpu(name.strip(), int(float(sized[1]) * GIB))
    return None

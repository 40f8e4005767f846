"""A frozen dataclass that is cheap to create.

An instance of `dataclass(frozen=True)` sets each field by a function call, which costs ten times as much as an
assignment. That is too slow for classes with many fields and several new instances for each call. The decorator of
this module does not freeze instances: only the type checker refuses assignments to their fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen_dataclass(cls: type[T]) -> type[T]:
    """Decorate a class like `dataclass(frozen=True, slots=True)`, but let only the type checker refuse assignments."""
    return dataclass(slots=True, unsafe_hash=True)(cls)

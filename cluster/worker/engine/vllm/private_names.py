"""Tables of vLLM's private names, and whether this vLLM has them.

A table maps a dotted path to the names used on it: parameters of a function or method, fields of a class. Names move
between releases; a table that is checked at start turns a surprise in the middle of a request into a sentence.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def resolve(path: str) -> Any:
    """The object at a dotted path: a module's attribute, or deeper. Raises ImportError, AttributeError."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ImportError(path)


def _names(symbol: Any) -> set[str]:
    names = set(getattr(symbol, "__struct_fields__", ())) | set(getattr(symbol, "_fields", ()))
    names |= set(getattr(symbol, "__members__", ()))
    if dataclasses.is_dataclass(symbol):
        names |= {field.name for field in dataclasses.fields(symbol)}
    if callable(symbol):
        names |= set(inspect.signature(symbol).parameters)
    return names


def digest(path: str) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a function's source, that of the first where others are wrapped
    around it (functools.wraps). Raises ImportError, AttributeError, OSError."""
    return hashlib.sha256(inspect.getsource(resolve(path)).encode()).hexdigest()[:16]


def missing(symbols: Mapping[str, Sequence[str]]) -> list[str]:
    """The entries of the table that this vLLM does not have, as `path` or `path: name`; empty when all is there."""
    lacking = []
    for path, fields in symbols.items():
        try:
            symbol = resolve(path)
            names = _names(symbol) if fields else set()
        except (ImportError, AttributeError, ValueError):
            lacking.append(path)
            continue
        lacking += [f"{path}: {field}" for field in fields if field not in names]
    return lacking

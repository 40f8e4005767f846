"""Checks whether the installed vLLM has the private names that this code uses.

Private names change between releases of vLLM. So they are listed in tables and checked at start, which gives a clear
reason instead of a failure within a request. A table maps the dotted path of a function or class to the names of the
parameters or fields that this code uses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def resolve(path: str) -> Any:
    """Return the object at a dotted path. Raises ImportError, AttributeError.

    The path is a module's path, followed by names of attributes (for example a class and a method).
    """
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            target: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            target = getattr(target, name)
        return target
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
    """Return the first 16 hexadecimal digits of the SHA-256 of a function's source. `path`: the function's dotted path.

    For a wrapped function (functools.wraps), the source of the innermost function counts. Raises ImportError,
    AttributeError, OSError.
    """
    return hashlib.sha256(inspect.getsource(resolve(path)).encode()).hexdigest()[:16]


def missing(symbols: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names in `symbols` that the installed vLLM does not have. `symbols` maps a dotted path to names of
    fields. A missing path is returned as `path`, a missing field as `path: name`."""
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

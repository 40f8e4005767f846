"""Descriptions of configuration keys, from the docstrings below the attributes of the sections.

The source code is read only when descriptions are wanted, since no process of a cluster needs them.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from cluster.config.schema import Config


def attribute_docstrings(owner: type) -> dict[str, str]:
    """Return the docstring of each attribute of a class and of its base classes, by attribute name."""
    found: dict[str, str] = {}
    for base in (base for base in reversed(owner.__mro__) if base.__module__.startswith("cluster.")):
        body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(base)).body[0]).body
        for statement, below in itertools.pairwise(body):
            target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
            if isinstance(target, ast.Name) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                found[target.id] = " ".join(str(below.value.value).split())
    return found


def sections_in(hint: Any) -> Iterator[type[BaseModel]]:
    """Yield the classes of the configuration sections in a type hint."""
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        yield hint
    for inner in typing.get_args(hint):
        yield from sections_in(inner)


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of cluster.yaml, with a description of every key."""
    schema = Config.model_json_schema(by_alias=True)
    waiting: list[type[BaseModel]] = [Config]
    described = set[type[BaseModel]]()
    while waiting:
        section = waiting.pop()
        if section in described:
            continue
        described.add(section)
        place = schema if section is Config else schema["$defs"][section.__name__]
        texts = attribute_docstrings(section)
        for name, field in section.model_fields.items():
            inner = [*sections_in(field.annotation)]
            waiting += inner
            text = texts.get(name) or next((inspect.getdoc(one) for one in inner), None)
            if text:
                place["properties"][field.alias or name].setdefault("description", " ".join(text.split()))
    return schema

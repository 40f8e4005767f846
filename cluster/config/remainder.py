"""A document of cluster.yaml without its wrong keys, so that what is left can be checked too. Pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config.problems import Path

LEFT_OUT = "left-out"
"""The name, with its position, of an entry that stands for one that could not be mended."""


def without(data: Any, paths: Sequence[Path]) -> Any:
    """A copy of a document without the values at these paths, as far as they are there. Items of `models`, `tenants`
    and `ray` become items that are right, so that the others keep their positions. None when nothing is left."""
    made = copy.deepcopy(data)
    for path in paths:
        if not _take_out(made, path):
            return None
    return made


_PLACEHOLDERS: Mapping[str, Mapping[str, Any]] = {
    "models": {"source": "demo://smollm2"},
    "tenants": {},
    "ray": {"dashboard_url": "http://127.0.0.1:8265"},
}
_OF_A_MODEL: Mapping[str, str] = {"name": f"{LEFT_OUT}-{{}}", "source": "demo://smollm2"}
_REPLACED: Mapping[str, Any] = {"api_version": "headrace/v1", "name": LEFT_OUT, "models": []}


def _take_out(data: Any, path: Path) -> bool:
    depth, node = 0, data
    while depth < len(path) and _has(node, path[depth]):
        node = node[path[depth]]
        depth += 1
    while depth:
        parent = data
        for key in path[: depth - 1]:
            parent = parent[key]
        last = path[depth - 1]
        if depth == 1 and last in _REPLACED:
            changed = bool(parent[last] != _REPLACED[str(last)])
            parent[last] = copy.deepcopy(_REPLACED[str(last)])
            return changed
        if isinstance(last, int) and path[depth - 2] == "aliases":
            parent[last] = "-".join(map(str, (LEFT_OUT, *path[1:depth:2])))
            return True
        if isinstance(last, int) and depth == 2 and path[0] in _PLACEHOLDERS:
            placeholder = {"name": f"{LEFT_OUT}-{last}", **_PLACEHOLDERS[str(path[0])]}
            if parent[last] == placeholder:
                depth -= 1
                continue
            parent[last] = placeholder
            return True
        if path[0] == "models" and depth == 3 and last in _OF_A_MODEL:
            parent[last], before = _OF_A_MODEL[str(last)].format(path[1]), parent[last]
            if parent[last] != before:
                return True
        elif isinstance(last, str):
            del parent[last]
            return True
        depth -= 1  # an item of another list: the whole list
    return False


def _has(node: Any, key: str | int) -> bool:
    if isinstance(node, dict):
        return key in node
    return isinstance(node, list) and isinstance(key, int) and key < len(node)

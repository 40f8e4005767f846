"""Removes the invalid keys from a cluster.yaml document so that the rest can be checked too. Pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config.problems import Path

LEFT_OUT = "left-out"
"""Prefix of the name of a placeholder for an invalid list item. The item's position follows the prefix."""


def without(data: Any, paths: Sequence[Path]) -> Any:
    """Return a copy of a document without the values at `paths`, or None if a value cannot be removed.

    Items of `models`, `tenants` and `ray` are replaced by valid placeholders, so that the other items keep their
    positions.
    """
    remaining = copy.deepcopy(data)
    for path in paths:
        if not _remove(remaining, path):
            return None
    return remaining


_PLACEHOLDERS: Mapping[str, Mapping[str, Any]] = {
    "models": {"source": "demo://smollm2"},
    "tenants": {},
    "ray": {"dashboard_url": "http://127.0.0.1:8265"},
}
_MODEL_REPLACEMENTS: Mapping[str, str] = {"name": f"{LEFT_OUT}-{{}}", "source": "demo://smollm2"}
_REPLACEMENTS: Mapping[str, Any] = {"api_version": "headrace/v1", "name": LEFT_OUT, "models": []}


def _remove(data: Any, path: Path) -> bool:
    """Remove or replace the value at a path, or the nearest parent that can be removed or replaced.

    Returns False if nothing can be removed or replaced.
    """
    depth, node = 0, data
    while depth < len(path) and _has(node, path[depth]):
        node = node[path[depth]]
        depth += 1
    while depth:
        parent = data
        for key in path[: depth - 1]:
            parent = parent[key]
        last = path[depth - 1]
        if depth == 1 and last in _REPLACEMENTS:
            changed = bool(parent[last] != _REPLACEMENTS[str(last)])
            parent[last] = copy.deepcopy(_REPLACEMENTS[str(last)])
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
        if path[0] == "models" and depth == 3 and last in _MODEL_REPLACEMENTS:
            parent[last], before = _MODEL_REPLACEMENTS[str(last)].format(path[1]), parent[last]
            if parent[last] != before:
                return True
        elif isinstance(last, str):
            del parent[last]
            return True
        depth -= 1  # an item of another list is removed with the whole list
    return False


def _has(node: Any, key: str | int) -> bool:
    if isinstance(node, dict):
        return key in node
    return isinstance(node, list) and isinstance(key, int) and key < len(node)

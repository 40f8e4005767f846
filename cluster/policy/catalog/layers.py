"""Merging of layered catalog files, and the differences between two catalogs. Entries are plain values. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.api.catalog import Change, Difference

Entry = Mapping[str, Any]


def merge_layers(layers: Sequence[Sequence[Entry]]) -> tuple[dict[str, Any], ...]:
    """Merge layers of entries into one catalog, by model name; later layers override earlier layers.

    Mappings are merged key by key. Other values are replaced whole, and null removes a key. Models are returned in the
    order in which their names first appear. Raises ValueError for an entry without a name, and for a name that occurs
    twice in one layer.
    """
    merged: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(layers):
        seen: set[str] = set()
        for i, entry in enumerate(layer):
            name = entry.get("name") if isinstance(entry, Mapping) else None
            if not isinstance(name, str) or not name:
                raise ValueError(f"layer {number + 1}: models[{i}]: has no name")
            if name in seen:
                raise ValueError(f"layer {number + 1}: models[{i}]: {name!r} occurs twice in one file")
            seen.add(name)
            merged[name] = _merge(merged.get(name, {}), entry)
    return tuple(merged.values())


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            old = merged.get(key)
            merged[key] = _merge(old if isinstance(old, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def apply_entries(now: Sequence[Entry], given: Sequence[Entry], *, prune: bool) -> tuple[dict[str, Any], ...]:
    """Return the catalog `now` with the entries `given` applied.

    A given entry replaces the current entry of the same name. The other current entries are kept, or removed if `prune`
    is set.
    """
    new = {str(entry["name"]): dict(entry) for entry in given}
    kept = {str(entry["name"]): dict(entry) for entry in now if not prune or entry["name"] in new}
    return tuple((kept | new).values())


def promote_canary(entry: Entry) -> dict[str, Any]:
    """Return the entry with the canary promoted to the stable version. Raises KeyError for an entry without a
    canary."""
    canary = entry["canary"]
    own = {key: value for key, value in canary.items() if key not in ("weight", "rollback")}
    new = {key: value for key, value in entry.items() if key not in ("canary", "digest")}
    return new | own


def diff(now: Mapping[str, Entry], then: Mapping[str, Entry], restarts: Mapping[str, str]) -> tuple[Change, ...]:
    """Differences between two catalogs, sorted by model name.

    `restarts`: the reason why a model's replicas restart, by model. Models whose replicas keep running are absent.
    """
    listed = []
    for name in sorted(now.keys() | then.keys()):
        before, after = now.get(name), then.get(name)
        if before == after:
            continue
        kind = "add" if before is None else "remove" if after is None else "change"
        differences = tuple(_differences("", before or {}, after or {})) if kind == "change" else ()
        listed.append(Change(name, kind, differences, restarts.get(name, "")))
    return tuple(listed)


def _differences(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    differences: list[Difference] = []
    for key in sorted(before.keys() | after.keys()):
        old, new, where = before.get(key), after.get(key), f"{path}{key}"
        if old == new:
            continue
        if isinstance(old or {}, Mapping) and isinstance(new or {}, Mapping):  # a section in one entry or in both
            differences += _differences(f"{where}.", old or {}, new or {})
        else:
            differences.append(Difference(where, old, new))
    return differences

"""Conversion of a model spec to JSON, and the digest that decides whether replicas must be restarted. All functions are
pure."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

from cluster.api.types import ModelSpec

# Fields that do not affect replicas. The gateway uses the names, shares and fallbacks. Scaling changes the counts. The
# Ray cluster is part of the surroundings. Setting `digest` to the weights that already run needs no restart.
_NOT_THE_REPLICAS = (
    "aliases",
    "min_replicas",
    "max_replicas",
    "idle_s",
    "slo_ttft_s",
    "slo_itl_s",
    "slo_target",
    "digest",
    "license",
    "ray",
    "fallback",
    "weight",
    "error_ratio",
    "ttft_ratio",
)
_LISTS = ("aliases", "fallback")


def to_json(spec: ModelSpec) -> dict[str, object]:
    """Return the spec as plain JSON values; `from_json` is the inverse, except for `sampling`, which is left out:
    replicas do not need it, and replicas of older releases refuse it."""
    values = dataclasses.asdict(spec)
    values |= {name: list(values[name]) for name in _LISTS}
    values["engine"] = dict(spec.engine)
    del values["sampling"]
    return values


def from_json(values: Mapping[str, object]) -> ModelSpec:
    """Return the spec from JSON values; the inverse of `to_json`. Raises ValueError for an unknown key."""
    known = {f.name for f in dataclasses.fields(ModelSpec)}
    for key in values:
        if key not in known:
            raise ValueError(f"spec: unknown key {key!r}")
    plain: dict[str, object] = dict(values)
    plain |= {name: tuple(value) for name in _LISTS if isinstance(value := plain.get(name), list)}
    return ModelSpec(**plain)  # type: ignore[arg-type]


def digest(spec: ModelSpec, surroundings: Mapping[str, object]) -> str:
    """Return the digest of everything that a replica is started with, as 16 hex digits.

    The digest covers the fields of `spec` that affect replicas, and `surroundings` (JSON values).
    """
    seen = {key: value for key, value in to_json(spec).items() if key not in _NOT_THE_REPLICAS}
    if spec.control_tokens_in_content == "keep":  # as in digests from before this field, so nothing restarts
        del seen["control_tokens_in_content"]
    text = json.dumps([seen, dict(surroundings)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Data types for adapters (LoRA). An adapter is a small set of weights that changes a base model, and that
the model's workers load without a restart.

Everywhere below the gateway (on the link, in the engine and in the cache index) an adapter is named by
its digest.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

ADAPTERS = "adapters:v1"
"""Capability: the worker loads adapters that its gateways name, and reports their states."""

SEPARATOR = ":"
"""Separator of model and adapter in the name that callers use: `model:adapter`."""

OTHER_FILES = "it has other files"
"""Start of the reason for which a worker does not have an adapter whose files have another digest than the catalog
names. A worker has other files until it has received the new digest."""


def full_name(model: str, adapter: str) -> str:
    """Return the name that callers use: `model:adapter`, or only `model` if `adapter` is ""."""
    return f"{model}{SEPARATOR}{adapter}" if adapter else model


class AdapterState(enum.StrEnum):
    """State of an adapter on a worker. A list of adapters shows one state for each adapter, combined from all workers.
    The names are those of link.v1 AdapterStatus.State."""

    LOADING = "LOADING"
    READY = "READY"
    """Requests for the adapter are accepted: the worker has its weights, in the engine's memory or on disk."""
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter of a model, as configured or loaded at run time.

    `source`: location of the files, in the same form as the source of a model's weights. `digest`: SHA-256 of the
    adapter's files as lower-case hex; empty until a worker or the controller has read the files. `tenants`: the tenants
    that may use the adapter; empty for every tenant that may use the model. `pinned`: the engine never drops this
    adapter to load another one. `version`: the only version of the model that has the adapter; empty for all versions.
    `load_number`: number of the request that loaded the adapter at run time, higher for a later request; 0 for an
    adapter of the model's entry.
    """

    name: str
    source: str
    digest: str = ""
    tenants: tuple[str, ...] = ()
    pinned: bool = False
    license: str = ""
    version: str = ""
    load_number: int = 0

    def as_entry(self) -> dict[str, Any]:
        """Return the adapter as an entry of `models[].adapters`, without its load number."""
        entry = asdict(self)
        del entry["load_number"]
        return entry


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """State of an adapter on one worker. `reason`: why the adapter could not be loaded. `resident`: whether the adapter
    is in a slot of the engine. If not, a request waits until the adapter is copied into a slot. `load_number`: the
    number in the adapter's spec on the worker; 0 if the spec has none, and on a worker of an older release."""

    name: str
    digest: str
    state: AdapterState
    reason: str = ""
    resident: bool = False
    load_number: int = 0

    def is_of(self, spec: AdapterSpec) -> bool:
        """Return whether this is the state of `spec`, not of another load of the same name. True if the worker reports
        no number."""
        return self.load_number in (0, spec.load_number)

"""Ports: small interfaces (`typing.Protocol`), each with a fake or a simulation for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.api.kv_events import KvEvent
from cluster.api.types import EngineInfo, EngineLoad, EngineRequest, TokenOutput


class EngineDead(Exception):
    """Raised when the engine has stopped permanently. The engine's process must exit, so that Ray sees a dead actor at
    once."""


class EngineCorrupt(EngineDead):
    """Raised when the engine runs but returns wrong results. The message names the engine's node.

    The engine is treated like a dead engine.
    """


class EngineRefused(Exception):
    """Raised when the engine rejects a request and keeps running.

    `reason` is the name of an Outcome. `field` is the invalid field of the request, or "".
    """

    def __init__(self, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field


class Engine(Protocol):
    """An inference engine that runs requests step by step.

    A single reader calls `step`. Calls of `submit` and `abort` may interleave with `step`.
    tests/worker/engine/contract.py checks that every implementation keeps these rules:

    - A request's outputs come in order and end with exactly one `finish`. After `abort` the request has no further
      outputs.
    - An aborted request frees its slot within two steps.
    - A refused request has no outputs.
    - Equal requests with temperature 0 generate equal tokens, alone or in a batch.
    """

    async def start(self) -> EngineInfo:
        """Load and warm up the engine, and return once requests are accepted.

        Raises ValueError for settings that cannot work.
        """

    async def submit(self, request: EngineRequest) -> None:
        """Accept a request without blocking the event loop. Raises EngineRefused for a bad request, or EngineDead."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests. Aborted requests get no final output; unknown request ids are ignored."""

    async def step(self) -> Sequence[TokenOutput]:
        """Wait for the next step that has outputs, and return all outputs of that step. Raises EngineDead."""

    def load(self) -> EngineLoad:
        """Return the engine's current load. The call is cheap."""

    async def check(self) -> None:
        """Raise EngineDead if the engine is known to be dead. The check does not wait for a step."""

    async def close(self) -> None:
        """Stop the engine and every process that the engine has started."""


class KvEventSource(Protocol):
    """The events of an engine's prefix cache. A single reader calls `kv_events`, starting before the first request."""

    async def kv_events(self) -> Sequence[KvEvent]:
        """Wait for further events and return them in the engine's order. A cancelled wait loses nothing."""


class AdapterEngine(Protocol):
    """The methods of an engine that loads adapters. They are called only if EngineInfo.adapter_slots is above 0.

    The caller has checked the files against the base model (worker/weights/adapter.py), and keeps the files in place
    while the adapter is loaded.
    """

    async def load_adapter(self, digest: str, folder: str, *, pinned: bool) -> None:
        """Load the adapter's files into the engine's memory. Returns when requests for `digest` can be submitted.
        `pinned`: the engine must not drop the adapter by itself.

        Raises EngineRefused with the reason ADAPTER_INVALID if the engine rejects the files and keeps running,
        EngineCorrupt if the engine must be replaced, and EngineDead if the engine is dead.
        """

    async def unload_adapter(self, digest: str) -> None:
        """Unload an adapter. The engine refuses new requests for the adapter at once; running requests continue.

        Returns when the adapter's last request has ended and the adapter's memory is free. An unknown digest is
        ignored. Raises EngineDead.
        """

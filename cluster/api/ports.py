"""Ports: small protocols, each with a fake or a simulation for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.api.types import EngineInfo, EngineLoad, EngineRequest, TokenOutput


class EngineDead(Exception):
    """The engine has stopped permanently; its process must exit so that Ray sees a dead actor at once."""


class EngineCorrupt(EngineDead):
    """The engine runs and returns wrong results; it is treated like a dead one. The message names its node."""


class EngineRefused(Exception):
    """The engine rejects this request and keeps running. `reason` names an Outcome, `field` the request's field."""

    def __init__(self, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field


class Engine(Protocol):
    """An inference engine that runs requests step by step.

    A single reader calls `step`; `submit` and `abort` may interleave with it. tests/worker/engine/contract.py checks
    that every implementation keeps these rules:

    - A request's outputs come in order and end with exactly one `finish`; after `abort` there are no further ones.
    - An aborted request frees its slot within two steps.
    - A refused request has no outputs.
    - Equal requests with temperature 0 generate equal tokens, alone or in a batch.
    """

    async def start(self) -> EngineInfo:
        """Load and warm up; return when requests are accepted. Raises ValueError for settings that cannot work."""

    async def submit(self, request: EngineRequest) -> None:
        """Accept a request without blocking the event loop. Raises EngineRefused for a bad request, or EngineDead."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Abort requests without a final output; unknown ids are ignored."""

    async def step(self) -> Sequence[TokenOutput]:
        """Wait for the next step that has outputs and return all of them. Raises EngineDead."""

    def load(self) -> EngineLoad:
        """Return the engine's current load; cheap."""

    async def check(self) -> None:
        """Raise EngineDead if the engine is known to be dead; does not wait for a step."""

    async def close(self) -> None:
        """Stop the engine and every process that it has started."""

"""The seams: small protocols with a fake (or a simulation) beside each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cluster.api.types import EngineInfo, EngineLoad, EngineRequest, TokenOutput


class EngineDead(Exception):
    """The engine has stopped for good; its process must end so that Ray sees a dead actor at once."""


class EngineSick(EngineDead):
    """The engine runs and answers wrongly; it goes the way of a dead one. The message names its node."""


class EngineRefused(Exception):
    """The engine does not take this request, and is unharmed. `reason` names an Outcome, `field` a field."""

    def __init__(self, reason: str, message: str, field: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field = field


class Engine(Protocol):
    """Runs requests to their end, step by step. One reader calls `step`; submit and abort may interleave with it.

    Laws (tests/worker/engine/contract.py holds every implementation to them): outputs of a request come in order and
    end with exactly one `finish`, or with nothing more after `abort`; after `abort` its place is free within two steps;
    a refused request has no outputs; equal requests with temperature 0 give equal tokens, alone or in a batch.
    """

    async def start(self) -> EngineInfo:
        """Load and warm up; returns once requests can be taken. Raises ValueError for what cannot work."""

    async def submit(self, request: EngineRequest) -> None:
        """Take a request. Raises EngineRefused (the request is at fault) or EngineDead. Never blocks the loop long."""

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Drop requests; unknown ids are ignored. No final output comes for them."""

    async def step(self) -> Sequence[TokenOutput]:
        """Wait for the next step that has outputs and return all of them. Raises EngineDead."""

    def load(self) -> EngineLoad:
        """What the engine is doing now; cheap."""

    async def check(self) -> None:
        """Raise EngineDead if the engine is known to be dead; does not wait for a step."""

    async def close(self) -> None:
        """End the engine and every process it has started."""

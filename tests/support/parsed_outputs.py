"""The output parser of a worker whose engine makes parsed outputs itself, for tests."""

from __future__ import annotations

from cluster.api.types import EngineRequest
from cluster.worker.parsing.port import NoParsers


class ParsedByEngine(NoParsers):
    """An output parser that leaves `parsing` and the outputs to the engine."""

    async def open(self, request: EngineRequest) -> EngineRequest:
        """Return the request unchanged."""
        return request

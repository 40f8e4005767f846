"""An output parser for test workers whose engine returns parsed outputs itself."""

from __future__ import annotations

from cluster.api.types import EngineRequest
from cluster.worker.parsing.port import NoParsers


class ParsedByEngine(NoParsers):
    """An output parser that leaves all parsing to the engine."""

    async def open(self, request: EngineRequest) -> EngineRequest:
        """Return the request unchanged."""
        return request

"""Client that sends prepared request bodies. Every server gets the same bytes."""

from __future__ import annotations

from collections.abc import Mapping

from loadtests.faces.base import Request
from loadtests.faces.openai_sse import OpenAiSse


class PreparedBodies(OpenAiSse):
    """Client of OpenAI's API with server-sent events. It looks up the body of a call by the key of the request."""

    def __init__(self, url: str, bodies: Mapping[str, bytes], *, api_key: str = "") -> None:
        """Store the address and the bodies. A caller may add and remove bodies at any time."""
        super().__init__(url, "", api_key=api_key)
        self._bodies = bodies

    def body(self, request: Request) -> bytes:
        """Return the prepared body of a request. Raises KeyError if there is none."""
        return self._bodies[request.key]

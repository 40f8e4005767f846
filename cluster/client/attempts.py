"""The calls of one stream of a Client or AsyncClient: the first call, and the calls that resume the stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.client.errors import UNREACHABLE, HeadraceError
from cluster.client.gateways import GatewayList
from cluster.client.resume import Resumption

Method = Callable[[Any], Callable[..., Any]]
"""Type of functions that return a method of a given gRPC stub."""


@dataclass(eq=False)
class StreamAttempts:
    """The calls that serve one stream: the first call, then one call for each resume. `method`: gRPC method of the
    first call."""

    gateways: GatewayList[Any, Any]
    method: Method
    resumption: Resumption
    request_id: str
    metadata: tuple[tuple[str, str], ...]
    call: Any = field(default=None, init=False)
    """The current call; None before `start` is called."""
    _endpoint: str = field(default="", init=False)

    @property
    def endpoint(self) -> str:
        """The endpoint of the gateway to which the current call was sent."""
        return self._endpoint

    def start(self) -> None:
        """Start the first call."""
        self.call = self._begin(self.resumption.request, self.method)

    def pause_after(self, failed: HeadraceError) -> float | None:
        """Return the seconds to wait before the stream is resumed, or None if the failure ends the stream.

        If the gateway did not answer, the client uses the next gateway from now on.
        """
        if failed.reason == UNREACHABLE:
            self.gateways.switch_from(self.endpoint)
        return self.resumption.pause_s(failed)

    def resume(self) -> None:
        """Switch to the next gateway and resume the stream. If no resume token was received, start the first call
        again."""
        self.gateways.switch_from(self.endpoint)
        request = self.resumption.resume_request
        if request is None:
            self.start()
        else:
            self.call = self._begin(request, lambda stub: stub.Resume)

    def _begin(self, request: Any, method: Method) -> Any:
        self._endpoint = self.gateways.endpoint
        return method(self.gateways.stub)(request, timeout=self.resumption.remaining_s, metadata=self.metadata)

"""The gateways of a client. The client uses one gateway, and switches to the next if the gateway does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Channel = TypeVar("Channel")
Stub = TypeVar("Stub")


class GatewayList(Generic[Channel, Stub]):
    """Gateway endpoints, with one channel per endpoint. A channel is opened on first use. Thread-safe."""

    def __init__(self, endpoints: Sequence[str], connect: Callable[[str], tuple[Channel, Stub]]) -> None:
        self.endpoints = tuple(endpoints)
        self._connect = connect
        self._current = 0
        self._channels: dict[str, tuple[Channel, Stub]] = {}
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """The endpoint that the client uses now."""
        return self.endpoints[self._current]

    @property
    def stub(self) -> Stub:
        """The gRPC stub of the endpoint that the client uses now."""
        with self._lock:
            endpoint = self.endpoint
            opened = self._channels.get(endpoint)
            if opened is None:
                opened = self._channels[endpoint] = self._connect(endpoint)
            return opened[1]

    def switch_from(self, failed: str) -> None:
        """Use the next endpoint. Does nothing if another thread has already switched from `failed`."""
        with self._lock:
            if self.endpoint == failed:
                self._current = (self._current + 1) % len(self.endpoints)

    @property
    def channels(self) -> Sequence[Channel]:
        """All channels that were opened so far."""
        return [channel for channel, _ in self._channels.values()]

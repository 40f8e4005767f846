"""The gateways that a client may ask: one at a time, the next when that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Channel = TypeVar("Channel")
Stub = TypeVar("Stub")


class GatewayList(Generic[Channel, Stub]):
    """Channels are made when they are first needed. Safe to share between threads."""

    def __init__(self, endpoints: Sequence[str], make: Callable[[str], tuple[Channel, Stub]]) -> None:
        self.endpoints = tuple(endpoints)
        self._make = make
        self._at = 0
        self._made: dict[str, tuple[Channel, Stub]] = {}
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        """The one that is asked now."""
        return self.endpoints[self._at]

    @property
    def stub(self) -> Stub:
        """Its methods."""
        with self._lock:
            endpoint = self.endpoint
            made = self._made.get(endpoint)
            if made is None:
                made = self._made[endpoint] = self._make(endpoint)
            return made[1]

    def turn(self, failed: str) -> None:
        """This one did not answer: ask the next, unless somebody has turned away from it already."""
        with self._lock:
            if self.endpoint == failed:
                self._at = (self._at + 1) % len(self.endpoints)

    @property
    def channels(self) -> Sequence[Channel]:
        """All that were made."""
        return [channel for channel, _ in self._made.values()]

"""Delivery of KV events from a worker to a gateway: delayed, in order, and sometimes lost.

A batch arrives after a random delay, but never before an earlier batch. The gateway notices a lost batch when a batch
or heartbeat with a later number arrives. The lost batch is then sent again; later batches wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from cluster.policy.kv_cache.changes import KvChange
from loadtests.sim.events import EventQueue

HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class Lateness:
    """Delivery of batches: the delay of a batch in seconds is uniform in [`least_s`, `most_s`]. The share `lost` of the
    batches is lost and sent again."""

    least_s: float = 0.05
    most_s: float = 0.5
    lost: float = 0.01


class KvFeed:
    """Transfer of one worker's KV event batches to one gateway. Every batch is applied once, in order."""

    def __init__(self, events: EventQueue, rng: Random, lateness: Lateness, apply: Callable[[KvChange], None]) -> None:
        self._events = events
        self._rng = rng
        self._lateness = lateness
        self._apply = apply
        self._sent: dict[int, KvChange] = {}
        """Batches that are not applied yet."""
        self._number = 0
        self._last_arrival = 0.0
        self._next = 0
        self._arrived: set[int] = set()
        self._asked: set[int] = set()
        self.is_open = True
        self.lost = 0

    def send(self, change: KvChange) -> None:
        """Send a batch."""
        number = self._number
        self._number += 1
        self._sent[number] = change
        if self._rng.random() < self._lateness.lost:
            self.lost += 1
            self._events.after(HEARTBEAT_S, lambda: self._notice(number + 1))
            return
        self._last_arrival = max(self._last_arrival, self._events.now + self._delay_s())
        self._events.at(self._last_arrival, lambda: self._arrive(number))

    def _delay_s(self) -> float:
        return self._rng.uniform(self._lateness.least_s, self._lateness.most_s)

    def _arrive(self, number: int) -> None:
        self._arrived.add(number)
        while self._next in self._arrived:
            self._arrived.discard(self._next)
            change = self._sent.pop(self._next)
            self._next += 1
            if self.is_open:
                self._apply(change)
        self._notice(number)

    def _notice(self, before: int) -> None:
        """Request again all batches with numbers below `before` that have not arrived."""
        for number in range(self._next, before):
            if number not in self._arrived and number not in self._asked:
                self._asked.add(number)
                self._events.after(self._delay_s(), lambda missing=number: self._arrive_again(missing))  # type: ignore[misc]

    def _arrive_again(self, number: int) -> None:
        self._asked.discard(number)
        self._arrive(number)

"""Value types for the reports between gateways and workers: the backlog that waits on another gateway, and the service
that a tenant has received at a worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Backlog(NamedTuple):
    """Waiting requests of one tenant in one class: their number, and their expected cost in weighted tokens."""

    requests: int
    service: float


@dataclass(frozen=True, slots=True)
class ServedTotal:
    """Service of one tenant at one worker since the worker's start: weighted tokens charged, less refunds.

    `total`: service for calls of all gateways. `by_this_link`: service for calls that came over the link on which the
    report is sent.
    """

    rank: int
    tenant: str
    total: float
    by_this_link: float

"""Values of the reports about other gateways: the backlog of a flow on a gateway, and the service of a tenant at a
worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Backlog(NamedTuple):
    """Waiting requests of one flow: their number, and their expected cost in weighted tokens."""

    requests: int
    service: float


@dataclass(frozen=True, slots=True)
class ServedTotal:
    """Service of one tenant at one worker since the worker's start: weighted tokens charged, less refunds.

    `total`: calls of all gateways. `by_this_link`: calls that came over the link on which the report is sent.
    """

    rank: int
    tenant: str
    total: float
    by_this_link: float

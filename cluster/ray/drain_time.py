"""How the time that Ray gives a node to drain is divided. Pure; no Ray here."""

from __future__ import annotations

TIMEOUT_ENV = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""Seconds that `ray start --block` waits after SIGTERM until it ends its node; Ray's default is 30."""
MARGIN_S = 15.0
"""The last part of that time, in which links close, counts are handed over and engines end."""


def ray_timeout_s(drain_timeout_s: float) -> float:
    """The value of TIMEOUT_ENV with which calls have `drain_timeout_s` to end or move; the chart has the same sum."""
    return drain_timeout_s + MARGIN_S


def usable_s(left_s: float) -> float:
    """The time in which calls may end or move, of the time left until the node's deadline."""
    return max(left_s - MARGIN_S, left_s / 4)

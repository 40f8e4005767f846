"""Division of the time that Ray gives a node to drain. Pure; does not import Ray."""

from __future__ import annotations

TIMEOUT_ENV = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""Variable with the seconds from SIGTERM until `ray start --block` ends its node; Ray's default is 30."""
MARGIN_S = 15.0
"""Last part of that time, in which links close, usage records are sent and engines stop."""


def ray_timeout_s(drain_timeout_s: float) -> float:
    """Return the value of TIMEOUT_ENV that gives calls `drain_timeout_s` to end or resume elsewhere.

    The Helm chart computes the same sum.
    """
    return drain_timeout_s + MARGIN_S


def usable_s(left_s: float) -> float:
    """Return how much of the time until the node's deadline calls may use to end or resume elsewhere."""
    return max(left_s - MARGIN_S, left_s / 4)

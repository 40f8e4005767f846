"""The drain time of a Ray node, divided into time for running calls and time to end the processes. Does not import
Ray.
"""

from __future__ import annotations

TIMEOUT_ENV = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""Environment variable with the seconds from SIGTERM until `ray start --block` ends the node; Ray's default is 30."""
MARGIN_S = 15.0
"""Seconds at the end of a node's drain time in which links close, usage records are sent and engines stop."""


def ray_timeout_s(drain_timeout_s: float) -> float:
    """Return the drain time of a Ray node in seconds, for the environment variable TIMEOUT_ENV. It is the sum of
    `drain_timeout_s`, the time for calls to end or resume elsewhere, and MARGIN_S.

    The Helm chart computes the same sum.
    """
    return drain_timeout_s + MARGIN_S


def usable_s(left_s: float) -> float:
    """Return for how many seconds calls may still end or resume on another worker, before a margin for the shutdown
    begins. `left_s`: seconds until the drain deadline."""
    return max(left_s - MARGIN_S, left_s / 4)

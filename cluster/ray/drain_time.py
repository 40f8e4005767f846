"""The drain time of a Ray node, divided into time for running calls and time to end the processes. Does not import
Ray.
"""

from __future__ import annotations

TIMEOUT_ENV = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""Environment variable with the seconds from SIGTERM until `ray start --block` ends the node; Ray's default is 30."""
MARGIN_S = 15.0
"""Seconds at the end of a node's drain time in which links close, usage records are sent and engines stop."""


def ray_timeout_s(drain_timeout_s: float) -> float:
    """Return the drain time of a Ray node in seconds: `drain_timeout_s` plus MARGIN_S. `drain_timeout_s`: the time
    in which calls may end or resume on another worker.

    The result is the value of the environment variable TIMEOUT_ENV. The Helm chart computes the same sum.
    """
    return drain_timeout_s + MARGIN_S


def usable_s(left_s: float) -> float:
    """Return the seconds that running calls have to end or to move to another worker: the time to the drain deadline,
    less a margin for the shutdown. `left_s`: seconds until the deadline."""
    return max(left_s - MARGIN_S, left_s / 4)

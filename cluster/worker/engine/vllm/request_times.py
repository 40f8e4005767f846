"""Times of a request in vLLM's engine core. The core measures them for its own metrics in any case.

vLLM's own request tracing (`otlp_traces_endpoint`) is not used: it works in AsyncLLM's output processor, which the fast
path bypasses, and needs an exporter in the process. Here the durations are sent to the gateway, which makes the spans.

If a release of vLLM lacks the attributes that are read here, its requests have no times; nothing else changes.
"""

from __future__ import annotations

from typing import Any

from cluster.api.request_times import RequestTimes

QUEUED, SCHEDULED = 1, 2
"""Values of vllm.v1.engine.EngineCoreEventType."""


def core_times(given: Any, step: Any) -> RequestTimes | None:
    """Return a request's times up to its first output; None if the core has not measured any.

    `given`: the EngineCoreOutput with the first output. `step`: the EngineCoreOutputs that contains `given`.
    """
    at: dict[int, float] = {}
    for event in getattr(given, "events", None) or ():
        at.setdefault(int(event.type), event.timestamp)
    ended = getattr(step, "timestamp", 0.0)
    return _times(at.get(QUEUED, 0.0), at.get(SCHEDULED, 0.0), ended)


def stats_times(given: Any) -> RequestTimes | None:
    """Return a request's times up to its first output; None if AsyncLLM has not measured any.

    `given`: the first RequestOutput of the request.
    """
    stats = getattr(given, "metrics", None)
    names = ("queued_ts", "scheduled_ts", "first_token_ts")
    return None if stats is None else _times(*(getattr(stats, name, 0.0) for name in names))


def _times(queued: float, scheduled: float, ended: float) -> RequestTimes | None:
    if not queued <= scheduled <= ended or not queued:
        return None
    return RequestTimes(queue_s=scheduled - queued, prefill_s=ended - scheduled)

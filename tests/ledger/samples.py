"""Sample usage records."""

from __future__ import annotations

from typing import Any

from cluster.ledger.usage.records import UsageRecord

DAY_S = 86400.0


def record(record_id: str = "r1", **changes: Any) -> UsageRecord:
    """Return a usage record for a call on 1970-01-02. `changes`: fields with other values."""
    values: dict[str, Any] = {
        "record_id": record_id,
        "tenant": "acme",
        "key_id": "k1",
        "model": "tiny",
        "version": "v1",
        "request_id": f"q-{record_id}",
        "opened_at_s": DAY_S + 1.5,
        "outcome": "ok",
        "prompt_tokens": 10,
        "cached_tokens": 4,
        "completion_tokens": 5,
        "reasoning_tokens": min(2, changes.get("completion_tokens", 5)),
        "generated_tokens": 6,
        "queue_s": 0.25,
        "ttft_s": 0.5,
        "duration_s": 2.0,
        "gpu": "H100",
        "gpu_seconds": 1.5,
        "labels": {"team": "a"},
    }
    return UsageRecord(**(values | changes))

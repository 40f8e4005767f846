"""Overview documents, as the admin verb Fleet.GetOverview returns them."""

from __future__ import annotations

from typing import Any


def overview(workers: int = 3, calls: int = 5, tenants: int = 2) -> dict[str, Any]:
    """Return an overview of a cluster with one model that serves and one model that is starting."""
    return {
        "at": 1_791_000_000.0,
        "cluster": "demo",
        "version": "0.1.0",
        "step_s": 1.0,
        "controller": {"age_s": 0.4},
        "problems": [],
        "gateways": [
            {"id": "gw-0", "age_s": 0.2, "streams": 4, "queued": 1, "lag_ms": 1.5, "tokens_per_s": 90.0, "process": 0}
        ],
        "models": [
            {"id": "sim", "state": "READY", "reason": "", "replicas": 3, "replicas_desired": 3,
             "ready_workers": workers, "running": 4, "waiting": 1, "tokens_per_s": 90.25, "ttft_p50_s": 0.051,
             "ttft_p99_s": 1.25, "cache_hit": 0.5, "aliases": ["default"], "frozen": False, "versions": [],
             "progress": None},
            {"id": "large", "state": "STARTING", "reason": "no worker yet", "replicas": 0, "replicas_desired": 1,
             "ready_workers": 0, "running": 0, "waiting": 0, "tokens_per_s": None, "ttft_p50_s": None,
             "ttft_p99_s": None, "cache_hit": None, "aliases": [], "frozen": False, "versions": [],
             "progress": {"stage": "downloading weights", "fraction": 0.4}},
        ],
        "workers": [
            {"id": f"sim-w{at}", "incarnation": f"i{at}", "model": "sim", "version": "v1",
             "state": "LOST" if at == 2 else "READY", "running": at, "waiting": 0, "max_num_seqs": 8,
             "kv_usage": 0.25 * (at % 4), "kv_tokens": 4096, "step_ms": 8.0 + at, "node": "abc", "host": f"node-{at}",
             "pod": "", "gpu": "H100", "ray_cluster": "", "links": ["gw-0"],
             "lost_at": 1_791_000_000.0 if at == 2 else None, "lost_reason": "link closed" if at == 2 else "",
             "resumed": at}
            for at in range(workers)
        ],
        "calls": [
            {"id": f"chatcmpl-{at}", "request_id": f"r-{at}", "tenant": "acme", "model": "sim", "api": "openai",
             "state": "running", "outcome": "", "arrived_s": 1_791_000_000.0 - at, "queue_s": 0.01 * at,
             "ttft_s": 0.05 * at if at else None, "tokens": 10 * at, "tokens_per_s": 30.0, "prompt_tokens": 100,
             "cached_tokens": 64, "worker": "sim-w0", "gateway": "gw-0", "reason": "cached_prefix", "resumes": 0,
             "trace_id": "", "duration_s": None}
            for at in range(calls)
        ],
        "tenants": [
            {"id": f"tenant-{at}", "weight": 1.0, "running": 2, "waiting": 0, "tokens_per_s": 45.0 + at, "share": 0.5,
             "fair_share": 0.5, "gap": 0.1, "requests": 40, "cost_per_h": None,
             "limits": {"tokens_per_minute": {"used": 50, "limit": 100}, "max_streams": {"used": 9, "limit": 10}},
             "budget": {"used": 1.5, "limit": 10.0, "currency": "EUR"} if at else None}
            for at in range(tenants)
        ],
        "scaling": [{"id": "sim", "wanted": 4, "had": 3, "reason": "the queue is longer than 2 s", "frozen": False}],
    }  # fmt: skip

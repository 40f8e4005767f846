"""Names, labels and buckets of all metrics. docs/reference/metrics.md is written from these tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# The buckets of vLLM 0.32, so that one panel can show vLLM's histograms and these.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
LAG_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


@dataclass(frozen=True, slots=True)
class Definition:
    """A metric: its kind (counter, gauge or histogram), meaning, labels and, for a histogram, upper bounds."""

    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


DEFINITIONS: Mapping[str, Definition] = {
    "requests_total": Definition("counter", "Calls ended, by outcome.", ("model", "tenant", "api", "outcome")),
    "auth_failures_total": Definition("counter", "Requests rejected for want of valid credentials.", ("reason",)),
    "console_csp_reports_total": Definition(
        "counter", "Reports of browsers about content that the console's security policy has stopped."
    ),
    "guard_actions_total": Definition(
        "counter",
        "Actions of guards, by guard (input_patterns, ...): redacted, refused, flagged, failed_closed, failed_open.",
        ("tenant", "reason", "outcome"),
    ),
    "slo_calls_total": Definition(
        "counter",
        "Calls judged by the model's SLO, by outcome: met, late_first_token, slow_tokens, failed.",
        ("model", "outcome"),
    ),
    "rejected_total": Definition("counter", "Calls refused before a worker accepted them.", ("model", "reason")),
    "prompt_tokens_total": Definition("counter", "Prompt tokens of calls, by the engine's count.", ("model", "tenant")),
    "cached_tokens_total": Definition("counter", "Prompt tokens from the prefix cache.", ("model", "tenant")),
    "generation_tokens_total": Definition("counter", "Tokens delivered to callers.", ("model", "tenant")),
    "reasoning_tokens_total": Definition(
        "counter", "Reasoning tokens, a part of the tokens delivered to callers.", ("model", "tenant")
    ),
    "tenant_service_tokens_total": Definition(
        "counter", "Weighted tokens charged for ended calls.", ("model", "tenant")
    ),
    "scaling_decisions_total": Definition(
        "counter",
        "Scaling decisions of the controller, by outcome: hold, up, down, to_zero, from_zero, move.",
        ("model", "outcome"),
    ),
    "gpu_seconds_total": Definition("counter", "GPU-seconds held by a model's replicas.", ("model",)),
    "route_decisions_total": Definition("counter", "Calls bound to a worker, by reason.", ("model", "reason")),
    "prefix_predicted_tokens_total": Definition(
        "counter",
        "Prompt tokens that were expected in the worker's prefix cache, by kind of prediction: exact, approximate.",
        ("model", "state"),
    ),
    "prefix_mispredicted_tokens_total": Definition(
        "counter",
        "Differences between expected and found cached tokens, over calls with a prediction, by its kind.",
        ("model", "state"),
    ),
    "resumes_total": Definition("counter", "Sequences resumed on another worker, by reason.", ("model", "reason")),
    "resume_gap_seconds": Definition(
        "histogram",
        "A caller's wait between one worker's last token and the next worker's first token.",
        ("model",),
        TTFT_BUCKETS,
    ),
    "hedges_total": Definition(
        "counter",
        "Calls sent to a second worker, by outcome: won (the second worker kept the call) or lost.",
        ("model", "outcome"),
    ),
    "wasted_tokens_total": Definition(
        "counter",
        "Prompt tokens that a worker was expected to compute in vain, by reason: hedge. An upper bound.",
        ("model", "reason"),
    ),
    "canary_calls_total": Definition(
        "counter",
        "Calls to a model with a canary, by version: ok, failed (because of the worker).",
        ("model", "version", "outcome"),
    ),
    "canary_compared_total": Definition(
        "counter",
        "Calls to a canary whose first token was compared with the stable version's, by outcome: slower, as_fast.",
        ("model", "version", "outcome"),
    ),
    "worker_detected_total": Definition("counter", "Worker links that ended, by cause.", ("model", "reason")),
    "request_duration_seconds": Definition("histogram", "Duration of a call.", ("model",), REQUEST_BUCKETS),
    "time_to_first_token_seconds": Definition(
        "histogram", "Time from arrival to first token.", ("model",), TTFT_BUCKETS
    ),
    "inter_token_latency_seconds": Definition("histogram", "Time between tokens of a call.", ("model",), ITL_BUCKETS),
    "queue_time_seconds": Definition("histogram", "Waiting time in the gateway.", ("model",), REQUEST_BUCKETS),
    "event_loop_lag_seconds": Definition("histogram", "Delay of the event loop's wake-ups.", (), LAG_BUCKETS),
    "requests_in_flight": Definition("gauge", "Calls in progress.", ("model",)),
    "queue_requests": Definition("gauge", "Sequences waiting in the gateway.", ("model",)),
    "queue_tokens": Definition("gauge", "Prompt tokens waiting in the gateway.", ("model",)),
    "fairness_gap_ratio": Definition(
        "gauge", "Largest difference in service between two waiting tenants, in U of docs/tenancy.md.", ("model",)
    ),
    "limit_utilization_ratio": Definition(
        "gauge", "Used part of a limit at its tenant's last call, if within a minute.", ("tenant", "limit")
    ),
    "budget_used_ratio": Definition(
        "gauge", "Used part of a tenant's budget of this day or month, from the ledger.", ("tenant", "limit")
    ),
    "budget_webhook_total": Definition("counter", "Budget notices sent, by outcome.", ("outcome",)),
    "prompt_log_lost_total": Definition("counter", "Calls that could not be written to the prompt log.", ()),
    "limits_degraded": Definition("gauge", "1 while the store of shared limits is unavailable.", ()),
    "worker_up": Definition("gauge", "1 while a worker's link is up.", ("model", "worker")),
    "worker_info": Definition(
        "gauge",
        "Always 1: a worker's pod, its node (outside Kubernetes its host), and its type of GPU.",
        ("worker", "pod", "node", "gpu"),
    ),
    "worker_running_requests": Definition("gauge", "Requests running in the engine.", ("model", "worker")),
    "worker_waiting_requests": Definition("gauge", "Requests in the engine's own queue.", ("model", "worker")),
    "worker_kv_usage_ratio": Definition("gauge", "Share of KV blocks in use.", ("model", "worker")),
    "worker_step_seconds": Definition("gauge", "Length of the engine's last step.", ("model", "worker")),
    "link_connected": Definition("gauge", "Links that are up, by dialing process: worker or controller.", ("api",)),
    "model_replicas": Definition("gauge", "Workers linked to this gateway.", ("model",)),
    "model_replicas_desired": Definition("gauge", "Replica target of the controller.", ("model",)),
    "model_state": Definition("gauge", "1 for the model's current state.", ("model", "state")),
    "model_slo_ttft_seconds": Definition("gauge", "SLO of a model for the time to first token.", ("model",)),
    "model_slo_itl_seconds": Definition("gauge", "SLO of a model for the mean time between tokens.", ("model",)),
    "model_version_workers": Definition("gauge", "Workers of a version linked to this gateway.", ("model", "version")),
    "adapters": Definition("gauge", "Adapters by their state on this gateway's workers.", ("model", "state")),
    "spans_total": Definition(
        "counter",
        "Spans of sampled calls, by outcome: exported; dropped (the queue to the collector was full); failed (the "
        "collector was away or refused them).",
        ("outcome",),
    ),
    "problem": Definition(
        "gauge",
        "1 while a problem is present, by its kind, what has it, and whom it hurts: callers or operators.",
        ("kind", "object", "hurts"),
    ),
    "config_valid": Definition(
        "gauge", "1 while the configuration file is valid; 0 if a restart would refuse a part of it.", ()
    ),
    "catalog_age_seconds": Definition("gauge", "Time since the controller's last message; -1 if there was none.", ()),
    "tenants_capped": Definition(
        "gauge", "Tenants that share the label `other`, because `observe.max_tenant_series` are named already.", ()
    ),
    "log_lines_dropped_total": Definition(
        "counter", "Log lines that were dropped because their reader was too slow or its disk full.", ()
    ),
    "certificate_expiry_timestamp_seconds": Definition(
        "gauge",
        "Expiry of the certificates in a file, in seconds since the epoch: of a chain the earliest, of authorities the "
        "latest.",
        ("file",),
    ),
    "model_version_weight_ratio": Definition(
        "gauge", "Share of a model's new calls that a version gets: a canary's is below 1.", ("model", "version")
    ),
    "model_version_state": Definition(
        "gauge",
        "1 for the version's current state; `quarantined` beside the states of model_state.",
        ("model", "version", "state"),
    ),
    "controller_leading": Definition("gauge", "1 while this controller acts; 0 while another one holds the Lease.", ()),
    "canary_rollbacks_total": Definition(
        "counter", "Canaries that the controller has rolled back by itself.", ("model",)
    ),
    "weights_fetched_bytes": Definition(
        "gauge", "Bytes of weights that a starting worker has on its node.", ("model", "worker")
    ),
    "weights_total_bytes": Definition(
        "gauge", "Bytes of weights that a starting worker needs; 0 until it knows.", ("model", "worker")
    ),
    "weights_fetch_bytes_per_second": Definition(
        "gauge", "Rate at which a starting worker fetches weights.", ("model", "worker")
    ),
    "ledger_pending_records": Definition("gauge", "Usage records that are not in the database yet.", ()),
    "ledger_lag_seconds": Definition("gauge", "Age of the oldest usage record that is not in the database.", ()),
    "usage_record_conflicts_total": Definition(
        "counter", "Usage records dropped because a row of another tenant has their id.", ()
    ),
    "usage_reports_refused_total": Definition(
        "counter",
        "Workers' usage reports that were refused: idle_id and not_sent (not the worker's own), record, seal.",
        ("reason",),
    ),
    "ray_up": Definition("gauge", "1 while a Ray cluster answers the controller.", ("ray_cluster",)),
    "build_info": Definition("gauge", "Always 1.", ("version", "python", "grpc")),
    "engine_path_info": Definition(
        "gauge", "Always 1: the path by which a worker calls its engine, and the reason.", ("worker", "path", "reason")
    ),
}

ENGINE_DEFINITIONS: Mapping[str, Definition] = {
    "vllm:num_requests_running": Definition("gauge", "Requests in the engine's batch.", ("model_name", "worker")),
    "vllm:num_requests_waiting": Definition(
        "gauge", "Requests that wait in the engine's own queue.", ("model_name", "worker")
    ),
    "vllm:kv_cache_usage_perc": Definition(
        "gauge", "Used part of the engine's KV blocks, from 0 to 1.", ("model_name", "worker")
    ),
    "vllm:num_preemptions_total": Definition(
        "counter", "Requests whose KV blocks the engine took away to serve others.", ("model_name", "worker")
    ),
    "vllm:prefix_cache_queries_total": Definition(
        "counter", "Prompt tokens that the engine looked up in its prefix cache.", ("model_name", "worker")
    ),
    "vllm:prefix_cache_hits_total": Definition(
        "counter", "Prompt tokens that the engine found in its prefix cache.", ("model_name", "worker")
    ),
    "vllm:prompt_tokens_total": Definition(
        "counter", "Prompt tokens that the engine has computed or found.", ("model_name", "worker")
    ),
    "vllm:generation_tokens_total": Definition(
        "counter", "Tokens that the engine has generated.", ("model_name", "worker")
    ),
}
"""vLLM's own series, under vLLM's names. In vLLM, AsyncLLM exports these series, but it does not run on the fast path.
Therefore workers report the values over the link, and each gateway exports the values of its workers."""

ENGINE_HISTOGRAMS: Mapping[str, str] = {
    "vllm:time_to_first_token_seconds": "time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds": "inter_token_latency_seconds",
    "vllm:e2e_request_latency_seconds": "request_duration_seconds",
    "vllm:request_queue_time_seconds": "queue_time_seconds",
}
"""The gateway's own histograms that are also exported under vLLM's names, with the label model_name. The keys are
vLLM's names, the values are our names. The gateway measures these times in place of vLLM's AsyncLLM."""

"""Dashboard of fairness between tenants."""

from __future__ import annotations

from scripts.dashboards.parts import GREEN, MODEL, RED, YELLOW, Board, quantiles, rate

NAME = "fairness"


def board() -> Board:
    """Return the dashboard."""
    made = Board(NAME, "Does every waiting tenant get its share? docs/tenancy.md explains the measure.", ("model",))
    made.row("Share of service")
    made.stat(
        "Largest gap",
        "Largest difference in service between two waiting tenants, in U of docs/tenancy.md. 0 while none waits.",
        f"max(headrace_fairness_gap_ratio{{{MODEL}}})",
        "none",
        ((None, GREEN), (1, YELLOW), (2, RED)),
    )
    made.stat(
        "Tenants served",
        "Tenants that were charged for tokens in the last 5 minutes.",
        f"count(sum by (tenant) (rate(headrace_tenant_service_tokens_total{{{MODEL}}}[5m])) > 0) or vector(0)",
        "none",
    )
    made.stat(
        "Largest share",
        "Share of all service that the largest tenant got in the last 5 minutes.",
        f"max(sum by (tenant) (rate(headrace_tenant_service_tokens_total{{{MODEL}}}[5m])))"
        f" / sum(rate(headrace_tenant_service_tokens_total{{{MODEL}}}[5m]))",
        "percentunit",
    )
    made.series(
        "Gap between waiting tenants",
        "Largest difference in service between two waiting tenants, by model.",
        [(f"max by (model) (headrace_fairness_gap_ratio{{{MODEL}}})", "{{model}}")],
        "none",
        ((None, "transparent"), (2, RED)),
    )
    made.series(
        "Service by tenant",
        "Weighted tokens charged a second. While tenants wait, each gets its weight's share.",
        [(f"topk(15, {rate('headrace_tenant_service_tokens_total', 'tenant')})", "{{tenant}}")],
        "short",
    )
    made.row("Queue")
    made.series(
        "Calls waiting",
        "Calls in the gateways' queues. Fairness matters only while calls wait.",
        [(f"sum by (model) (headrace_queue_requests{{{MODEL}}})", "{{model}}")],
        "none",
    )
    made.series("Wait before a worker", "Time in the gateways' queues.", quantiles("headrace_queue_time_seconds"), "s")
    return made

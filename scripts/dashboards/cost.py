"""Dashboard of GPU-hours and their cost. The GPU-seconds are metrics of the controller."""

from __future__ import annotations

from scripts.dashboards.parts import CLUSTER, MODEL, Board, rate

NAME = "cost"
HOURS = f"sum by (model) (increase(headrace_gpu_seconds_total{{{MODEL}}}[$__range])) / 3600"


def board() -> Board:
    """Return the dashboard."""
    made = Board(
        NAME,
        "GPU-hours held by models, and money by the price above. `headrace usage --cost` is exact, by tenant and type.",
        ("model", "price"),
    )
    made.row("In the chosen time")
    made.stat("GPU-hours", "GPU-hours that replicas held.", f"sum({HOURS})", "h")
    made.stat("Cost", "GPU-hours times the price above.", f"sum({HOURS}) * $price", "none")
    made.stat(
        "GPUs held now",
        "GPUs that replicas hold, averaged over the last 5 minutes.",
        f"sum(rate(headrace_gpu_seconds_total{{{MODEL}}}[5m]))",
        "none",
    )
    made.stat(
        "Tokens for each GPU-second",
        "Tokens delivered for each second of a GPU, in the last 5 minutes.",
        f"sum(rate(headrace_generation_tokens_total{{{MODEL}}}[5m]))"
        f" / (sum(rate(headrace_gpu_seconds_total{{{MODEL}}}[5m])) > 0)",
        "none",
    )
    made.table(
        "Cost by model",
        "GPU-hours and cost of each model, and what a million delivered tokens cost.",
        {
            "GPU-hours": HOURS,
            "cost": f"{HOURS} * $price",
            "cost of a million tokens": f"{HOURS} * $price * 1e6"
            f" / sum by (model) (increase(headrace_generation_tokens_total{{{MODEL}}}[$__range]))",
        },
        {"GPU-hours": "h"},
        span=12,
    )
    made.table(
        "Share of the service by tenant",
        "A tenant's part of all weighted tokens: its part of the cost, if costs are split by use.",
        {
            "share": f"topk(20, sum by (tenant) (increase(headrace_tenant_service_tokens_total{{{MODEL}}}[$__range]))"
            f" / scalar(sum(increase(headrace_tenant_service_tokens_total{{{MODEL}}}[$__range]))))",
        },
        {"share": "percentunit"},
        span=12,
    )
    made.row("Over time")
    made.series(
        "GPUs held",
        "GPUs that each model's replicas hold.",
        [(rate("headrace_gpu_seconds_total", "model"), "{{model}}")],
        "none",
    )
    made.series(
        "Scaling decisions",
        "The controller's decisions, by outcome; `hold` changes nothing.",
        [(rate("headrace_scaling_decisions_total", "model, outcome"), "{{model}} {{outcome}}")],
        "cps",
    )
    made.series(
        "Tokens delivered",
        "Tokens a second, by model.",
        [(rate("headrace_generation_tokens_total", "model"), "{{model}}")],
        "short",
    )
    made.series(
        "Workers",
        "Workers that are linked to a gateway, by model.",
        [(f"count by (model) (group by (model, worker) (headrace_worker_up{{{CLUSTER}}}))", "{{model}}")],
        "none",
    )
    return made

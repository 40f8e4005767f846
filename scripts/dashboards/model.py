"""Dashboard of a model: its SLO, latency and load."""

from __future__ import annotations

from scripts.dashboards.parts import (
    BAD_BELOW_ONE,
    GREEN,
    MODEL,
    RED,
    YELLOW,
    Board,
    quantiles,
    rate,
    runbook,
)

NAME = "model"


def board() -> Board:
    """Return the dashboard."""
    made = Board(NAME, "One model, or several: objective, latency, load.", ("model",))
    _objective(made)
    _time(made)
    _load(made)
    return made


def _objective(made: Board) -> None:
    made.row("Objective")
    made.stat(
        "Workers",
        "Workers that are linked to at least one gateway.",
        f"sum(max by (model) (headrace:model_workers:count{{{MODEL}}}))",
        "none",
        BAD_BELOW_ONE,
        runbook("HeadraceModelWithoutWorkers"),
    )
    made.stat(
        "Workers wanted",
        "Number of replicas that the controller wants.",
        f"sum(max by (model) (headrace_model_replicas_desired{{{MODEL}}}))",
        "none",
        (),
        runbook("HeadraceFewerReplicas"),
    )
    made.stat(
        "Calls within the SLO",
        "Share of the calls of the last 5 minutes that met `slo` of the model, failed calls included.",
        f'sum(rate(headrace_slo_calls_total{{{MODEL},outcome="met"}}[5m]))'
        f" / sum(rate(headrace_slo_calls_total{{{MODEL}}}[5m]))",
        "percentunit",
        ((None, RED), (0.9, YELLOW), (0.99, GREEN)),
        runbook("HeadraceLatencyBudgetBurnsFast"),
    )
    made.stat(
        "Calls that fail",
        "Share of the calls of the last hour that failed because of the cluster.",
        f"max(headrace:errors:ratio1h{{{MODEL}}})",
        "percentunit",
        ((None, GREEN), (0.001, YELLOW), (0.0144, RED)),
        runbook("HeadraceErrorBudgetBurnsFast"),
    )
    made.stat(
        "First token, objective",
        "`slo.ttft_s` of the model, the shortest of the chosen ones.",
        f"min(headrace_model_slo_ttft_seconds{{{MODEL}}})",
        "s",
    )
    made.stat(
        "Between tokens, objective",
        "`slo.itl_s` of the model, the shortest of the chosen ones.",
        f"min(headrace_model_slo_itl_seconds{{{MODEL}}})",
        "s",
    )
    made.series(
        "Calls by the SLO",
        "Calls a second: met; late_first_token and slow_tokens missed a time; failed lacked capacity or a worker.",
        [(rate("headrace_slo_calls_total", "outcome"), "{{outcome}}")],
        "reqps",
    )
    made.series(
        "Burn rate of the latency budget",
        "1: exactly the allowed share of calls is slow. 14.4 over an hour pages.",
        [
            (
                f"headrace:late_calls:ratio{window}{{{MODEL}}} / on (model) headrace:slo_budget:ratio{{{MODEL}}}",
                f"{{{{model}}}} {window}",
            )
            for window in ("1h", "6h")
        ],
        "none",
        ((None, "transparent"), (1, YELLOW), (14.4, RED)),
        runbook("HeadraceLatencyBudgetBurnsFast"),
    )
    made.series(
        "State",
        "1 for the state that the model is in.",
        [(f"max by (model, state) (headrace_model_state{{{MODEL}}}) == 1", "{{model}} {{state}}")],
        "none",
        (),
        runbook("HeadraceModelFailed"),
    )
    made.series(
        "Adapters by state",
        "LoRA adapters of the model on the gateways' workers.",
        [(f"max by (model, state) (headrace_adapters{{{MODEL}}})", "{{model}} {{state}}")],
        "none",
        (),
        runbook("HeadraceAdapterFailed"),
    )


def _time(made: Board) -> None:
    made.row("Where time goes")
    made.series(
        "Time to first token",
        "From the arrival of a call to its first token.",
        [
            *quantiles("headrace_time_to_first_token_seconds"),
            (f"max by (model) (headrace_model_slo_ttft_seconds{{{MODEL}}})", "{{model}} objective"),
        ],
        "s",
    )
    made.series(
        "Time between tokens",
        "Between two tokens of a call.",
        [
            *quantiles("headrace_inter_token_latency_seconds"),
            (f"max by (model) (headrace_model_slo_itl_seconds{{{MODEL}}})", "{{model}} objective"),
        ],
        "s",
    )
    made.series(
        "Wait before a worker",
        "Time in the gateways' queues. If it makes up most of the time to first token, capacity is short.",
        quantiles("headrace_queue_time_seconds"),
        "s",
    )
    made.series("Duration of calls", "From arrival to end.", quantiles("headrace_request_duration_seconds"), "s")


def _load(made: Board) -> None:
    made.row("Load")
    made.series(
        "Calls by outcome",
        "Calls ended a second. `ok` is a whole answer; docs/reference/errors.md has the others.",
        [(rate("headrace_requests_total", "outcome"), "{{outcome}}")],
        "reqps",
    )
    made.series(
        "Calls refused",
        "Calls that ended before a worker had accepted them, by reason. shed and queue_full: capacity is short.",
        [(rate("headrace_rejected_total", "reason"), "{{reason}}")],
        "reqps",
        (),
        runbook("HeadraceShedding"),
    )
    made.series(
        "Calls in progress and waiting",
        "In progress: with a worker. Waiting: in the gateways' queues.",
        [
            (f"sum by (model) (headrace_requests_in_flight{{{MODEL}}})", "{{model}} in progress"),
            (f"sum by (model) (headrace_queue_requests{{{MODEL}}})", "{{model}} waiting"),
        ],
        "none",
    )
    made.series(
        "Prompt tokens waiting",
        "Prompt tokens of the calls that wait.",
        [(f"sum by (model) (headrace_queue_tokens{{{MODEL}}})", "{{model}}")],
        "short",
    )
    made.series(
        "Tokens a second",
        "Prompt tokens, and tokens delivered to callers; reasoning is a part of these.",
        [
            (rate("headrace_prompt_tokens_total", "model"), "{{model}} prompt"),
            (rate("headrace_generation_tokens_total", "model"), "{{model}} delivered"),
            (
                f"{rate('headrace_reasoning_tokens_total', 'model')}"
                f" or 0 * {rate('headrace_generation_tokens_total', 'model')}",
                "{{model}} reasoning",
            ),
        ],
        "short",
    )
    made.series(
        "Wanted and linked workers",
        "Replicas that the controller wants, and workers linked to a gateway.",
        [
            (f"max by (model) (headrace_model_replicas_desired{{{MODEL}}})", "{{model}} wanted"),
            (f"max by (model) (headrace_model_replicas{{{MODEL}}})", "{{model}} linked to one gateway"),
        ],
        "none",
        (),
        runbook("HeadraceFewerReplicas"),
    )

"""Dashboard of a tenant: its calls, tokens, limits, budgets and guards."""

from __future__ import annotations

from scripts.dashboards.parts import CLUSTER, RED, YELLOW, Board, rate, runbook

NAME = "tenant"
TENANT = f'{CLUSTER},tenant=~"$tenant"'


def board() -> Board:
    """Return the dashboard."""
    made = Board(
        NAME,
        "One tenant, or several. Tenants beyond observe.max_tenant_series are `other`; `headrace usage` has all.",
        ("tenant",),
    )
    _use(made)
    _limits(made)
    return made


def _use(made: Board) -> None:
    made.row("Use")
    made.table(
        "Tenants",
        "The ten tenants with the most calls in the last 5 minutes.",
        {
            "calls": f"topk(10, sum by (tenant) (rate(headrace_requests_total{{{TENANT}}}[5m])))",
            "not ok": f'sum by (tenant) (rate(headrace_requests_total{{{TENANT},outcome!="ok"}}[5m]))'
            f" / sum by (tenant) (rate(headrace_requests_total{{{TENANT}}}[5m]))",
            "tokens": f"sum by (tenant) (rate(headrace_generation_tokens_total{{{TENANT}}}[5m]))",
            "cached": f"sum by (tenant) (rate(headrace_cached_tokens_total{{{TENANT}}}[5m]))"
            f" / sum by (tenant) (rate(headrace_prompt_tokens_total{{{TENANT}}}[5m]))",
        },
        {"calls": "reqps", "not ok": "percentunit", "tokens": "short", "cached": "percentunit"},
    )
    made.series(
        "Calls by outcome",
        "Calls ended a second.",
        [(rate("headrace_requests_total", "tenant, outcome", TENANT), "{{tenant}} {{outcome}}")],
        "reqps",
    )
    made.series(
        "Calls by model",
        "Calls ended a second.",
        [(rate("headrace_requests_total", "tenant, model", TENANT), "{{tenant}} {{model}}")],
        "reqps",
    )
    made.series(
        "Tokens delivered",
        "Tokens a second that the tenant got.",
        [(f"topk(15, {rate('headrace_generation_tokens_total', 'tenant', TENANT)})", "{{tenant}}")],
        "short",
    )
    made.series(
        "Prompt tokens",
        "Prompt tokens a second, and those of them that came from the prefix cache.",
        [
            (f"topk(15, {rate('headrace_prompt_tokens_total', 'tenant', TENANT)})", "{{tenant}}"),
            (f"topk(15, {rate('headrace_cached_tokens_total', 'tenant', TENANT)})", "{{tenant}} cached"),
        ],
        "short",
    )


def _limits(made: Board) -> None:
    made.row("Limits, budgets, guards")
    made.series(
        "Limits used",
        "Used part of each limit at the tenant's last call, if within a minute. At 1 calls get RATE_LIMITED.",
        [(f"topk(15, max by (tenant, limit) (headrace_limit_utilization_ratio{{{TENANT}}}))", "{{tenant}} {{limit}}")],
        "percentunit",
        ((None, "transparent"), (0.9, YELLOW), (1, RED)),
    )
    made.series(
        "Budgets used",
        "Used part of the budget of this day or month. At 1 calls get BUDGET_EXHAUSTED.",
        [(f"topk(15, max by (tenant, limit) (headrace_budget_used_ratio{{{TENANT}}}))", "{{tenant}} {{limit}}")],
        "percentunit",
        ((None, "transparent"), (0.9, YELLOW), (1, RED)),
        runbook("HeadraceBudgetNearlyUsed"),
    )
    made.series(
        "Actions of guards",
        "By guard and action. failed_closed and failed_open: the guard could not decide.",
        [
            (
                rate("headrace_guard_actions_total", "tenant, reason, outcome", TENANT),
                "{{tenant}} {{reason}} {{outcome}}",
            )
        ],
        "cps",
        (),
        runbook("HeadraceGuardFails"),
    )
    made.series(
        "Tenants without a series",
        "Tenants that share the label value `other`: those beyond observe.max_tenant_series.",
        [(f"max by (instance) (headrace_tenants_capped{{{CLUSTER}}})", "{{instance}}")],
        "none",
        (),
        runbook("HeadraceTenantsCapped"),
    )
    made.series(
        "Budget notices",
        "Notices sent to observe.budget_webhook, by outcome.",
        [
            (
                f'sum(increase(headrace_budget_webhook_total{{{CLUSTER},outcome="{outcome}"}}[$__rate_interval]))'
                " or vector(0)",
                outcome,
            )
            for outcome in ("delivered", "failed")
        ],
        "none",
    )
    made.series(
        "Calls missing in the prompt log",
        "Calls that could not be written, for tenants with `log_prompts`.",
        [(f"sum(increase(headrace_prompt_log_lost_total{{{CLUSTER}}}[$__rate_interval])) or vector(0)", "lost")],
        "none",
        (),
        runbook("HeadracePromptLogLosesLines"),
    )

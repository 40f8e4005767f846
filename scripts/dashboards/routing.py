"""Dashboard of routing, the prefix cache and resumed calls."""

from __future__ import annotations

from scripts.dashboards.parts import GREEN, MODEL, RED, YELLOW, Board, quantiles, rate, runbook

NAME = "routing"
OUTCOME = MODEL + ',outcome="{}"'
FALLBACK = MODEL + ',reason="fallback"'


def total(metric: str, matcher: str = MODEL) -> str:
    """Return the query for the rate of a counter, summed over all its series. `matcher`: selects the series."""
    return f"sum(rate({metric}{{{matcher}}}[$__rate_interval]))"


def board() -> Board:
    """Return the dashboard."""
    made = Board(NAME, "Which worker gets a call and why, what the prefix cache saves, what was resumed.", ("model",))
    _choice(made)
    _cache(made)
    _resumes(made)
    return made


def _choice(made: Board) -> None:
    made.row("Choice of the worker")
    made.series(
        "Decisions by reason",
        "Calls bound to a worker. cached_prefix: it had the beginning of the prompt. docs/routing.md has the reasons.",
        [(rate("headrace_route_decisions_total", "reason"), "{{reason}}")],
        "reqps",
    )
    made.series(
        "Calls sent to a second worker",
        "Late first tokens: won, the second worker kept the call; lost, the first one did.",
        [
            (f"{total('headrace_hedges_total', OUTCOME.format(outcome))} or vector(0)", outcome)
            for outcome in ("won", "lost")
        ],
        "reqps",
    )
    made.series(
        "Prompt tokens computed in vain",
        "Upper bound of the prompt tokens that a second worker computed for nothing.",
        [(f"{total('headrace_wasted_tokens_total')} or vector(0)", "tokens a second")],
        "short",
    )
    made.series(
        "Calls served by a fallback",
        "Calls that another model took because theirs had no ready worker.",
        [(f"{total('headrace_route_decisions_total', FALLBACK)} or vector(0)", "fallback")],
        "reqps",
    )


def _cache(made: Board) -> None:
    made.row("Prefix cache")
    made.stat(
        "Cached prompt tokens",
        "Share of prompt tokens that came from the prefix cache in the last 5 minutes.",
        f"sum(rate(headrace_cached_tokens_total{{{MODEL}}}[5m]))"
        f" / sum(rate(headrace_prompt_tokens_total{{{MODEL}}}[5m]))",
        "percentunit",
    )
    made.stat(
        "Wrong expectations",
        "Tokens by which the cache differed from the expected ones, as a share of the expected ones.",
        f"sum(rate(headrace_prefix_mispredicted_tokens_total{{{MODEL}}}[5m]))"
        f" / sum(rate(headrace_prefix_predicted_tokens_total{{{MODEL}}}[5m]) > 0) or vector(0)",
        "percentunit",
        ((None, GREEN), (0.1, YELLOW), (0.3, RED)),
    )
    made.series(
        "Cached share of prompt tokens",
        "Share of prompt tokens that the engines took from their prefix caches.",
        [
            (
                f"{rate('headrace_cached_tokens_total', 'model')} / {rate('headrace_prompt_tokens_total', 'model')}",
                "{{model}}",
            )
        ],
        "percentunit",
        span=8,
    )
    made.series(
        "Expected cached tokens",
        "Prompt tokens that the gateways expected in the chosen worker's cache, and by how much they were wrong.",
        [
            (rate("headrace_prefix_predicted_tokens_total", "model, state"), "{{model}} expected, {{state}}"),
            (rate("headrace_prefix_mispredicted_tokens_total", "model, state"), "{{model}} wrong, {{state}}"),
        ],
        "short",
        span=8,
    )


def _resumes(made: Board) -> None:
    made.row("Resumed calls")
    made.series(
        "Calls resumed on another worker",
        "By reason. Callers see a pause, no error.",
        [(rate("headrace_resumes_total", "model, reason"), "{{model}} {{reason}}")],
        "cps",
        (),
        runbook("HeadraceWorkersLost"),
    )
    made.series(
        "Pause of resumed calls",
        "From the last token of one worker to the first token of the next one.",
        quantiles("headrace_resume_gap_seconds"),
        "s",
    )

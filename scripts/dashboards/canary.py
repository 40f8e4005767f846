"""Dashboard of model versions: the canary compared with the stable version."""

from __future__ import annotations

from scripts.dashboards.parts import GREEN, MODEL, RED, YELLOW, Board, rate, runbook

NAME = "canary"
CALLS = rate("headrace_canary_calls_total", "model, version")
COMPARED = rate("headrace_canary_compared_total", "model, version")
FAILED = MODEL + ',outcome="failed"'
SLOWER = MODEL + ',outcome="slower"'


def board() -> Board:
    """Return the dashboard."""
    made = Board(NAME, "Versions of a model beside each other. Calls are compared while a canary runs.", ("model",))
    made.row("Now")
    made.table(
        "Versions",
        "Share of the calls, workers, and calls of each version.",
        {
            "share": f"max by (model, version) (headrace_model_version_weight_ratio{{{MODEL}}})",
            "workers": f"max by (model, version) (headrace_model_version_workers{{{MODEL}}})",
            "calls": f"sum by (model, version) (rate(headrace_canary_calls_total{{{MODEL}}}[5m]))",
        },
        {"share": "percentunit", "calls": "reqps"},
        span=16,
    )
    made.stat(
        "Rolled back",
        "Canaries that the controller has rolled back by itself since its start.",
        f"sum(headrace_canary_rollbacks_total{{{MODEL}}}) or vector(0)",
        "none",
        ((None, GREEN), (1, YELLOW)),
        runbook("HeadraceCanaryTakenBack"),
    )
    made.row("Comparison")
    made.series(
        "Failed share, by version",
        "Share of calls that failed because of the worker. The controller compares both versions.",
        [
            (
                f"{rate('headrace_canary_calls_total', 'model, version', FAILED)} / {CALLS} or 0 * {CALLS}",
                "{{model}} {{version}}",
            )
        ],
        "percentunit",
        (),
        runbook("HeadraceCanaryTakenBack"),
    )
    made.series(
        "First tokens of the canary: slower than the stable version's",
        "Share of compared calls whose first token took more than `rollback.ttft_ratio` times as long.",
        [
            (
                f"{rate('headrace_canary_compared_total', 'model, version', SLOWER)} / {COMPARED} or 0 * {COMPARED}",
                "{{model}} {{version}}",
            )
        ],
        "percentunit",
        ((None, "transparent"), (0.5, RED)),
        runbook("HeadraceCanaryTakenBack"),
    )
    made.series(
        "Calls by version",
        "Calls a second while a canary runs, by outcome.",
        [(rate("headrace_canary_calls_total", "model, version, outcome"), "{{model}} {{version}} {{outcome}}")],
        "reqps",
    )
    made.series(
        "State by version",
        "1 for the state that each version is in. quarantined: it runs without calls.",
        [(f"max by (model, version, state) (headrace_model_version_state{{{MODEL}}}) == 1", "{{version}} {{state}}")],
        "none",
    )
    made.series(
        "Workers by version",
        "Workers of each version that are linked to one gateway.",
        [(f"max by (model, version) (headrace_model_version_workers{{{MODEL}}})", "{{model}} {{version}}")],
        "none",
    )
    made.series(
        "Share of the calls by version",
        "Share that the catalog gives each version.",
        [(f"max by (model, version) (headrace_model_version_weight_ratio{{{MODEL}}})", "{{model}} {{version}}")],
        "percentunit",
    )
    return made

"""Dashboard of a whole cluster. It shows whether everything is well and, if not, where to look."""

from __future__ import annotations

from scripts.dashboards.parts import (
    BAD_ABOVE_ZERO,
    BAD_BELOW_ONE,
    CLUSTER,
    GREEN,
    RED,
    YELLOW,
    Board,
    quantile,
    rate,
    runbook,
    runbook_of_row,
    to_board,
)

NAME = "overview"
FIRING = f'ALERTS{{alertname=~"Headrace.+",alertstate="firing",{CLUSTER}}}'
SHORT = (
    f"max by (model) (headrace_model_replicas{{{CLUSTER}}}) == 0"
    f" and max by (model) (headrace_model_replicas_desired{{{CLUSTER}}}) > 0"
)


def process(query: str) -> str:
    """Restrict a query to the processes of the selected cluster, for metrics such as process_* that have no label with
    the cluster's name."""
    own = f"max by (instance) (headrace_tenants_capped{{{CLUSTER}}} * 0 + 1)"
    return f"max by (instance) ({query}) * on (instance) {own}"


def board() -> Board:
    """Return the dashboard."""
    made = Board(NAME, "The whole cluster: what is up, what fails, and which dashboard has more.")
    _state(made)
    _models(made)
    _load(made)
    _control(made)
    return made


def _state(made: Board) -> None:
    made.row("State")
    made.stat(
        "Gateways", "Gateways that answer Prometheus.", f"count(headrace_config_valid{{{CLUSTER}}})", "none",
        BAD_BELOW_ONE, runbook("HeadraceGatewaysGone"),
    )  # fmt: skip
    made.stat(
        "Workers",
        "Workers that are linked to at least one gateway.",
        f"count(group by (model, worker) (headrace_worker_up{{{CLUSTER}}})) or vector(0)",
        "none",
    )
    made.stat(
        "Models without a worker",
        "Models that should run and have no worker. Models at zero by plan do not count.",
        f"count({SHORT}) or vector(0)",
        "none",
        BAD_ABOVE_ZERO,
        runbook("HeadraceModelWithoutWorkers"),
    )
    made.stat(
        "Calls that fail",
        "Share of the calls of the last 5 minutes that failed because of the cluster.",
        f"sum(headrace:errors:ratio5m{{{CLUSTER}}} * on (model) sum by (model)"
        f" (headrace:requests:rate5m{{{CLUSTER}}})) / sum(headrace:requests:rate5m{{{CLUSTER}}}) or vector(0)",
        "percentunit",
        ((None, GREEN), (0.001, YELLOW), (0.0144, RED)),
        runbook("HeadraceErrorBudgetBurnsFast"),
    )
    made.stat(
        "Controller",
        "Gateways that are linked to a controller. Without one nothing scales or changes.",
        f'sum(headrace_link_connected{{{CLUSTER},api="controller"}})',
        "none",
        BAD_BELOW_ONE,
        runbook("HeadraceControllerAway"),
    )
    made.stat(
        "Alerts that fire",
        "Alerts of this cluster that fire now, all severities.",
        f"count({FIRING}) or vector(0)",
        "none",
        BAD_ABOVE_ZERO,
    )


def _models(made: Board) -> None:
    made.table(
        "Alerts",
        "Alerts that fire. The name links to the runbook.",
        {"firing": f"max by (alertname, severity, model, tenant, instance) ({FIRING})"},
        {},
        span=12,
        link=("alertname", runbook_of_row()),
    )
    by = f"{CLUSTER}"
    made.table(
        "Models",
        "Each model now. The name links to its dashboard.",
        {
            "workers": f"max by (model) (headrace:model_workers:count{{{by}}})",
            "wanted": f"max by (model) (headrace_model_replicas_desired{{{by}}})",
            "calls": f"sum by (model) (headrace:requests:rate5m{{{by}}})",
            "fail": f"max by (model) (headrace:errors:ratio5m{{{by}}})",
            "first token p99": f"max by (model) (headrace:time_to_first_token_seconds:p99_5m{{{by}}})",
            "tokens": f"max by (model) (headrace:generation_tokens:rate5m{{{by}}})",
        },
        {"calls": "reqps", "fail": "percentunit", "first token p99": "s", "tokens": "short"},
        span=12,
        link=("model", to_board("model", "model")),
    )


def _load(made: Board) -> None:
    made.row("Load")
    made.series(
        "Calls by outcome",
        "Calls ended a second. `ok` is a whole answer.",
        [(rate("headrace_requests_total", "outcome", CLUSTER), "{{outcome}}")],
        "reqps",
    )
    made.series(
        "Tokens delivered",
        "Tokens a second that callers got, by model.",
        [(rate("headrace_generation_tokens_total", "model", CLUSTER), "{{model}}")],
        "short",
    )
    made.series(
        "Calls in progress and waiting",
        "In progress: with a worker. Waiting: in the gateways' queues.",
        [
            (f"sum(headrace_requests_in_flight{{{CLUSTER}}})", "in progress"),
            (f"sum(headrace_queue_requests{{{CLUSTER}}})", "waiting"),
        ],
        "none",
    )
    made.series(
        "Failed authentication",
        "Requests a second without valid credentials, by reason.",
        [(rate("headrace_auth_failures_total", "reason", CLUSTER), "{{reason}}")],
        "reqps",
        ((None, "transparent"), (10, RED)),
        runbook("HeadraceKeysGuessed"),
    )


def _control(made: Board) -> None:
    made.row("Gateways and stores")
    made.series(
        "Gateway lag",
        "How late a gateway's event loop wakes, 99th percentile. Every stream through it is late by as much.",
        [(quantile(0.99, "headrace_event_loop_lag_seconds", "instance", CLUSTER), "{{instance}}")],
        "s",
        ((None, "transparent"), (0.1, RED)),
        runbook("HeadraceGatewayLate"),
    )
    made.series(
        "Links",
        "Workers and controllers that are connected to each gateway.",
        [(f"max by (instance, api) (headrace_link_connected{{{CLUSTER}}})", "{{instance}} {{api}}")],
        "none",
    )
    made.series(
        "Content of the console stopped",
        "Reports of browsers about content that the console's security policy has stopped. None is expected.",
        [
            (
                f"sum by (instance) (increase(headrace_console_csp_reports_total{{{CLUSTER}}}[$__rate_interval]))",
                "{{instance}}",
            )
        ],
        "none",
    )
    made.series(
        "Age of the catalog",
        "Time since each gateway's last message from the controller; -1 if there was none.",
        [(f"max by (instance) (headrace_catalog_age_seconds{{{CLUSTER}}})", "{{instance}}")],
        "s",
        ((None, "transparent"), (900, RED)),
        runbook("HeadraceCatalogOld"),
    )
    made.series(
        "Usage waiting for the database: age",
        "Age of the oldest usage record that is not in the database.",
        [(f"max by (instance) (headrace_ledger_lag_seconds{{{CLUSTER}}})", "{{instance}}")],
        "s",
        ((None, "transparent"), (60, YELLOW), (600, RED)),
        runbook("HeadraceDatabaseAway"),
        span=8,
    )
    made.series(
        "Usage waiting for the database: records",
        "Usage records in the gateways' spools.",
        [(f"max by (instance) (headrace_ledger_pending_records{{{CLUSTER}}})", "{{instance}}")],
        "none",
        (),
        runbook("HeadraceSpoolLarge"),
        span=8,
    )
    made.series(
        "Certificates expire in",
        "Time until each certificate expires, the earliest of all processes.",
        [
            (
                f"min by (file) (headrace_certificate_expiry_timestamp_seconds{{{CLUSTER}}}) - time()",
                "{{file}}",
            )
        ],
        "s",
        ((None, RED), (3 * 86400, YELLOW), (21 * 86400, "transparent")),
        runbook("HeadraceCertificateExpiresSoon"),
        span=8,
    )
    made.series(
        "Memory of processes",
        "Resident memory of gateways and controllers.",
        [(process("process_resident_memory_bytes"), "{{instance}}")],
        "bytes",
        span=8,
    )
    made.series(
        "CPU of processes",
        "Cores that gateways and controllers use. A gateway is one process: at 1 it is full.",
        [(process("rate(process_cpu_seconds_total[$__rate_interval])"), "{{instance}}")],
        "none",
        span=8,
    )
    made.series(
        "Open descriptors",
        "Share of the descriptors that each process may open.",
        [(process("process_open_fds / process_max_fds"), "{{instance}}")],
        "percentunit",
        ((None, "transparent"), (0.9, RED)),
        span=8,
    )
    made.stat(
        "Leading controllers",
        "Controllers that act. One, in a cluster with several.",
        f"sum(headrace_controller_leading{{{CLUSTER}}})",
        "none",
        BAD_BELOW_ONE,
        runbook("HeadraceControllerAway"),
    )
    made.stat(
        "Dropped log lines",
        "Log lines that processes dropped within the last hour.",
        f"sum(increase(headrace_log_lines_dropped_total{{{CLUSTER}}}[1h])) or vector(0)",
        "none",
        BAD_ABOVE_ZERO,
        runbook("HeadraceLogLinesDropped"),
    )
    made.stat(
        "Configuration",
        "1: every gateway's file is valid. 0: a restart would refuse a part of it.",
        f"min(headrace_config_valid{{{CLUSTER}}})",
        "none",
        BAD_BELOW_ONE,
        runbook("HeadraceConfigRefused"),
    )
    made.stat(
        "Limits store away",
        "1: a gateway cannot reach the store of shared limits and keeps to its share.",
        f"max(headrace_limits_degraded{{{CLUSTER}}})",
        "none",
        BAD_ABOVE_ZERO,
        runbook("HeadraceLimitsDegraded"),
    )
    made.stat(
        "Ray clusters",
        "Ray clusters that answer the controller.",
        f"sum(max by (ray_cluster) (headrace_ray_up{{{CLUSTER}}}))",
        "none",
        BAD_BELOW_ONE,
        runbook("HeadraceRayAway"),
    )
    made.stat(
        "Releases",
        "Releases of gateways and controllers that run at once. More than one only during a rollout.",
        f"count(count by (version) (headrace_build_info{{{CLUSTER}}}))",
        "none",
        ((None, GREEN), (2, YELLOW)),
    )

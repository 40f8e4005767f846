"""Dashboard of workers and the nodes that they run on."""

from __future__ import annotations

from scripts.dashboards.parts import CLUSTER, GREEN, LOST, MODEL, RED, YELLOW, Board, rate, runbook

NAME = "workers"


def of_worker(metric: str) -> str:
    """Return the query for a gauge that describes workers. Every gateway exports this gauge for its own links."""
    return f"max by (model, worker) ({metric}{{{MODEL}}})"


def of_engine(metric: str) -> str:
    """Return the query for the rate of a counter of vLLM's engines. Every gateway exports these counters for the
    workers that are linked to it."""
    matcher = f'{CLUSTER},model_name=~"$model"'
    return f"max by (model_name, worker) (rate({metric}{{{matcher}}}[$__rate_interval]))"


def with_place(metric: str) -> str:
    """Return the query for a gauge that describes workers, with the labels `pod`, `node` and `gpu` added for each
    worker.

    Several gateways export these labels for the same worker; the query uses those of one gateway.
    """
    place = f"topk by (worker) (1, headrace_worker_info{{{CLUSTER}}})"
    return f"{of_worker(metric)} * on (worker) group_left (pod, node, gpu) {place}"


def board() -> Board:
    """Return the dashboard."""
    made = Board(NAME, "Workers: where they run, how full they are, which were lost.", ("model",))
    made.row("Now")
    made.stat("Workers", "Workers linked to a gateway.", f"count({of_worker('headrace_worker_up')})", "none")
    made.stat(
        "Nodes",
        "Nodes that have a worker.",
        f"count(group by (node) (headrace_worker_info{{{CLUSTER}}}))",
        "none",
    )
    made.stat(
        "Fullest KV cache",
        "Used share of the KV cache of the fullest worker.",
        f"max(headrace_worker_kv_usage_ratio{{{MODEL}}})",
        "percentunit",
        ((None, GREEN), (0.9, YELLOW), (0.95, RED)),
        runbook("HeadraceCacheFull"),
    )
    made.stat(
        "Longest engine step",
        "Length of the last step of the slowest engine.",
        f"max(headrace_worker_step_seconds{{{MODEL}}})",
        "s",
    )
    made.stat(
        "Workers lost",
        "Links to workers that ended within the last hour because the worker ended, hung or was silent.",
        f"sum(increase(headrace_worker_detected_total{{{MODEL},{LOST}}}[1h])) or vector(0)",
        "none",
        ((None, GREEN), (1, YELLOW), (3, RED)),
        runbook("HeadraceWorkersLost"),
    )
    made.table(
        "Where workers run",
        "Each worker with its pod, node and GPU.",
        {
            "running": with_place("headrace_worker_running_requests"),
            "waiting": with_place("headrace_worker_waiting_requests"),
            "KV cache": with_place("headrace_worker_kv_usage_ratio"),
            "step": with_place("headrace_worker_step_seconds"),
        },
        {"KV cache": "percentunit", "step": "s"},
    )
    _over_time(made)
    return made


def _over_time(made: Board) -> None:
    made.row("Over time")
    made.series(
        "Running in engines",
        "Calls that each worker's engine computes.",
        [(of_worker("headrace_worker_running_requests"), "{{model}} {{worker}}")],
        "none",
    )
    made.series(
        "Waiting in engines",
        "Calls in each engine's own queue. Gateways keep it short; a long one means that the engine is full.",
        [(of_worker("headrace_worker_waiting_requests"), "{{model}} {{worker}}")],
        "none",
    )
    made.series(
        "KV cache in use",
        "Used share of each worker's KV cache.",
        [(of_worker("headrace_worker_kv_usage_ratio"), "{{model}} {{worker}}")],
        "percentunit",
        ((None, "transparent"), (0.95, RED)),
        runbook("HeadraceCacheFull"),
    )
    made.series(
        "Engine step",
        "Length of each engine's last step. One worker above the others is slow.",
        [(of_worker("headrace_worker_step_seconds"), "{{model}} {{worker}}")],
        "s",
    )
    made.series(
        "Workers lost, by cause",
        "Links to workers that ended. lost, hung, deaf, mute and silent are faults; others end in order.",
        [(rate("headrace_worker_detected_total", "model, reason"), "{{model}} {{reason}}")],
        "cps",
        (),
        runbook("HeadraceWorkersLost"),
    )
    made.series(
        "Refused usage reports",
        "Reports of workers about requests that were not sent to them, or that would replace another tenant's record.",
        [
            (f"sum(rate(headrace_usage_{name}_total{{{CLUSTER}}}[$__rate_interval])) or vector(0)", title)
            for name, title in (("reports_refused", "refused"), ("record_conflicts", "conflicts"))
        ],
        "cps",
    )
    made.series(
        "Workers by node",
        "Number of workers on each node. A node that leaves shows as a step.",
        [(f"count by (node) (group by (worker, node) (headrace_worker_info{{{CLUSTER}}}))", "{{node}}")],
        "none",
    )
    made.series(
        "Wanted workers",
        "Replicas that the controller wants, and workers that are linked.",
        [
            (f"max by (model) (headrace_model_replicas_desired{{{MODEL}}})", "{{model}} wanted"),
            (f"count by (model) ({of_worker('headrace_worker_up')})", "{{model}} linked"),
        ],
        "none",
        (),
        runbook("HeadraceFewerReplicas"),
    )
    made.series(
        "Preemptions",
        "Calls a second whose KV blocks an engine took away to serve others. They are computed again.",
        [(of_engine("vllm:num_preemptions_total"), "{{model_name}} {{worker}}")],
        "cps",
        (),
        runbook("HeadraceCacheFull"),
    )
    made.series(
        "Prefix cache of the engines",
        "Share of the prompt tokens that each engine looked up and found.",
        [
            (
                f"{of_engine('vllm:prefix_cache_hits_total')} / ({of_engine('vllm:prefix_cache_queries_total')} > 0)",
                "{{model_name}} {{worker}}",
            )
        ],
        "percentunit",
    )
    made.series(
        "Tokens of the engines",
        "Tokens a second that each engine has computed or found for prompts, and generated.",
        [
            (of_engine("vllm:prompt_tokens_total"), "{{model_name}} {{worker}} prompt"),
            (of_engine("vllm:generation_tokens_total"), "{{model_name}} {{worker}} generated"),
        ],
        "short",
    )
    made.series(
        "Weights fetched",
        "Fetched share of the weights of workers that start. No data while none starts.",
        [
            (
                f"{of_worker('headrace_weights_fetched_bytes')} / ({of_worker('headrace_weights_total_bytes')} > 0)",
                "{{model}} {{worker}}",
            )
        ],
        "percentunit",
        (),
        runbook("HeadraceModelStartSlow"),
    )
    made.series(
        "Rate of the fetch",
        "Bytes a second at which starting workers fetch weights. No data while none starts.",
        [(of_worker("headrace_weights_fetch_bytes_per_second"), "{{model}} {{worker}}")],
        "Bps",
    )
    made.series(
        "Path into the engine",
        "Workers by the path on which calls reach their engine, and why.",
        [
            (
                f"count by (path, reason) (max by (worker, path, reason) (headrace_engine_path_info{{{CLUSTER}}}))",
                "{{path}} {{reason}}",
            )
        ],
        "none",
    )

"""Rows of the overview as JSON values: of workers, calls and models. docs/overview.md describes the fields.

A value that is not known is None, never a guess. No row holds text of a prompt or an answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from cluster.api.types import DrainState
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.records.token_times import mean_gap_s
from cluster.gateway.calls.sequences.life import State
from cluster.gateway.console.overview.recent_calls import MAX_CHARS, EndedCall, total_tokens
from cluster.gateway.links.starting_workers import StartingWorker
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.models.known_model import KnownModel
from cluster.gateway.models.start_progress import expected_progress

Row = dict[str, Any]

LOST: Final = "LOST"
"""State of a worker whose link has ended unexpectedly."""
MAX_REASON_CHARS: Final = 500
MAX_NAME_CHARS: Final = 256
"""Maximum number of characters that are shown of each name that a worker reports."""
MAX_NUMBER: Final = 2**53
"""Upper bound on products of numbers that a worker reports. Browsers cannot represent larger integers exactly."""
_DIGITS: Final = 4

_TEXT, _NUMBER, _LIST, _OBJECT = (str,), (int, float), (list,), (dict,)
_NONE = (type(None),)
SHAPES: Final[Mapping[str, Mapping[str, tuple[type, ...]]]] = {
    "workers": dict.fromkeys(
        ("id", "incarnation", "model", "version", "state", "node", "host", "pod", "gpu", "ray_cluster", "lost_reason"),
        _TEXT,
    )
    | dict.fromkeys(("running", "waiting", "max_num_seqs", "kv_usage", "kv_tokens", "step_ms", "resumed"), _NUMBER)
    | {"links": _LIST, "lost_at": _NUMBER + _NONE},
    "models": {"id": _TEXT, "state": _TEXT, "reason": _TEXT, "aliases": _LIST, "versions": _LIST}
    | {"progress": _OBJECT + _NONE, "ttft_counts": _LIST}
    | dict.fromkeys(("replicas", "replicas_desired", "ready_workers", "running", "waiting", "tokens_per_s"), _NUMBER)
    | dict.fromkeys(("prompt_tokens", "cached_tokens", "gap"), _NUMBER),
    "tenants": {"id": _TEXT, "ttft_s": _LIST, "limits": _OBJECT, "budget": _OBJECT + _NONE}
    | dict.fromkeys(("weight", "running", "waiting", "tokens_per_s", "requests", "cost_per_h"), _NUMBER),
    "calls": dict.fromkeys(
        ("id", "request_id", "tenant", "model", "api", "state", "outcome", "gateway", "trace_id"), _TEXT
    )
    | dict.fromkeys(("arrived_s", "tokens", "prompt_tokens", "resumes"), _NUMBER)
    | dict.fromkeys(("queue_s", "ttft_s", "tokens_per_s", "cached_tokens", "duration_s"), _NUMBER + _NONE)
    | {"worker": _TEXT + _NONE, "reason": _TEXT + _NONE},
    "gateway": {"id": _TEXT, "lag_ms": _NUMBER + _NONE}
    | dict.fromkeys(("age_s", "streams", "queued", "tokens_per_s", "process"), _NUMBER),
    "limit": {"used": _NUMBER + _NONE, "limit": _NUMBER, "name": _TEXT},
    "part": dict.fromkeys(("workers", "models", "tenants", "calls"), _LIST)
    | {"at": _NUMBER, "gateway": _OBJECT, "has_all": (bool,)}
    | dict.fromkeys(("controller_age_s", "controller_gateways"), _NUMBER + _NONE),
}
"""The fields of the rows that gateway processes send to each other, with the types that the merge relies on."""
_ELEMENTS: Final = {"links": _TEXT, "aliases": _TEXT, "versions": _OBJECT, "ttft_counts": _NUMBER, "ttft_s": _NUMBER}


def check_row(kind: str, row: Any) -> None:
    """Check a row that another process has sent against SHAPES. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError(f"{kind}: a row must be an object")
    for name, types in SHAPES[kind].items():
        value = row.get(name, ...)  # a field that is missing has no allowed type
        if not isinstance(value, types):
            raise ValueError(f"{kind}.{name}: a {type(value).__name__}")
        if isinstance(value, list) and not all(isinstance(each, _ELEMENTS.get(name, (dict,))) for each in value):
            raise ValueError(f"{kind}.{name}: an element of another type")
    if kind == "tenants":
        for limit in (*row["limits"].values(), *(() if row["budget"] is None else (row["budget"],))):
            check_row("limit", {"name": ""} | limit)


_PHASES = {
    State.RESUMING: "resuming",
    State.RESENT: "resuming",
    State.RUNNING: "running",
    State.SENT: "prefill",
    State.HEDGED: "prefill",
    State.QUEUED: "queued",
}
_ORDER = ("resuming", "running", "prefill", "queued")


def worker_state(link: WorkerLink) -> str:
    """Return the state of a worker. A worker that has reported DRAINED is shown as DRAINING while a call runs on the
    worker, because the gateway may have sent that call before the report arrived."""
    if link.drain_state is DrainState.DRAINED and (link.running or link.load.running):
        return DrainState.DRAINING.value
    return "READY" if link.takes_new_requests else link.drain_state.value


def worker_row(link: WorkerLink) -> Row:
    """Return the row of a linked worker."""
    identity, load, info = link.identity, link.load, link.info
    return {
        "id": identity.worker_id[:MAX_NAME_CHARS],
        "incarnation": identity.incarnation[:MAX_NAME_CHARS],
        "model": identity.model[:MAX_NAME_CHARS],
        "version": identity.version[:MAX_NAME_CHARS],
        "state": worker_state(link),
        "running": load.running,
        "waiting": load.waiting,
        "max_num_seqs": info.max_num_seqs,
        "kv_usage": round(load.kv_usage, _DIGITS),
        "kv_tokens": min(info.kv_tokens, MAX_NUMBER),
        "step_ms": round(load.step_s * 1000, 2),
        "node": identity.node[:MAX_NAME_CHARS],
        "host": identity.host[:MAX_NAME_CHARS],
        "pod": identity.pod[:MAX_NAME_CHARS],
        "gpu": identity.gpu[:MAX_NAME_CHARS],
        "ray_cluster": identity.ray_cluster[:MAX_NAME_CHARS],
        "links": (),
        "lost_at": None,
        "lost_reason": "",
        "resumed": 0,
    }


def running_call_row(call: Call, now: float, epoch_s: float, gateway: str) -> Row:
    """Return the row of an open call. The row names the worker of the call's first sequence, or None while this
    sequence waits. `now` and `epoch_s`: the present time in monotonic seconds and in seconds since the epoch."""
    usage, sequences = call.usage, call.sequences
    first = sequences[0] if sequences else None
    link = None if first is None else first.link
    has_token = call.first_token_at is not None
    gap_s = mean_gap_s(call) if has_token and not call.is_pooling else 0.0
    route = None if first is None else first.route
    return {
        "id": call.shown_id,
        "request_id": call.request_id[:MAX_CHARS],
        "tenant": call.tenant,
        "model": call.shown_model,
        "api": call.api,
        "state": call_state(call),
        "outcome": "",
        "arrived_s": round(epoch_s - (now - call.arrived), 3),
        "queue_s": round(usage.queue_s, _DIGITS) if call.began_at is not None else None,
        "ttft_s": round(usage.ttft_s, _DIGITS) if has_token else None,
        "tokens": total_tokens(call),
        "tokens_per_s": round(1 / gap_s, 1) if gap_s > 0 else None,
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens if has_token else None,
        "worker": None if link is None else link.identity.worker_id,
        "gateway": gateway,
        "reason": None if route is None else route.reason,
        "resumes": usage.resumed,
        "trace_id": call.trace_id,
        "duration_s": None,
    }


def call_state(call: Call) -> str:
    """Return the state of an open call. If one of its sequences is resuming, the state is `resuming`. Otherwise it is
    the state of the sequence that has come furthest."""
    phases = {phase for sequence in call.sequences if (phase := _PHASES.get(sequence.life.state)) is not None}
    return next((phase for phase in _ORDER if phase in phases), "running" if call.sequences else "queued")


def ended_call_row(call: EndedCall, now: float, epoch_s: float, gateway: str, prefix: str) -> Row:
    """Return the row of an ended call. `prefix`: a text that differs between processes. A call without an answer id
    gets an id made of the prefix and the call's number."""
    return {
        "id": call.id or f"{prefix}{call.number}",
        "request_id": call.request_id,
        "tenant": call.tenant,
        "model": call.model,
        "api": call.api,
        "state": "ended",
        "outcome": call.outcome,
        "arrived_s": round(epoch_s - (now - call.arrived), 3),
        "queue_s": _rounded(call.queue_s),
        "ttft_s": _rounded(call.ttft_s),
        "tokens": call.tokens,
        "tokens_per_s": round(1 / call.gap_s, 1) if call.gap_s > 0 else None,
        "prompt_tokens": call.prompt_tokens,
        "cached_tokens": call.cached_tokens,
        "worker": call.worker or None,
        "gateway": gateway,
        "reason": call.reason or None,
        "resumes": call.resumes,
        "trace_id": call.trace_id,
        "duration_s": round(max(call.ended - call.arrived, 0.0), _DIGITS),
    }


def model_row(model: KnownModel, starting: Mapping[str, StartingWorker], epoch_s: float) -> Row:
    """Return those fields of a model's row that come from the catalog and the links. `starting`: one starting worker of
    each model, keyed by the model's name."""
    entry, links = model.entry, list(model.links.values())
    ready = Counter(link.identity.version for link in links if model.takes_calls(link))
    return {
        "id": model.name,
        "state": model.state.value,
        "reason": entry.state_reason[:MAX_REASON_CHARS],
        "replicas": entry.replicas,
        "replicas_desired": entry.replicas_desired,
        "ready_workers": ready.total(),
        "aliases": list(entry.aliases),
        "versions": [
            {
                "version": share.version,
                "weight": share.weight,
                "state": share.state.value,
                "reason": share.state_reason[:MAX_REASON_CHARS],
                "replicas": share.replicas,
                "replicas_desired": share.replicas_desired,
                "ready_workers": ready[share.version],
                "quarantined": share.quarantined,
            }
            for share in entry.versions
        ],
        "progress": None if ready else start_progress(model, starting.get(model.name), epoch_s),
    }


def start_progress(model: KnownModel, starting: StartingWorker | None, epoch_s: float) -> Row | None:
    """Return how far the start of a model without a worker has come; None if nothing is known. During the download of
    the weights, the progress is the downloaded fraction. After that it is estimated from the duration of earlier
    starts."""
    if starting is not None and 0 < starting.fetched_bytes < starting.total_bytes:
        return {"stage": "downloading weights", "fraction": round(starting.fetched_bytes / starting.total_bytes, 3)}
    fraction, left_s = expected_progress(model.entry, epoch_s)
    if not left_s or not (model.entry.starting_since_s or starting):
        return None
    return {"stage": "starting", "fraction": round(fraction, 3)}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _DIGITS)

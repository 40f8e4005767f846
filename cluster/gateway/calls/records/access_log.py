"""The access log. A call that has ended gets at most one line, with the event `call.ended` and without any text of
prompt or answer.

Calls that succeeded or were cancelled are sampled by their trace id or, without one, by their request id. So all
gateways choose the same calls, and a caller that samples its traces with the same ratio chooses these calls too. Calls
that failed or were resumed are always chosen. The lines of each of the two groups are limited to a number per second,
so that the cost of the log is bounded. If lines are left out, the next line holds the number of omitted lines.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import structlog

from cluster.api.outcomes import Outcome
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.meta import CallMeta
from cluster.gateway.calls.opening import Opening
from cluster.gateway.calls.pooling.pooling_opening import PoolingOpening
from cluster.gateway.links.worker_fields import worker_fields

log = structlog.get_logger("calls")

_UNREMARKABLE = (Outcome.OK, Outcome.CANCELLED)
_DIGITS = 3


def is_sampled(trace_id: str, request_id: str, ratio: float) -> bool:
    """Return whether a call is in the sample. The last 56 bits of the trace id decide, because these bits are random
    (W3C Trace Context Level 2). Without a trace id, a hash of the request id decides.

    `trace_id`: 32 hex digits or ""."""
    if ratio >= 1:
        return True
    if trace_id:
        return int(trace_id[-14:], 16) < ratio * 2**56
    return zlib.crc32(request_id.encode()) < ratio * 2**32


class LineBudget:
    """A limit on log lines: `per_s` lines a second on average, and `per_s` lines in one burst."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._left = float(per_s)
        self._at = 0.0
        self._refused = 0

    def take(self, now: float) -> int | None:
        """Ask for one line. Returns None if the line is refused. Otherwise returns the number of lines that were
        refused since the last allowed line. `now`: seconds of a clock that never goes back."""
        self._left = min(self._left + (now - self._at) * self._per_s, float(self._per_s))
        self._at = now
        if self._left < 1:
            self._refused += 1
            return None
        self._left -= 1
        refused, self._refused = self._refused, 0
        return refused


class AccessLog:
    """The access log of one gateway process."""

    def __init__(self, sample_ratio: float, max_lines_per_s: int, clock: Callable[[], float]) -> None:
        """`sample_ratio`: share of the succeeded and cancelled calls that is logged. `clock`: returns monotonic
        seconds; the times of the calls are from the same clock."""
        self._log = log.bind()  # a line costs less than with the lazy logger
        self._ratio = sample_ratio
        self._clock = clock
        self._sampled, self._remarkable = LineBudget(max_lines_per_s), LineBudget(max_lines_per_s)

    def record(self, opening: Opening | PoolingOpening, outcome: Outcome) -> None:
        """Write the log line of a call that has ended, or that could not begin. Does nothing if sampling leaves the
        call out."""
        call, meta = opening.call, opening.meta
        if outcome not in _UNREMARKABLE or (call is not None and call.usage.resumed):
            budget = self._remarkable
        elif is_sampled(opening.trace_id, meta.request_id, self._ratio):
            budget = self._sampled
        else:
            return
        fields: dict[str, Any] = {} if call is None else _call_fields(call)
        fields |= {"model": opening.model_name, "duration_s": round(self._clock() - opening.arrived, _DIGITS)}
        self._write(budget, (opening if call is None else call).log_fields, meta, outcome, fields)

    def refused(self, meta: CallMeta, outcome: Outcome) -> None:
        """Write the line of a request that was refused before its body was read."""
        self._write(self._remarkable, meta.log_fields, meta, outcome, {})

    def _write(
        self,
        budget: LineBudget,
        log_fields: Mapping[str, str],
        meta: CallMeta,
        outcome: Outcome,
        fields: Mapping[str, Any],
    ) -> None:
        left_out = budget.take(self._clock())
        if left_out is None:
            return
        more = {"left_out_before": left_out} if left_out else {}
        self._log.info(
            "call.ended", **log_fields, outcome=outcome.value, tenant=meta.tenant, api=meta.api, **fields, **more
        )


def _call_fields(call: Call) -> dict[str, Any]:
    """Return the fields of a call that was opened: its counts, its times, and the worker of its first sequence."""
    usage = call.usage
    fields: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": usage.cached_tokens,
        "completion_tokens": usage.completion_tokens,
        "queue_s": round(usage.queue_s, _DIGITS),
    }
    if call.first_token_at is not None:
        fields["ttft_s"] = round(usage.ttft_s, _DIGITS)
    if call.adapter:
        fields["adapter"] = call.adapter
    if usage.resumed:
        fields["resumed"] = usage.resumed
    worker = call.sequences[0].worker if call.sequences else None
    if worker is not None:
        fields |= {"version": worker.version, **worker_fields(worker)}
    return fields

"""Metrics of calls that have ended: outcomes, times, tokens, and whether the SLO of the model was met."""

from __future__ import annotations

from collections.abc import Callable

from cluster.api.outcomes import SHORT_OF_CAPACITY, Outcome
from cluster.gateway.calls.call import Call
from cluster.gateway.calls.call_opening import CallOpening
from cluster.gateway.calls.reasoning import new_reasoning_tokens
from cluster.gateway.calls.records.token_times import mean_gap_s, new_tokens
from cluster.gateway.demand import DemandTally, within_slo
from cluster.gateway.models.directory import ModelDirectory
from cluster.observe.metrics import Metrics


class EndMetrics:
    """The metrics of one gateway's ended calls."""

    def __init__(
        self, metrics: Metrics, directory: ModelDirectory, tally: DemandTally, clock: Callable[[], float]
    ) -> None:
        self._metrics = metrics
        self._directory = directory
        self._tally = tally
        self._clock = clock

    def count(self, opening: CallOpening, outcome: Outcome) -> None:
        """Count a call that has ended or could not begin."""
        call, model, meta = opening.call, opening.model_name, opening.meta
        metrics = self._metrics
        metrics.count("requests_total", model, meta.tenant, meta.api, outcome.value)
        if call is not None:
            self._count_slo(call, outcome)
        elif outcome in SHORT_OF_CAPACITY and self._directory.find(model) is not None:
            metrics.count("slo_calls_total", model, "failed")  # refused before it became a call: no worker was ready
        if call is None or call.first_token_at is None:
            if outcome not in (Outcome.OK, Outcome.CANCELLED):
                metrics.count("rejected_total", model, outcome.value)
            return
        usage = call.usage
        usage.count_tokens(call.sequences)
        traced = "" if opening.trace is None and meta.is_unsampled else opening.trace_id
        metrics.histogram("request_duration_seconds", model).observe_traced(self._clock() - opening.arrived, traced)
        metrics.histogram("queue_time_seconds", model).observe(usage.queue_s)
        if call.is_pooling:
            metrics.count("prompt_tokens_total", model, meta.tenant, by=call.charged_prompt_tokens)
            metrics.count("cached_tokens_total", model, meta.tenant, by=usage.cached_tokens)
            return
        metrics.histogram("time_to_first_token_seconds", model).observe_traced(usage.ttft_s, traced)
        if call.pays_prompt:
            metrics.count("prompt_tokens_total", model, meta.tenant, by=usage.prompt_tokens)
        metrics.count("cached_tokens_total", model, meta.tenant, by=usage.cached_tokens)
        metrics.count("generation_tokens_total", model, meta.tenant, by=new_tokens(call))
        if reasoning := new_reasoning_tokens(call):
            metrics.count("reasoning_tokens_total", model, meta.tenant, by=reasoning)

    def _count_slo(self, call: Call, outcome: Outcome) -> None:
        """Count whether a call met the SLO of its model.

        A cancelled or invalid call is counted only if it got no first token and the SLO's time to first token had
        passed.
        """
        known = self._directory.find(call.model)
        if known is None or call.is_resumed:
            return
        entry, served = known.entry, outcome is Outcome.OK
        ttft_s = call.usage.ttft_s if call.first_token_at is not None else None
        late = entry.slo_ttft_s and self._clock() - call.arrived > entry.slo_ttft_s and ttft_s is None
        if not served and not late and outcome not in SHORT_OF_CAPACITY:
            return
        met = served and within_slo(ttft_s, mean_gap_s(call), entry.slo_ttft_s, entry.slo_itl_s)
        self._tally.count_slo(call.model, call.policy.priority_class, call.rank, met)
        if met:
            result = "met"
        elif not served:
            result = "late_first_token" if late and outcome not in SHORT_OF_CAPACITY else "failed"
        else:
            result = "slow_tokens" if within_slo(ttft_s, 0.0, entry.slo_ttft_s, 0.0) else "late_first_token"
        self._metrics.count("slo_calls_total", call.model, result)

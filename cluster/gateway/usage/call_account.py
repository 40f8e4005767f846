"""The account of one submitted sequence: the counts of the gateway and of the engine, and the usage record that is made
from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.api.outcomes import Outcome
from cluster.api.types import WorkerIdentity
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.reasoning import reasoning_in_part
from cluster.ledger.usage.records import MAX_ID, SEGMENTS_PER_RESUME, OpenRecord, UsageRecord
from cluster.policy.routing.route_history import Route
from cluster.wire.ended_requests import EndedUsage


@dataclass(eq=False, slots=True)
class CallAccount:
    """The account of one submitted sequence. `awaited`: number of submissions to workers whose counts have not been
    reported yet."""

    record: OpenRecord
    sealed: bytes
    awaited: int = 0
    reported: set[tuple[str, int]] = field(default_factory=set)
    """Worker incarnation and report key of each report that is already counted."""
    continued: bool = False
    """Whether the last worker continued the sequence. If so, the cached tokens in that worker's report are not those of
    the caller's prompt."""
    cached_tokens: int = 0
    predicted_cached_tokens: int | None = None
    """Number of cached tokens that were predicted for the worker that reports `cached_tokens`; None without a
    prediction."""
    generated_tokens: int = 0
    gpu: str = ""
    gpu_seconds: float = 0.0
    workers: tuple[WorkerIdentity, ...] = ()
    """Workers that got a Submit of the sequence. Only these may report its usage."""
    worker: WorkerIdentity | None = None
    """Worker that got the last Submit, or that has kept a hedged sequence."""
    in_vain: list[str] = field(default_factory=list)
    """Incarnations of the workers that a hedged sequence has left. The next report of each is not counted, since a
    caller pays for one worker only."""
    counts: dict[str, Any] | None = None
    """Fields of the record that the gateway knows when the sequence has ended."""
    admitted: bool = False
    written: bool = False

    def add_worker(self, worker: WorkerIdentity) -> None:
        """Record that a worker gets a Submit of the sequence."""
        if not self.may_report(worker):
            self.workers += (worker,)

    def may_report(self, worker: WorkerIdentity) -> bool:
        """Return whether a worker got a Submit of the sequence, on any of its links."""
        return any(worker is known or _is_same(worker, known) for known in self.workers)

    def assign(self, worker: WorkerIdentity, route: Route | None) -> None:
        """Record the worker that has the sequence now, and the prediction with which the worker was chosen."""
        self.worker = worker
        if not self.continued and route is not None:
            self.predicted_cached_tokens = route.predicted_cached_tokens

    @property
    def complete(self) -> bool:
        """Whether the sequence has ended and the engine's counts of all its submissions are known."""
        return self.counts is not None and self.awaited <= 0

    def apply_report(self, incarnation: str, report: EndedUsage) -> bool:
        """Add the counts that a worker has reported. Returns False if the report is already counted."""
        name = (incarnation, report.key)
        if name in self.reported:
            return False
        self.reported.add(name)
        self.admitted = True
        self.awaited -= 1
        if incarnation in self.in_vain:
            self.in_vain.remove(incarnation)
            return True
        if not self.continued:
            self.cached_tokens = report.cached_tokens
        self.generated_tokens += report.generated_tokens
        self.gpu = fit_text(report.gpu)
        self.gpu_seconds += report.gpu_seconds
        return True

    def end(self, sequence: CallSequence, outcome: Outcome, now: float) -> None:
        """Record the final counts of a sequence that has ended, as far as the gateway knows them."""
        call = sequence.call
        self.admitted = self.admitted or sequence.admitted or len(sequence.emitted) > sequence.restored
        if self.continued:
            self.cached_tokens = sequence.cached_tokens
        self.counts = {
            "outcome": outcome.value,
            "completion_tokens": max(sequence.delivered - sequence.restored, 0),
            "reasoning_tokens": reasoning_in_part(sequence.reasoning_tokens, sequence.restored, sequence.delivered),
            "generated_tokens": len(sequence.emitted) - sequence.restored,
            "ttft_s": _ttft_s(call),
            "duration_s": max(now - call.arrived, 0.0),
        }

    def close(self) -> UsageRecord | None:
        """Close the account and return its record; None if no engine has admitted the sequence."""
        self.written = True
        counts = self.counts
        if counts is None or not self.admitted:
            return None
        counts["generated_tokens"] = max(self.generated_tokens, counts["generated_tokens"])
        return self.record.to_usage_record(
            **counts,
            **self._cached_counts(),
            gpu=self.gpu,
            gpu_seconds=self.gpu_seconds,
            **worker_fields(self.worker),
        )

    def _cached_counts(self) -> dict[str, Any]:
        """Return the record's fields for cached tokens. Empty for a record that counts no prompt."""
        if not counts_prompt(self.record):
            return {}
        cached_tokens = min(self.cached_tokens, self.record.prompt_tokens)
        return {"cached_tokens": cached_tokens, "predicted_cached_tokens": self.predicted_cached_tokens}


def _is_same(one: WorkerIdentity, other: WorkerIdentity) -> bool:
    # The model comes first: the only one of the three that a worker's certificate proves.
    return (one.model, one.worker_id, one.incarnation) == (other.model, other.worker_id, other.incarnation)


def counts_prompt(record: OpenRecord) -> bool:
    """Return whether a usage record counts the prompt of its call. If a call has several outputs, only the first
    output's record counts the prompt. In a pooling call, each input's record counts that input."""
    return record.prompt_tokens > 0 or record.segment % SEGMENTS_PER_RESUME == 0


def worker_fields(worker: WorkerIdentity | None) -> dict[str, Any]:
    """Return the record fields that describe the worker on which a call ended."""
    if worker is None:
        return {}
    return {
        "worker": fit_text(worker.worker_id),
        "pod": fit_text(worker.pod),
        "node": fit_text(worker.host or worker.node),
    }


def fit_text(text: str) -> str:
    """Return a text from a caller or worker, shortened and cleaned so that it fits into a record."""
    if text.isascii() and len(text) <= MAX_ID and "\0" not in text:
        return text
    return text[:MAX_ID].replace("\0", "").encode("utf-8", "replace").decode()


def _ttft_s(call: Call) -> float | None:
    """Return the time to the first token of a call, in seconds; None if the call has no first token."""
    if call.is_pooling or call.first_token_at is None:
        return None
    return max(call.first_token_at - call.arrived, 0.0)

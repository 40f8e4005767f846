"""Accounting, which writes exactly one usage record for each admitted sequence, whichever process dies.

A record is opened with the sequence's Submit and written when the sequence ends. A call of n sequences has n records,
segments 0 to n-1, since the sequences run and end independently, perhaps on different workers. The prompt is counted in
segment 0 alone; each input of a pooling call is counted in its own segment. The parts of a call after a client's resume
have segments from SEGMENTS_PER_RESUME on. The id of a record is fixed before the first Submit and stays the same over
retries.

Counts: the gateway knows how many tokens were delivered. The engine knows how many tokens were generated and what they
cost. A record is written once the counts of both are known. If the engine's counts do not arrive in time, because the
worker's link is down, the record has the gateway's own counts. A worker may offer usage for an account that is not open
at this gateway. Such usage belongs to a call of a lost gateway and is written as an estimate. If the exact record
exists, that record replaces the estimate.

Reasoning tokens are part of the completion tokens. A worker's usage report does not have their number, so an estimate
has 0 reasoning tokens.

Nothing in this module runs per token.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.types import WorkerIdentity
from cluster.gateway.calls.call import Call, CallSequence
from cluster.gateway.calls.reasoning import reasoning_in_part
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.resume_tokens.claim import ResumeTerms
from cluster.gateway.usage.delivery import RecordDelivery
from cluster.ledger.usage.records import MAX_ID, SEGMENTS_PER_RESUME, OpenRecord, RecordError, UsageRecord
from cluster.ledger.usage.sealed_records import Sealer, SealError
from cluster.ledger.usage.spool import SpoolStatistics
from cluster.ledger.usage.usage import IDLE_TENANT
from cluster.wire.ended_requests import EndedUsage

log = structlog.get_logger("ledger")

GRACE_S = 10.0
"""Longest wait, in seconds, of an ended call for the engine's counts. In this time a worker can reconnect a broken
link."""
SWEEP_S = 0.5
SLICE = 64
"""Number of records of one call that are written at once, which takes about 3 ms."""
LAST_COUNTS_S = 1.0


@dataclass(eq=False, slots=True)
class CallAccount:
    """The account of one submitted sequence. `awaited`: number of Submits whose counts have not been reported yet."""

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
    worker: WorkerIdentity | None = None
    """Worker that got the last Submit, or that has kept a hedged sequence."""
    in_vain: list[str] = field(default_factory=list)
    """Incarnations of the workers that a hedged sequence has left. The next report of each is not counted, since a
    caller pays for one worker only."""
    counts: dict[str, Any] | None = None
    """Fields of the record that the gateway knows when the sequence has ended."""
    admitted: bool = False
    written: bool = False

    @property
    def complete(self) -> bool:
        """Whether the sequence has ended and the engine's counts of all Submits are known."""
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
        self.gpu = report.gpu
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
            **_place(self.worker),
        )

    def _cached_counts(self) -> dict[str, Any]:
        """Return the record's fields for cached tokens; an empty mapping for a record that counts no prompt."""
        if not _has_prompt(self.record):
            return {}
        return {"cached_tokens": self.cached_tokens, "predicted_cached_tokens": self.predicted_cached_tokens}


class Accounting:
    """The open accounts of all sequences at one gateway process."""

    def __init__(
        self,
        *,
        incarnation: str,
        sealer: Sealer,
        folder: Path,
        insert: Callable[[Sequence[UsageRecord]], None],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        grace_s: float = GRACE_S,
        gateway: str = "",
    ) -> None:
        """`incarnation`: the prefix of record ids. `gateway`: the name that is written into records. `folder`: the
        folder of the spool. `insert`: see RecordDelivery."""
        self._incarnation = incarnation
        self._sealer = sealer
        self._clock = clock
        self._wall = wall
        self._grace_s = grace_s
        self._gateway = _fit(gateway)
        self._numbers = itertools.count(1)
        self._by_sequence: dict[str, CallAccount] = {}
        self._calls: dict[bytes, CallAccount] = {}
        self._late: deque[tuple[float, CallAccount]] = deque()
        self._finishing: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None
        self._delivery = RecordDelivery(folder, insert)
        self.on_record: Callable[[UsageRecord], None] | None = None
        """Function that is called with each record of a sequence that has ended at this gateway."""

    def __repr__(self) -> str:
        return f"<Accounting open {len(self._calls)} pending {self.statistics().pending}>"

    def statistics(self) -> SpoolStatistics:
        """Return the statistics of the records that wait for the database."""
        return self._delivery.statistics()

    @property
    def open_accounts(self) -> int:
        """Number of submitted sequences whose record has not been written yet."""
        return len(self._calls)

    # ---- start and stop

    def start(self) -> None:
        """Start moving records into the database. Raises ValueError if another process uses the spool's folder."""
        self._delivery.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Stop accounting, after all calls have ended. Waits up to LAST_COUNTS_S for the engines' counts, writes the
        records, and moves as many records as possible into the database."""
        await asyncio.gather(*self._finishing)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_COUNTS_S):
                await self._all_reported()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        while self._late:
            self._give_up(self._late.popleft()[1])
        await self._delivery.stop()

    async def _all_reported(self) -> None:
        for _, account in list(self._late):
            while not account.written:
                self._news.clear()
                await self._news.wait()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self._clock()
            while self._late and self._late[0][0] <= now:
                self._give_up(self._late.popleft()[1])

    # ---- one sequence

    def open(self, sequence: CallSequence, link: WorkerLink) -> bytes:
        """Open the account of a sequence that is about to be submitted on this link. A retry uses the sequence's open
        account. Returns the sealed record for the Submit."""
        account = self._by_sequence.get(sequence.key)
        if account is None:
            record = self._record(sequence, link)
            account = self._by_sequence[sequence.key] = CallAccount(record, self._sealer.seal(record))
            self._calls[account.sealed] = account
        account.awaited += 1
        account.worker = link.identity
        account.continued = bool(sequence.emitted)
        if not account.continued and sequence.route is not None:
            account.predicted_cached_tokens = sequence.route.predicted_cached_tokens
        return account.sealed

    def hedged(self, sequence: CallSequence) -> bytes:
        """Expect the counts of one more Submit, because a sequence is also sent to a second worker. Returns the sealed
        record for this Submit. Raises KeyError for a sequence without an open account."""
        account = self._by_sequence[sequence.key]
        account.awaited += 1
        return account.sealed

    def hedge_ended(self, sequence: CallSequence, computed_by: str) -> None:
        """Record that only one of the two workers of a hedged sequence still has the sequence. `computed_by`:
        incarnation of the worker that no longer has the sequence; "" if this worker refused the sequence."""
        account = self._by_sequence.get(sequence.key)
        if account is not None and sequence.link is not None:
            account.worker = sequence.link.identity
        if account is not None and computed_by:
            account.in_vain.append(computed_by)

    def _record(self, sequence: CallSequence, link: WorkerLink) -> OpenRecord:
        try:
            return self._opened(sequence, link, sequence.call.labels)
        except RecordError as error:
            record = self._opened(sequence, link, {})
            log.warning("usage.labels_dropped", **sequence.call.log_fields, record=record.record_id, reason=str(error))
            return record

    def _opened(self, sequence: CallSequence, link: WorkerLink, labels: Mapping[str, str]) -> OpenRecord:
        call, now = sequence.call, self._clock()
        pays = call.payment.terms is ResumeTerms.PAID or not call.is_resumed
        has_own_prompt = call.is_pooling or not sequence.index
        return OpenRecord(
            record_id=f"{self._incarnation}.{next(self._numbers)}.{sequence.index}",
            tenant=call.tenant,
            key_id=_fit(call.key_id),
            model=call.model,
            version=link.identity.version,
            request_id=_fit(call.request_id),
            opened_at_s=self._wall() - (now - call.arrived),
            adapter=call.adapter,
            segment=sequence.index
            + (0 if call.resume_tokens is None else call.resume_tokens.generation * SEGMENTS_PER_RESUME),
            prompt_tokens=len(sequence.request.prompt_token_ids) if pays and has_own_prompt else 0,
            queue_s=max(now - call.arrived, 0.0),
            labels=labels,
            gateway=self._gateway,
            trace_id=call.trace_id,
        )

    def ended(self, call: Call, outcome: Outcome) -> None:
        """Close the account of each submitted sequence of an ended call. The record is written now, or later if the
        engine's counts are still missing. The records of many sequences are written in slices. Idempotent."""
        now, pays = self._clock(), call.pays_prompt
        ended: list[CallAccount] = []
        for sequence in call.sequences:
            account = self._by_sequence.pop(sequence.key, None)
            if account is None:
                continue
            if call.is_resumed:
                # It is known only now who pays for a prompt that was computed again. The first sequence counts it.
                prompt_tokens = len(sequence.request.prompt_token_ids) if pays else 0
                account.record, pays = replace(account.record, prompt_tokens=prompt_tokens), False
            account.end(sequence, outcome, now)
            ended.append(account)
        self._finish(ended[:SLICE], now)
        if len(ended) > SLICE:
            task = asyncio.create_task(self._finish_in_slices(ended[SLICE:], now))
            self._finishing.add(task)
            task.add_done_callback(self._finishing.discard)

    async def _finish_in_slices(self, ended: Sequence[CallAccount], now: float) -> None:
        for at in range(0, len(ended), SLICE):
            await asyncio.sleep(0)
            self._finish(ended[at : at + SLICE], now)

    def _finish(self, ended: Sequence[CallAccount], now: float) -> None:
        """Close the accounts of sequences that ended at `now`. An account without all of the engine's counts stays open
        until the counts arrive, at most for the grace period."""
        for account in ended:
            if account.written:
                continue
            if account.complete:
                self._close(account)
            else:
                self._late.append((now + self._grace_s, account))

    def refused(self, sequence: CallSequence) -> None:
        """Stop waiting for the counts of a Submit that the worker refused. A refused Submit costs nothing."""
        if (account := self._by_sequence.get(sequence.key)) is not None:
            account.awaited -= 1

    def _give_up(self, account: CallAccount) -> None:
        """Close an account for which the engine's counts have not arrived in time, if the account is still open."""
        if not account.written:
            self._close(account)

    def _close(self, account: CallAccount) -> None:
        self._calls.pop(account.sealed, None)
        self._news.set()
        record = account.close()
        if record is not None:
            self._delivery.write(record)
            if self.on_record is not None:
                self.on_record(record)

    # ---- reports of workers

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        """Apply a worker's usage reports for ended requests. The requests are those of this gateway or of lost
        gateways."""
        refused = []
        for report in ended:
            try:
                self._apply_report(link, report)
            except SealError as error:  # another gateway may have the secret for this report
                log.warning("usage.seal_unknown", worker=link.identity.worker_id, reason=str(error))
            except RecordError as error:
                log.error("usage.report_refused", worker=link.identity.worker_id, reason=str(error))
                refused.append(report.key)
            except Exception:  # concerns one record only: the worker offers the record again, and keeps its link
                log.exception("usage.report_failed", worker=link.identity.worker_id)
        if refused:
            link.box.usage_acks(refused)

    def _apply_report(self, link: WorkerLink, report: EndedUsage) -> None:
        account = self._calls.get(report.sealed) if report.sealed else None
        if account is None:
            self._write_unopened(link, report)
            return
        self._delivery.acknowledge_later(account.record.record_id, link, report.key)
        if account.apply_report(link.identity.incarnation, report) and account.complete:
            self._close(account)

    def _write_unopened(self, link: WorkerLink, report: EndedUsage) -> None:
        """Write the record for a report without an open account at this gateway. The report is of a replica's idle time
        or of a call of a lost gateway."""
        if report.idle_id:
            record = _idle_record(link.identity, report)
        else:
            record = _estimated_record(self._sealer.open(report.sealed), link.identity, report)
        self._delivery.acknowledge_later(record.record_id, link, report.key)
        self._delivery.write(record)


def _idle_record(worker: WorkerIdentity, report: EndedUsage) -> UsageRecord:
    """Return the record of a replica's idle time."""
    return UsageRecord(
        record_id=_fit(report.idle_id),
        tenant=IDLE_TENANT,
        key_id="",
        model=worker.model,
        version=worker.version,
        request_id="",
        opened_at_s=report.idle_since_s,
        outcome=Outcome.OK.value,
        duration_s=report.duration_s,
        gpu=report.gpu,
        gpu_seconds=report.gpu_seconds,
        **_place(worker),
    )


def _estimated_record(opened: OpenRecord, worker: WorkerIdentity, report: EndedUsage) -> UsageRecord:
    """Return the record of a call whose gateway was lost. The tokens that this worker and earlier workers wrote to the
    lost gateway's link count as delivered. The number of reasoning tokens among them is not known."""
    return opened.to_usage_record(
        outcome=report.outcome,
        cached_tokens=report.cached_tokens if _has_prompt(opened) else 0,
        completion_tokens=report.earlier_tokens + report.written_tokens,
        generated_tokens=report.earlier_tokens + report.generated_tokens,
        duration_s=opened.queue_s + report.duration_s,
        gpu=report.gpu,
        gpu_seconds=report.gpu_seconds,
        delivered_unknown=True,
        **_place(worker),
    )


def _has_prompt(record: OpenRecord) -> bool:
    """Return whether a record counts a prompt: the first output of a call does, and each input of a pooling call."""
    return record.prompt_tokens > 0 or record.segment % SEGMENTS_PER_RESUME == 0


def _ttft_s(call: Call) -> float | None:
    """Return the time to the first token of a call; None without one."""
    if call.is_pooling or call.first_token_at is None:
        return None
    return max(call.first_token_at - call.arrived, 0.0)


def _place(worker: WorkerIdentity | None) -> dict[str, Any]:
    """Return the record fields that describe the worker on which a call ended."""
    if worker is None:
        return {}
    return {"worker": _fit(worker.worker_id), "pod": _fit(worker.pod), "node": _fit(worker.host or worker.node)}


def _fit(text: str) -> str:
    """Return a text from a caller or worker, cut and cleaned so that a record accepts the text."""
    if text.isascii() and len(text) <= MAX_ID and "\0" not in text:
        return text
    return text[:MAX_ID].replace("\0", "").encode("utf-8", "replace").decode()

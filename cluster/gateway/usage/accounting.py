"""Accounting: exactly one usage record per admitted sequence, whichever process dies.

A record is opened with the sequence's Submit and written at its end. A call of n sequences has n records, segments 0 to
n-1, since each sequence runs and ends on its own, perhaps on another worker; the prompt is counted in segment 0 alone.
Parts that a client resumed have segments from SEGMENTS_PER_RESUME on. A record's id is fixed before the first Submit
and kept over retries.

Counts: the gateway knows what was delivered, the engine what was generated and what it cost; a record is written once
both are known. If the engine's counts do not come in time (its link is down), the record has the gateway's own. Usage
that a worker offers for an account that is not open here belongs to a call of a lost gateway: it is written as an
estimate, which the exact record replaces if it exists.

Durability: a record is appended to the local spool and moved from there into the database; a worker's copy is
acknowledged only once the database has committed. So a record is lost only with the gateway's disk *and* the worker.

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
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.resume_tokens.claim import ResumeTerms
from cluster.ledger.errors import StoreUnavailable
from cluster.ledger.usage.records import MAX_ID, SEGMENTS_PER_RESUME, OpenRecord, RecordError, UsageRecord
from cluster.ledger.usage.sealed_records import Sealer, SealError
from cluster.ledger.usage.spool import Replayer, Spool, SpoolStatistics
from cluster.ledger.usage.usage import IDLE_TENANT
from cluster.process import ticks
from cluster.wire.ended_requests import EndedUsage

log = structlog.get_logger("ledger")

GRACE_S = 10.0
"""Longest wait of an ended call for the engine's counts: enough for a worker to reconnect a broken link."""
SWEEP_S = 0.5
LAST_COUNTS_S = 1.0
LAST_MOVE_S = 5.0


@dataclass(eq=False, slots=True)
class CallAccount:
    """Account of one submitted sequence. `awaited`: number of Submits whose counts have not been reported."""

    record: OpenRecord
    sealed: bytes
    awaited: int = 0
    reported: set[tuple[str, int]] = field(default_factory=set)
    """Worker incarnations and keys of the reports that are counted already."""
    continued: bool = False
    """Whether the last worker continued the sequence: then its cached tokens are not those of the caller's prompt."""
    cached_tokens: int = 0
    generated_tokens: int = 0
    gpu: str = ""
    gpu_seconds: float = 0.0
    worker: WorkerIdentity | None = None
    """Worker of the last Submit."""
    end: dict[str, Any] | None = None
    """Record fields that the gateway knows at the end of the sequence."""
    admitted: bool = False
    written: bool = False


class Accounting:
    """All accounts of one gateway process."""

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
        """`incarnation` is the prefix of record ids, `gateway` the name written into records, `folder` the spool's.
        `insert` writes to the database and raises StoreUnavailable while it is unavailable. Raises ValueError if
        another process uses the folder."""
        self._incarnation = incarnation
        self._sealer = sealer
        self._insert = insert
        self._clock = clock
        self._wall = wall
        self._grace_s = grace_s
        self._gateway = _fit(gateway)
        self._numbers = itertools.count(1)
        self._by_sequence: dict[str, CallAccount] = {}
        self._calls: dict[bytes, CallAccount] = {}
        self._late: deque[tuple[float, CallAccount]] = deque()
        self._acks: dict[str, list[tuple[WorkerLink, int]]] = {}
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._spool = Spool(folder)
        self._replayer = Replayer(self._spool, self._move)

    def __repr__(self) -> str:
        return f"<Accounting open {len(self._calls)} pending {self._spool.statistics().pending}>"

    def statistics(self) -> SpoolStatistics:
        """Statistics of the records that wait for the database."""
        return self._spool.statistics()

    @property
    def open_accounts(self) -> int:
        """Number of submitted sequences whose record is not written yet."""
        return len(self._calls)

    # ---- start and stop

    def start(self) -> None:
        """Start to move records into the database."""
        self._loop = asyncio.get_running_loop()
        self._sweeper = asyncio.create_task(self._sweep())
        self._replayer.start()

    async def stop(self) -> None:
        """Stop after all calls have ended: wait a moment for their counts, write their records, and move what can be
        moved."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_COUNTS_S):
                await self._all_reported()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)
        while self._late:
            self._give_up(self._late.popleft()[1])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_MOVE_S):
                await asyncio.to_thread(self._last_move)
        await asyncio.sleep(0)  # lets the acknowledgements of that move run
        self._loop = None
        await asyncio.to_thread(self._spool.close)

    async def _all_reported(self) -> None:
        for _, account in list(self._late):
            while not account.written:
                self._news.clear()
                await self._news.wait()

    def _last_move(self) -> None:
        self._replayer.stop()
        with contextlib.suppress(StoreUnavailable, OSError):
            self._spool.wait_durable(self._spool.statistics().written, 1.0)
            self._replayer.replay()

    async def _sweep(self) -> None:
        while True:
            await ticks.sleep_to_tick(SWEEP_S)
            now = self._clock()
            while self._late and self._late[0][0] <= now:
                self._give_up(self._late.popleft()[1])

    # ---- one sequence

    def open(self, sequence: CallSequence, link: WorkerLink) -> bytes:
        """Open the account of a sequence that is about to be submitted on this link, also for a retry. Returns the
        sealed record for the Submit."""
        account = self._by_sequence.get(sequence.key)
        if account is None:
            record = self._record(sequence, link)
            account = self._by_sequence[sequence.key] = CallAccount(record, self._sealer.seal(record))
            self._calls[account.sealed] = account
        account.awaited += 1
        account.worker = link.identity
        account.continued = bool(sequence.emitted)
        return account.sealed

    def _record(self, sequence: CallSequence, link: WorkerLink) -> OpenRecord:
        try:
            return self._opened(sequence, link, sequence.call.labels)
        except RecordError as error:
            record = self._opened(sequence, link, {})
            log.warning("labels_dropped", record=record.record_id, reason=str(error))
            return record

    def _opened(self, sequence: CallSequence, link: WorkerLink, labels: Mapping[str, str]) -> OpenRecord:
        call, now = sequence.call, self._clock()
        return OpenRecord(
            record_id=f"{self._incarnation}.{next(self._numbers)}.{sequence.index}",
            tenant=call.tenant,
            key_id=_fit(call.key_id),
            model=call.model,
            version=link.identity.version,
            request_id=_fit(call.request_id),
            opened_at_s=self._wall() - (now - call.arrived),
            adapter=sequence.request.adapter,
            segment=sequence.index
            + (0 if call.resume_tokens is None else call.resume_tokens.generation * SEGMENTS_PER_RESUME),
            prompt_tokens=_prompt_tokens(sequence) if call.terms is ResumeTerms.PAID or not call.is_resumed else 0,
            queue_s=max(now - call.arrived, 0.0),
            labels=labels,
            gateway=self._gateway,
        )

    def ended(self, call: Call, outcome: Outcome) -> None:
        """Write, once, the record of each submitted sequence of an ended call, or wait for the engine's counts."""
        now = self._clock()
        first_resumed = call.is_resumed
        for sequence in call.sequences:
            account = self._by_sequence.pop(sequence.key, None)
            if account is None or account.end is not None:
                continue
            if first_resumed:  # only now is it known who pays for a prompt that was computed again
                prompt_tokens = len(sequence.request.prompt_token_ids) if call.pays_prompt else 0
                account.record, first_resumed = replace(account.record, prompt_tokens=prompt_tokens), False
            elif call.is_resumed:
                account.record = replace(account.record, prompt_tokens=0)
            account.admitted = account.admitted or sequence.admitted or len(sequence.emitted) > sequence.restored
            if account.continued:
                account.cached_tokens = sequence.cached_tokens
            account.end = {
                "outcome": outcome.value,
                "completion_tokens": max(sequence.delivered - sequence.restored, 0),
                "generated_tokens": len(sequence.emitted) - sequence.restored,
                "ttft_s": None if call.first_token_at is None else max(call.first_token_at - call.arrived, 0.0),
                "duration_s": max(now - call.arrived, 0.0),
            }
            if account.awaited > 0:
                self._late.append((now + self._grace_s, account))
            else:
                self._close(account)

    def refused(self, sequence: CallSequence) -> None:
        """Expect no counts of a Submit that its worker refused: it cost nothing."""
        if (account := self._by_sequence.get(sequence.key)) is not None:
            account.awaited -= 1

    def _give_up(self, account: CallAccount) -> None:
        """Close an account, if it is still open, whose engine counts have not come in time."""
        if not account.written:
            self._close(account)

    def _close(self, account: CallAccount) -> None:
        account.written = True
        self._news.set()
        self._calls.pop(account.sealed, None)
        end = account.end
        if end is None or not account.admitted:
            return
        end["generated_tokens"] = max(account.generated_tokens, end["generated_tokens"])
        record = account.record.to_usage_record(
            **end,
            cached_tokens=0 if account.record.segment % SEGMENTS_PER_RESUME else account.cached_tokens,
            gpu=account.gpu,
            gpu_seconds=account.gpu_seconds,
            **_place(account.worker),
        )
        self._write(record)

    def _write(self, record: UsageRecord) -> None:
        try:
            self._spool.append(record)
        except ValueError:  # the spool is closed; the worker has no acknowledgement and offers the usage elsewhere
            log.warning("usage_after_the_end", record=record.record_id)

    # ---- reports of workers

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        """Apply a worker's usage reports of ended requests: this gateway's, or those of lost gateways."""
        refused = []
        for report in ended:
            try:
                self._apply_report(link, report)
            except SealError as error:  # another gateway may have the secret
                log.warning("usage_not_ours", worker=link.identity.worker_id, reason=str(error))
            except RecordError as error:
                log.error("usage_refused", worker=link.identity.worker_id, reason=str(error))
                refused.append(report.key)
            except Exception:  # concerns one record: the worker offers it again, and keeps its link
                log.exception("usage_not_taken", worker=link.identity.worker_id)
        if refused:
            link.box.usage_acks(refused)

    def _apply_report(self, link: WorkerLink, report: EndedUsage) -> None:
        account = self._calls.get(report.sealed) if report.sealed else None
        if account is None:
            self._write_unopened(link, report)
            return
        self._acks.setdefault(account.record.record_id, []).append((link, report.key))
        name = (link.identity.incarnation, report.key)
        if name in account.reported:
            return
        account.reported.add(name)
        account.admitted = True
        account.awaited -= 1
        if not account.continued:
            account.cached_tokens = report.cached_tokens
        account.generated_tokens += report.generated_tokens
        account.gpu = report.gpu
        account.gpu_seconds += report.gpu_seconds
        if account.end is not None and account.awaited <= 0:
            self._close(account)

    def _write_unopened(self, link: WorkerLink, report: EndedUsage) -> None:
        """Write a report that has no open account here: idle time, or a call of a lost gateway."""
        record = self._idle(link, report) if report.idle_id else self._estimate(link, report)
        self._acks.setdefault(record.record_id, []).append((link, report.key))
        self._write(record)

    def _idle(self, link: WorkerLink, report: EndedUsage) -> UsageRecord:
        return UsageRecord(
            record_id=_fit(report.idle_id),
            tenant=IDLE_TENANT,
            key_id="",
            model=link.identity.model,
            version=link.identity.version,
            request_id="",
            opened_at_s=report.idle_since_s,
            outcome=Outcome.OK.value,
            duration_s=report.duration_s,
            gpu=report.gpu,
            gpu_seconds=report.gpu_seconds,
            **_place(link.identity),
        )

    def _estimate(self, link: WorkerLink, report: EndedUsage) -> UsageRecord:
        """The record of a call whose gateway was lost. Its delivered tokens are those that this worker and earlier ones
        wrote to that gateway's link."""
        opened = self._sealer.open(report.sealed)
        return opened.to_usage_record(
            outcome=report.outcome,
            cached_tokens=0 if opened.segment % SEGMENTS_PER_RESUME else report.cached_tokens,
            completion_tokens=report.earlier_tokens + report.written_tokens,
            generated_tokens=report.earlier_tokens + report.generated_tokens,
            duration_s=opened.queue_s + report.duration_s,
            gpu=report.gpu,
            gpu_seconds=report.gpu_seconds,
            delivered_unknown=True,
            **_place(link.identity),
        )

    # ---- into the database

    def _move(self, records: Sequence[UsageRecord]) -> None:
        """Insert records into the database. Runs in the replayer's thread."""
        try:
            self._insert(records)
        except StoreUnavailable:
            raise
        except Exception:  # the database rejects a record
            if len(records) == 1:  # rejected for good: the spool sets it aside, and its worker need not offer it again
                self._schedule_acks(records)
            raise
        self._schedule_acks(records)

    def _schedule_acks(self, records: Sequence[UsageRecord]) -> None:
        loop = self._loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed
                loop.call_soon_threadsafe(self._acknowledge, [record.record_id for record in records])

    def _acknowledge(self, record_ids: Sequence[str]) -> None:
        """Acknowledge committed records to their workers, which may then forget them."""
        keys: dict[WorkerLink, list[int]] = {}
        for record_id in record_ids:
            for link, key in self._acks.pop(record_id, ()):
                keys.setdefault(link, []).append(key)
        for link, link_keys in keys.items():
            link.box.usage_acks(link_keys)


def _place(worker: WorkerIdentity | None) -> dict[str, Any]:
    """Record fields of the worker on which a call ended."""
    if worker is None:
        return {}
    return {"worker": _fit(worker.worker_id), "pod": _fit(worker.pod), "node": _fit(worker.host or worker.node)}


def _prompt_tokens(sequence: CallSequence) -> int:
    """Prompt tokens to record for a sequence: those of the call for its first sequence, else 0."""
    return 0 if sequence.index else len(sequence.request.prompt_token_ids)


def _fit(text: str) -> str:
    """Cut and clean a text of a caller or worker so that a record accepts it."""
    if text.isascii() and len(text) <= MAX_ID and "\0" not in text:
        return text
    return text[:MAX_ID].replace("\0", "").encode("utf-8", "replace").decode()

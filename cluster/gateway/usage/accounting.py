"""Accounting, which writes exactly one usage record for each admitted sequence, whichever process dies.

A record is opened when the sequence is submitted and written when the sequence ends. A call of n sequences has n
records, numbered as segments 0 to n-1, because the sequences run and end independently, perhaps on different workers.
The prompt is counted in segment 0 alone; each input of a pooling call is counted in its own segment. When a client
resumes a call, the continued sequences have records of their own, with segments from SEGMENTS_PER_RESUME on.

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
import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import structlog

from cluster.api.outcomes import Outcome
from cluster.api.types import WorkerIdentity
from cluster.gateway.calls.call import Call
from cluster.gateway.links.worker_link import WorkerLink
from cluster.gateway.usage.call_account import CallAccount, counts_prompt, fit_text, worker_fields
from cluster.gateway.usage.delivery import Insert, RecordDelivery
from cluster.gateway.usage.open_accounts import OpenAccounts
from cluster.ledger.usage.records import OpenRecord, RecordError, UsageRecord
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
LOG_S = 5.0
"""Minimum seconds between two lines about refused reports. A line has the sums by reason."""
MAX_DIGITS = 20
"""Largest number of digits in the number of an idle report."""


class Accounting:
    """The usage accounting of one gateway process: it closes the accounts of ended sequences and writes their
    records."""

    def __init__(
        self,
        *,
        incarnation: str,
        sealer: Sealer,
        folder: Path,
        insert: Insert,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        grace_s: float = GRACE_S,
        gateway: str = "",
    ) -> None:
        """Create the accounting. `incarnation`: the prefix of record ids. `gateway`: the gateway's name in records.
        `folder`: the folder of the spool (records that wait for the database)."""
        self.accounts = OpenAccounts(incarnation=incarnation, sealer=sealer, gateway=gateway, clock=clock, wall=wall)
        """Accounts of the submitted sequences whose records are not being written yet."""
        self._sealer = sealer
        self._clock = clock
        self._grace_s = grace_s
        self._late: deque[tuple[float, CallAccount]] = deque()
        self._finishing: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._sweeper: asyncio.Task[None] | None = None
        self._delivery = RecordDelivery(folder, insert)
        self.refused: dict[str, int] = {}
        """Number of refused usage reports, by reason."""
        self._log_again_at = float("-inf")
        self.on_record: Callable[[UsageRecord], None] | None = None
        """Function that is called with each record of a sequence that has ended at this gateway."""

    def __repr__(self) -> str:
        return f"<Accounting open {len(self.accounts)} pending {self.statistics().pending}>"

    def statistics(self) -> SpoolStatistics:
        """Return the statistics of the records that wait for the database."""
        return self._delivery.statistics()

    @property
    def conflicts(self) -> int:
        """Number of records that were dropped because a row of another tenant has their id."""
        return self._delivery.conflicts

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

    # ---- ended sequences

    def ended(self, call: Call, outcome: Outcome) -> None:
        """Close the account of each submitted sequence of an ended call. A record whose engine counts are still missing
        is written later. The records of many sequences are written in slices. Idempotent."""
        now, pays = self._clock(), call.pays_prompt
        ended: list[CallAccount] = []
        for sequence in call.sequences:
            account = self.accounts.pop_ended(sequence)
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
        """Close the accounts of sequences that ended at `now`. An account stays open while counts of the engine are
        missing, at most for the grace period."""
        for account in ended:
            if account.written:
                continue
            if account.complete:
                self._close(account)
            else:
                self._late.append((now + self._grace_s, account))

    def _give_up(self, account: CallAccount) -> None:
        """Close an account if it is still open, because the engine's counts have not arrived in time."""
        if not account.written:
            self._close(account)

    def _close(self, account: CallAccount) -> None:
        self.accounts.remove(account)
        self._news.set()
        try:
            record = account.close()
        except RecordError as error:  # the accounts after it are closed all the same
            log.error("usage.record_refused", record=account.record.record_id, reason=str(error))
            return
        if record is not None:
            self._delivery.write(record)
            if self.on_record is not None:
                self.on_record(record)

    # ---- reports of workers

    def usage(self, link: WorkerLink, ended: Sequence[EndedUsage]) -> None:
        """Apply a worker's usage reports for ended requests of this gateway or of lost gateways. Reports that can never
        be applied are counted in `refused` and acknowledged, so that the worker does not repeat them."""
        refused: dict[str, list[int]] = {}
        reason = ""
        for report in ended:
            try:
                self._apply_report(link, report)
            except SealError as error:  # not acknowledged: another gateway may have the secret for this report
                self._count_refused("seal")
                reason = reason or str(error)
            except ReportRefused as error:
                refused.setdefault(error.kind, []).append(report.key)
                reason = reason or str(error)
            except RecordError as error:
                refused.setdefault("record", []).append(report.key)
                reason = reason or str(error)
            except Exception:  # concerns one record only: the worker offers the record again, and keeps its link
                log.exception("usage.report_failed", worker=link.identity.worker_id)
        for kind, keys in refused.items():
            self._count_refused(kind, len(keys))
            link.box.usage_acks(keys)
        if reason and self._clock() >= self._log_again_at:  # a faulty worker may send very many
            self._log_again_at = self._clock() + LOG_S
            log.warning("usage.report_refused", worker=link.identity.worker_id, reason=reason, **self.refused)

    def _count_refused(self, kind: str, count: int = 1) -> None:
        self.refused[kind] = self.refused.get(kind, 0) + count

    def _apply_report(self, link: WorkerLink, report: EndedUsage) -> None:
        account = self.accounts.find(report.sealed) if report.sealed else None
        if account is None:
            self._write_unopened(link, report)
            return
        if not account.may_report(link.identity):
            raise ReportRefused("not_sent", "usage: the request was not sent to this worker")
        self._delivery.acknowledge_later(account.record.record_id, link, report.key)
        if account.apply_report(link.identity.incarnation, report) and account.complete:
            self._close(account)

    def _write_unopened(self, link: WorkerLink, report: EndedUsage) -> None:
        """Write the usage record for a worker's report that belongs to no open account at this gateway. Such a report
        is about a replica's idle time, or about a call of a lost gateway.

        The seal proves that a gateway has sent the call to a worker of the record's model. A certificate proves the
        worker's model.
        """
        if report.sealed:
            opened = self._sealer.open(report.sealed)
            if opened.model != link.identity.model:
                raise ReportRefused("not_sent", f"usage: the request was sent to a worker of {opened.model}")
            record = _estimated_record(opened, link.identity, report)
        else:
            record = _idle_record(link.identity, report)
        self._delivery.acknowledge_later(record.record_id, link, report.key)
        self._delivery.write(record)


class ReportRefused(ValueError):
    """Error: a usage report that its worker may not send. `kind`: the reason in one word, a metric label."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def _idle_record(worker: WorkerIdentity, report: EndedUsage) -> UsageRecord:
    """Return the record of a replica's idle time. Raises ReportRefused for an id that does not begin with the worker's
    own incarnation."""
    before, _, number = report.idle_id.rpartition("-")
    if before != f"idle-{worker.incarnation}" or not MAX_DIGITS >= len(number) > 0 or not number.isdecimal():
        raise ReportRefused("idle_id", f"usage.idle_id: must be idle-{worker.incarnation}- and a number")
    # A worker may send any incarnation, but only the model of its certificate.
    owner = hashlib.sha256("\0".join((worker.model, worker.worker_id, worker.incarnation)).encode()).hexdigest()
    return UsageRecord(
        record_id=f"idle:{owner[:32]}:{int(number)}",
        tenant=IDLE_TENANT,
        key_id="",
        model=worker.model,
        version=worker.version,
        request_id="",
        opened_at_s=report.idle_since_s,
        outcome=Outcome.OK.value,
        duration_s=report.duration_s,
        gpu=fit_text(report.gpu),
        gpu_seconds=report.gpu_seconds,
        **worker_fields(worker),
    )


def _estimated_record(opened: OpenRecord, worker: WorkerIdentity, report: EndedUsage) -> UsageRecord:
    """Return the record of a call whose gateway was lost. Tokens that its workers sent to the lost gateway count as
    delivered. The number of reasoning tokens among them is not known."""
    return opened.to_usage_record(
        outcome=fit_text(report.outcome),
        cached_tokens=min(report.cached_tokens, opened.prompt_tokens) if counts_prompt(opened) else 0,
        completion_tokens=report.earlier_tokens + report.written_tokens,
        generated_tokens=report.earlier_tokens + report.generated_tokens,
        duration_s=opened.queue_s + report.duration_s,
        gpu=fit_text(report.gpu),
        gpu_seconds=report.gpu_seconds,
        delivered_unknown=True,
        **worker_fields(worker),
    )
